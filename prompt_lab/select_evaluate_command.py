"""The command ``prompt-lab select evaluate``: how well rankings of source tasks predict transfer.

Measured transfer comes from CSV tables (the one of Lin et al. 2024 ships with the package) or from
result files, where a run is a transfer if it starts from the prompt file of another task. The
rankings are those of ``prompt-lab select``, or come from files; `prompt_lab.selection` judges them.
Left out: significance of differences between rankings, and figures.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from prompt_lab.atomic_file import write_csv
from prompt_lab.select_command import (
    PromptMethod,
    aligned,
    check_prompts,
    load_banks,
    rank_by_prompts,
    sentence_similarities,
    training_sizes,
)
from prompt_lab.selection import Entry, Quality, Seeds, Table

if TYPE_CHECKING:
    from prompt_lab.report import Row

PAPER = "paper"
"""Reserved name of the transfer table of Lin et al. 2024 that ships with the package."""

_ALIKE = ("method", "backbone", "num_virtual_tokens", "metric_variant")
"""Columns of result files in which all runs of a transfer table must agree."""

_PLAIN = ("vocab", "text", "labels", "normal", "uniform")
"""Starts of prompt tuning that know no other task."""


def evaluate_command(
    transfer: list[str],
    *,
    prompts: list[str] | None = None,
    similarity: list[str] | None = None,
    root: str | None = None,
    encoder: str | None = None,
    seeds: Seeds = "mean",
    out: str | None = None,
) -> list[Path]:
    """Compare rankings of source tasks by how well they predict measured transfer.

    Transfer comes from CSV tables or from results.csv files of fits. A CSV has a row per source and
    a column per target, or the columns source, target, score and seed; scores are percent. A source
    named no-transfer has the scores without transfer, and a column size the rows of the sources'
    training sets. The name paper stands for the published table of 13 sources and 10 targets. In
    result files, a run is a transfer if it starts from the prompt file of another task
    (model.init.path); the run that dev chose counts, and the others without transfer are those that
    start from no file.

    It prints, as mean and standard deviation over targets in percent, nDCG, Regret@1, Regret@3, and
    with scores without transfer gain@1 and gain@3: the relative transfer of the best of the first 1
    or 3. random is the exact expectation over all rankings, and sources of equal similarity count
    with their expectation too.

    Args:
        transfer: CSV tables, results.csv files, folders with such, or paper.
        prompts: prompt stores, or folders of fits: adds all rankings by prompts.
        similarity: CSV tables as of transfer, with similarities instead of scores: adds a ranking
            for each, by the name of its file.
        root: folder of few-shot files, or sandbox: adds size, where no table has it.
        encoder: id or folder of a sentence-transformers model: adds semb, on the files of root.
        seeds: mean judges the scores averaged over seeds, as the paper's equations; each judges
            every seed by itself and averages the measures, as its code.
        out: folder for methods.csv and targets.csv.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: a file, folder, prompt or training file that is not there.
        ValueError: a table that cannot be read, similarities that are missing, results of several
            settings, no transfer in the results, or something that a method needs is not given.
    """
    from prompt_lab.selection import evaluate

    if out is not None and Path(out).is_file():
        raise ValueError(f"--out {out} is a file: name a folder")
    table = _read_transfer(transfer)
    found: dict[str, dict[str, Quality]] = {}
    ratings = _ratings(table, prompts or [], similarity or [], root, encoder)
    for name, rating in ratings.items():
        try:
            found[name] = evaluate(table, rating, seeds)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    _tell_qualities(table, found, seeds)
    return [] if out is None else _write_qualities(Path(out), table, ratings, found)


# ---- measured transfer ---------------------------------------------------------------------------


def _read_transfer(places: Sequence[str]) -> Table:
    """Measured transfer from CSV tables and result files."""
    from prompt_lab.report import find_results, read_results
    from prompt_lab.selection import PAPER_TABLE, make_table, read_table

    entries: list[Entry] = []
    sizes: dict[str, float] = {}
    results: list[Path] = []
    notes: tuple[str, ...] = ()
    for place in places:
        path = PAPER_TABLE if place == PAPER else Path(place)
        if path.is_dir() or _is_result_file(path):
            results += find_results([path])
            continue
        found, own_sizes = read_table(path)
        entries += found
        sizes |= own_sizes
    if results:
        found, notes = _results_entries(read_results(results))
        entries += found
    table = make_table(entries, sizes)
    return Table(table.scores, table.baseline, table.sizes, (*notes, *table.notes))


def _is_result_file(path: Path) -> bool:
    """Whether a file is a results.csv, by its header."""
    if not path.is_file():
        return False
    with path.open(encoding="utf-8", errors="replace") as file:
        return "fit_id" in file.readline().strip().split(",")


def _results_entries(rows: Sequence[Row]) -> tuple[list[Entry], tuple[str, ...]]:
    """Scores in percent of the runs that are transfers or have none, and what was left out.

    Of the runs of one source, task, sample and seeds, the one with the best dev score counts.
    """
    from prompt_lab.results import best_by_dev
    from prompt_lab.selection import NO_TRANSFER

    starts = _starts([row.cells["initialised"] for row in rows if row.cells["variant"] == "tuned"])
    tuned = [row for row in rows if row.cells["variant"] == "tuned"]
    targets = {
        row.cells["task"]
        for row in tuned
        if starts[row.cells["initialised"]] not in ("", NO_TRANSFER, row.cells["task"])
    }
    used = [
        row for row in tuned if row.cells["task"] in targets and starts[row.cells["initialised"]]
    ]
    if not targets:
        raise ValueError(
            "no run starts from the prompt file of another task (model.init.name file, "
            "model.init.path a .safetensors file), so there is no transfer to compare with"
        )
    _check_alike(used, starts)
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in used:
        source = row.cells["initialised"], row.cells["order_seed"]
        groups.setdefault(source, []).append(row.cells)
    entries, untested = [], 0
    for (start, order), group in groups.items():
        for cells in best_by_dev(group):
            seed = "/".join((cells["sample"], cells["init_seed"], order))
            if cells["test"]:
                score = 100 * float(cells["test"])
                entries.append(Entry(starts[start], cells["task"], score, seed))
            untested += not cells["test"]
    others = len(tuned) - len(used)
    notes = []
    if others:
        notes.append(f"left out, {others} tuned runs of other tasks or other starts")
    if untested:
        notes.append(f"left out, {untested} runs without a test score")
    return entries, tuple(notes)


def _starts(ways: Iterable[str]) -> dict[str, str]:
    """Source task of each way to initialise a prompt; `NO_TRANSFER`, or empty for other starts."""
    from prompt_lab.prompt_file import read_metadata
    from prompt_lab.selection import NO_TRANSFER

    starts, lost = {}, []
    for way in dict.fromkeys(ways):
        kind, _, text = way.partition(" ")
        path = Path(text)
        starts[way] = NO_TRANSFER if kind in _PLAIN else ""
        if kind == "file" and path.suffix == ".safetensors":
            if path.is_file():
                starts[way] = read_metadata(path).get("task") or ""
            else:
                lost.append(text)
    if lost:
        raise FileNotFoundError(
            f"{len(lost)} prompt files that runs start from are not there: {', '.join(lost)}; run "
            "the command in the folder where the fits ran"
        )
    return starts


def _check_alike(rows: Sequence[Row], starts: Mapping[str, str]) -> None:
    """Refuse runs whose scores cannot be compared."""
    from prompt_lab.selection import NO_TRANSFER

    for column in _ALIKE:
        values = sorted({row.cells[column] for row in rows})
        if len(values) > 1:
            raise ValueError(
                f"the transfer runs differ in {column}: {', '.join(values)}; give the result files "
                "of one"
            )
    ways = {row.cells["initialised"] for row in rows}
    plain = sorted(way for way in ways if starts[way] == NO_TRANSFER)
    if len(plain) > 1:
        raise ValueError(
            f"several starts without transfer: {', '.join(plain)}; give the result files of one"
        )


def _ratings(
    table: Table,
    prompts: Sequence[str],
    files: Sequence[str],
    root: str | None,
    encoder: str | None,
) -> dict[str, dict[str, dict[str, float]]]:
    """Similarities by method, target and source, of all methods that have what they need."""
    targets, sources = list(table.scores), table.sources
    ratings = {"random": {target: dict.fromkeys(sources, 0.0) for target in targets}}
    sizes = table.sizes
    if not sizes and root is not None:
        sizes = training_sizes(root, sources)
    if sizes:
        ratings["size"] = {target: dict(sizes) for target in targets}
    if encoder is not None:
        matrix = sentence_similarities(targets, sources, root, encoder)
        rows = (dict(zip(sources, row, strict=True)) for row in matrix)
        ratings["semb"] = dict(zip(targets, rows, strict=True))
    if prompts:
        ratings |= _prompt_ratings(targets, sources, prompts)
    for file in files:
        name = Path(file).stem
        if name in ratings:
            raise ValueError(f"{file}: there is a method {name} already; rename the file")
        ratings[name] = _read_similarities(file)
    return ratings


def _prompt_ratings(
    targets: Sequence[str], sources: Sequence[str], stores: Sequence[str]
) -> dict[str, dict[str, dict[str, float]]]:
    """Similarities by method, target and source, of all methods on prompts."""
    from prompt_lab.methods.source_prompts import best_prompts

    files = best_prompts(stores)
    check_prompts("evaluate", targets, sources, files, stores)
    banks = load_banks(files, targets, sources)
    return {
        method: {
            target: {likeness.task: likeness.mean for likeness in ranking}
            for target, ranking in rank_by_prompts(method, banks)[0].items()
        }
        for method in get_args(PromptMethod)
    }


def _read_similarities(file: str) -> dict[str, dict[str, float]]:
    """Similarities of a CSV table by target and source, averaged over seeds."""
    from prompt_lab.selection import read_table

    values: dict[str, dict[str, list[float]]] = {}
    for entry in read_table(file)[0]:
        values.setdefault(entry.target, {}).setdefault(entry.source, []).append(entry.score)
    return {
        target: {source: statistics.fmean(numbers) for source, numbers in found.items()}
        for target, found in values.items()
    }


# ---- what is told and written ------------------------------------------------------------------


def _tell_qualities(table: Table, found: Mapping[str, Mapping[str, Quality]], seeds: Seeds) -> None:
    """Print a line for each method, and what to know of the table."""
    from prompt_lab.statistics import summarise

    count = max(len(own) for of_source in table.scores.values() for own in of_source.values())
    judged = {"mean": "their mean scores", "each": "each by itself, then averaged"}[seeds]
    over = f", {count} seeds ({judged})" if count > 1 else ""
    print(
        f"{len(table.pairs())} pairs of {len(table.sources)} sources and {len(table.scores)} "
        f"targets{over}; percent, mean ± standard deviation over targets"
    )
    for note in table.notes:
        print(f"  {note}")
    measures = _measures(bool(table.baseline))
    lines = [["method", *measures, "targets"]]
    for method, of_target in found.items():
        values = [_percent(quality) for quality in of_target.values()]
        summaries = [summarise(own[name] for own in values) for name in measures]
        cells = [
            "-" if not s.count else f"{s.mean:.2f}" + (f" ± {s.std:.2f}" if s.count > 1 else "")
            for s in summaries
        ]
        lines.append([method, *cells, f"{summaries[0].count}"])
    print("\n" + "\n".join(aligned(lines)))
    without = [target for target, own in found["random"].items() if math.isnan(own.ndcg)]
    if without:
        print(f"no source scores above 0, so not judged: {', '.join(without)}")


def _measures(with_gain: bool) -> list[str]:
    """Names of the columns of measures."""
    from prompt_lab.selection import KS

    gains = [f"gain@{k}" for k in KS] if with_gain else []
    return ["nDCG", *(f"Regret@{k}" for k in KS), *gains]


def _percent(quality: Quality) -> dict[str, float]:
    """All measures in percent, by the names of their columns."""
    values = {"nDCG": 100 * quality.ndcg}
    values |= {f"Regret@{k}": 100 * value for k, value in quality.regret.items()}
    values |= {f"gain@{k}": 100 * value for k, value in quality.gain.items()}
    return values | {f"score@{k}": value for k, value in quality.score.items()}


def _write_qualities(
    folder: Path,
    table: Table,
    ratings: Mapping[str, Mapping[str, Mapping[str, float]]],
    found: Mapping[str, Mapping[str, Quality]],
) -> list[Path]:
    """Write a line per method, and one per method and target; returns the paths."""
    from prompt_lab.selection import KS
    from prompt_lab.statistics import summarise

    lines, summaries = [], []
    for method, of_target in found.items():
        own = [_percent(quality) for quality in of_target.values()]
        summary: dict[str, Any] = {"method": method, "targets": len(own)}
        for name in _measures(True):
            over = summarise(values[name] for values in own)
            summary |= {name: over.mean, f"{name} std": over.std}
        summaries.append(summary)
        for (target, quality), values in zip(of_target.items(), own, strict=True):
            likeness = {source: ratings[method][target][source] for source in table.scores[target]}
            top = [source for source, x in likeness.items() if x == max(likeness.values())]
            first = top[0] if len(top) == 1 else f"{len(top)} equal ones"
            facts = {"method": method, "target": target, "sources": quality.sources, "first": first}
            lines.append(facts | values | {"no transfer": table.baseline.get(target)})
    scores = [f"score@{k}" for k in KS]
    columns = ["method", "target", "sources", "first", *_measures(True), *scores, "no transfer"]
    paths = [folder / "methods.csv", folder / "targets.csv"]
    with_std = [name for measure in _measures(True) for name in (measure, f"{measure} std")]
    write_csv(paths[0], ["method", "targets", *with_std], summaries)
    write_csv(paths[1], columns, lines)
    return paths
