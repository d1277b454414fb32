"""What a fit leaves behind: ``results.csv``, ``curves.csv``, predictions and a printed table.

Every ``test`` writes one line per run and variant to ``results.csv``; reports read only such files,
and only they choose a learning rate by dev. ``curves.csv`` has one line per run and evaluation.
Files are written whole or not at all. Nothing here computes a metric.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import statistics
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from prompt_lab.files.tensors import cell, naming, write_atomically, write_csv

if TYPE_CHECKING:
    import pandas as pd

PlainStart = Literal["vocab", "text", "labels", "normal", "uniform"]
PLAIN_STARTS: tuple[str, ...] = get_args(PlainStart)
"""Starts that know no other task, by their ``init.name``."""


@dataclass(frozen=True)
class Start:
    """Where a run starts from, as fields; results have them as columns, prompt files as metadata.

    Attributes:
        start: one of `PLAIN_STARTS`; ``prompt`` of a task; ``sum`` of task prompt vectors;
            ``mixture`` of prompts; ``meta`` or ``multitask``, learned on many tasks; ``codes`` in a
            subspace; ``weights``, the pretrained ones; ``zeros``.
        start_of: the task of a prompt; the source tasks, as they were named, of a mixture or of
            learning on many; for a sum a JSON list of [coefficient, task].
        start_seed: initialisation seed of what it starts from, or of the draw.
        start_file: file that it was read from, as the run named it; empty without one.
    """

    start: str
    start_of: str = ""
    start_seed: int | None = None
    start_file: str = ""


STARTS = tuple(field.name for field in fields(Start))
"""The fields of a start, as columns of results and in prompt files."""


def start_from(known: Mapping[str, Any], path: str | Path) -> Start:
    """The start of a run that starts from a prompt file, by its metadata and its path."""
    role, made_from = known.get("role") or "prompt", known.get("made_from") or {}
    of = known.get("task") or ""
    if role == "sum":
        of = json.dumps([[part["coefficient"], part["task"]] for part in made_from["vectors"]])
    elif role != "prompt":
        of = known.get("source_set") or " ".join(known.get("source_tasks") or [])
    return Start(role, of, known.get("init_seed"), str(path))


COLUMNS = {
    "fit_id": "name of the fit: a digest of settings, weights and data that can change a number",
    "method": "class of the method",
    "variant": "what was scored: tuned, or random_subspace and subspace; attempt; adapted; single, "
    "vectors, vector_alone; reconstruction and others of a method's own; and baselines: no_prompt, "
    "initial_prompt, chance, majority",
    "stage": "test",
    "backbone": "hub id or folder of the model",
    "task": "name of the task",
    "ontology": "its kind, group/subgroup",
    "sample": "few-shot sample",
    "shots": "K of the files, a number or all",
    "init_seed": "seed of the initial prompt",
    "order_seed": "seed of the order of the training rows",
    "start": "where the run starts from (see `Start`); empty for baselines",
    "start_of": "of which task or source tasks; of a sum a JSON list of [coefficient, task]",
    "start_seed": "initialisation seed of what it starts from",
    "start_file": "file that it was read from",
    "expression": "sum of task prompt vectors, as it was asked for",
    "scale": "lambda of the sum",
    "num_virtual_tokens": "N",
    "intrinsic_dim": "I, empty where whole prompts are tuned",
    "optimizer": "adamw, adafactor or sgd",
    "learning_rate": "peak learning rate",
    "batch_size": "rows of a step",
    "template": "plain or chat: what stood around inputs and answers",
    "decoding": "score, or generate with beams and longest answer",
    "label_score": "sum or mean of tokens' log-likelihoods, where labels were scored",
    "metric": "metric of the task",
    "metric_variant": "crossfit or corrected",
    "dev": "dev score that chose the prompt",
    "test": "test score",
    "test_rows": "rows of test",
    "cut_train": "inputs of train that were cut",
    "cut_dev": "inputs of dev that were cut",
    "cut_test": "inputs of test that were cut",
    "best_step": "step of the best dev score",
    "seconds": "wall-clock seconds of the fit, which all its runs share",
    "status": "how training ended",
    "run": "place in the grid of the fit, from 0; of equal dev scores the first counts",
    "prompt_file": "file of the prompt, below the folder of this table",
    "settings": "JSON object: all other settings that can change a number, by flag",
    "version": "version of the package",
}
"""The columns of ``results.csv`` and what they hold; an empty cell is a value that is not there."""

RESULT_COLUMNS = tuple(COLUMNS)
CURVE_COLUMNS = (
    *("step", "run", "train_loss", "reconstruction", "dev", "best_dev", "best_step"),
    *("moved", "inner_moved", "second_order", "skipped", "status"),
)
BASELINES = ("no_prompt", "initial_prompt", "chance", "majority")


def read_csv(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file as text, by column name.

    Raises:
        FileNotFoundError, ValueError: no such file; no text, or no CSV.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} is damaged, or no CSV file ({error})") from None


def start_curves(path: Path, step: int) -> None:
    """Begin ``curves.csv``, keeping what a fit that is resumed at ``step`` has already written.

    Raises:
        ValueError: a file that is damaged, but for a last line that a killed fit did not end.
    """
    lines = read_csv(path) if path.is_file() and step > 0 else []
    if lines and None in lines[-1].values():
        lines.pop()
    try:
        kept = [line for line in lines if int(line["step"]) <= step]
        write_csv(path, CURVE_COLUMNS, kept)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): move it away to resume without the earlier curves"
        ) from None


def append_curves(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add the lines of one evaluation to ``curves.csv``."""
    with naming(path), path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, CURVE_COLUMNS, lineterminator="\n")
        for row in rows:
            writer.writerow({name: cell(row.get(name)) for name in CURVE_COLUMNS})


def write_predictions(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object per line: run, variant, row, prediction, references."""
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    write_atomically(path, ("\n".join(lines) + "\n").encode())


def choose_by_dev(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Of the rows that agree in some columns, the one with the best dev score.

    The one choice of the package, for results and for the index of a store alike. Of equal scores
    the earlier ``run`` counts, then the earlier row; a row without a score loses to all others.
    Missing values of ``keys`` agree with each other; the chosen rows keep the frame's order.
    """
    import pandas as pd

    places = [name for name in ("dev", "run") if name in frame]
    order: Any = frame[places].apply(pd.to_numeric, errors="coerce")
    order = order.sort_values(places, ascending=[False, True][: len(places)], kind="stable")
    chosen = frame.loc[order.index].drop_duplicates(list(keys))
    return frame.loc[chosen.index.sort_values()]


def best_by_dev(rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The run that :func:`choose_by_dev` takes of each task, sample, seed and start of a fit."""
    import pandas as pd

    known, keys = list(rows), ["task", "sample", "init_seed", *STARTS[:3]]
    frame = pd.DataFrame(known, columns=[*keys, "dev", "run"])
    return [known[place] for place in choose_by_dev(frame, keys).index]


def summary_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table that ``test`` prints: a line per task, the baselines beside what was trained.

    A column of what was trained is one variant and intrinsic dimension: the mean over samples,
    seeds and starts of the run that dev chose among learning rates and batch sizes, with the
    standard deviation (ddof 1); ``prompts`` is the number of those that have a score.
    """

    def column(row: Mapping[str, Any]) -> str:
        dim = row.get("intrinsic_dim")
        return row["variant"] if dim is None else f"{row['variant']} {dim}"

    trained = list(dict.fromkeys(column(row) for row in rows if row["variant"] not in BASELINES))
    columns = [name for name in BASELINES if any(row["variant"] == name for row in rows)] + trained
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        cells, counts = [task, of_task[0]["metric"]], []
        for name in columns:
            own = [row for row in of_task if column(row) == name]
            chosen = [row["test"] for row in (best_by_dev(own) if name in trained else own)]
            known = [test for test in chosen if test is not None and not math.isnan(test)]
            cells.append(f"{statistics.mean(known):.3f}" if known else "-")
            if name in trained and len(known) > 1:
                cells[-1] += f" ± {statistics.stdev(known):.3f}"
            if name in trained and chosen:
                part = f" of {len(chosen)}" if len(known) < len(chosen) else ""
                counts.append(f"{len(known)}{part}")
        lines.append([*cells, ", ".join(dict.fromkeys(counts)) or "0"])
    names = [name.replace("_", " ") for name in columns]
    return text_table(["task", "metric", *names, "prompts"], lines)


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of aligned text that fits a terminal: names of columns and long cells wrap."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1000
    whole = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    is_wide = sum(whole) + 2 * (len(whole) - 1) > width
    names = [name.split(" ") if is_wide else [name] for name in header]
    height = max(map(len, names))
    heads = [[own[at] if at < len(own) else "" for own in names] for at in range(height)]
    widths = [max(map(len, column)) for column in zip(*heads, *rows, strict=True)]
    while sum(widths) + 2 * (len(widths) - 1) > width and max(widths) > 9:
        widths[widths.index(max(widths))] -= 1
    lines: list[Sequence[str]] = [*heads, ["-" * w for w in widths]]
    for row in rows:
        cells = [textwrap.wrap(c, w) or [""] for c, w in zip(row, widths, strict=True)]
        lines += zip_longest(*cells, fillvalue="")
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines
    )
