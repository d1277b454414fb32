"""The command ``prompt-lab select evaluate``: how well rankings of source tasks predict transfer.

Measured transfer comes from CSV tables (the one of Lin et al. 2024 ships with the package) or from
result files. The rankings are those of ``prompt-lab select``, or come from files;
`selection` judges them, `selection_steps` over the steps of training, and
`selection_report` writes tables and figures. Left out: significance of differences
between rankings.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from prompt_lab.analysis.select_command import (
    PromptMethod,
    aligned,
    check_prompts,
    load_banks,
    rank_by_prompts,
    sentence_similarities,
    training_sizes,
)
from prompt_lab.analysis.selection import KS, Quality, Seeds, evaluate
from prompt_lab.analysis.selection_report import Ratings, Study, measures, percent, write_study
from prompt_lab.analysis.transfer_results import read_transfer
from prompt_lab.analysis.transfer_table import Table, read_table

if TYPE_CHECKING:
    from prompt_lab.analysis.selection_report import ByStep
    from prompt_lab.data.mixtures import Key
    from prompt_lab.files.prompts import FoundPrompt

_MOST_STEPS = 10
"""Columns of a printed table of steps."""


def evaluate_command(
    transfer: list[str],
    *,
    prompts: list[str] | None = None,
    similarity: list[str] | None = None,
    root: str | None = None,
    encoder: str | None = None,
    steps: list[str] | None = None,
    seeds: Seeds = "mean",
    out: str | None = None,
) -> list[Path]:
    """Compare rankings of source tasks by how well they predict measured transfer.

    Transfer comes from CSV tables or from results.csv files of fits. A CSV has a row per source and
    a column per target, or the columns source, target, score and seed; scores are percent. A source
    named no-transfer has the scores without transfer, and a column size the rows of the sources'
    training sets. The name paper stands for the published table of 13 sources and 10 targets. In
    result files, a run is a transfer if it starts from the prompt file of another task
    (model.init.source_tasks, or a file as model.init.path); the run that dev chose counts, and the
    others without transfer are those that start from no file.

    It prints, as mean and standard deviation over targets in percent, nDCG, Regret@1, Regret@3, and
    with scores without transfer gain@1 and gain@3: the relative transfer of the best of the first 1
    or 3. random is the exact expectation over all rankings, and sources of equal similarity count
    with their expectation too.

    With out it writes these, the transfer itself (transfer.csv, relative_transfer.csv), the best of
    the first k for every k (top_k.csv), and figures as PNG and SVG: relative transfer as a map, by
    source and by target; each similarity; the best of the first k; nDCG over steps; and with
    prompts a t-SNE map of the rows of each target's prompt and those of its best, second and worst
    source.

    Args:
        transfer: CSV tables, results.csv files, folders with such, or paper.
        prompts: prompt stores, folders of fits, prompt files or checkpoints: adds all rankings by
            prompts.
        similarity: CSV tables as of transfer, with similarities instead of scores: adds a ranking
            for each, by the name of its file.
        root: folder of few-shot files, or sandbox: adds size, where no table has it.
        encoder: id or folder of a sentence-transformers model: adds semb, on the files of root.
        steps: folders of fits of the target tasks with model.save_steps: the target prompts of each
            step rank the source prompts too; then the targets need no prompt among prompts.
        seeds: mean judges the scores averaged over seeds, as the paper's equations; each judges
            every seed by itself and averages the measures, as its code. At saved steps, each judges
            every target prompt by the scores of its own sample and seeds.
        out: folder for tables and figures.

    Returns:
        The files that were written.

    Raises:
        FileNotFoundError: a file, folder, prompt or training file that is not there, or saved steps
            that lack a target.
        ValueError: a table that cannot be read, similarities that are missing, results of several
            settings, no transfer in the results, or something that a method needs is not given.
    """
    if out is not None and Path(out).is_file():
        raise ValueError(f"--out {out} is a file: name a folder")
    if steps and not prompts:
        raise ValueError("--steps needs prompts of the source tasks: give their stores: --prompts")
    table = read_transfer(transfer)
    ratings = _ratings(table, root, encoder)
    files, untuned = _tuned(table, prompts, bool(steps)) if prompts else ({}, [])
    if files and not untuned:
        ratings |= _prompt_ratings(list(table.scores), table.sources, files)
    ratings |= _file_ratings(similarity or [], ratings)
    found: dict[str, dict[str, Quality]] = {}
    ks = range(1, max(*KS, len(table.sources)) + 1)
    for name, rating in ratings.items():
        try:
            found[name] = evaluate(table, rating, seeds, ks)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    by_step, notes = _by_step(table, steps, files, seeds) if steps else ({}, [])
    _tell_qualities(table, found, seeds)
    if untuned:
        print(f"without a final prompt, so judged at saved steps alone: {', '.join(untuned)}")
    _tell_steps(by_step, notes)
    if out is None:
        return []
    shown = {} if untuned else files
    return write_study(Path(out), Study(table, ratings, found, shown, by_step))


# ---- rankings ------------------------------------------------------------------------------------


def _ratings(table: Table, root: str | None, encoder: str | None) -> Ratings:
    """Similarities by method, target and source, of all methods without prompts that can be had."""
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
    return ratings


def _tuned(
    table: Table, stores: Sequence[str], has_steps: bool
) -> tuple[dict[Key, FoundPrompt], list[str]]:
    """The best prompts by task and sample, and the targets without one, which steps allow."""
    from prompt_lab.files.prompts import best_prompts

    files = best_prompts(stores)
    tuned = {task for task, _ in files}
    untuned = [target for target in table.scores if has_steps and target not in tuned]
    targets = [] if untuned else list(table.scores)
    check_prompts("evaluate", targets, table.sources, files, stores)
    return files, untuned


def _prompt_ratings(
    targets: Sequence[str], sources: Sequence[str], files: Mapping[Key, FoundPrompt]
) -> Ratings:
    """Similarities by method, target and source, of all methods on prompts."""
    banks = load_banks(files, targets, sources)
    return {
        method: {
            target: {likeness.task: likeness.mean for likeness in ranking}
            for target, ranking in rank_by_prompts(method, banks)[0].items()
        }
        for method in get_args(PromptMethod)
    }


def _file_ratings(files: Sequence[str], others: Ratings) -> Ratings:
    """Similarities of CSV tables by name of the file, target and source, averaged over seeds."""
    ratings = {}
    for file in files:
        name = Path(file).stem
        if name in others or name in ratings:
            raise ValueError(f"{file}: there is a method {name} already; rename the file")
        values: dict[str, dict[str, list[float]]] = {}
        for entry in read_table(file)[0]:
            values.setdefault(entry.target, {}).setdefault(entry.source, []).append(entry.score)
        ratings[name] = {
            target: {source: statistics.fmean(numbers) for source, numbers in found.items()}
            for target, found in values.items()
        }
    return ratings


def _by_step(
    table: Table, folders: Sequence[str], files: Mapping[Key, FoundPrompt], seeds: Seeds
) -> tuple[ByStep, list[str]]:
    """The quality of all methods on prompts at each saved step, and what to know of it."""
    from prompt_lab.analysis.selection_steps import find_steps, judge_steps, tell_matches

    steps, notes = find_steps(folders, list(table.scores))
    if seeds == "each":
        notes.append(tell_matches(table, steps))
    return judge_steps(table, steps, files, seeds), notes


# ---- what is told --------------------------------------------------------------------------------


def _tell_qualities(table: Table, found: Mapping[str, Mapping[str, Quality]], seeds: Seeds) -> None:
    """Print a line for each method, and what to know of the table."""
    from prompt_lab.analysis.old_results import summarise

    count = max(len(own) for of_source in table.scores.values() for own in of_source.values())
    judged = {"mean": "their mean scores", "each": "each by itself, then averaged"}[seeds]
    over = f", {count} seeds ({judged})" if count > 1 else ""
    print(
        f"{len(table.pairs())} pairs of {len(table.sources)} sources and {len(table.scores)} "
        f"targets{over}; percent, mean ± standard deviation over targets"
    )
    for note in table.notes:
        print(f"  {note}")
    names = measures(bool(table.baseline))
    lines = [["method", *names, "targets"]]
    for method, of_target in found.items():
        values = [percent(quality) for quality in of_target.values()]
        summaries = [summarise(own[name] for own in values) for name in names]
        cells = [
            "-" if not s.count else f"{s.mean:.2f}" + (f" ± {s.std:.2f}" if s.count > 1 else "")
            for s in summaries
        ]
        lines.append([method, *cells, f"{summaries[0].count}"])
    print("\n" + "\n".join(aligned(lines)))
    without = [target for target, own in found["random"].items() if math.isnan(own.ndcg)]
    if without:
        print(f"no source scores above 0, so not judged: {', '.join(without)}")


def _tell_steps(by_step: ByStep, notes: Sequence[str]) -> None:
    """Print for each measure a line per method and a column per step, at most `_MOST_STEPS`."""
    from prompt_lab.analysis.old_results import summarise

    steps = list(by_step)
    if not steps:
        return
    count = min(_MOST_STEPS, len(steps))
    shown = [steps[round(at * (len(steps) - 1) / max(1, count - 1))] for at in range(count)]
    part = f" ({count} of {len(steps)})" if count < len(steps) else ""
    print(f"\nby step of the target prompts{part}; percent, mean over targets")
    for note in notes:
        print(f"  {note}")
    for name in measures(False):
        lines = [[name, *map(str, shown)]]
        for method in by_step[steps[0]]:
            found = (by_step[step][method].values() for step in shown)
            means = [summarise(percent(one)[name] for one in own).mean for own in found]
            lines.append([method, *("-" if math.isnan(x) else f"{x:.2f}" for x in means)])
        print("\n" + "\n".join(aligned(lines)))
