"""What prompts of one task give on another, and how that goes with the distance between them.

Zero-shot transfer is measured by `VectorArithmetic`, or in any other way, and read here. Gains are
over no prompt, as in section 5.3 of "Interpreting Prompt-Tuning Across SuperGLUE Tasks"; the paper
describes their relation to distance in words, here it is a rank correlation with a permutation
test.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.core.vectors import parse_expression

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.analysis.interpret_prompts import Tuned
    from prompt_lab.analysis.interpretation import RankCorrelation

TRANSFER_COLUMNS = ("source", "target", "score", "no_prompt")
"""What a table of transfer has: at least these columns."""

SCORES = TRANSFER_COLUMNS[2:]


@dataclass(frozen=True)
class Transfer:
    """What prompts of one task give on another, and how that goes with distance.

    Attributes:
        tasks: the T tasks, in the order of the matrices.
        distances: (T, T) mean distance of their prompts.
        gains: (T, T) score less the score without prompt, source by target; NaN where not known.
        rows: the same as lines of a table.
        correlations: of the two, by each method.
    """

    tasks: list[str]
    distances: Tensor
    gains: Tensor
    rows: list[dict[str, Any]]
    correlations: list[RankCorrelation]


@dataclass(frozen=True)
class _Line:
    """A score of a prompt on a task, as it was read.

    Attributes:
        source: the prompt, or its task.
        target: the task.
        score: text of the score.
        no_prompt: text of the score without prompt.
        where: what was read.
    """

    source: str
    target: str
    score: str
    no_prompt: str
    where: str

    def numbers(self) -> tuple[float, float]:
        """Both scores.

        Raises:
            ValueError: one that is no finite number.
        """
        score = _score(self.score, f"{self.where}, score")
        return score, _score(self.no_prompt, f"{self.where}, no_prompt")


def read_transfer(places: Sequence[str], tuned: Sequence[Tuned]) -> list[dict[str, Any]]:
    """Measured transfer between the tasks of some prompts, from tables and from results.

    Of result files, the lines count in which ``VectorArithmetic`` has evaluated the vector of one
    task at scale 1, which on its own initial prompt is the tuned prompt; the score without prompt
    is that of the same task, sample and way of answering.

    Args:
        places: CSV files with at least `TRANSFER_COLUMNS`; results.csv files; or folders, which
            stand for every results.csv in them and below.
        tuned: the prompts.

    Returns:
        One for each pair of tasks that both have prompts: means of score and no_prompt over the
        lines of the pair, their difference as gain, and how many lines there are.

    Raises:
        FileNotFoundError: a place that is not there, or a folder without results.
        ValueError: a column that is missing, a score that is no number, results of other weights
            or without scores of no prompt, or no pair of tasks that have prompts.
    """
    from prompt_lab.analysis.old_results import is_result_file

    paths = [Path(place) for place in dict.fromkeys(places)]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise FileNotFoundError(f"no table of transfer {', '.join(missing)}")
    results = [path for path in paths if path.is_dir() or is_result_file(path)]
    lines = [line for path in paths if path not in results for line in _table_lines(path)]
    if results:
        lines += _result_lines(results, tuned[0].prompt.backbone_digest)
    group_of = {name: one.group for one in tuned for name in (one.label, one.prompt.name)}
    group_of |= {one.group: one.group for one in tuned}
    groups = set(group_of.values())
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for line in lines:
        source = group_of.get(line.source)
        if source is not None and line.target in groups:
            pairs.setdefault((source, line.target), []).append(line.numbers())
    if not pairs:
        raise ValueError(
            f"{', '.join(places)}: no line whose source and target are tasks of these prompts "
            f"({', '.join(sorted(groups))})"
        )
    rows = []
    for (source, target), scores in pairs.items():
        score, without = (sum(side) / len(scores) for side in zip(*scores, strict=True))
        found = {"source": source, "target": target, "score": score, "no_prompt": without}
        rows.append({**found, "gain": score - without, "lines": len(scores)})
    return rows


def _table_lines(path: Path) -> Iterator[_Line]:
    """The lines of a table of transfer.

    Raises:
        ValueError: a column that is missing.
    """
    from prompt_lab.files.results import read_csv

    lines = read_csv(path)
    lacking = [name for name in TRANSFER_COLUMNS if not lines or name not in lines[0]]
    if lacking:
        raise ValueError(
            f"{path} lacks the columns {', '.join(lacking)}, or has no lines: give a CSV file with "
            f"{', '.join(TRANSFER_COLUMNS)}, or a results.csv of VectorArithmetic"
        )
    for number, line in enumerate(lines, 2):
        cells = [line[name] or "" for name in TRANSFER_COLUMNS]
        yield _Line(*cells, where=f"{path}, line {number}")


def _result_lines(places: Sequence[Path], digest: str) -> list[_Line]:
    """The lines of result files that are of a tuned prompt on a task.

    Args:
        places: result files, and folders with such.
        digest: of the backbone's weights.

    Raises:
        FileNotFoundError: a folder without results.
        ValueError: results of other weights, no such lines, or none without prompt beside them.
    """
    from prompt_lab.analysis.old_results import find_results, read_results

    paths = find_results(places)
    for path in paths:
        _check_weights(path, digest)
    rows = [row.cells for row in read_results(paths)]
    without: dict[tuple[str, ...], str] = {}
    for cells in rows:
        if cells["variant"] == "no_prompt":
            without.setdefault(_answered(cells), cells["test"])
    sources = ((_source(cells), cells) for cells in rows)
    found = [(source, cells) for source, cells in sources if source]
    if not found:
        raise ValueError(
            f"{', '.join(map(str, places))}: no line of VectorArithmetic with the vector of one "
            "task at scale 1: test the tasks as model.expressions with model.evaluate_on all"
        )
    lacking = sorted({cells["task"] for _, cells in found if _answered(cells) not in without})
    if lacking:
        raise ValueError(
            f"{', '.join(map(str, places))}: no score without prompt (variant no_prompt) of "
            f"{', '.join(lacking)}, answered in the same way: test with model.evaluate_on all, or "
            "give the results of a fit with model.test_baselines, too"
        )
    return [
        _Line(source, cells["task"], cells["test"], without[_answered(cells)], cells["prompt_file"])
        for source, cells in found
    ]


def _check_weights(path: Path, digest: str) -> None:
    """Refuse the results of a test on other weights than those of the prompts.

    Raises:
        ValueError: naming both.
    """
    file = path.parent / "digests.json"
    tested = json.loads(file.read_text()).get("backbone", digest) if file.is_file() else digest
    if tested != digest:
        raise ValueError(
            f"{path} is of a backbone with weights {tested[:12]}, the prompts are of one with "
            f"{digest[:12]}: give the results of these prompts"
        )


def _answered(cells: Mapping[str, str]) -> tuple[str, ...]:
    """What a score without prompt is of."""
    return tuple(cells[name] for name in ("task", "sample", "decoding", "metric_variant"))


def _source(cells: Mapping[str, str]) -> str:
    """The task whose tuned prompt a line of results is of; empty for other lines.

    On its own task that is the variant ``single``; there, ``vectors`` has another initial prompt.
    """
    if cells["method"] != "VectorArithmetic" or cells["variant"] not in ("single", "vectors"):
        return ""
    factors = parse_expression(cells["expression"])
    (source, factor), *others = factors.items()
    is_own = source == cells["task"]
    is_tuned = not others and factor == 1 and float(cells["scale"]) == 1
    return source if is_tuned and is_own == (cells["variant"] == "single") else ""


def _score(cell: str, where: str) -> float:
    """A number of a table."""
    try:
        number = float(cell)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} is {cell!r}: give a finite number")
    return number


def compare_transfer(
    rows: Sequence[Mapping[str, Any]], tuned: Sequence[Tuned], distances: Tensor
) -> Transfer:
    """Transfer and distance between tasks, and their rank correlations.

    Args:
        rows: as from :func:`read_transfer`.
        tuned: the prompts.
        distances: (R, R) between them.
    """
    import torch

    from prompt_lab.analysis.interpretation import group_distances, rank_correlation

    tasks, means = group_distances(distances, [one.group for one in tuned])
    used = [task for task in tasks if any(task in (r["source"], r["target"]) for r in rows)]
    places = torch.tensor([tasks.index(task) for task in used])
    means = means[places][:, places]
    gains = torch.full_like(means, math.nan)
    full = []
    for row in rows:
        at, to = used.index(row["source"]), used.index(row["target"])
        gains[at, to] = row["gain"]
        full.append({**row, "distance": float(means[at, to])})
    full.sort(key=lambda row: (used.index(row["source"]), used.index(row["target"])))
    correlations = [rank_correlation(means, gains, method) for method in ("spearman", "kendall")]
    return Transfer(used, means, gains, full, correlations)
