"""Sections of a report: lines, scores, relative gains, sets of tasks, dimensions, tasks and tests.

A section is a title, a legend, a table of unrounded numbers, the same as text, and figures. It is
made of the runs that `tables.read_lines` gives, and counts them out again.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.statistics import LEVEL, bootstrap, holm, t_test
from prompt_lab.analysis.tables import (
    POINT,
    SHARED,
    TASK,
    chosen_runs,
    count_out,
    flag_table,
    group_rank,
    is_method,
    mean_over_tasks,
    shots_rank,
    task_scores,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RULE = (
    "A task is left out of the mean where its score or its reference is missing, and where its "
    "reference is zero or negative, for which a ratio says nothing."
)
INTERVAL = "95 % interval: seeded bootstrap over tasks and runs."
BOLD = "Bold: the best of the lines with the usual number of tasks, baselines apart."


@dataclass
class Section:
    """A part of a report.

    Attributes:
        name: of its CSV file.
        title: its heading.
        legend: what the numbers are.
        table: unrounded numbers, a row for each thing.
        shown: the same as text, as people read it: Markdown, where ``**`` is bold and a backslash
            stands before a mark that is meant as such (`literal`).
        figures: by the names of their files.
    """

    name: str
    title: str
    legend: str
    table: pd.DataFrame
    shown: pd.DataFrame
    figures: dict[str, Figure] = field(default_factory=dict)


# ---- numbers as text -----------------------------------------------------------------------------


def number(value: float, sign: str = "", digits: int = 3) -> str:
    """A number, or a dash where there is none."""
    return "–" if pd.isna(value) else f"{value:{sign}.{digits}f}"


def counted(count: float, what: str) -> str:
    """A count with its noun, ``2 tasks``."""
    return f"{count:g} {what}" + ("" if count == 1 else "s")


def literal(text: str) -> str:
    """A text that stays as it is in a table of Markdown, whatever marks it holds."""
    return re.sub(f"[{re.escape(string.punctuation)}]", r"\\\g<0>", text)


def plus_minus(
    means: Sequence[float] | pd.Series,
    stds: Sequence[float] | pd.Series,
    digits: int = 3,
    sign: str = "",
) -> list[str]:
    """Means with their standard deviations, where these are known."""
    return [
        number(x, sign, digits) + ("" if pd.isna(x + y) else f" ± {y:.{digits}f}")
        for x, y in zip(means, stds, strict=True)
    ]


def intervals(low: pd.Series, high: pd.Series, sign: str = "", digits: int = 3) -> list[str]:
    """Both ends of intervals."""
    ends = zip(low, high, strict=True)
    texts = [[number(x, sign, digits) for x in both] for both in ends]
    return ["–" if "–" in both else " to ".join(both) for both in texts]


def p_values(values: pd.Series) -> list[str]:
    """p-values, with a star up to `LEVEL`."""
    texts = ["–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}" for p in values]
    return [f"{x} *" if p <= LEVEL else x for x, p in zip(texts, values, strict=True)]


def bold_best(texts: Sequence[str], values: pd.Series) -> list[str]:
    """The texts, those of the highest value bold; none where there is nothing to be better than."""
    known = values.dropna()
    if known.nunique() < 2:
        return [*texts]
    return [f"**{x}**" if y == known.max() else x for x, y in zip(texts, values, strict=True)]


def _bold_line(
    texts: Sequence[str], table: pd.DataFrame, value: str, tasks: str = "tasks"
) -> list[str]:
    like = table["variant"].notna() & is_method(table)
    usual = table.loc[like & (table[tasks] > 0), tasks].mode().max()
    return bold_best(texts, table[value].where(like & (table[tasks] == usual)))


def span(values: pd.Series) -> str:
    """The least and the most of some numbers."""
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def file_name(words: object) -> str:
    """Words as a part of a file name."""
    return "_".join(re.findall(r"\w+", str(words)))


def pages(
    stem: str, table: pd.DataFrame, value: str, looks: plots.Looks, note: str, **style: Any
) -> dict[str, Figure]:
    """Figures of dots, with as many tasks as a page takes, in order of ontology and name."""
    if not len(table):
        return {}
    ranks = {row.task: group_rank(row.ontology) for row in table.itertuples()}
    tasks = sorted(ranks, key=lambda task: (ranks[task], task))
    table = table.assign(at=table["task"].map(tasks.index)).sort_values("at", kind="stable")
    parts = table["at"] // plots.places_on_page(table["label"].nunique())
    name = stem if parts.nunique() == 1 else stem + "-{}"
    return {
        name.format(at + 1): plots.dots(part, value, looks, note, **style)
        for at, part in table.groupby(parts)
    }


def _counts(table: pd.DataFrame, **columns: str) -> tuple[str, dict[str, pd.Series]]:
    """Counts that all rows share as words for the legend, the others as columns.

    Baselines have fewer runs, which says nothing; but their tasks count.
    """
    own = table[is_method(table)]
    seen = {name: (table if name == "tasks" else own)[x] for name, x in columns.items()}
    same = {name: count.iloc[0] for name, count in seen.items() if count.nunique() == 1}
    words = " and ".join(counted(count, name[:-1]) for name, count in same.items())
    apart = any(table[columns[name]].nunique() > 1 for name in same)
    rest = {name: table[x] for name, x in columns.items() if name not in same}
    return (f"{words} in every row{', baselines apart' * apart}. " if words else ""), rest


# ---- lines and scores ----------------------------------------------------------------------------

_FACTS = [
    *("method", "backbone", "stage", "start", "num_virtual_tokens", "intrinsic_dim", "shots"),
    *("optimizer", "learning_rate", "batch_size", "decoding", "metric_variant"),
]


def lines_section(runs: pd.DataFrame) -> Section:
    """What each line is: how many runs of what, and the settings in which lines differ."""
    own = runs[~runs["line"].isin(SHARED)]
    flags = flag_table(own)
    facts = pd.concat([own[_FACTS], flags.loc[:, flags.nunique() > 1]], axis=1)
    lines, counts = {}, {}
    for line, part in own.groupby("line", sort=False):
        status = part["status"].str.lower()
        counts = {"runs": len(part), "tasks": part["task"].nunique()}
        for name in ("sample", "init_seed", "order_seed"):
            known = part.loc[part[name] != "", name]
            counts[f"{name.replace('_', ' ')}s"] = known.nunique()
        counts["failed"] = status.str.match("failed|diverged").sum()
        counts["unfinished"] = (status == "training").sum()
        counts["without test score"] = part["test"].isna().sum()
        for split in ("train", "dev", "test"):
            counts[f"most rows cut in {split}"] = part[f"cut_{split}"].fillna(0).max()
        lines[line] = {name: f"{count:g}" for name, count in counts.items()}
        lines[line] |= {name: _values(facts.loc[part.index, name]) for name in facts}
    table = pd.DataFrame(lines).rename_axis("what")
    differs, is_count = table.nunique(axis=1) > 1, table.index.isin([*counts])
    keep = np.where(is_count, (table != "0").any(axis=1), differs)
    shown = table[keep | (table.shape[1] == 1) & table.index.isin(["method", "backbone"])]
    twice, shared = runs.attrs.get("twice", 0), len(runs) - len(own)
    legend = (
        f"{counted(len(own), 'run')} of {counted(own['task'].nunique(), 'task')}"
        + (f", and {shared} of baselines that all lines share. " if shared else ". ")
        + (f"{twice} runs stand in several files and count once. " if twice else "")
        + "Settings in which no line differs are left out."
    )
    shown = shown.rename_axis("").reset_index()
    return Section("lines", "Lines", legend, table.reset_index(), shown)


def _values(column: pd.Series) -> str:
    values = sorted({x for x in column if pd.notna(x) and x != ""})
    return ", ".join(f"{x:g}" if isinstance(x, float) else str(x).strip('"') for x in values)


def scores_section(runs: pd.DataFrame, scores: pd.DataFrame) -> Section:
    """Mean test score of each point over its tasks, with dots for each task."""
    table = mean_over_tasks(scores)
    ends = {
        label: bootstrap([tests for _, tests in own.groupby("task", sort=False)["test"]])
        for label, own in chosen_runs(runs).groupby("label", sort=False)
    }
    table[["low", "high"]] = [ends[label] for label in table["label"]]
    count_out(runs, table)
    words, counts = _counts(table, tasks="tasks", runs="scored")
    shown = pd.DataFrame({"line": table["label"]})
    shown["score"] = _bold_line(plus_minus(table["score"], table["std"]), table, "score")
    shown["95 % interval"] = intervals(table["low"], table["high"])
    shown = shown.assign(**counts)
    if table["failed"].any():
        shown["failed"] = table["failed"]
    legend = (
        "Mean test score ± standard deviation. Of the runs that differ in learning rate or batch "
        "size alone, the one of the best dev score counts (ties: the earlier). A task's score is "
        "the mean over seeds, then over samples, and its deviation (ddof 1) that of all its runs "
        f"that count; both are means over tasks here. {words}{INTERVAL} {BOLD}"
    )
    note = "test score; bars: standard deviation over samples and seeds"
    own = _few(scores[is_method(scores) & scores["score"].notna()])
    figures = pages("scores", own, "score", plots.looks(scores), note, spread="std")
    return Section("scores", "Scores", legend, table, shown, figures)


def _few(table: pd.DataFrame) -> pd.DataFrame:
    """Of many points those of the largest intrinsic dimension and K, which a figure can show."""
    if table["label"].nunique() <= 6:
        return table
    largest = table.groupby("family")["intrinsic_dim"].transform("max")
    table = table[table["intrinsic_dim"].isna() | (table["intrinsic_dim"] == largest)]
    ranks = table["shots"].map(shots_rank)
    return table[ranks == ranks.groupby(table["name"]).transform("max")]


# ---- relative to a reference ---------------------------------------------------------------------


def gains_section(runs: pd.DataFrame, ratios: pd.DataFrame) -> Section:
    """E_rel and ARG of each point against a reference, with a test and the gains of each task."""
    reference = ratios["reference"].iloc[0]
    table = relative_means(runs, ratios)
    count_out(runs, table)
    is_other = (table["line"] != reference) | ~is_method(table)
    table["p"] = table["p"].where(is_method(table) & is_other)
    table["p_corrected"] = holm(table["p"])
    own = table[is_other & (table["e_rel_tasks"] > 0)]
    columns = {"tasks": "e_rel_tasks", "runs": "e_rel_runs", "samples": "samples"}
    words, counts = _counts(own, **columns)
    shown = own[["label"]].rename(columns={"label": "line"})
    texts = plus_minus(own["e_rel"], own["e_rel_std"])
    shown["E_rel"] = _bold_line(texts, own, "e_rel", "e_rel_tasks")
    shown["95 % interval"] = intervals(own["low"], own["high"])
    shown["ARG (%)"] = plus_minus(100 * own["e_rel"] - 100, 100 * own["arg_std"], 1, "+")
    both = zip(own["shared_mean"], own["reference_mean"], strict=True)
    means = [f"{number(x)} : {number(y)}" for x, y in both]
    shown = shown.assign(**{"score : reference": means, "p": p_values(own["p_corrected"])})
    shown = shown.assign(**counts)
    gains = ratios[is_method(ratios) & (ratios["line"] != reference)]
    reasons = [
        f"{why}: {', '.join(dict.fromkeys(of_why['task']))}"
        for why, of_why in gains[gains["left_out"] != ""].groupby("left_out", sort=False)
    ]
    legend = (
        f"Against {reference}. E_rel: mean over tasks of score / reference, ± the mean of the "
        "tasks' deviations / reference. ARG: average relative gain, E_rel less 1, ± standard "
        "deviation (ddof 1) over samples of a sample's own ARG. Score : reference are means over "
        f"the tasks that both have. {RULE} {words}{INTERVAL} p: two-sided paired t-test of the "
        f"tasks' scores, corrected after Holm over the "
        f"{counted(own['p'].notna().sum(), 'test')} of this table; *: at most {LEVEL:g}. {BOLD}"
        + (f" Left out, {'; '.join(reasons)}." if reasons else "")
    )
    name = f"gains-{file_name(reference)}"
    drawn, note = plots.looks(runs), f"relative gain over {reference} (%)"
    gains = _few(gains[gains["ratio"].notna()])
    spread = 100 * gains["std"] / gains["reference_score"]
    gains = gains.assign(gain=100 * gains["ratio"] - 100, spread=spread)
    bars = f"{note}; bars: standard deviation"
    figures = pages(name, gains, "gain", drawn, bars, spread="spread", level=0.0)
    if gains["task"].nunique() >= 10:
        figures[f"{name}-violins"] = plots.violins(gains, "gain", "label", drawn, note, 0.0)
    return Section(name, f"Relative to {reference}", legend, table, shown, figures)


def relative_means(runs: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """A row for each point: E_rel, the spread of ARG over samples, means of both, a test."""
    base = ratios[(ratios["line"] == ratios["reference"]) & is_method(ratios)]
    label_of = {(x.task, x.shots): x.label for x in base.itertuples()}
    chosen, keys = chosen_runs(runs), ["task", "shots", "sample"]
    tests = dict([*chosen.groupby(["label", "task"], sort=False)["test"]])
    cells = chosen.groupby(["label", *keys], sort=False)["test"].mean().reset_index()
    of_base = cells[cells["label"].isin(base["label"])].drop(columns="label")
    cells = cells.merge(of_base, on=keys, suffixes=("", "_base"))
    cells = cells[(cells["test_base"] > 0) & cells["test"].notna()]
    rows = []
    for point, own in ratios.groupby(POINT, dropna=False, sort=False):
        label = own["label"].iloc[0]
        both = own[own["score"].notna() & own["reference_score"].notna()]
        used = own[own["ratio"].notna()]
        pairs = cells[(cells["label"] == label) & cells["task"].isin(used["task"])]
        gains = (pairs["test"] / pairs["test_base"] - 1).groupby(pairs["sample"]).mean()
        bases = [tests[label_of[x.task, x.shots], x.task] for x in used.itertuples()]
        low, high = bootstrap([tests[label, task] for task in used["task"]], bases)
        test = t_test(both["score"], both["reference_score"], paired=True)
        row = dict(zip(POINT, point, strict=True)) | {"reference": own["reference"].iloc[0]}
        row |= {"e_rel": used["ratio"].mean(), "e_rel_tasks": len(used)}
        row |= {"e_rel_std": (used["std"] / used["reference_score"]).mean()}
        row |= {"e_rel_runs": used["scored"].sum(), "low": low, "high": high}
        row |= {"arg_std": gains.std(), "samples": len(gains), "shared_tasks": len(both)}
        row |= {"shared_mean": both["score"].mean()}
        row |= {"reference_mean": both["reference_score"].mean()}
        row |= {name: test[name] for name in ("difference", "t", "df", "p")}
        row["left_out"] = " ".join(own.loc[own["left_out"] != "", "task"])
        rows.append(row | {"runs": own["runs"].sum()})
    return pd.DataFrame(rows)


# ---- sets of tasks and intrinsic dimensions ------------------------------------------------------


def sets_sections(
    kind: str, scores: pd.DataFrame, sets: pd.Series, ratios: Sequence[pd.DataFrame]
) -> Iterator[Section]:
    """Means over the tasks of each set, such as an ontology group: scores, then each E_rel."""
    order = sorted(sets.unique(), key=group_rank)
    for table, value, title, name in _valued(scores.assign(set=sets), ratios):
        means = mean_over_tasks(table, value, "spread", [*POINT, "set"])
        means = means.rename(columns={value: "mean"})
        grid = means.pivot_table(index="label", columns="set", values="mean", sort=False)
        grid = grid.reindex(columns=[x for x in order if x in grid])
        stem, figures = f"{name}-by-{kind}", {}
        if grid.notna().to_numpy().any():  # not where every reference is zero
            figures[stem] = plots.heatmap(grid, title, 1.0 if value == "ratio" else None)
        shown, words = _pivot(means, "label", "set", order)
        legend = f"{title} over the tasks of each set. {words} {BOLD}"
        yield Section(stem, f"{title} by {kind}", legend, means, shown, figures)


def dimension_sections(scores: pd.DataFrame, ratios: Sequence[pd.DataFrame]) -> Iterator[Section]:
    """Means over the intrinsic dimension, as a table and as curves."""
    order = sorted(scores["intrinsic_dim"].dropna().unique())
    drawn = plots.looks(scores, "family")
    for table, value, title, name in _valued(scores, ratios) if order else ():
        has = table["intrinsic_dim"].notna()
        means = mean_over_tasks(table[has], value, "spread").rename(columns={value: "mean"})
        means = means.sort_values("intrinsic_dim", kind="stable")
        shown, words = _pivot(means, "family", "intrinsic_dim", order)
        stem, figures = f"{name}-by-dimension", {}
        if len(order) > 1 and means["mean"].notna().any():
            style = ("intrinsic dimension", title, "std", 1.0 if value == "ratio" else None)
            figures[stem] = plots.lines(means, "intrinsic_dim", "mean", "family", drawn, *style)
        whole = table[~has & is_method(table)].groupby("label", sort=False)[value].mean().dropna()
        beside = ", ".join(f"{label} {x:.3f}" for label, x in whole.items())
        legend = f"{title} in a subspace, ± standard deviation over runs, mean over tasks. {words}"
        legend += f" {BOLD}"
        legend += f" Without a subspace: {beside}." if beside else ""
        yield Section(stem, f"{title} by intrinsic dimension", legend, means, shown, figures)


def _valued(
    scores: pd.DataFrame, ratios: Sequence[pd.DataFrame]
) -> Iterator[tuple[pd.DataFrame, str, str, str]]:
    """Scores, then ratios to every reference: a table, its value, title and name."""
    yield scores.assign(spread=scores["std"]), "score", "Mean score", "score"
    for table in ratios:
        spread = table["std"] / table["reference_score"]
        extra = {name: scores[name].to_numpy() for name in scores if name not in table}
        name = table["reference"].iloc[0]
        table = table.assign(spread=spread.where(table["ratio"].notna()), **extra)
        yield table, "ratio", f"E_rel against {name}", f"e_rel-{file_name(name)}"


def _pivot(
    means: pd.DataFrame, index: str, columns: str, order: Sequence[Any]
) -> tuple[pd.DataFrame, str]:
    """Means as text, a row for each label and a column for each value; and of how many tasks."""
    shown = pd.DataFrame({"line": list(dict.fromkeys(means[index]))})
    words = []
    for place in order:
        own = means[means[columns] == place].set_index(index).reindex(shown["line"])
        name = f"{place:g}" if isinstance(place, float) else str(place)
        shown[name] = _bold_line(plus_minus(own["mean"], own["std"]), own, "mean")
        counts = own.loc[own["tasks"] > 0, "tasks"]
        words += [f"{name}: {span(counts)}"] * (len(counts) > 0)
    return shown, f"Tasks: {', '.join(words) or 'none'}."


# ---- tasks, starts and K -------------------------------------------------------------------------


def task_section(runs: pd.DataFrame) -> Iterator[Section]:
    """Scores of every task and K, a column for each line and start; over K also curves."""
    tuned = runs[is_method(runs)]
    over_k = tuned["shots"].nunique() > 1
    tuned = pd.concat([tuned, *_initial_prompts(tuned, runs)]) if over_k else tuned
    if not len(tuned):
        return
    table = task_scores(tuned.reset_index(drop=True))
    table["rank"] = table["shots"].map(shots_rank)
    table["group"] = table["ontology"].map(group_rank)
    names = list(dict.fromkeys(table["name"]))
    rows = []
    for (_, task, _, k, metric), own in table.groupby(["group", "task", "rank", "shots", "metric"]):
        own = own.drop_duplicates("name").set_index("name").reindex(names)
        texts = bold_best(plus_minus(own["score"], own["std"]), own["score"])
        row = {"task": task, "metric": metric, "K": k}
        rows.append(row | dict(zip(names, texts, strict=True)))
    shown = pd.DataFrame(rows)
    metrics = ", ".join(shown["metric"].unique())
    one_metric = shown["metric"].nunique() == 1
    shown = shown.drop(columns=["metric"] * one_metric + ["K"] * (not over_k))
    legend = (
        "Test score of each task: mean over seeds, then samples, ± standard deviation (ddof 1) "
        f"over both. {f'Metric: {metrics}. ' if one_metric else ''}Runs that count in a cell: "
        f"{span(table['scored'])}. Bold: the best of a row."
        + (" K 0: the initial prompts as they are, over seeds." if over_k else "")
    )
    drawn, figures = plots.looks(table, "name"), {}
    for task, own in table.sort_values("rank", kind="stable").groupby("task", sort=False):
        if own["shots"].nunique() > 1:
            words = (f"K ({task})", f"test {own['metric'].iloc[0]}", "std")
            figure = plots.lines(own, "shots", "score", "name", drawn, *words)
            figures[f"shots-{file_name(task)}"] = figure
    title = "Scores by task, start and K" if over_k else "Scores by task"
    yield Section("tasks", title, legend, table.drop(columns=["rank", "group"]), shown, figures)


def _initial_prompts(tuned: pd.DataFrame, runs: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """The initial prompts of each line, or of its starts, as runs of K 0: a mean for each seed."""
    initial = runs[runs["variant"] == "initial_prompt"]
    for (line, name), own in tuned.groupby(["line", "name"], sort=False):
        found = initial[(initial["line"] == line) & initial["task"].isin(own["task"])]
        if tuned.loc[tuned["line"] == line, "name"].nunique() > 1:
            first = own[["start", "start_of"]].iloc[0]
            found = found[(found[["start", "start_of"]] == first).all(axis=1)]
            found = found[found["start"] != ""]
        found = found.groupby([*TASK, "init_seed"], sort=False)["test"].mean().reset_index()
        point = {**own[POINT].iloc[0], "label": f"{name}, K 0", "shots": "0"}
        rest = dict.fromkeys(("status", "sample", "expression", "order_seed", "start_seed"), "")
        if len(found):
            yield found.assign(**point, **rest, dev=np.nan, run=0.0)


def tests_section(runs: pd.DataFrame, references: Sequence[str]) -> Iterator[Section]:
    """t-tests of each task and K: against the reference, or of the two that dev puts first."""
    chosen = chosen_runs(runs[is_method(runs)])
    rows = []
    for (task, shots, _), own in chosen.groupby(["task", "shots", "metric"], sort=False):
        sides = dict([*own.groupby("name", sort=False)])
        base = own.loc[own["line"].isin(references), "name"].unique()
        dev = own.groupby("name", sort=False)["dev"].mean().dropna()
        first = [*dev.sort_values(ascending=False, kind="stable").index[:2]]
        pairs = [(name, base[0]) for name in sides if len(base) and name != base[0]]
        for one, other in pairs if references else [first] * (len(first) == 2):
            row = {"task": task, "shots": shots, "one": one, "other": other}
            rows.append(row | compare_runs(sides[one], sides[other]))
    table = pd.DataFrame(rows)
    if not len(table) or table["p"].isna().all():
        return
    table["p_corrected"] = holm(table["p"])
    known = table[table["p"].notna()]
    shown = known[["task", "shots", "one", "other"]]
    shown = shown.set_axis(["task", "K", "line", "against"], axis=1)
    shown["n"] = known["n"].astype(str) + " : " + known["n_other"].astype(str)
    shown["difference"] = [number(x, "+") for x in known["difference"]]
    shown["95 % interval"] = intervals(known["low"], known["high"], "+")
    shown["test"], shown["p"] = known["test"], p_values(known["p_corrected"])
    same = [x for x in ("K", "against", "test") if shown[x].nunique() == 1]
    pair = "The two lines of the best mean dev scores of their chosen runs"
    legend = (
        f"{f'Each line against {references[0]}' if references else pair}, on each task"
        f"{'' if 'K' in same else ' and K'}: two-sided t-tests of unrounded test scores of runs, "
        "paired where both sides have the same samples and seeds, else Welch's"
        f"{f' (here {shown.test.iloc[0]} in all)' if 'test' in same else ''}. n: runs of either "
        f"side. p: corrected after Holm over the {counted(len(known), 'test')} of this table; *: "
        f"at most {LEVEL:g}. The intervals are not corrected. Runs count as independent, also "
        "those that share a sample or a seed."
    )
    if few := len(table) - len(known):
        legend += f" {few} comparisons have too few runs, or no spread."
    shown = shown.drop(columns=[x for x in same if x != "against" or references])
    yield Section("tests", "Tests on each task", legend, table, shown)


def compare_runs(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, Any]:
    """The t-test of two groups of runs, paired where both have the same samples and seeds.

    The seed of a run that starts from a prompt is that of the prompt.
    """
    sides = []
    for side in (one, other):
        of_source = (side["start"] == "prompt") & (side["start_seed"] != "")
        seed = side["start_seed"].where(of_source, side["init_seed"])
        keys = pd.MultiIndex.from_arrays([side["sample"], seed, side["order_seed"]])
        sides.append(pd.Series(side["test"].to_numpy(), keys))
    a, b = sides
    paired = a.index.is_unique and b.index.is_unique and {*a.index} == {*b.index}
    test = t_test(a, b.reindex(a.index) if paired else b, paired)
    return {"test": "paired" if paired else "Welch", **test}
