"""How well a ranking of source tasks finds those that help a target task most.

nDCG and Regret@k are those of Lin et al. 2024, "Exploring the Effectiveness and Consistency of Task
Selection in Intermediate-Task Transfer Learning", equations 5 to 7, on scores in percent. Sources
of equal similarity are in random order: every measure is its exact expected value over all orders,
and RANDOM the ranking in which all are equal.

**Transfer** is a DataFrame with a row for each score: ``target``, ``source``, ``sample`` and
``seed`` (text, what tells scores of a pair apart), ``score`` in percent, ``baseline`` (mean score
of the target without transfer) and ``size`` (rows of the source's training set), NaN where unknown.
**Rankings** have ``ranking``, ``target``, ``source`` and ``similarity``, the highest first.

**A table of one's own** is a CSV file: wide, a row for each source, named in the first column, and
a column for each target; or long, with the columns source, target, score and perhaps sample and
seed. Either may have a column size. Empty cells are missing, and what follows a # is a comment.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from prompt_lab.analysis.tables import find_results, read_results, read_text
from prompt_lab.files.prompts import FoundPrompt, find_prompts
from prompt_lab.files.results import PLAIN_STARTS, choose_by_dev
from prompt_lab.files.vectors import check_compatible, listed

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.data.sampling import Key

Seeds = Literal["mean", "each"]

NO_TRANSFER = "no-transfer"
"""The source of scores without transfer."""

PAPER_TABLE = Path(__file__).parents[1] / "data" / "selection_transfer.csv"
"""Table 7 of Lin et al. 2024, and the sizes of its Table 2."""

KS = (1, 3)
"""The k of the measures that are told."""

_UNIT, _BY = {"unit_rows": True}, {"over": "source"}
PROMPT_RANKINGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "subspace": ("subspace_similarities", {}, "similarity of prompt subspaces, 0 to 1"),
    "feature": ("feature_similarities", {}, "cosine of mean rows, -1 to 1"),
    "feature-unit": ("feature_similarities", _UNIT, "cosine of means of rows of length 1, -1 to 1"),
    "unigram": ("unigram_similarities", {}, "cosine of the rows' means over width, -1 to 1"),
    "unigram-unit": ("unigram_similarities", _UNIT, "the same for rows of length 1, -1 to 1"),
    "max": ("max_similarities", {}, "mean over target rows of the largest cosine, -1 to 1"),
    "max-source": ("max_similarities", _BY, "mean over source rows of the largest cosine, -1 to 1"),
    "cosine": ("cosine_similarities", {}, "cosine of all numbers, -1 to 1"),
    "frobenius": ("frobenius_distances", {}, "minus the Frobenius norm of the difference"),
}
"""Rankings by prompts: function of `core.similarity`, its flags, and how to read its numbers."""

_ROW_BY_ROW = ("unigram", "unigram-unit", "cosine", "frobenius")
_RUN = ["task", "sample", "init_seed", "order_seed"]


# ---- measures ------------------------------------------------------------------------------------


def ndcg(scores: Sequence[float], similarities: Sequence[float]) -> float:
    """Normalised discounted cumulative gain of a ranking, at most 1; NaN if no score is above 0.

    DCG = sum over places i = 1, 2, ... of (2^score_i - 1) / log2(i + 1), over that of the best
    ranking (equations 5 and 6). The highest of ``similarities`` (S,) of S sources comes first.
    """
    from sklearn.metrics import dcg_score  # its ndcg_score takes no negative gains

    score = np.asarray(scores, float)
    if score.max() <= 0 or len(score) == 1:
        return 1.0 if score.max() > 0 else math.nan
    gains = (np.exp2(score - score.max()) - np.exp2(-score.max()))[None]  # over 2^max
    best = dcg_score(gains, gains, ignore_ties=True)
    return float(dcg_score(gains, np.asarray(similarities, float)[None]) / best)


def best_of_top_k(scores: Sequence[float], similarities: Sequence[float], k: int) -> float:
    """The highest score among the first k sources of a ranking; a ``ValueError`` for another k.

    Where g sources of equal similarity stand across place k, it is the mean over all choices of the
    m that still fit: the j-th smallest is the largest of them with C(j - 1, m - 1) / C(g, m).
    """
    score, likeness = np.asarray(scores, float), np.asarray(similarities, float)
    sure, left = -math.inf, k
    for value in np.unique(likeness)[::-1]:
        tied = np.sort(score[likeness == value])
        if len(tied) >= left:
            ways = math.comb(len(tied), left)
            chances = [math.comb(j, left - 1) / ways for j in range(len(tied))]
            return float(np.maximum(tied, sure) @ chances)
        sure, left = max(sure, tied[-1]), left - len(tied)
    raise ValueError(f"k is {k}, and there are {len(score)} sources: give 1 to {len(score)}")


def judge(
    scores: Sequence[float], similarities: Sequence[float], baseline: float = math.nan
) -> dict[str, float]:
    """All measures of one ranking, in percent; ``baseline`` is the score without transfer.

    ``nDCG``; for each k from 1 to S ``score@k`` of the best of the first k, ``Regret@k``, (max over
    all - score@k) / max over all (equation 7), NaN where no score is above 0, and ``gain@k``,
    (score@k - baseline) / baseline, NaN where no baseline is.
    """
    found, highest = {"nDCG": 100 * ndcg(scores, similarities)}, max(scores)
    for k in range(1, len(scores) + 1):
        best = found[f"score@{k}"] = best_of_top_k(scores, similarities, k)
        regret = max(0.0, (highest - best) / highest) if highest > 0 else math.nan
        gain = (best - baseline) / baseline if baseline > 0 else math.nan
        found |= {f"Regret@{k}": 100 * regret, f"gain@{k}": 100 * gain}
    return found


def evaluate(transfer: pd.DataFrame, rankings: pd.DataFrame, seeds: Seeds = "mean") -> pd.DataFrame:
    """Judge rankings of sources by measured transfer; both are tables as in the module.

    Scores of seeds are averaged before ranking ("mean": the equations), or each seed that all
    sources of a target have is judged and the measures are averaged ("each": the authors' code).

    Returns:
        A row for each ranking and target: ``sources``, ``first`` (the name), ``baseline``, and the
        columns of `judge`. A ``ValueError`` for similarities that are missing or not finite, or
        with "each" for a target without a seed that all its sources have.
    """
    pairs, grids, rows = transfer[["target", "source"]].drop_duplicates(), {}, []
    for target, own in transfer.groupby("target", sort=False):
        grid = own.pivot(index="source", columns=["sample", "seed"], values="score")
        grid = grid.loc[own["source"].unique()]
        grids[target] = grid.mean(axis=1).to_frame() if seeds == "mean" else grid.dropna(axis=1)
        if grids[target].empty:
            raise ValueError(
                f"{target}: no seed that all its sources have, so none can be judged by itself; "
                "add the missing scores, or take the mean over seeds"
            )
    baselines = transfer.groupby("target")["baseline"].first()
    for ranking, own in rankings.groupby("ranking", sort=False):
        likeness = pairs.merge(own, on=["target", "source"], how="left")
        lost = likeness[~np.isfinite(likeness["similarity"])]
        if len(lost):
            names = listed(f"{x.source} for {x.target}" for x in lost.itertuples())
            raise ValueError(
                f"{ranking}: no similarity of {len(lost)} of {len(pairs)} pairs that were "
                f"measured: {names}; add them, or take the pairs out of the transfer table"
            )
        for target, of_target in likeness.groupby("target", sort=False):
            values, grid = of_target["similarity"].to_numpy(), grids[target]
            judged = [judge(grid[at].to_numpy(), values, baselines[target]) for at in grid]
            top = of_target.loc[values == values.max(), "source"].tolist()
            facts = {"ranking": ranking, "target": target, "sources": len(values)}
            facts["first"] = top[0] if len(top) == 1 else f"{len(top)} equal ones"
            facts["baseline"] = baselines[target]
            rows.append(facts | pd.DataFrame(judged).mean().to_dict())
    most = range(1, max(*KS, pairs.groupby("target").size().max()) + 1)
    names = [f"{what}@{k}" for what in ("Regret", "gain", "score") for k in most]
    return pd.DataFrame(rows, columns=[*facts, "nDCG", *names])


# ---- measured transfer ---------------------------------------------------------------------------


def read_transfer(places: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """Measured transfer from CSV tables and from results of fits.

    In results, a run is a transfer if it starts from the prompt of another task, and without
    transfer if from none; the one that dev chose counts. A task as its own source is left out.
    ``places`` are CSV tables, results.csv files, folders with such, or "paper", for its table 7.

    Returns:
        Transfer, as in the module; and notes on what was left out, and what is missing.

    Raises:
        FileNotFoundError: a file or folder that is not there.
        ValueError: a table that cannot be read, results of several settings, no transfer in them, a
            score twice, scores that are no percent, or a target without any source.
    """
    tables, files, notes = [], {}, []
    for place in places:
        path = PAPER_TABLE if place == "paper" else Path(place)
        if path.is_dir() or (path.is_file() and b"fit_id" in path.open("rb").readline()):
            files |= dict.fromkeys(find_results(path))
        else:
            tables.append(read_table(path))
    if files:
        found, notes = _from_results(pd.concat([*map(read_results, files)], ignore_index=True))
        tables.append(found)
    every = pd.concat(tables, ignore_index=True)
    sizes = every.dropna(subset="size").groupby("source")["size"]
    if len(several := sizes.nunique().loc[lambda count: count > 1]):
        raise ValueError(f"several sizes of {listed(several.index)}: give one number for each")
    table = every.dropna(subset="score")
    _check_scores(table)
    is_base, is_own = table["source"] == NO_TRANSFER, table["source"] == table["target"]
    transfer = table[~is_base & ~is_own].reset_index(drop=True)
    lacking = [x for x in every["target"].unique() if x not in {*transfer["target"]}]
    if lacking or transfer.empty:
        names = listed(lacking) or "any target"
        raise ValueError(f"no source has a score for {names}: add one, or leave the target out")
    transfer["size"] = transfer["source"].map(sizes.first())
    baselines = table[is_base].groupby("target")["score"].mean()
    transfer["baseline"] = transfer["target"].map(baselines).astype(float)
    if own := sorted({*table[is_own]["source"]}):
        notes.append(f"left out, a task as its own source: {listed(own)}")
    counts = transfer.groupby(["target", "source"]).size()
    grid = itertools.product(transfer["target"].unique(), transfer["source"].unique())
    missing = [f"{s} for {t}" for t, s in grid if s != t and (t, s) not in counts.index]
    if missing:
        notes.append(f"not measured, so not ranked for that target: {listed(missing)}")
    most = len(transfer[["sample", "seed"]].drop_duplicates())
    if len(few := counts[counts < most]):
        names = listed(f"{source} for {target}" for target, source in few.index)
        notes.append(f"measured with fewer than {most} seeds: {names}")
    return transfer, notes


def _check_scores(table: pd.DataFrame) -> None:
    twice = table[table.duplicated(["source", "target", "sample", "seed"])]
    if len(twice):
        source, target = twice.iloc[0][["source", "target"]]
        raise ValueError(
            f"{len(twice)} scores stand more than once, such as that of {source} for {target}: "
            "keep one, or tell them apart in a column seed"
        )
    if len(wrong := table.loc[table["score"].abs() > 100, "score"]):
        raise ValueError(f"scores such as {wrong.iloc[0]:g}: give percent, at most 100")
    if table["score"].abs().max() <= 1:
        raise ValueError("all scores are at most 1: give percent, which the gains of nDCG need")


def read_table(path: str | Path) -> pd.DataFrame:
    """A CSV table of numbers for pairs of tasks, scores or similarities, as in the module.

    Columns ``source``, ``target``, ``sample``, ``seed``, ``score`` and ``size``. A
    ``FileNotFoundError`` for no such file, a ``ValueError`` for no such table.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}: give a CSV table")
    cells = read_text(path, "CSV table", header=None, comment="#", encoding="utf-8-sig")
    cells = cells.fillna("").map(str.strip)
    header, is_long = [*cells.iloc[0]], {"source", "target", "score"} <= {*cells.iloc[0]}
    optional = ("target", "score", "sample", "seed", "size") if is_long else ("size",)
    others = [x for x in header if x not in optional][1:]  # the first is the source
    if len({*header}) < len(header) or "" in header[1:] or bool(others) == is_long:
        raise ValueError(
            f"{path} has the columns {', '.join(header)}: give source, target, score and perhaps "
            "sample, seed and size; or a row for each source, a column for each target and perhaps "
            "size, each name once"
        )
    table = cells.iloc[1:].set_axis(header if is_long else ["source", *header[1:]], axis=1)
    if not is_long:
        known = ["source", "size"] if "size" in table else ["source"]
        table = table.melt(known, others, "target", "score")
    names = ["source", "target", "sample", "seed", "score", "size"]
    table = table.reindex(columns=names).fillna("")
    if (table[["source", "target"]] == "").any(axis=None):
        raise ValueError(f"{path}: a row without source or target; {NO_TRANSFER} stands for none")
    for name in ("score", "size"):
        numbers = pd.to_numeric(table[name], errors="coerce").astype(float)
        numbers = numbers.where(np.isfinite(numbers))
        if (wrong := numbers.isna() & (table[name] != "")).any():
            source, target, cell = table.loc[wrong, ["source", "target", name]].iloc[0]
            raise ValueError(
                f"{path}: {name} of {source} for {target} is {cell!r}, not a finite number; leave "
                "missing ones empty"
            )
        table[name] = numbers
    return table


def _from_results(runs: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    tuned = runs[runs["variant"] == "tuned"]
    source = tuned["start_of"].where(tuned["start"] == "prompt", "")
    tuned = tuned.assign(source=source.mask(tuned["start"].isin(PLAIN_STARTS), NO_TRANSFER))
    is_other = ~tuned["source"].isin(["", NO_TRANSFER]) & (tuned["source"] != tuned["task"])
    targets = tuned.loc[is_other, "task"].unique()
    if not len(targets):
        raise ValueError(
            "no run starts from the prompt file of another task (model.init.name file, with "
            "model.init.source_tasks or a .safetensors file as model.init.path), so there is no "
            "transfer to compare with"
        )
    used = tuned[tuned["task"].isin(targets) & (tuned["source"] != "")]
    for name in ("method", "backbone", "num_virtual_tokens", "metric_variant", "shots", "start"):
        own = used[used["source"] == NO_TRANSFER] if name == "start" else used
        by = own["task"] if name in ("start", "shots") else pd.Series("all tasks", own.index)
        for task, kinds in own[name].groupby(by):
            if kinds.nunique() > 1:
                known = ", ".join(sorted(map(str, kinds.unique())))
                raise ValueError(
                    f"the transfer runs of {task} differ in {name} ({known}): give the result "
                    "files of one"
                )
    chosen = choose_by_dev(used, ["source", *_RUN, "start_seed"])
    scored = chosen[chosen["test"].notna()]
    others, lost = len(tuned) - len(used), len(chosen) - len(scored)
    notes = [f"left out, {others} tuned runs of other tasks or other starts"] * bool(others)
    notes += [f"left out, {lost} runs without a test score"] * bool(lost)
    seed = scored["init_seed"] + "/" + scored["order_seed"]
    table = scored[["source", "task", "sample"]].rename(columns={"task": "target"})
    return table.assign(seed=seed, score=100 * scored["test"], size=math.nan), notes


# ---- rankings by prompts -------------------------------------------------------------------------


def load_prompts(files: Mapping[Key, FoundPrompt]) -> dict[Key, Tensor]:
    """Prompts (N, D); a ``ValueError`` for several backbones or widths, NaN, or only zeros."""
    check_compatible(*files.values(), any_length=True)
    for one in files.values():
        if not one.prompt.prompt.any():
            raise ValueError(f"{one.where} is all zeros: tune it again or leave its task out")
    return {key: one.prompt.prompt for key, one in files.items()}


def rank_by_prompts(
    method: str, targets: Mapping[Key, Tensor], sources: Mapping[Key, Tensor], **subspace: Any
) -> pd.DataFrame:
    """How alike source tasks are to target tasks by their prompts.

    Tasks that have samples in common are compared on those, sample by sample; others by all pairs
    of their prompts (N, D). ``subspace`` are ``energy`` and ``rank`` of `core.similarity`. A row
    for each target and source has ``similarity`` (mean), ``std`` (ddof 1), ``count`` of pairs, and
    ``same_sample``. A ``ValueError`` for several lengths where rows are compared, or as there.
    """
    import torch

    from prompt_lab.core import similarity

    name, flags, _ = PROMPT_RANKINGS[method]
    ours, theirs = {}, {}
    for bank, groups in ((targets, ours), (sources, theirs)):
        for key, prompt in bank.items():
            groups.setdefault(len(prompt), []).append(key)
    if method in _ROW_BY_ROW and len(lengths := ours | theirs) > 1:
        names = listed(f"{keys[0][0]} {size}" for size, keys in lengths.items())
        raise ValueError(
            f"{method} compares prompts row by row, and these have several lengths ({names}): give "
            "prompts of one length"
        )
    rows = []
    for one, other in itertools.product(ours.values(), theirs.values()):
        banks = torch.stack([targets[x] for x in one]), torch.stack([sources[x] for x in other])
        matrix = getattr(similarity, name)(*banks, **flags, **subspace)
        pairs = zip(itertools.product(one, other), matrix.flatten().tolist(), strict=True)
        rows += [(*target, *source, value) for (target, source), value in pairs]
    columns = ["target", "target_sample", "source", "source_sample", "similarity"]
    pairs = pd.DataFrame(rows, columns=columns)
    if method == "frobenius":
        pairs["similarity"] *= -1
    pairs["same_sample"] = pairs["target_sample"] == pairs["source_sample"]
    has_same = pairs.groupby(["target", "source"])["same_sample"].transform("any")
    used = pairs[pairs["same_sample"] | ~has_same].groupby(["target", "source"], sort=False)
    table = used["similarity"].agg(similarity="mean", std="std", count="size")
    return table.assign(same_sample=used["same_sample"].all()).reset_index()


def prompt_rankings(targets: Mapping[Key, Tensor], sources: Mapping[Key, Tensor]) -> pd.DataFrame:
    """All `PROMPT_RANKINGS` of prompts, as `rank_by_prompts` gives each, with ``ranking``."""
    found = [rank_by_prompts(x, targets, sources).assign(ranking=x) for x in PROMPT_RANKINGS]
    return pd.concat(found, ignore_index=True)


# ---- over steps ----------------------------------------------------------------------------------


def find_steps(folders: Sequence[str], targets: Sequence[str]) -> tuple[pd.DataFrame, list[str]]:
    """The prompts of target tasks that fits with ``model.save_steps`` kept.

    Of a grid, the run with the best dev score at any step counts at all steps. Prompts of other
    tasks, and those that start from another task, are left out.

    Returns:
        A row for each ``step``, ``task``, ``sample`` (-1 for none), ``init_seed`` and
        ``order_seed``, with the prompt in ``found``; and notes.

    Raises:
        FileNotFoundError: a folder without saved steps, or a step without a prompt of some target.
        ValueError: a damaged prompt file.
    """
    rows = []
    for folder in {Path(x).resolve(): Path(x) for x in folders}.values():
        places = {int(x.name): x for x in folder.glob("steps/*") if x.name.isdecimal()}
        if not places:
            raise FileNotFoundError(
                f"no saved steps in {folder}: give folders of fits of the target tasks with "
                "model.save_steps"
            )
        for step in sorted(places):
            for one in find_prompts(places[step]):
                fit = str(one.path.parents[1] / one.path.name)
                facts = {"step": step, "dev": one.dev, "found": one, "fit": fit}
                rows.append({**one.metadata, **facts})
    every = pd.DataFrame(rows, columns=[*_RUN, "start", "run", "step", "dev", "found", "fit"])
    table = every[every["task"].isin(targets) & every["start"].isin(PLAIN_STARTS)].copy()
    others = len(every) - len(table)
    table[_RUN[1:]] = table[_RUN[1:]].fillna(-1).astype(int)
    runs = table.groupby([*_RUN, "fit"], sort=False)[["dev", "run"]]
    runs = runs.agg({"dev": "max", "run": "first"}).reset_index()
    table = table[table["fit"].isin(choose_by_dev(runs, _RUN)["fit"])]
    table = table.sort_values("step", kind="stable", ignore_index=True)
    lacks = []
    for step in sorted(every["step"].unique()):
        held = {*table.loc[table["step"] == step, "task"]}
        if names := listed(x for x in targets if x not in held):
            lacks.append(f"step {step} lacks {names}")
    if lacks:
        raise FileNotFoundError(
            f"not every saved step has all target tasks: {listed(lacks)}; fit all from a start "
            "without transfer with the same model.save_steps (a run that patience ended has no "
            "later ones)"
        )
    counts = table.groupby("step").size()
    fewer = [f"{count} at step {step}" for step, count in counts.items() if count < counts.max()]
    notes = [f"left out, {others} saved prompts of other tasks or other starts"] * bool(others)
    if fewer:
        notes.append(f"not all of {counts.max()} target prompts were saved: {listed(fewer)}")
    return table, notes


def evaluate_steps(
    transfer: pd.DataFrame, steps: pd.DataFrame, sources: Mapping[Key, FoundPrompt], seeds: Seeds
) -> pd.DataFrame:
    """Judge the rankings by the target prompts of each step (Lin et al. 2024, section 6).

    With "mean" the similarities of a target's prompts are averaged, and the ranking is judged by
    the mean scores. With "each" every prompt is judged by the scores of its own sample (their means
    over seeds), and the measures are averaged. ``steps`` are as `find_steps` gives them,
    ``sources`` the best prompts by task and sample. As `evaluate`, with a column ``step``; errors
    as `load_prompts`, and with "each" for a sample of which a source has no score.
    """
    steps = steps.assign(prompt=[x.where for x in steps["found"]])
    own = {(x.prompt, x.sample): x.found for x in steps.itertuples()}
    used = {key: one for key, one in sources.items() if key[0] in {*transfer["source"]}}
    prompts = load_prompts(own | used)
    bank, judged = {key: prompts[key] for key in used}, []
    for step, of_step in steps.groupby("step"):
        keys = of_step[["prompt", "sample"]].itertuples(index=False, name=None)
        targets = {key: prompts[key] for key in keys}
        rankings = prompt_rankings(targets, bank).rename(columns={"target": "prompt"})
        rankings = rankings.merge(of_step[["prompt", "task", "sample"]], on="prompt")
        rankings = rankings.rename(columns={"task": "target"})
        if seeds == "mean":
            pairs = rankings.groupby(["ranking", "target", "source"], sort=False)["similarity"]
            judged.append(evaluate(transfer, pairs.mean().reset_index()).assign(step=step))
            continue
        for (task, sample, _), of_prompt in rankings.groupby(["target", "sample", "prompt"]):
            of_task = transfer[transfer["target"] == task]
            scores = of_task[of_task["sample"] == ("" if sample < 0 else str(sample))]
            if lacking := sorted({*of_task["source"]} - {*scores["source"]}):
                raise ValueError(
                    f"a prompt of {task} is judged by the transfer scores of its sample, {sample}, "
                    f"and {listed(lacking)} have none: add them, or take the mean over seeds"
                )
            judged.append(evaluate(scores, of_prompt).assign(step=step))
    found = pd.concat(judged).groupby(["step", "ranking", "target"], sort=False)
    return found.mean(numeric_only=True).reset_index()
