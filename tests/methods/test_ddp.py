"""Equalities 6 and 7 on several gloo processes: they equal one, and may be resumed.

First two processes through the real command line: six runs of GPT-2, half of which diverge. Then
the fits of ``tiny_fits.py``, those of every method, in ``PROMPT_LAB_TEST_PROCESSES`` processes (2
where it is not set). Neither runs nor rows nor episodes divide evenly; dev and test have eleven
rows. The reference is one process.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from conftest import make_backbone, make_data, make_method, make_trainer
from lightning.pytorch import Trainer
from safetensors.torch import load_file
from tiny_fits import BREAK, FITS, checkpoint, fit, make_files, run_all

from prompt_lab.commands import fit as cli
from prompt_lab.files.prompts import load_prompt
from prompt_lab.files.results import read_csv

EVAL_ROWS = 11
PROCESSES = int(os.environ.get("PROMPT_LAB_TEST_PROCESSES", "2"))
LOSSES = ("train_loss", "reconstruction", "second_order", "inner_moved", "moved")
"""Columns of the curves that are sums of what processes computed, and so differ by rounding."""


class Pair(NamedTuple):
    """Run folders of the same fit and test on one and on two processes, and what the two said."""

    one: Path
    two: Path
    said: str


@pytest.fixture(scope="module")
def odd_root(fewshot_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The few-shot files with eleven rows of dev and test."""
    root = tmp_path_factory.mktemp("odd") / "root"
    shutil.copytree(fewshot_root, root)
    for path in [*root.glob("*/*_dev.tsv"), *root.glob("*/*_test.tsv")]:
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:EVAL_ROWS]))
    return root


@pytest.fixture(scope="module")
def pair(
    model_folder: Callable[[str], Path],
    odd_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    """Fit and test six runs on one process, here, and on two processes of their own."""
    folder = tmp_path_factory.mktemp("ddp")
    words = [
        *("fit", f"--model.backbone.name={model_folder('gpt2')}", "--model.num_virtual_tokens=5"),
        *("--model.learning_rate=[0.1, 3.0e+38]", "--model.init_seed=2", "--model.batch_size=3"),
        *("--data.tasks=[glue-cola, emotion, e2e_nlg_cleaned]", "--data.samples=[13]"),
        *(f"--data.root={odd_root}", "--test_after_fit"),
        *("--trainer.max_steps=6", "--trainer.val_check_interval=2", "--model.test_baselines=true"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cli.RUN_DIR_VARIABLE, "")  # taken back after the fit
        assert cli.run([*words, f"--run_dir={folder / 'one'}"]) == 0
    two = ["--trainer.devices=2", "--trainer.strategy=ddp", f"--run_dir={folder / 'two'}"]
    done = subprocess.run(  # a job that hangs ignores the plain signal
        ["timeout", "-k", "5", "150", sys.executable, "-m", "prompt_lab", *words, *two],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Pair(folder / "one", folder / "two", done.stdout + done.stderr)


def without_seconds(path: Path) -> list[dict[str, str]]:
    """The lines of results, times aside."""
    return [{**row, "seconds": ""} for row in read_csv(path)]


def compare_curves(one: Path, many: Path, rounding: float) -> None:
    """Compare the curves of two fits; losses may differ by so much, relatively."""
    rows, again = (read_csv(folder / "curves.csv") for folder in (one, many))
    assert len(rows) == len(again) > 0
    for row, other in zip(rows, again, strict=True):
        for column, value in row.items():
            if column in LOSSES and value:
                assert float(other[column]) == pytest.approx(float(value), rel=rounding), column
            else:
                assert other[column] == value, column


def test_two_processes_train_the_prompts_of_one(pair):
    names = sorted(path.name for path in (pair.one / "prompts").glob("*.safetensors"))
    assert names == sorted(path.name for path in (pair.two / "prompts").glob("*.safetensors"))
    for name in names:
        one, two = (load_prompt(folder / "prompts" / name) for folder in (pair.one, pair.two))
        torch.testing.assert_close(two.prompt, one.prompt, rtol=0, atol=1e-5)
        assert two.prompt.equal(two.init) == one.status.startswith("failed")
        assert (two.status, two.steps, two.dev_score) == (one.status, one.steps, one.dev_score)
    last, again = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["prompt"]
        for folder in (pair.one, pair.two)
    )
    torch.testing.assert_close(again, last, rtol=0, atol=1e-5)


def test_two_processes_answer_every_row_once_score_as_one_and_speak_once(pair):
    """Reference: the tables and files of one process, but for seconds."""
    rows = without_seconds(pair.one / "results.csv")
    assert rows == without_seconds(pair.two / "results.csv")
    assert {row["variant"] for row in rows} >= {"tuned", "no_prompt", "initial_prompt"}
    compare_curves(pair.one, pair.two, 1e-4)
    told = (pair.two / "predictions.jsonl").read_bytes()
    assert told == (pair.one / "predictions.jsonl").read_bytes()
    seen = [(x["variant"], x["run"], x["row"]) for x in map(json.loads, told.splitlines())]
    tuned = {path.stem for path in (pair.two / "prompts").glob("*.safetensors")}
    wanted = [("tuned", run, n) for run in tuned for n in range(EVAL_ROWS)]
    for variant in ("no_prompt", "initial_prompt"):  # once for all rates
        runs = {run for run in tuned if "3e+38" not in run}
        wanted += [(variant, run, n) for run in runs for n in range(EVAL_ROWS)]
    assert sorted(seen) == sorted(wanted)
    assert pair.said.count("test scores\n") == 1
    assert pair.said.count("on 2 x cpu, 6 steps") == 1
    assert "Traceback" not in pair.said
    names = {path.name for path in pair.two.iterdir()}
    assert names == {path.name for path in pair.one.iterdir()}


def test_the_trained_prompts_are_all_that_ddp_handles(fewshot_root, tmp_path):
    """Reference: the names of all parameters and buffers, those of the backbone included."""
    method = make_method(make_backbone("bart"))
    data = make_data(fewshot_root, ["glue-sst2"], [13])
    Trainer.fit(make_trainer(tmp_path, 1, 1), method, datamodule=data)
    names = {name for name, _ in [*method.named_parameters(), *method.named_buffers()]}
    assert names - set(method._ddp_params_and_buffers_to_ignore) == {"prompt"}
    model = method.backbone.model
    frozen = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert {f"backbone.model.{name}" for name in frozen} < names


# ---- every method --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fits(odd_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of all fits: below ``one`` those of one process, below ``many`` those of several."""
    folder = tmp_path_factory.mktemp("fits")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"WORLD_SIZE": str(PROCESSES), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "MKL_CBWR": "AUTO"}
    common["PYTHONPATH"] = os.pathsep.join(sys.path)
    words = [sys.executable, str(Path(__file__).with_name("tiny_fits.py"))]
    words += [str(odd_root), str(folder / "many"), str(PROCESSES)]
    make_files(folder / "files")
    processes = [
        subprocess.Popen(
            ["timeout", "-k", "5", "240", *words],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(PROCESSES)
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run_all(str(odd_root), str(folder / "one"))
    torch.set_num_threads(threads)
    said = [process.communicate()[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(s[-2000:] for s in said)
    return folder


def tensors(run_dir: Path) -> dict[str, torch.Tensor]:
    """All tensors that a fit left behind, by file and name."""
    paths = sorted(run_dir.rglob("*.safetensors"))
    assert paths
    return {
        f"{path.relative_to(run_dir)} {name}": tensor
        for path in paths
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("name", [*FITS, "vectors"])
def test_several_processes_equal_one(fits, name):
    one, many = (fits / folder / name / "whole" for folder in ("one", "many"))
    assert {path.name for path in many.iterdir()} == {path.name for path in one.iterdir()}
    assert without_seconds(many / "results.csv") == without_seconds(one / "results.csv")
    assert (many / "predictions.jsonl").read_bytes() == (one / "predictions.jsonl").read_bytes()
    if name == "vectors":
        return
    torch.testing.assert_close(tensors(many), tensors(one), rtol=0, atol=1e-5)
    compare_curves(one, many, 1e-3)


@pytest.mark.parametrize("name", FITS)
def test_a_fit_that_several_processes_resume_equals_the_one_without_a_break(fits, name):
    """To the byte but for seconds; with three processes or more, losses to rounding.

    DDP orders its buckets anew after the first step of a process, and with them the order in which
    three gradients of one number are summed.
    """
    whole, cut = (fits / "many" / name / folder for folder in ("whole", "cut"))
    first, second = tensors(whole), tensors(cut)
    assert first.keys() == second.keys()
    for place, tensor in first.items():
        assert tensor.numpy().tobytes() == second[place].numpy().tobytes(), place
    if PROCESSES > 2:
        compare_curves(whole, cut, 1e-6)
    else:
        assert (cut / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    assert (cut / "predictions.jsonl").read_bytes() == (whole / "predictions.jsonl").read_bytes()
    assert without_seconds(cut / "results.csv") == without_seconds(whole / "results.csv")


@pytest.mark.parametrize("name", ["whole runs", "codes"])
def test_a_checkpoint_of_several_processes_is_resumed_by_one(fits, odd_root, tmp_path, name):
    """It holds all runs in the order of the grid, as the checkpoint of one process does."""
    last, own = (
        torch.load(checkpoint(fits / folder / name / "whole"), weights_only=True)
        for folder in ("many", "one")
    )
    assert last["runs"] == own["runs"]
    assert last["state_dict"].keys() == own["state_dict"].keys()
    fit(name, fits / "files", tmp_path, str(odd_root), ckpt=fits / "many" / name / BREAK)
    expected = tensors(fits / "one" / name / "whole" / "prompts")
    torch.testing.assert_close(tensors(tmp_path / "prompts"), expected, rtol=0, atol=1e-5)
