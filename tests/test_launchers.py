"""Processes that torchrun or SLURM starts, one that is lost, strategies that are refused.

There is one machine here. Two agents of torchrun, told that they are two nodes, stand in for nodes,
and the variables that ``srun`` sets stand in for SLURM. The reference is one process.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_backbone, make_data, make_method, make_trainer
from lightning.pytorch.strategies import ModelParallelStrategy
from safetensors.torch import load_file

from prompt_lab.commands import fit as cli
from prompt_lab.files.results import read_csv

OWN = [sys.executable, "-m", "prompt_lab"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def words(model_folder: Callable[[str], Path], fewshot_root: Path) -> list[str]:
    """A fit of three runs, of which one process has two, and their test."""
    return [
        *("fit", f"--model.backbone.name={model_folder('gpt2')}", "--model.num_virtual_tokens=5"),
        *("--model.init_seed=[0, 1, 2]", "--model.learning_rate=0.1", "--test_after_fit"),
        *("--data.tasks=[glue-cola]", f"--data.root={fewshot_root}", "--data.samples=[13]"),
        *("--trainer.max_steps=4", "--trainer.val_check_interval=2", "--trainer.logger=false"),
        *("--trainer.accelerator=cpu", "--trainer.strategy=ddp"),
    ]


@pytest.fixture(scope="module")
def alone(words: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the same on one process."""
    folder = tmp_path_factory.mktemp("alone")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cli.RUN_DIR_VARIABLE, "")
        assert cli.run([*words, "--trainer.devices=1", f"--run_dir={folder}"]) == 0
    return folder


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """A process with one thread and these variables."""
    common = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        env={**os.environ, **common, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        text=True,
    )


def ended(process: subprocess.Popen[str], limit: float = 150) -> str:
    """What a process said, once it has ended; one that hangs is killed with all that it started."""
    try:
        return process.communicate(timeout=limit)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return process.communicate()[0]


def free_port() -> str:
    """A port that nothing uses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def by_torchrun(words: list[str], rank: int, port: str) -> subprocess.Popen[str]:
    """One of two agents, each with one process."""
    nodes = ["--nnodes=2", "--nproc_per_node=1", f"--node_rank={rank}"]
    place = ["--master_addr=127.0.0.1", f"--master_port={port}"]
    return start([*TORCHRUN, *nodes, *place, "-m", "prompt_lab", *words])


def by_slurm(words: list[str], rank: int, port: str) -> subprocess.Popen[str]:
    """One of two tasks, each on a node of its own."""
    given = {"JOB_ID": "77", "JOB_NAME": "fit", "NTASKS": "2", "NTASKS_PER_NODE": "1"}
    given |= {"NNODES": "2", "NODELIST": "127.0.0.1", "JOB_NODELIST": "127.0.0.1"}
    given |= {"PROCID": str(rank), "NODEID": str(rank), "LOCALID": "0"}
    return start(
        [*OWN, *words],
        MASTER_PORT=port,
        **{f"SLURM_{name}": value for name, value in given.items()},
    )


@pytest.mark.parametrize("launch", [by_torchrun, by_slurm])
def test_two_nodes_give_what_one_process_gives(launch, words, alone, tmp_path):
    """Prompts, scores and answers; the first process alone speaks and writes."""
    given = [*words, "--trainer.devices=1", "--trainer.num_nodes=2", f"--run_dir={tmp_path}"]
    port = free_port()
    nodes = [launch(given, rank, port) for rank in (0, 1)]
    said = [ended(node) for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(said)
    assert "3 runs of 5 virtual tokens on 2 x cpu" in said[0]
    assert "test scores" in said[0]
    assert "test scores" not in said[1]
    names = sorted(path.name for path in (alone / "prompts").glob("*.safetensors"))
    assert len(names) == 3
    for name in names:
        one, two = (load_file(folder / "prompts" / name) for folder in (alone, tmp_path))
        torch.testing.assert_close(two, one, rtol=0, atol=1e-5)
    assert (tmp_path / "predictions.jsonl").read_bytes() == (
        alone / "predictions.jsonl"
    ).read_bytes()


def test_a_lost_node_ends_the_job_and_the_rest_of_it_can_be_resumed(words, alone, tmp_path):
    """The second process is killed after an evaluation; the first one ends by itself, soon."""
    longer = [*words, "--trainer.max_steps=60", f"--run_dir={tmp_path}"]
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    two = [
        start(
            [*OWN, *longer, "--trainer.devices=2"],
            **{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in (0, 1)
    ]
    curves = tmp_path / "curves.csv"
    waited = time.monotonic()
    while not curves.is_file() or len(read_csv(curves)) < 9:
        assert time.monotonic() - waited < 100
        assert two[0].poll() is None, ended(two[0])
        time.sleep(0.05)
    two[1].kill()
    said = ended(two[0], 60)
    assert two[0].returncode == 1, said
    assert "another process of this job is gone or cannot be reached" in said
    assert "Traceback" not in said
    ended(two[1])
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] < 60
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cli.RUN_DIR_VARIABLE, "")
        assert cli.run([*longer, "--trainer.devices=1", "--resume"]) == 0
    rows = read_csv(curves)
    assert [int(row["step"]) for row in rows] == [s for s in range(2, 62, 2) for _ in "abc"]
    first = [row for row in read_csv(alone / "curves.csv") if row["step"] == "2"]
    for row, other in zip(rows[:3], first, strict=True):
        assert (row["run"], row["dev"]) == (other["run"], other["dev"])
    assert len(list((tmp_path / "prompts").glob("*.safetensors"))) == 3


def test_processes_of_torchrun_without_an_id_need_a_folder(words, monkeypatch, capsys):
    for name in ("LOCAL_RANK", cli.RUN_DIR_VARIABLE):
        monkeypatch.delenv(name, raising=False)  # of tests before
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    assert cli.run(words) == 1
    assert "torchrun gives this job no id" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["fsdp", "deepspeed_stage_2"])
def test_strategies_that_split_the_backbone_are_refused_by_name(name, words, capsys, tmp_path):
    given = [*words, f"--trainer.strategy={name}", f"--run_dir={tmp_path}"]
    assert cli.run(given) == 1
    said = capsys.readouterr().err
    assert f"trainer.strategy {name} splits the backbone over devices" in said
    assert "use ddp" in said


def test_strategies_that_split_the_backbone_are_refused_as_objects(fewshot_root, tmp_path):
    """FSDP2 and tensor parallelism are Lightning's ``ModelParallelStrategy``."""
    trainer = make_trainer(tmp_path, strategy=ModelParallelStrategy(), devices=1)
    data = make_data(fewshot_root, ["glue-cola"], [13])
    try:
        with pytest.raises(ValueError, match="ModelParallelStrategy splits the backbone"):
            trainer.fit(make_method(make_backbone("gpt2")), datamodule=data)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
