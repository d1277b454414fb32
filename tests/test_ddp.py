"""Equality 7: two gloo processes through the real command line equal one.

Rows do not divide evenly: nine a step for three runs of GPT-2 (once three that diverge have
stopped), one a step for one run of T5, where the second process has none at all; eleven rows of dev
and of test. The reference is one process.

``MetaPrompt`` shares episodes among processes instead of rows; its fits, four, three and one
episodes a step, follow each other in one pair of processes.
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
from typing import Any, NamedTuple

import pytest
import torch
from conftest import make_backbone
from lightning.pytorch import Trainer
from test_intrinsic_subspace import make_store
from test_prompt_tuning import make_trainer

from prompt_lab import cli
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.meta_gradient import InnerConfig
from prompt_lab.methods.meta_prompt import AdaptationConfig, MetaPrompt
from prompt_lab.methods.prompt_tuning import PromptTuning
from prompt_lab.prompt_file import load_prompt
from prompt_lab.results import read_csv
from prompt_lab.subspace import load_subspace

JOBS = {
    "three runs that live": (
        "gpt2",
        ["--data.tasks=[glue-cola, emotion, e2e_nlg_cleaned]", "--model.batch_size=3"],
    ),
    "one row a step": ("t5", ["--data.tasks=[glue-sst2]", "--model.batch_size=1"]),
}
RATES = {"gpt2": "[0.1, 3.0e+38]", "t5": "0.003"}
EVAL_ROWS = 11
EPISODES = (4, 3, 1)


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


@pytest.fixture(scope="module", params=JOBS)
def pair(
    request: pytest.FixtureRequest,
    model_folder: Callable[[str], Path],
    odd_root: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    """Fit and test a job on one process, here, and on two processes of their own."""
    kind, more = JOBS[request.param]
    folder = tmp_path_factory.mktemp("ddp")
    words = [
        *("fit", f"--model.backbone.name={model_folder(kind)}", "--model.num_virtual_tokens=5"),
        *(f"--model.learning_rate={RATES[kind]}", "--model.init_seed=2", *more),
        *(f"--data.root={odd_root}", "--data.samples=[13]", "--test_after_fit"),
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


def test_two_processes_train_the_prompts_of_one(pair):
    names = sorted(path.name for path in (pair.one / "prompts").glob("*.safetensors"))
    assert names == sorted(path.name for path in (pair.two / "prompts").glob("*.safetensors"))
    for name in names:
        one, two = (load_prompt(folder / "prompts" / name) for folder in (pair.one, pair.two))
        torch.testing.assert_close(two.prompt, one.prompt, rtol=0, atol=1e-5)
        assert two.status == one.status
        assert two.prompt.equal(two.init) == one.status.startswith("failed")
        assert (two.steps, two.dev_score) == (one.steps, one.dev_score)
    last, again = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["prompt"]
        for folder in (pair.one, pair.two)
    )
    torch.testing.assert_close(again, last, rtol=0, atol=1e-5)


def test_two_processes_give_the_scores_of_one(pair):
    """Reference: results.csv but for seconds, and every evaluation in curves.csv."""
    one, two = (
        [{**row, "seconds": ""} for row in read_csv(folder / "results.csv")]
        for folder in (pair.one, pair.two)
    )
    assert one == two
    assert {row["variant"] for row in one} >= {"tuned", "no_prompt", "initial_prompt"}
    curves, again = (read_csv(folder / "curves.csv") for folder in (pair.one, pair.two))
    assert len(curves) == len(again) > 0
    for row, other in zip(curves, again, strict=True):
        for name in ("step", "run", "dev", "best_dev", "best_step", "status"):
            assert row[name] == other[name]
        assert float(row["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-4)


def test_two_processes_answer_every_row_once(pair):
    rows = [json.loads(line) for line in (pair.two / "predictions.jsonl").open()]
    seen = [(row["variant"], row["run"], row["row"]) for row in rows]
    tuned = {path.stem for path in (pair.two / "prompts").glob("*.safetensors")}
    wanted = [("tuned", run, n) for run in tuned for n in range(EVAL_ROWS)]
    for variant in ("no_prompt", "initial_prompt"):  # once for all rates
        runs = {run for run in tuned if "3e+38" not in run}
        wanted += [(variant, run, n) for run in runs for n in range(EVAL_ROWS)]
    assert sorted(seen) == sorted(wanted)
    assert (pair.two / "predictions.jsonl").read_bytes() == (
        pair.one / "predictions.jsonl"
    ).read_bytes()


def test_two_processes_print_and_write_once(pair):
    assert pair.said.count("test scores\n") == 1
    assert pair.said.count("on 2 x cpu, 6 steps") == 1
    assert "Traceback" not in pair.said
    names = {path.name for path in pair.two.iterdir()}
    assert names == {path.name for path in pair.one.iterdir()}
    assert not any(name.startswith("previous") for name in names)


def test_the_trained_prompts_are_all_that_ddp_handles(fewshot_root, tmp_path):
    """Reference: the names of all parameters and buffers, those of the backbone included."""
    method = PromptTuning(num_virtual_tokens=3)
    method.backbone = make_backbone("bart")
    data = CrossFitDataModule(["glue-sst2"], root=str(fewshot_root), samples=[13])
    settings = {"max_epochs": -1, "max_steps": 1, "val_check_interval": 1}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = Trainer(
        accelerator="cpu", default_root_dir=tmp_path, inference_mode=False, **settings, **quiet
    )
    trainer.fit(method, datamodule=data)
    names = {name for name, _ in [*method.named_parameters(), *method.named_buffers()]}
    assert names - set(method._ddp_params_and_buffers_to_ignore) == {"prompt"}
    model = method.backbone.model
    frozen = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert {f"backbone.model.{name}" for name in frozen} < names


def test_two_processes_find_the_subspace_of_one(model_folder, odd_root, tmp_path):
    """Five rows a step, mixed from two tasks; maps, losses and every score are compared."""
    tasks = ["glue-cola", "e2e_nlg_cleaned", "emotion"]
    store = make_store(tmp_path / "store", make_backbone("gpt2"), tasks)
    words = [
        *("fit", "--model=IntrinsicSubspace", f"--model.prompts={store}"),
        *(f"--model.backbone.name={model_folder('gpt2')}", "--model.num_virtual_tokens=5"),
        *("--model.intrinsic_dim=[2, 3]", "--model.inner_size=16", "--model.batch_size=5"),
        *("--model.unseen_tasks=[emotion]", f"--data.tasks={tasks}"),
        *(f"--data.root={odd_root}", "--data.samples=[13]", "--test_after_fit"),
        *("--trainer.max_steps=6", "--trainer.val_check_interval=2"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false"),
    ]
    two = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    for name, more in (("one", []), ("two", two)):
        command = [sys.executable, "-m", "prompt_lab", *words, *more]
        done = subprocess.run(
            ["timeout", "-k", "5", "150", *command, f"--run_dir={tmp_path / name}"],
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for dim in (2, 3):
        one, other = (
            load_subspace(tmp_path / name / f"subspace_{dim}.safetensors")
            for name in ("one", "two")
        )
        for own, second in zip(one.parameters(), other.parameters(), strict=True):
            torch.testing.assert_close(second, own, rtol=0, atol=1e-5)
    for name, columns in (
        ("results.csv", ("task", "variant", "intrinsic_dim", "dev", "test")),
        ("curves.csv", ("step", "run", "dev", "best_step")),
    ):
        rows, again = (read_csv(tmp_path / part / name) for part in ("one", "two"))
        assert [[row[c] for c in columns] for row in again] == [
            [row[c] for c in columns] for row in rows
        ]
    rows, again = (read_csv(tmp_path / part / "curves.csv") for part in ("one", "two"))
    for row, other in zip(rows, again, strict=True):
        for column in ("train_loss", "reconstruction"):
            assert float(other[column]) == pytest.approx(float(row[column]), rel=1e-4)


def learn_prompts(root: str, folder: str, rank: int, **trainer: Any) -> None:
    """Fits of ``MetaPrompt`` with 4, 3 and 1 episodes a step; each process keeps its prompts."""
    for episodes in EPISODES:
        method = MetaPrompt(
            num_virtual_tokens=5,
            episodes=episodes,
            support_size=2,
            query_size=3,
            inner=InnerConfig(2, learning_rate=0.1, learned="shared"),
            adaptation=AdaptationConfig(2, 0.1, 3),
            validation_tasks=["emotion"],
            learning_rate=0.1,
        )
        method.backbone = make_backbone("gpt2")
        tasks = ["glue-cola", "e2e_nlg_cleaned", "glue-sst2", "emotion"]
        data = CrossFitDataModule(tasks, root=root, samples=[13, 42])
        run_dir = Path(folder) / str(episodes)
        made = make_trainer(run_dir, steps=3, every=1, **trainer)
        made.fit(method, datamodule=data)
        torch.save(method.state_dict(), run_dir / f"rank{rank}.pt")
        made.test(method, datamodule=data, verbose=False)


def test_two_processes_learn_the_prompt_of_one(odd_root, tmp_path):
    """Also where episodes do not divide evenly, and where the second process has none."""
    learn_prompts(str(odd_root), str(tmp_path / "one"), 0)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "import sys; from test_ddp import learn_prompts as f; f(*sys.argv[1:3], "
    code += "int(sys.argv[3]), devices=2, strategy='ddp')"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    common |= {
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(__file__).parent),
    }
    words = ["timeout", "-k", "5", "150", sys.executable, "-c", code]
    both = [
        subprocess.Popen(
            [*words, str(odd_root), str(tmp_path / "two"), str(rank)],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    said = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert "model.episodes is 1 on 2 processes: some have nothing to do" in said[0]
    assert (said[0] + said[1]).count("nothing to do") == 1
    for episodes in EPISODES:
        one, two = (tmp_path / name / str(episodes) for name in ("one", "two"))
        first = torch.load(one / "rank0.pt", weights_only=True)
        ranks = [torch.load(two / f"rank{rank}.pt", weights_only=True) for rank in (0, 1)]
        for name in ("prompt", "log_rate", "best"):
            assert ranks[0][name].equal(ranks[1][name]), name
            torch.testing.assert_close(ranks[0][name], first[name], rtol=0, atol=1e-5)
        assert (first["prompt"] - first["init"]).norm() > 0.1
        for file, columns in (
            ("curves.csv", ("step", "run", "dev", "best_dev", "best_step", "skipped")),
            ("results.csv", ("task", "variant", "dev", "test", "best_step", "status")),
        ):
            rows, again = (read_csv(folder / file) for folder in (one, two))
            assert [[row[c] for c in columns] for row in again] == [
                [row[c] for c in columns] for row in rows
            ]
        rows, again = (read_csv(folder / "curves.csv") for folder in (one, two))
        assert len(rows) == 6
        for row, other in zip(rows, again, strict=True):
            for column in ("train_loss", "second_order", "inner_moved", "moved"):
                assert float(other[column]) == pytest.approx(float(row[column]), rel=1e-3)
