"""``FitReport``: its figures against counts of what the steps read, and when it is silent."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_data, make_method, make_trainer
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

from prompt_lab.commands import fit as cli
from prompt_lab.commands.callbacks import FitReport
from prompt_lab.core.batch import IGNORE
from prompt_lab.core.meta_gradient import InnerConfig
from prompt_lab.files.results import read_csv
from prompt_lab.methods.meta_prompt import MetaPrompt
from prompt_lab.methods.method import PromptMethod

LINE = re.compile(
    r"trained (?:(\d+) runs? )?(?:from step (\d+) )?in ([\d.,]+) s(?:, ([\d.,]+) runs/s)?: "
    r"(\d+) steps in ([\d.,]+) s, ([\d.,]+) steps/s, ([\d.,]+) tokens/s; "
    r"evaluation ([\d.,]+) s; peak memory of the process ([\d.,]+) GB"
)


class CountedTokens(Callback):
    """Counts the tokens of all batches by their tensors."""

    def __init__(self) -> None:
        self.tokens: dict[str, int] = {"rows": 0, "support": 0, "query": 0}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = {"rows": [batch]}
        if hasattr(batch, "support"):
            parts = {"support": batch.support, "query": [batch.query]}
        for name, batches in parts.items():
            for part in batches:
                count = part.input_mask.sum() + (part.target_ids != IGNORE).sum()
                self.tokens[name] += int(count)


class Slow(Callback):
    """Makes every evaluation longer by half a second."""

    def on_validation_epoch_end(self, trainer, pl_module):
        time.sleep(0.5)


class Interrupt(Callback):
    """Somebody presses the keys after the second step."""

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.global_step == 2:
            raise KeyboardInterrupt


Fit = Callable[..., tuple[FitReport, CountedTokens]]


@pytest.fixture
def fit(backbone, fewshot_root, tmp_path) -> Fit:
    """Function that fits on a tiny model; gives the report and an own count of tokens."""

    def run(
        method: PromptMethod | None = None,
        tasks: list[str] = ["glue-sst2", "e2e_nlg_cleaned"],  # noqa: B006
        ckpt: Path | None = None,
        callbacks: list[Callback] = [],  # noqa: B006
        trainer: dict[str, Any] | None = None,
        **settings: Any,
    ) -> tuple[FitReport, CountedTokens]:
        method = method or make_method(**settings)
        method.backbone = backbone("t5")
        report, counted = FitReport(), CountedTokens()
        made = make_trainer(
            tmp_path / "run", callbacks=[*callbacks, counted, report], **(trainer or {})
        )
        data = make_data(fewshot_root, tasks, [13])
        made.fit(method, datamodule=data, ckpt_path=None if ckpt is None else str(ckpt))
        made.save_checkpoint(tmp_path / "last.ckpt")
        return report, counted

    return run


def told(capsys: pytest.CaptureFixture[str]) -> list[re.Match[str]]:
    """The lines of reports among what was printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    return [line for line in found if line]


def numbers(line: re.Match[str]) -> list[float]:
    return [float(part.replace(",", "")) if part else 0.0 for part in line.groups()]


def test_tokens_steps_and_runs_are_those_of_the_fit(fit, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="logs")
    report, counted = fit(trainer={"logger": logger}, learning_rate=[0.03, 0.01])
    (line,) = told(capsys)
    runs, first, seconds, runs_rate, steps, training, steps_rate, tokens_rate, *_ = numbers(line)
    assert (runs, first, steps) == (4, 0, 6)
    assert report.tokens == counted.tokens["rows"] > 6 * 4 * 4
    near = {"rel": 0.12}  # two digits or three
    assert tokens_rate * training == pytest.approx(report.tokens, **near)
    assert steps_rate * training == pytest.approx(6, **near)
    assert runs_rate * seconds == pytest.approx(4, **near)
    row = read_csv(tmp_path / "logs" / "version_0" / "metrics.csv")[-1]
    logged = {name: float(value) for name, value in row.items() if name.startswith("fit/")}
    assert logged == pytest.approx(report.figures)
    assert len(logged) == 4
    assert 0.05 < logged["fit/peak_memory_gb"] < 50


def test_time_of_evaluations_is_none_of_training(fit, capsys):
    fit(callbacks=[Slow()], trainer={"num_sanity_val_steps": -1})
    (line,) = told(capsys)
    _, _, seconds, _, _, training, *_, evaluation, _ = numbers(line)
    assert evaluation >= 1.5  # one before the first step, two in the fit
    assert training < seconds - 1.4


def test_a_resumed_fit_tells_of_its_own_steps_and_one_without_steps_of_nothing(
    fit, tmp_path, capsys
):
    fit(trainer={"steps": 3})
    last = tmp_path / "last.ckpt"
    report, counted = fit(ckpt=last)
    first, second = told(capsys)
    assert numbers(first)[4] == 3
    assert second[2] == "3"
    assert second[4] is None
    assert numbers(second)[4] == 3
    assert report.tokens == counted.tokens["rows"]
    assert "fit/runs_per_second" not in report.figures
    report, _ = fit(ckpt=last)
    assert told(capsys) == []
    assert report.figures == {}


def test_runs_that_stop_early_end_the_count(fit, capsys):
    fit(trainer={"steps": 30, "every": 2}, patience=1, learning_rate=1e-9)
    (line,) = told(capsys)
    assert numbers(line)[4] == 4


def test_an_interrupted_fit_tells_nothing(fit, capsys):
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(callbacks=[Interrupt()])
    assert told(capsys) == []


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_episodes_count_the_rows_that_are_read(fit, capsys, algorithm):
    method = MetaPrompt(
        algorithm, num_virtual_tokens=4, inner=InnerConfig(2, learning_rate=0.1), episodes=2
    )
    report, counted = fit(method)
    support, query = counted.tokens["support"], counted.tokens["query"]
    assert support > 0 < query
    assert report.tokens == support + query * (algorithm == "fomaml")
    (line,) = told(capsys)
    assert line[1] is None
    assert line[4] is None


def test_processes_sum_tokens_and_tell_of_the_largest(fit, monkeypatch, capsys):
    """Two processes are stood in for by a reduction over this one and another."""
    report, _ = fit()
    capsys.readouterr()

    class Joined:
        """A strategy whose other process has 100 tokens and 7 GB."""

        def reduce(self, values: torch.Tensor, reduce_op: str) -> torch.Tensor:
            other = values.new_tensor([100, 7_000_000_000])
            return torch.stack([values, other]).sum(0) if reduce_op == "sum" else values.max(other)

    class Pair:
        """What the report asks of a trainer of two processes."""

        strategy, world_size, global_step, callback_metrics = Joined(), 2, 6, {}
        is_global_zero, loggers = True, []

    own = report.tokens
    module = make_method()
    report.on_train_end(Pair(), module)
    report.on_fit_end(Pair(), module)
    assert report.tokens == own + 100
    assert numbers(told(capsys)[0])[-1] == 7


def test_the_command_line_prints_it(model_folder, fewshot_root, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(cli.RUN_DIR_VARIABLE, "")  # taken back after the fit
    words = [
        *("fit", f"--model.backbone.name={model_folder('gpt2')}", "--model.num_virtual_tokens=4"),
        *(f"--data.root={fewshot_root}", "--data.tasks=[glue-sst2]", "--data.samples=[13]"),
        *("--trainer.max_steps=1", "--trainer.val_check_interval=1", "--trainer.logger=false"),
        *("--trainer.accelerator=cpu", f"--run_dir={tmp_path / 'cli'}"),
    ]
    assert cli.run(words) == 0
    assert len(told(capsys)) == 1
