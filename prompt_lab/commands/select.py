"""The commands ``prompt-lab select`` and ``select evaluate``: which source tasks to learn from.

Rankings by tuned prompts and measures of rankings are in `prompt_lab.analysis.selection`, rankings
that need no prompts in `prompt_lab.analysis.data_rankings`.
"""

# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportCallIssue=false, reportIndexIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
import random
import shlex
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prompt_lab.data.partitions import expand_sets
from prompt_lab.files.prompts import FoundPrompt, TaskSample, best_prompts
from prompt_lab.files.results import text_table
from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

Method = Literal[
    "subspace", "feature", "feature-unit", "unigram", "unigram-unit", "max", "max-source", "cosine",
    "frobenius", "size", "semb", "random",
]  # fmt: skip

_MOST_STEPS = 10


def select_command(
    targets: list[str],
    *,
    prompts: list[str] | None = None,
    sources: list[str] | None = None,
    method: Method = "subspace",
    number: int = 5,
    choose: Literal["highest", "lowest", "random"] = "highest",
    seed: int = 0,
    rank: int | None = None,
    energy: float = 0.95,
    root: str | None = None,
    encoder: str | None = None,
    out: str | None = None,
) -> Path | None:
    """Rank source tasks for target tasks, by default by how alike their prompts are; choose some.

    Methods on tuned prompts: subspace (norm of the projection of one prompt's subspace on the
    other's, from 0 to 1), feature (cosine of mean rows), unigram (cosine of the rows' means), max
    (for each row of the target the largest cosine with a row of the source; max-source the other
    way round), cosine (of all numbers), frobenius (minus the distance). With -unit all rows have
    length 1 first. Of several prompts of a task and sample, the one with the best dev score counts.
    Samples that both tasks have are compared one by one; others by all pairs.

    Methods without prompts: size (rows of the source's training file), semb (cosine of the mean
    sentence embeddings of the training inputs), random (numbers of the seed). A task's training
    file is that of the largest K, of its samples the first.

    With several targets, the mean over targets chooses: the settings of meta prompt tuning (Qin,
    Li, Zhao and Joty 2023, appendix A.7).

    Args:
        targets: tasks, or sets of partitions such as mpt/cls_to_cls/target.
        prompts: prompt stores, folders of fits, prompt files or checkpoints; not needed for size,
            semb and random.
        sources: tasks or sets to choose among; without it all tasks of the stores but the targets.
        method: what ranks the sources.
        number: how many source tasks to choose.
        choose: which of the ranking - the highest, the lowest, or random ones.
        seed: seed of random choices and of the method random.
        rank: dimensions of each subspace; without it as many as energy needs.
        energy: share of a prompt's squared norm that its subspace keeps, above 0 and at most 1.
        root: folder of few-shot files, or sandbox, for size and semb.
        encoder: id or folder of a sentence-transformers model, for semb.
        out: YAML file to write with the chosen tasks as data.tasks, a further --config of a fit.

    Raises:
        FileNotFoundError, ValueError, IsADirectoryError: tasks or files that lack, in a sentence.
    """
    import pandas as pd
    import yaml

    from prompt_lab.analysis.data_rankings import rank_by_data
    from prompt_lab.analysis.selection import PROMPT_RANKINGS

    if out is not None and Path(out).is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: name a file")
    files = best_prompts(prompts or [])
    wanted = list(dict.fromkeys(expand_sets(targets)))
    others = [task for task in dict.fromkeys(task for task, _ in files) if task not in wanted]
    names = others if sources is None else list(dict.fromkeys(expand_sets(sources)))
    if method in PROMPT_RANKINGS:
        _check_prompts(method, wanted, names, files, prompts)
    if both := [task for task in names if task in wanted]:
        raise ValueError(f"source and target at once: {', '.join(both)}; take it out of one")
    if not names:
        held = f"{', '.join(prompts)} hold no task but the targets" if prompts else ""
        advice = "name tasks with --sources, or give further stores to --prompts"
        raise ValueError(f"{held or 'no source tasks'}: {advice}")
    if not 1 <= number <= len(names):
        raise ValueError(
            f"--number is {number}, and there are {len(names)} source tasks: give 1 to {len(names)}"
        )
    if method in PROMPT_RANKINGS:
        subspace = {"energy": energy, "rank": rank} if method == "subspace" else {}
        ranked, legend = _by_prompts(method, _loaded(files, wanted, names), subspace)
    else:
        pairs = pd.MultiIndex.from_product([wanted, names], names=["target", "source"])
        ranked = pairs.to_frame(index=False).assign(std=math.nan, count=1, same_sample=True)
        ranked["similarity"], legend = rank_by_data(method, ranked, root, encoder, seed)
    means = ranked.groupby("source")["similarity"].agg(similarity="mean", std="std", count="size")
    means = _sorted(means.reset_index().assign(same_sample=True))
    print(f"{legend}\n")
    for target in wanted:
        print(f"{target}\n{_ranking_text(_sorted(ranked[ranked['target'] == target]))}\n")
    if len(wanted) > 1:
        print(f"mean over {len(wanted)} targets\n{_ranking_text(means, 'targets')}\n")
    order, how = means["source"].tolist(), choose
    chosen = order[-number:][::-1] if choose == "lowest" else order[:number]
    if choose == "random":
        chosen, how = random.Random(seed).sample(sorted(order), number), f"random with seed {seed}"
    summary = f"{number} of {len(names)} source tasks, {how}, for {', '.join(wanted)}"
    print(summary)
    for task in chosen:
        place = order.index(task)
        print(f"  {task}: rank {place + 1}, similarity {_text(means['similarity'].iloc[place])}")
    print(f"--data.tasks {shlex.quote('[' + ', '.join(chosen) + ']')}")
    if out is None:
        return None
    content = yaml.safe_dump({"data": {"tasks": chosen}}, default_flow_style=None, width=100)
    write_atomically(Path(out), f"# {summary}\n{content}".encode())
    return Path(out)


def evaluate_command(
    transfer: list[str],
    *,
    prompts: list[str] | None = None,
    similarity: list[str] | None = None,
    root: str | None = None,
    encoder: str | None = None,
    steps: list[str] | None = None,
    seeds: Literal["mean", "each"] = "mean",
    out: str | None = None,
) -> list[Path]:
    """Compare rankings of source tasks by how well they predict measured transfer.

    Transfer comes from CSV tables or from results.csv files of fits. A CSV has a row per source and
    a column per target, or the columns source, target, score and perhaps sample and seed; scores
    are percent. A source named no-transfer has the scores without transfer, and a column size the
    rows of the sources' training sets; empty cells are missing, and what follows a # is a comment.
    The name paper stands for the published table of 13 sources and 10 targets. In results, a run
    that starts from the prompt of another task is a transfer; the run that dev chose counts.

    It prints, as mean and standard deviation over targets in percent, nDCG, Regret@1, Regret@3, and
    with scores without transfer gain@1 and gain@3: the relative transfer of the best of the first 1
    or 3. random, and sources of equal similarity, count with their exact expectation.

    With out it writes a report with 95 % intervals, a CSV file for each table, and figures: the
    transfer by pair, source and target; the best of the first k; nDCG over steps; similarities; and
    t-SNE maps of the rows of each target's prompt and those of its best, second and worst source.

    Args:
        transfer: CSV tables, results.csv files, folders with such, or paper.
        prompts: prompt stores, folders of fits, prompt files or checkpoints; adds all rankings by
            prompts.
        similarity: CSV tables as of transfer, with similarities instead of scores; adds a ranking
            for each, by the name of its file.
        root: folder of few-shot files, or sandbox; adds size, where no table has it.
        encoder: id or folder of a sentence-transformers model; adds semb, on the files of root.
        steps: folders of fits of the target tasks with model.save_steps; the target prompts of each
            step rank the source prompts too, and the targets need no prompt among prompts.
        seeds: mean judges the scores averaged over seeds, as the paper's equations; each judges
            every seed by itself and averages the measures, as its code. At saved steps, each judges
            every target prompt by the scores of its own sample.
        out: folder for the report.

    Raises:
        FileNotFoundError, ValueError, NotADirectoryError: what lacks or is wrong, in a sentence.
    """
    from prompt_lab.analysis import selection, selection_sections
    from prompt_lab.analysis.sections import check_folder, write_report

    folder = None if out is None else check_folder(out)
    if steps and not prompts:
        raise ValueError("--steps needs prompts of the source tasks: give their stores: --prompts")
    table, notes = selection.read_transfer(transfer)
    targets, sources = table["target"].unique().tolist(), table["source"].unique().tolist()
    files = best_prompts(prompts or [])
    untuned = [task for task in targets if steps and task not in {tuned for tuned, _ in files}]
    if prompts:
        _check_prompts("evaluate", [] if untuned else targets, sources, files, prompts)
    tuned = files if prompts and not untuned else None
    rankings = _rankings(table, tuned, similarity or (), root, encoder)
    judged, by_step, more = selection.evaluate(table, rankings, seeds), None, []
    if steps:
        saved, more = selection.find_steps(steps, targets)
        by_step = selection.evaluate_steps(table, saved, files, seeds)
    counts = table.groupby(["target", "source"]).size()
    how = {"mean": "their mean scores", "each": "each by itself, then averaged"}[seeds]
    print(
        f"{len(counts)} pairs of {len(sources)} sources and {len(targets)} targets"
        f"{f', {counts.max()} seeds ({how})' if counts.max() > 1 else ''}; percent, mean ± "
        "standard deviation over targets"
    )
    print("".join(f"  {note}\n" for note in notes))
    shown = selection_sections.mean_measures(judged)[1].astype(str)
    print(text_table([*shown], shown.to_numpy().tolist()))
    nothing = judged.loc[(judged["ranking"] == "random") & judged["nDCG"].isna(), "target"]
    if len(nothing):
        print(f"no source scores above 0, so not judged: {', '.join(nothing)}")
    if untuned:
        print(f"without a final prompt, so judged at saved steps alone: {', '.join(untuned)}")
    if by_step is not None:
        _tell_steps(selection_sections.mean_measures(by_step, ("step", "ranking"))[0], more)
    if folder is None:
        return []
    sections = selection_sections.selection_sections(table, rankings, judged, by_step, tuned)
    return write_report([*sections], folder)


# ---- rankings ------------------------------------------------------------------------------------


def _check_prompts(
    method: str,
    targets: Sequence[str],
    sources: Sequence[str],
    files: Iterable[TaskSample],
    stores: Sequence[str] | None,
) -> None:
    if not stores:
        raise ValueError(f"{method} compares tuned prompts: give their stores with --prompts")
    held = {task for task, _ in files}
    for role, tasks in (("target", targets), ("source", sources)):
        if missing := [task for task in tasks if task not in held]:
            raise FileNotFoundError(
                f"{len(missing)} of {len(tasks)} {role} tasks have no prompt in "
                f"{', '.join(stores)}: {', '.join(missing)}; tune them first, or leave them out"
            )


def _loaded(
    files: dict[TaskSample, FoundPrompt], targets: Collection[str], sources: Collection[str]
) -> list[dict[TaskSample, Tensor]]:
    from prompt_lab.analysis.selection import load_prompts

    asked = {*targets, *sources}
    found = load_prompts({key: one for key, one in files.items() if key[0] in asked})
    return [{key: x for key, x in found.items() if key[0] in side} for side in (targets, sources)]


def _by_prompts(
    method: str, sides: list[dict[TaskSample, Tensor]], subspace: dict[str, Any]
) -> tuple[pd.DataFrame, str]:
    import numpy as np

    from prompt_lab.analysis.selection import PROMPT_RANKINGS, rank_by_prompts
    from prompt_lab.core.similarity import subspaces

    ranked, legend = rank_by_prompts(method, *sides, **subspace), PROMPT_RANKINGS[method][2]
    if subspace:
        found = [[subspaces(x[None], **subspace)[0] for x in side.values()] for side in sides]
        ours, theirs = ([basis.shape[1] for basis in side] for side in found)
        width, sizes = len(found[0][0]), sorted({*ours, *theirs})
        legend += (
            f": {' to '.join(map(str, dict.fromkeys((sizes[0], sizes[-1]))))} of {width} "
            "dimensions; between random subspaces of these sizes about "
            f"{math.sqrt(np.maximum.outer(ours, theirs).mean() / width):.3f}"
        )
    return ranked, legend


def _rankings(
    table: pd.DataFrame,
    files: dict[TaskSample, FoundPrompt] | None,
    similarity: Sequence[str],
    root: str | None,
    encoder: str | None,
) -> pd.DataFrame:
    import pandas as pd

    from prompt_lab.analysis.data_rankings import rank_by_data
    from prompt_lab.analysis.selection import prompt_rankings, read_table

    pairs = table[["target", "source"]].drop_duplicates()
    found = [pairs.assign(ranking="random", similarity=0.0)]
    sizes = table.set_index("source")["size"].dropna().to_dict()
    if sizes:
        found.append(pairs.assign(ranking="size", similarity=pairs["source"].map(sizes)))
    for method in ["size"] * bool(root and not sizes) + ["semb"] * bool(encoder):
        values, _ = rank_by_data(method, pairs, root, encoder)
        found.append(pairs.assign(ranking=method, similarity=values))
    if files is not None:
        found.append(prompt_rankings(*_loaded(files, {*pairs["target"]}, {*pairs["source"]})))
    for file in similarity:
        name = Path(file).stem
        if any(name in {*own["ranking"]} for own in found):
            raise ValueError(f"{file}: there is a method {name} already; rename the file")
        means = read_table(file).groupby(["target", "source"])["score"].mean()
        found.append(means.rename("similarity").reset_index().assign(ranking=name))
    return pd.concat(found, ignore_index=True)


# ---- what is told --------------------------------------------------------------------------------


def _sorted(ranked: pd.DataFrame) -> pd.DataFrame:
    return ranked.sort_values(["similarity", "source"], ascending=[False, True])


def _ranking_text(ranked: pd.DataFrame, counted: str = "samples") -> str:
    cells = []
    for place, row in enumerate(ranked.itertuples(), 1):
        spread = "" if math.isnan(row.std) else f" ± {_text(row.std)}"
        count = f"{row.count}{'' if row.same_sample else ' pairs'}"
        cells.append([f"{place}", row.source, f"{_text(row.similarity)}{spread}", count])
    text = text_table(["rank", "source", "similarity", counted], cells)
    if not ranked["same_sample"].all():
        text += "\npairs: no sample in common, so each of one task with each of the other"
    return text


def _text(value: float) -> str:
    return f"{value:.0f}" if abs(value) > 1 and float(value).is_integer() else f"{value:.3f}"


def _tell_steps(table: pd.DataFrame, notes: Sequence[str]) -> None:
    import numpy as np

    from prompt_lab.analysis.sections import number

    steps = table["step"].unique()
    shown = steps[np.linspace(0, len(steps) - 1, min(_MOST_STEPS, len(steps))).round().astype(int)]
    part = f" ({len(shown)} of {len(steps)})" if len(shown) < len(steps) else ""
    print(f"\nby step of the target prompts{part}; percent, mean over targets")
    print("".join(f"  {note}\n" for note in notes), end="")
    for name in ("nDCG", "Regret@1", "Regret@3"):
        grid = table.pivot(index="ranking", columns="step", values=name)
        grid = grid.loc[table["ranking"].unique(), shown]
        rows = [[str(x), *(number(y, digits=2) for y in row)] for x, row in grid.iterrows()]
        print(f"\n{text_table([name, *map(str, shown)], rows)}")
