"""``FitReport``: its figures against counts of what the steps read, and when it is silent."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import make_method
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from tiny_fits import fit_in, loaded

from prompt_lab.commands.callbacks import FitReport
from prompt_lab.core.batch import IGNORE
from prompt_lab.core.meta_gradient import InnerConfig
from prompt_lab.files.results import read_csv
from prompt_lab.methods.meta_prompt import MetaPrompt

LINE = re.compile(
    r"trained (?:(\d+) runs? )?(?:from step (\d+) )?in ([\d.,]+) s(?:, ([\d.,]+) runs/s)?: "
    r"(\d+) steps in ([\d.,]+) s, ([\d.,]+) steps/s, ([\d.,]+) tokens/s; "
    r"evaluation ([\d.,]+) s; peak memory of the process ([\d.,]+) GB"
)


class Counted(Callback):
    """Counts the tokens of all batches by their tensors; makes evaluations slow, or interrupts."""

    def __init__(self, slow: float = 0, interrupted_at: int = -1) -> None:
        self.tokens: dict[str, int] = {"rows": 0, "support": 0, "query": 0}
        self.slow, self.interrupted_at = slow, interrupted_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        parts = {"rows": [batch]}
        if hasattr(batch, "support"):
            parts = {"support": batch.support, "query": [batch.query]}
        for name, batches in parts.items():
            for part in batches:
                count = part.input_mask.sum() + (part.target_ids != IGNORE).sum()
                self.tokens[name] += int(count)

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.interrupted_at:
            raise KeyboardInterrupt

    def on_validation_epoch_end(self, trainer, pl_module):
        time.sleep(self.slow)


@pytest.fixture
def fit(backbone, fewshot_root, tmp_path) -> Callable[..., tuple[FitReport, Counted]]:
    """Function that fits on a tiny model; gives the report and an own count of tokens."""

    def run(
        method: Any = None, counted: Counted | None = None, trainer: Any = None, **settings: Any
    ) -> tuple[FitReport, Counted]:
        method = loaded(method or make_method(**settings), backbone("t5"))
        report, counted = FitReport(), counted or Counted()
        given = {"callbacks": [counted, report], **(trainer or {})}
        fit_in(tmp_path / "run", method, fewshot_root, ["glue-sst2", "e2e_nlg_cleaned"], **given)
        method.trainer.save_checkpoint(tmp_path / "last.ckpt")
        return report, counted

    return run


def told(capsys: pytest.CaptureFixture[str]) -> list[list[float | None]]:
    """The numbers of the lines of reports among what was printed."""
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("trained")]
    found = [LINE.fullmatch(line) for line in lines]
    assert all(found), lines
    return [[float(x.replace(",", "")) if x else None for x in m.groups()] for m in found if m]


def test_tokens_steps_and_runs_are_those_of_the_fit(fit, tmp_path, capsys):
    logger = CSVLogger(tmp_path, name="logs")
    report, counted = fit(trainer={"logger": logger}, learning_rate=[0.03, 0.01])
    (line,) = told(capsys)
    runs, first, seconds, runs_rate, steps, training, steps_rate, tokens_rate, *_ = line
    assert (runs, first, steps) == (4, None, 6)
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
    fit(counted=Counted(slow=0.2), trainer={"num_sanity_val_steps": -1})
    ((_, _, seconds, _, _, training, *_, evaluation, _),) = told(capsys)
    assert evaluation >= 0.6  # one before the first step, two in the fit
    assert training < seconds - 0.55


def test_a_resumed_fit_tells_of_its_own_steps_and_one_without_steps_of_nothing(
    fit, tmp_path, capsys
):
    fit(trainer={"steps": 3})
    last = {"ckpt": tmp_path / "last.ckpt"}
    report, counted = fit(trainer=last)
    first, second = told(capsys)
    assert (first[4], second[1], second[3], second[4]) == (3, 3, None, 3)
    assert report.tokens == counted.tokens["rows"]
    assert "fit/runs_per_second" not in report.figures
    report, _ = fit(trainer=last)
    assert told(capsys) == []
    assert report.figures == {}


def test_runs_that_stop_early_end_the_count_and_interrupted_fits_tell_nothing(fit, capsys):
    fit(trainer={"steps": 30, "every": 2}, patience=1, learning_rate=1e-9)
    assert [line[4] for line in told(capsys)] == [4]
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        fit(counted=Counted(interrupted_at=2))
    assert told(capsys) == []


@pytest.mark.parametrize("algorithm", ["fomaml", "reptile"])
def test_episodes_count_the_rows_that_are_read(fit, capsys, algorithm):
    inner = InnerConfig(2, learning_rate=0.1)
    method = MetaPrompt(algorithm, num_virtual_tokens=4, inner=inner, episodes=2)
    report, counted = fit(method)
    support, query = counted.tokens["support"], counted.tokens["query"]
    assert support > 0 < query
    assert report.tokens == support + query * (algorithm == "fomaml")
    ((runs, _, _, rate, *_),) = told(capsys)
    assert (runs, rate) == (None, None)


def test_processes_sum_tokens_and_tell_of_the_largest(fit, capsys):
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

    own, module = report.tokens, make_method()
    report.on_train_end(Pair(), module)
    report.on_fit_end(Pair(), module)
    assert report.tokens == own + 100
    assert told(capsys)[0][-1] == 7
