"""The sections of a report, each a title, a legend, a table and figures; and what writes them.

Every section is made of the runs that `prompt_lab.analysis.tables.read_lines` gives, and counts
them out again. A table is a DataFrame of unrounded numbers for its CSV file; what is shown of it in
``report.md`` and ``report.html`` is text. Left out: rankings of source tasks, readings of prompts.
"""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.statistics import LEVEL, bootstrap, holm, principal_components, t_test
from prompt_lab.analysis.tables import (
    POINT,
    SHARED,
    SUMS,
    TASK,
    chosen_runs,
    count_out,
    flag_table,
    group_rank,
    mean_over_tasks,
    relate,
    shots_rank,
    task_scores,
)
from prompt_lab.core.arithmetic import parse_expression
from prompt_lab.core.atomic_file import write_atomically
from prompt_lab.files.results import BASELINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KEPT = 0.5
"""Share of a tuned prompt's score from which a sum keeps a task (arXiv 2408.01119, section 4.3)."""

RULE = (
    "A task is left out of the mean where its score or its reference is missing, and where its "
    "reference is zero or negative, for which a ratio says nothing."
)
INTERVAL = "95 % interval: seeded bootstrap over tasks and runs."


@dataclass
class Section:
    """A part of a report.

    Attributes:
        name: of its files.
        title: its heading.
        legend: what the numbers are.
        table: unrounded numbers, a row for each thing.
        shown: the same as text, as people read it.
        figures: by name of their files.
    """

    name: str
    title: str
    legend: str
    table: pd.DataFrame
    shown: pd.DataFrame
    figures: dict[str, Figure] = field(default_factory=dict)


def make_report(
    runs: pd.DataFrame,
    references: Sequence[str] = (),
    partition: Mapping[str, Iterable[str]] | None = None,
) -> list[Section]:
    """All sections that the runs have something for.

    Args:
        runs: as `read_lines` gives them.
        references: names of lines to compare with; the first also in tests and figures.
        partition: tasks by the name of their set.

    Raises:
        ValueError: a reference that is no line, or is several on one task; a K that is none.
    """
    known = runs["line"].unique()
    if missing := [name for name in references if name not in known]:
        raise ValueError(f"no reference {missing[0]!r} among the lines {', '.join(known)}")
    compared = runs[~runs["variant"].isin(SUMS)]
    scores = task_scores(compared)
    ratios = [relate(scores, name) for name in references]
    groups = {
        "ontology": scores["ontology"].map(lambda text: text.split("/")[0]),
        "partition": scores["task"].map(_set_names(partition)) if partition else None,
    }
    sections = [lines_section(runs), scores_section(compared, scores)]
    sections += [gains_section(compared, table) for table in ratios]
    for kind, of_kind in groups.items():
        if of_kind is not None and of_kind.nunique() > 1:
            sections += sets_sections(kind, scores, of_kind, ratios)
    sections += dimension_sections(scores, ratios)
    sections += [*task_section(compared), *tests_section(compared, references[:1])]
    sections += [*adaptation_section(compared), *codes_section(compared)]
    return [*sections, *vector_sections(runs)]


def _set_names(partition: Mapping[str, Iterable[str]]) -> Callable[[str], str]:
    names = {task: name for name, tasks in partition.items() for task in tasks}
    return lambda task: names.get(task, "in no set")


# ---- text of numbers -----------------------------------------------------------------------------


def _number(value: float, sign: str = "", digits: int = 3) -> str:
    return "–" if pd.isna(value) else f"{value:{sign}.{digits}f}"


def _spread(mean: float, std: float, digits: int = 3, sign: str = "") -> str:
    text = _number(mean, sign, digits)
    return text if pd.isna(mean) or pd.isna(std) else f"{text} ± {std:.{digits}f}"


def _spreads(means: pd.Series, stds: pd.Series, digits: int = 3, sign: str = "") -> list[str]:
    return [_spread(x, y, digits, sign) for x, y in zip(means, stds, strict=True)]


def _interval(low: float, high: float, sign: str = "") -> str:
    return "–" if pd.isna(low) else f"{_number(low, sign)} to {_number(high, sign)}"


def _p_value(p: float) -> str:
    text = "–" if pd.isna(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"
    return f"{text} *" if p <= LEVEL else text


def _bold_best(texts: Sequence[str], values: pd.Series) -> list[str]:
    """The texts, those of the highest value bold; none where there is nothing to be better than."""
    known = values.dropna()
    if len(known) < 2 or known.nunique() == 1:
        return [*texts]
    return [f"**{x}**" if y == known.max() else x for x, y in zip(texts, values, strict=True)]


def _counts(table: pd.DataFrame, **columns: str) -> tuple[str, dict[str, pd.Series]]:
    """Counts that all rows share as words for the legend, the others as columns."""
    same = {name: table[x].iloc[0] for name, x in columns.items() if table[x].nunique() == 1}
    words = " and ".join(f"{count} {name}" for name, count in same.items())
    rest = {name: table[x] for name, x in columns.items() if name not in same}
    return (f"{words} in every row. " if words else ""), rest


def _methods(table: pd.DataFrame) -> pd.Series:
    return ~table["variant"].isin(BASELINES)


def _range(values: pd.Series) -> str:
    low, high = values.min(), values.max()
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


# ---- lines and scores ----------------------------------------------------------------------------


def lines_section(runs: pd.DataFrame) -> Section:
    """What each line is: how many runs of what, and the settings in which lines differ."""
    tuned = runs[~runs["line"].isin(SHARED)]
    facts: dict[str, dict[str, str]] = {}
    flags = flag_table(tuned)
    several = [name for name in flags if flags[name].nunique() > 1]
    for line, own in tuned.groupby("line", sort=False):
        status = own["status"].str.lower()
        fact = {"runs": len(own), "tasks": own["task"].nunique()}
        for name in ("sample", "init_seed", "order_seed"):
            fact[f"{name.replace('_', ' ')}s"] = (own[name][own[name] != ""]).nunique()
        fact["failed"] = status.str.match("failed|diverged").sum()
        fact["unfinished"] = (status == "training").sum()
        fact["without test score"] = own["test"].isna().sum()
        for name in ("cut_train", "cut_dev", "cut_test"):
            fact[f"most rows {name.replace('_', ' in ')}"] = own[name].max()
        for name in ("method", "backbone", "stage", "start", "num_virtual_tokens", "intrinsic_dim"):
            fact[name] = _values(own[name])
        for name in ("shots", "optimizer", "learning_rate", "batch_size", "decoding"):
            fact[name] = _values(own[name])
        for name in several:
            fact[name] = _values(flags.loc[own.index, name])
        facts[str(line)] = {
            name: f"{x:g}" if isinstance(x, float) else str(x) for name, x in fact.items()
        }
    table = pd.DataFrame(facts).rename_axis("what").reset_index()
    counts = ["runs", "tasks", "samples", "init seeds", "order seeds"]
    names = [*facts]
    differs = table[names].nunique(axis=1) > 1
    is_bad = table["what"].isin(["failed", "unfinished", "without test score"])
    is_cut = table["what"].str.startswith("most rows")
    some = (table[names].replace("nan", "0") != "0").any(axis=1)
    keep = table["what"].isin(counts) | (differs & ~is_cut) | ((is_bad | is_cut) & some)
    if len(names) == 1:
        keep |= table["what"].isin(["method", "backbone"])
    twice = runs.attrs.get("twice", 0)
    legend = (
        f"{len(runs)} runs of {runs['task'].nunique()} tasks. "
        + (f"{twice} runs stand in several files and count once. " if twice else "")
        + "Settings in which no line differs are left out."
    )
    shown = table[keep].replace({"nan": "", "default": "(default)"}).rename(columns={"what": ""})
    return Section("lines", "Lines", legend, table, shown)


def _values(column: pd.Series) -> str:
    """The values of a column, each once."""
    values = sorted({x for x in column if pd.notna(x) and x != ""})
    return ", ".join(f"{x:g}" if isinstance(x, float) else str(x).strip('"') for x in values)


def scores_section(runs: pd.DataFrame, scores: pd.DataFrame) -> Section:
    """Mean test score of each point over its tasks, with dots for each task."""
    table = mean_over_tasks(scores)
    tests = _tests_of(runs)
    ends = [bootstrap([*tests[label].values()]) for label in table["label"]]
    table[["low", "high"]] = ends
    count_out(runs, table)
    words, counts = _counts(table[_methods(table)], tasks="tasks", runs="scored")
    shown = pd.DataFrame({"line": table["label"], "score": _spreads(table["score"], table["std"])})
    usual = table.loc[_methods(table), "tasks"].mode().max()
    like = _methods(table) & (table["tasks"] == usual)
    shown["score"] = _bold_best(shown["score"], table["score"].where(like))
    shown["95 % interval"] = [_interval(*end) for end in ends]
    shown = shown.assign(**{name: table["scored" if name == "runs" else name] for name in counts})
    if table["failed"].any():
        shown["failed"] = table["failed"]
    legend = (
        "Mean test score ± standard deviation. Of the runs that differ in learning rate or batch "
        "size alone, the one of the best dev score counts (ties: the earlier). A task's score is "
        "the mean over seeds, then over samples, and its deviation (ddof 1) that of all its runs "
        f"that count; both are means over tasks here. {words}{INTERVAL} Bold: the best of the "
        f"lines with {usual:g} tasks, baselines apart."
    )
    return Section("scores", "Scores", legend, table, shown, _score_figures(scores))


def _tests_of(runs: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Test scores of the chosen runs by label and task."""
    chosen = chosen_runs(runs)
    return {
        str(label): {str(task): x["test"].to_numpy() for task, x in own.groupby("task", sort=False)}
        for label, own in chosen.groupby("label", sort=False)
    }


def _score_figures(scores: pd.DataFrame) -> dict[str, Figure]:
    """Scores of each task, on pages; of intrinsic dimensions the largest, of K too."""
    own = scores[_methods(scores) & scores["score"].notna()]
    own = _few(own)
    note = "test score; bars: standard deviation over samples and seeds"
    drawn = plots.looks(scores)
    return _pages(
        "scores", own, lambda page: plots.dots(page, "score", "task", "label", drawn, note, "std")
    )


def _few(table: pd.DataFrame) -> pd.DataFrame:
    """Of many points those of the largest intrinsic dimension and K, which a figure can show."""
    if table["label"].nunique() <= 6:
        return table
    largest = table.groupby("family")["intrinsic_dim"].transform("max")
    table = table[table["intrinsic_dim"].isna() | (table["intrinsic_dim"] == largest)]
    ranks = table["shots"].map(shots_rank)
    return table[ranks == ranks.groupby(table["name"]).transform("max")]


def _pages(
    stem: str, table: pd.DataFrame, draw: Callable[[pd.DataFrame], Figure]
) -> dict[str, Figure]:
    """One figure for every `plots.MOST_TASKS` tasks of a table."""
    ranks = {task: group_rank(kind) for task, kind in zip(table["task"], table["ontology"])}
    tasks = sorted(ranks, key=lambda task: (ranks[task], task))
    table = table.assign(at=table["task"].map(tasks.index)).sort_values("at", kind="stable")
    parts = [tasks[at : at + plots.MOST_TASKS] for at in range(0, len(tasks), plots.MOST_TASKS)]
    names = [stem] if len(parts) == 1 else [f"{stem}-{at}" for at in range(1, len(parts) + 1)]
    return {
        name: draw(table[table["task"].isin(part)]) for name, part in zip(names, parts, strict=True)
    }


# ---- relative to a reference ---------------------------------------------------------------------


def gains_section(runs: pd.DataFrame, ratios: pd.DataFrame) -> Section:
    """E_rel and ARG of each point against a reference, with a test and gains of each task."""
    reference = ratios["reference"].iloc[0]
    table = relative_means(runs, ratios)
    count_out(runs, table)
    is_reference = (table["line"] == reference) & _methods(table)
    table["p"] = table["p"].where(_methods(table) & ~is_reference)
    table["p_corrected"] = holm(table["p"])
    own = table[~is_reference & (table["e_rel_tasks"] > 0)]
    words, counts = _counts(own, tasks="e_rel_tasks", runs="e_rel_runs", samples="samples")
    best = own["e_rel"].where(_methods(own))
    shown = pd.DataFrame(
        {
            "line": own["label"],
            "E_rel": _bold_best(_spreads(own["e_rel"], own["e_rel_std"]), best),
            "95 % interval": [_interval(*x) for x in zip(own["low"], own["high"])],
            "ARG (%)": _spreads(100 * own["e_rel"] - 100, 100 * own["arg_std"], 1, "+"),
            "score : reference": [
                f"{_number(x)} : {_number(y)}"
                for x, y in zip(own["shared_mean"], own["reference_mean"])
            ],
            "p": [_p_value(p) for p in own["p_corrected"]],
        }
    ).assign(**{x: own[f"e_rel_{x}" if x != "samples" else x] for x in counts})
    out = ratios[(ratios["left_out"] != "") & _methods(ratios) & (ratios["line"] != reference)]
    reasons = [
        f"{why}: {', '.join(dict.fromkeys(of_why['task']))}"
        for why, of_why in out.groupby("left_out", sort=False)
    ]
    legend = (
        f"Against {reference}. E_rel: mean over tasks of score / reference, ± the mean of the "
        "tasks' deviations / reference. ARG: average relative gain, E_rel less 1, ± standard "
        "deviation (ddof 1) over samples of a sample's own ARG. Score : reference are means over "
        f"the tasks that both have. {RULE} {words}{INTERVAL} p: two-sided paired t-test of the "
        f"tasks' scores, corrected after Holm over the {own['p'].notna().sum()} tests of this "
        f"table; *: at most {LEVEL:g}. " + (f"Left out, {'; '.join(reasons)}." if reasons else "")
    )
    drawn = plots.looks(runs)
    gains = ratios[_methods(ratios) & (ratios["line"] != reference) & ratios["ratio"].notna()]
    gains = gains.assign(
        gain=100 * gains["ratio"] - 100, bar=100 * gains["std"] / gains["reference_score"]
    )
    figures: dict[str, Figure] = {}
    if len(gains):
        stem = f"gains-{_file_name(reference)}"
        few = _few(gains)
        note = f"relative gain over {reference} (%); bars: standard deviation / reference"
        figures = _pages(
            stem,
            few,
            lambda page: plots.dots(page, "gain", "task", "label", drawn, note, "bar", 0.0),
        )
        if gains["task"].nunique() >= 10:
            label = f"relative gain over {reference} (%)"
            figures[f"{stem}-violins"] = plots.violins(few, "gain", "label", drawn, label, 0.0)
    name = f"gains-{_file_name(reference)}"
    return Section(name, f"Relative to {reference}", legend.strip(), table, shown, figures)


def relative_means(runs: pd.DataFrame, ratios: pd.DataFrame) -> pd.DataFrame:
    """A row for each point: E_rel, the spread of ARG over samples, means of both, a test.

    Args:
        runs: as `read_lines` gives them.
        ratios: as `relate` gives them.
    """
    reference = ratios["reference"].iloc[0]
    base = ratios[(ratios["line"] == reference) & _methods(ratios)]
    tests = _tests_of(runs)
    chosen = chosen_runs(runs)
    by_sample = chosen.groupby(["label", "task", "shots", "sample"], sort=False)["test"].mean()
    by_sample = by_sample.reset_index()
    of_base = by_sample[by_sample["label"].isin(base["label"])].drop(columns="label")
    by_sample = by_sample.merge(of_base, on=["task", "shots", "sample"], suffixes=("", "_base"))
    label_of = {(x.task, x.shots): x.label for x in base.itertuples()}
    rows = []
    for point, own in ratios.groupby(POINT, dropna=False, sort=False):
        label = own["label"].iloc[0]
        both = own[own["score"].notna() & own["reference_score"].notna()]
        used = own[own["ratio"].notna()]
        pairs = by_sample[(by_sample["label"] == label) & by_sample["task"].isin(used["task"])]
        pairs = pairs[(pairs["test_base"] > 0) & pairs["test"].notna()]
        gains = (pairs["test"] / pairs["test_base"] - 1).groupby(pairs["sample"]).mean()
        ends = bootstrap(
            [tests[label][task] for task in used["task"]],
            [tests[label_of[x.task, x.shots]][x.task] for x in used.itertuples()],
        )
        test = t_test(both["score"], both["reference_score"], paired=True)
        rows.append(
            {
                **dict(zip(POINT, point, strict=True)),
                "reference": reference,
                "e_rel": used["ratio"].mean(),
                "e_rel_std": (used["std"] / used["reference_score"]).mean(),
                "e_rel_tasks": len(used),
                "e_rel_runs": used["scored"].sum(),
                "low": ends[0],
                "high": ends[1],
                "arg_std": gains.std(),
                "samples": len(gains),
                "shared_tasks": len(both),
                "shared_mean": both["score"].mean(),
                "reference_mean": both["reference_score"].mean(),
                **{name: test[name] for name in ("difference", "t", "df", "p")},
                "left_out": " ".join(own.loc[own["left_out"] != "", "task"]),
                "runs": own["runs"].sum(),
            }
        )
    return pd.DataFrame(rows)


# ---- sets of tasks and intrinsic dimensions ------------------------------------------------------


def sets_sections(
    kind: str, scores: pd.DataFrame, sets: pd.Series, ratios: Sequence[pd.DataFrame]
) -> Iterator[Section]:
    """Means over the tasks of each ontology group or set of a partition: scores, then E_rel."""
    by = [*POINT, "set"]
    order = sorted(sets.unique(), key=group_rank)
    where = "by ontology" if kind == "ontology" else "by set of the partition"
    for table, value, title, name in _valued(scores.assign(set=sets), ratios):
        means = _mean_of(table, value, by)
        shown, words = _pivot(means, "label", "set", order)
        grid = means.pivot_table(index="label", columns="set", values="mean", sort=False)
        grid = grid.reindex(columns=order).dropna(how="all").dropna(how="all", axis=1)
        figure = plots.heatmap(grid, title, 1.0 if value == "ratio" else None)
        stem = f"{name}-by-{kind}"
        legend = f"{title} over the tasks of each set. {words}"
        yield Section(stem, f"{title} {where}", legend, means, shown, {stem: figure})


def _valued(
    scores: pd.DataFrame, ratios: Sequence[pd.DataFrame]
) -> Iterator[tuple[pd.DataFrame, str, str, str]]:
    """Scores, then ratios to every reference: table, its value, title and name."""
    yield scores.assign(spread=scores["std"]), "score", "Mean score", "score"
    extra = [name for name in scores if name not in POINT]
    for table in ratios:
        table = table.assign(**{x: scores[x].to_numpy() for x in extra if x not in table})
        reference = table["reference"].iloc[0]
        table = table.assign(spread=table["std"] / table["reference_score"])
        yield table, "ratio", f"E_rel against {reference}", f"e_rel-{_file_name(reference)}"


def _mean_of(table: pd.DataFrame, value: str, by: Sequence[str]) -> pd.DataFrame:
    """Means over tasks of a value and its spread, with the tasks and runs that count."""
    known = table[value].notna()
    table = table.assign(spread=table["spread"].where(known), counted=table["scored"].where(known))
    means = table.groupby([*by], dropna=False, sort=False).agg(
        mean=(value, "mean"),
        std=("spread", "mean"),
        tasks=(value, "count"),
        scored=("counted", "sum"),
        runs=("runs", "sum"),
    )
    assert means["runs"].sum() == table["runs"].sum()
    return means.reset_index()


def _pivot(
    means: pd.DataFrame, index: str, columns: str, order: Sequence[object]
) -> tuple[pd.DataFrame, str]:
    """Means as text: a row for each label, a column for each value; and how many tasks they are."""
    shown = pd.DataFrame({"line": list(dict.fromkeys(means[index]))})
    alike = means.groupby(columns)["tasks"].nunique().max() == 1
    for place in order:
        own = means[means[columns] == place].set_index(index).reindex(shown["line"])
        texts = _spreads(own["mean"], own["std"])
        best = own["mean"].where(_methods(own) & own["variant"].notna())
        name = f"{place:g}" if isinstance(place, float) else str(place)
        shown[name] = _bold_best(texts, best)
    tasks = means[means["tasks"] > 0].groupby(columns)["tasks"].agg(["min", "max"])
    words = ", ".join(
        f"{x:g}: {_range(tasks.loc[x])}" if isinstance(x, float) else f"{x}: {_range(tasks.loc[x])}"
        for x in order
        if x in tasks.index
    )
    return shown, f"Tasks: {words}{'' if alike else ' (not all lines have all)'}."


def dimension_sections(scores: pd.DataFrame, ratios: Sequence[pd.DataFrame]) -> Iterator[Section]:
    """Means over the intrinsic dimension, as a table and as curves."""
    has = scores["intrinsic_dim"].notna()
    order = sorted(scores.loc[has, "intrinsic_dim"].unique())
    if not order:
        return
    drawn = plots.looks(scores, "family")
    for table, value, title, name in _valued(scores, ratios):
        means = _mean_of(table[has.to_numpy()], value, POINT)
        means = means.sort_values("intrinsic_dim", kind="stable")
        shown, words = _pivot(means, "family", "intrinsic_dim", order)
        whole = table[~has.to_numpy() & _methods(table)]
        level = 1.0 if value == "ratio" else None
        stem = f"{name}-by-dimension"
        figures = {}
        if len(order) > 1 and means["mean"].notna().any():
            figures[stem] = plots.lines(
                means,
                "intrinsic_dim",
                "mean",
                "family",
                drawn,
                "intrinsic dimension",
                title,
                "std",
                level,
            )
        beside = [
            f"{label} {_number(of_label[value].mean())}"
            for label, of_label in whole.groupby("label", sort=False)
            if of_label[value].notna().any()
        ]
        legend = (
            f"{title} of tuning in a subspace, ± standard deviation over runs, mean over tasks. "
            f"{words} " + (f"Without a subspace: {', '.join(beside)}." if beside else "")
        )
        yield Section(
            stem, f"{title} by intrinsic dimension", legend.strip(), means, shown, figures
        )


# ---- tasks, starts and K -------------------------------------------------------------------------


def task_section(runs: pd.DataFrame) -> Iterator[Section]:
    """Scores of every task and K, a column for each line and start; over K also curves."""
    compared = _with_initial_prompts(runs[_methods(runs)], runs)
    table = task_scores(compared, [*POINT, *TASK])
    names = list(dict.fromkeys(table["name"]))
    has_several = runs.loc[_methods(runs), "shots"].nunique() > 1
    rows = []
    keys = sorted(
        table.groupby(["ontology", "task", "shots", "metric"], sort=False),
        key=lambda item: (group_rank(item[0][0]), item[0][1], shots_rank(item[0][2])),
    )
    for (_, task, shots, metric), own in keys:
        own = own.drop_duplicates("name").set_index("name").reindex(names)
        texts = _bold_best(_spreads(own["score"], own["std"]), own["score"])
        rows.append({"task": task, "metric": metric, "K": shots, **dict(zip(names, texts))})
    shown = pd.DataFrame(rows)
    if not has_several:
        shown = shown.drop(columns="K")
    if shown["metric"].nunique() == 1:
        shown = shown.drop(columns="metric")
    if not len(shown):
        return
    metrics = ", ".join(table["metric"].unique())
    words = f"Metric: {metrics}. " if "metric" not in shown else ""
    zero = "K 0: the initial prompts as they are, over seeds. " if has_several else ""
    legend = (
        "Test score of each task: mean over seeds, then samples, ± standard deviation (ddof 1) "
        f"over both. {words}Runs that count in a cell: {_range(table['scored'])}. {zero}"
        "Bold: the best of a row."
    )
    figures = {}
    if has_several:
        drawn = plots.looks(table, "name")
        ranked = table.assign(rank=table["shots"].map(shots_rank)).sort_values("rank")
        for task, own in ranked.groupby("task", sort=False):
            if own["shots"].nunique() > 1:
                figures[f"shots-{_file_name(str(task))}"] = plots.lines(
                    own,
                    "shots",
                    "score",
                    "name",
                    drawn,
                    f"K ({task})",
                    f"test {own['metric'].iloc[0]}",
                    "std",
                )
    title = "Scores by task, start and K" if has_several else "Scores by task"
    yield Section("tasks", title, legend, table, shown, figures)


def _with_initial_prompts(tuned: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Tuned runs over several K, with the initial prompts of lines of one start as K 0."""
    if tuned["shots"].nunique() < 2:
        return tuned
    found = [tuned]
    for (line, name), own in tuned.groupby(["line", "name"], sort=False):
        first = own.iloc[0]
        alone = tuned.loc[tuned["line"] == line, "name"].nunique() == 1
        initial = runs[(runs["line"] == line) & (runs["variant"] == "initial_prompt")]
        initial = initial[initial["task"].isin(own["task"])]
        if not alone:
            same = (initial["start"] == first["start"]) & (initial["start"] != "")
            initial = initial[same & (initial["start_of"] == first["start_of"])]
        by = {**{x: first[x] for x in POINT}, "label": f"{name}, K 0", "shots": "0"}
        scores = initial.groupby([*TASK, "init_seed"], sort=False)["test"].mean().reset_index()
        scores = scores.assign(**by, dev=np.nan, run=0.0, status="", sample="", expression="")
        found.append(scores.assign(order_seed="", start_seed=""))
    return pd.concat([x for x in found if len(x)], ignore_index=True)


def tests_section(runs: pd.DataFrame, references: Sequence[str]) -> Iterator[Section]:
    """t-tests on each task and K: against the reference, or of the two lines that dev puts first."""
    chosen = chosen_runs(runs[_methods(runs)])
    rows = []
    for (task, shots), own in chosen.groupby(["task", "shots"], sort=False):
        sides = {str(name): side for name, side in own.groupby("name", sort=False)}
        base = own[own["line"].isin(references)]["name"].unique()
        dev = pd.Series({name: side["dev"].mean() for name, side in sides.items()}).dropna()
        first = [str(x) for x in dev.sort_values(ascending=False, kind="stable").index[:2]]
        pairs = [(name, str(base[0])) for name in sides if name != base[0]] if len(base) else []
        if not references and len(first) == 2:
            pairs = [(first[0], first[1])]
        for one, other in pairs:
            rows.append({"task": task, "shots": shots, "one": one, "other": other})
            rows[-1] |= compare_runs(sides[one], sides[other])
    table = pd.DataFrame(rows)
    if not len(table) or table["p"].isna().all():
        return
    table["p_corrected"] = holm(table["p"])
    known = table[table["p"].notna()]
    shown = pd.DataFrame(
        {
            "task": known["task"],
            "K": known["shots"],
            "line": known["one"],
            "against": known["other"],
            "n": [f"{x} : {y}" for x, y in zip(known["n"], known["n_other"])],
            "difference": [_number(x, "+") for x in known["difference"]],
            "95 % interval": [_interval(x, y, "+") for x, y in zip(known["low"], known["high"])],
            "test": known["test"],
            "p": [_p_value(p) for p in known["p_corrected"]],
        }
    )
    for name in ("K", "against", "test"):
        if shown[name].nunique() == 1 and (name != "K" or runs["shots"].nunique() == 1):
            shown = shown.drop(columns=name)
    pair = (
        f"Each line against {references[0]}"
        if references
        else "The two lines of the best mean dev scores of their chosen runs"
    )
    legend = (
        f"{pair}, on each task and K: two-sided t-tests of unrounded test scores of runs, paired "
        "where both sides have the same samples and seeds, else Welch's. n: runs of either side. "
        f"p: corrected after Holm over the {len(known)} tests of this table; *: at most {LEVEL:g}. "
        "The intervals are not corrected. Runs count as independent, also those that share a "
        f"sample or a seed. {len(table) - len(known)} comparisons have too few runs, or no spread."
    )
    yield Section("tests", "Tests on each task", legend, table, shown)


def compare_runs(one: pd.DataFrame, other: pd.DataFrame) -> dict[str, object]:
    """The t-test of two sides, paired by sample and seeds where both have the same."""
    sides = []
    for side in (one, other):
        of_source = (side["start"] == "prompt") & (side["start_seed"] != "")
        seed = side["start_seed"].where(of_source, side["init_seed"])
        keys = pd.MultiIndex.from_arrays([side["sample"], seed, side["order_seed"]])
        sides.append(pd.Series(side["test"].to_numpy(), keys))
    a, b = sides
    paired = a.index.is_unique and b.index.is_unique and {*a.index} == {*b.index}
    found = t_test(a, b.reindex(a.index) if paired else b, paired)
    return {"test": "paired" if paired else "Welch", **found}


# ---- adaptation curves ---------------------------------------------------------------------------


def adaptation_section(runs: pd.DataFrame) -> Iterator[Section]:
    """Mean dev score over the steps of training, on the tasks and samples that all lines have."""
    chosen = chosen_runs(runs[_methods(runs) & (runs["prompt_file"] != "")])
    curves = pd.concat([pd.DataFrame(columns=["label"]), *_curves(chosen)], ignore_index=True)
    cells = curves[["label", "task", "sample"]].drop_duplicates() if len(curves) else curves
    if not len(cells):
        return
    labels = list(dict.fromkeys(cells["label"]))
    counts = cells.groupby(["task", "sample"]).size()
    shared = counts[counts == len(labels)].index
    curves = curves.set_index(["task", "sample"])
    curves = curves[curves.index.isin(shared)].reset_index()
    tables, carried = [], []
    for label in labels:
        own = curves[curves["label"] == label]
        grid = own.pivot_table(index="step", columns=["task", "sample", "place"], values="dev")
        ended = own.groupby(["task", "sample", "place"])["ended"].first()[grid.columns].to_numpy()
        after = grid.bfill().isna() & ended
        short = int(after.any().sum())
        carried += [f"{short} of {grid.shape[1]} of {label}"] if short else []
        grid = grid.mask(after, grid.ffill()).dropna()
        of_cell = grid.T.groupby(level=["task", "sample"]).mean().T
        by_sample = of_cell.T.groupby(level="sample").mean().T
        table = pd.DataFrame(
            {
                "line": own["line"].iloc[0] if len(own) else "",
                "label": label,
                "step": grid.index.astype(int),
                "mean_dev": of_cell.T.groupby(level="task").mean().mean().to_numpy(),
                "std": by_sample.std(axis=1).to_numpy(),
                "runs": grid.shape[1],
            }
        )
        tables.append(table)
    table = pd.concat(tables, ignore_index=True)
    if not len(table):
        return
    tasks, samples = (len(shared.get_level_values(x).unique()) for x in ("task", "sample"))
    left = len(counts) - len(shared)
    legend = (
        f"Mean dev score of the runs that count, over {tasks} tasks and {samples} samples that all "
        "lines have; bands: standard deviation (ddof 1) over samples of the mean over tasks. "
        + (f"{left} pairs of task and sample that some lines lack are left out. " if left else "")
        + (f"Runs that ended early keep their last score: {', '.join(carried)}." if carried else "")
    )
    few = table.groupby("label", sort=False).tail(1)
    shown = pd.DataFrame(
        {
            "line": few["label"],
            "last step": few["step"],
            "dev score": _spreads(few["mean_dev"], few["std"]),
            "runs": few["runs"],
        }
    )
    figures = {}
    if table["step"].nunique() > 1:
        drawn = plots.looks(runs)
        figures["adaptation"] = plots.lines(
            table,
            "step",
            "mean_dev",
            "label",
            drawn,
            "step",
            "mean dev score",
            "std" if table["std"].notna().any() else None,
            steps=True,
        )
    yield Section("adaptation", "Adaptation curves", legend.strip(), table, shown, figures)


def _curves(chosen: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Dev scores of the chosen runs over steps, from the ``curves.csv`` beside their results."""
    for folder, own in chosen.groupby("folder", sort=False):
        file = Path(str(folder)) / "curves.csv"
        if not file.is_file():
            continue
        try:
            found = pd.read_csv(file, usecols=["step", "run", "dev"]).dropna()
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{file} is no curves.csv of prompt-lab: {error}") from None
        ended = own["status"].str.match(r"(?i)failed|diverged|stopped early")
        kept = own[["line", "label", "task", "sample"]].assign(
            run=[Path(name).stem for name in own["prompt_file"]], ended=ended, place=own.index
        )
        yield kept.merge(found, on="run")


# ---- codes in a subspace -------------------------------------------------------------------------


def codes_section(runs: pd.DataFrame) -> Iterator[Section]:
    """The codes of each subspace on their first two principal components."""
    chosen = chosen_runs(runs[_methods(runs) & (runs["intrinsic_dim"] >= 2)])
    tables, figures = [], {}
    for label, own in chosen.groupby("label", sort=False):
        own = own.assign(code=[_code(x.folder, x.prompt_file) for x in own.itertuples()])
        own = own[own["code"].notna()]
        if len(own) < 3:
            continue
        points, shares = principal_components(np.stack([*own["code"]]))
        kinds = own["ontology"]
        kinds = kinds if kinds.nunique() <= 6 else kinds.map(lambda text: text.split("/")[0])
        table = own[["label", "task", "sample", "init_seed"]].assign(
            kind=kinds, first=points[:, 0], second=points[:, 1], runs=1
        )
        tables.append(table)
        figures[f"codes-{_file_name(str(label))}"] = plots.scatter(
            table.assign(**{"task ": table["task"]}),
            "first",
            "second",
            "kind",
            f"first component ({shares[0]:.0%} of the variance)",
            f"second component ({shares[1]:.0%})",
        )
    if tables:
        table = pd.concat(tables, ignore_index=True)
        shown = table.groupby("label", sort=False)["runs"].sum().rename("codes").reset_index()
        legend = "Codes of the runs that count on the first two principal components of a line."
        yield Section("codes", "Codes in the subspace", legend, table, shown, figures)


def _tensors(folder: str, file: str, *names: str) -> list[np.ndarray]:
    """Tensors of a prompt file beside the results; nothing where they are not there."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / file
    if not file or not path.is_file():
        return []
    try:
        with safe_open(path, "np") as found:
            return [found.get_tensor(name).astype(np.float64) for name in names]
    except SafetensorError:
        return []


def _code(folder: str, file: str) -> np.ndarray | None:
    return next(iter(_tensors(folder, file, "code")), None)


# ---- task prompt vectors -------------------------------------------------------------------------

_CELL = ["line", "task", "sample", "init_seed"]


def vector_sections(runs: pd.DataFrame) -> Iterator[Section]:
    """Task prompt vectors on other initial prompts, sums of two, and other sums.

    The tables of Belanec et al. 2024 (arXiv 2408.01119): table 1, figure 4, and their future work.
    """
    sums = runs[runs["variant"] == "vectors"].copy()
    if not len(sums) and not (runs["variant"] == "vector_alone").any():
        return
    crosses = (
        (sums["start_seed"] != sums["init_seed"])
        .groupby([sums["line"], sums["expression"]])
        .transform("any")
    )
    single = sums["expression"].map(lambda text: [*parse_expression(text).values()] == [1.0])
    is_cross = crosses & single
    sums = _beside(sums, runs)
    cross, rest = sums[is_cross.to_numpy()], sums[~is_cross.to_numpy()]
    alone = runs[runs["variant"] == "vector_alone"]
    if len(cross):
        yield _cross_section(cross, alone, runs)
    assert len(cross) + len(rest) == len(sums)
    if not len(rest):
        return
    table = _sums_table(rest)
    count_out(rest, table)
    is_pair = table["pair"]
    if is_pair.any():
        yield _pair_section(table[is_pair].drop(columns="pair"))
    if not is_pair.all():
        yield _expression_section(table[~is_pair].drop(columns="pair"))


def _beside(sums: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Sums with the scores of their task's tuned prompt and of their bare initial prompt."""
    cell = ["line", "task", "sample"]
    tuned = runs.loc[runs["variant"] == "single", [*_CELL, "test", "folder", "prompt_file"]]
    tuned = tuned.rename(columns={"test": "tuned"}).drop_duplicates(_CELL)
    initial = runs.loc[runs["variant"] == "initial_prompt", [*cell, "init_seed", "test"]]
    initial = initial.rename(columns={"test": "initial", "init_seed": "start_seed"})
    initial = initial.drop_duplicates([*cell, "start_seed"])
    found = sums.drop(columns=["folder", "prompt_file"]).merge(tuned, on=_CELL, how="left")
    found = found.merge(initial, on=[*cell, "start_seed"], how="left")
    assert len(found) == len(sums)
    return found


def _cross_section(cross: pd.DataFrame, alone: pd.DataFrame, runs: pd.DataFrame) -> Section:
    rows = []
    for (line, task, metric), own in cross.groupby(["line", "task", "metric"], sort=False):
        is_own = own["start_seed"] == own["init_seed"]
        cells = own.drop_duplicates(_CELL)
        by_cell = own[~is_own].groupby(_CELL, sort=False)
        pairs = by_cell.agg(other=("test", "mean"), tuned=("tuned", "first"))
        of_task = alone[(alone["line"] == line) & (alone["task"] == task)]
        kinds = {
            "own": cells["tuned"],
            "chosen": own.loc[is_own, "test"],
            "other": own.loc[~is_own, "test"],
            "initial": own.drop_duplicates(["sample", "start_seed"])["initial"],
            "alone": of_task["test"],
            "ratio": pd.Series([_norm_ratio(x) for x in cells.itertuples()], dtype=float),
        }
        row: dict[str, object] = {"line": line, "task": task, "metric": metric}
        for kind, values in kinds.items():
            row |= {kind: values.mean(), f"{kind}_std": values.std(), f"{kind}_n": values.count()}
        row["vectors"] = pairs["other"].count()
        rows.append(row | t_test(pairs["other"], pairs["tuned"], True) | {"runs": len(own)})
    table = pd.DataFrame(rows)
    count_out(cross, table)
    table["p_corrected"] = holm(table["p"])
    shown = table[["line", "task", "metric"]].copy()
    names = {
        "own": "own",
        "chosen": "own, lambda by dev",
        "other": "other",
        "initial": "initial",
        "alone": "alone",
        "ratio": "vector/init",
    }
    for kind, name in names.items():
        if table[f"{kind}_n"].any():
            shown[name] = _spreads(table[kind], table[f"{kind}_std"])
    shown["other less own"] = [_number(x, "+") for x in table["difference"]]
    shown["p"] = [_p_value(p) for p in table["p_corrected"]]
    shown = _without_constants(shown)
    legend = (
        "Mean test score ± standard deviation (ddof 1) over prompts. own: each vector on the "
        "initial prompt that it was tuned from, which is the tuned prompt. other: each vector on "
        "each other initial prompt of its sample; these share vectors and initial prompts, so "
        "fewer are independent. initial: the initial prompts with no vector. alone: the vectors "
        "with no initial prompt. vector/init: norm of the vector / norm of its initial prompt. "
        f"Vectors of a task: {_range(table['vectors'])}; prompts in other: "
        f"{_range(table['other_n'])}. p: paired t-test over samples and seeds of a vector's mean "
        "over other initial prompts against its own score, corrected after Holm over the tests of "
        f"this table; *: at most {LEVEL:g}. It takes vectors for independent."
    )
    drawn = plots.looks(pd.DataFrame({"line": [*names], "label": [*names.values()]}))
    long = [
        pd.DataFrame(
            {
                "task": _names_of(table),
                "kind": name,
                "score": table[kind],
                "std": table[f"{kind}_std"],
                "ontology": "",
            }
        )
        for kind, name in names.items()
        if kind not in ("chosen", "ratio") and table[f"{kind}_n"].any()
    ]
    note = "test score; bars: standard deviation over prompts"
    figures = _pages(
        "vectors-cross",
        pd.concat(long, ignore_index=True),
        lambda page: plots.dots(page, "score", "task", "kind", drawn, note, "std"),
    )
    title = "Task prompt vectors on other initial prompts"
    return Section("vectors-cross", title, legend, table, shown, figures)


def _norm_ratio(row: object) -> float:
    """Norm of a prompt file's vector / that of its init; NaN without the file."""
    folder, file = row.folder, row.prompt_file  # pyright: ignore[reportAttributeAccessIssue]
    found = _tensors(folder, file, "prompt", "init") if isinstance(file, str) else []
    if len(found) < 2 or not (size := np.linalg.norm(found[1])):
        return np.nan
    return float(np.linalg.norm(found[0] - found[1]) / size)


def _names_of(table: pd.DataFrame) -> pd.Series:
    """Tasks or sums, with their line where there are several."""
    what = table["expression"] if "expression" in table else table["task"]
    return what if table["line"].nunique() == 1 else what + " (" + table["line"] + ")"


def _without_constants(shown: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns line and metric where these say the same in all rows."""
    return shown.drop(columns=[x for x in ("line", "metric") if shown[x].nunique() == 1])


def _sums_table(sums: pd.DataFrame) -> pd.DataFrame:
    """A row for each sum and task, beside the tuned and the initial prompts of the same cells."""
    rows = []
    for (line, expression), of_sum in sums.groupby(["line", "expression"], sort=False):
        factors = parse_expression(str(expression))
        tasks = [*factors, *(x for x in dict.fromkeys(of_sum["task"]) if x not in factors)]
        pair = [*factors.values()] == [1.0, 1.0] and {*of_sum["task"]} == {*factors}
        for task in tasks:
            own = of_sum[of_sum["task"] == task]
            if not len(own):
                continue
            factor = factors.get(task, 0)
            whole = own[own["test"].notna() & own["tuned"].notna()]
            both = own[own["initial"].notna() & own["tuned"].notna()]
            row = {"line": line, "expression": expression, "task": task, "pair": pair}
            row["vector"] = "added" if factor > 0 else "taken away" if factor < 0 else "not in it"
            row["metric"] = own["metric"].iloc[0]
            for name, column in (("score", "test"), ("tuned", "tuned"), ("initial", "initial")):
                row |= {name: own[column].mean(), f"{name}_std": own[column].std()}
                row[f"{name}_n"] = own[column].count()
            row["share"] = _ratio(whole["test"].mean(), whole["tuned"].mean())
            row["share_std"] = (whole["test"] / whole["tuned"])[whole["tuned"] > 0].std()
            row["share_n"] = len(whole)
            row["initial_share"] = _ratio(both["initial"].mean(), both["tuned"].mean())
            row |= {"scale": own["scale"].mean(), "scale_std": own["scale"].std()}
            row |= {"scale_least": own["scale"].min(), "scale_largest": own["scale"].max()}
            rows.append(row | {"runs": len(own)})
    return pd.DataFrame(rows)


def _ratio(score: float, reference: float) -> float:
    return score / reference if reference > 0 else np.nan


def _lambda(row: pd.Series) -> str:
    ends = (
        ""
        if row["scale_least"] == row["scale_largest"]
        else (f" ({row['scale_least']:g} to {row['scale_largest']:g})")
    )
    return "–" if pd.isna(row["scale"]) else f"{row['scale']:.3g}{ends}"


def _sum_columns(table: pd.DataFrame) -> pd.DataFrame:
    """What all sums show: a row for each sum and task."""
    return pd.DataFrame(
        {
            "line": table["line"],
            "sum": table["expression"],
            "lambda": [_lambda(row) for _, row in table.iterrows()],
            "task": table["task"],
            "metric": table["metric"],
            "score": _spreads(table["score"], table["score_std"]),
            "tuned": _spreads(table["tuned"], table["tuned_std"]),
            "initial": _spreads(table["initial"], table["initial_std"]),
        }
    )


_SUM_LEGEND = (
    "Each sum stands on the initial prompt of its vectors, scaled by the lambda that dev chose "
    "(mean, least to largest). score, tuned and initial: mean ± standard deviation (ddof 1) over "
    "samples and seeds of the sum, of the task's own tuned prompt and of the bare initial prompt."
)


def _pair_section(table: pd.DataFrame) -> Section:
    shares = table.groupby(["line", "expression"], sort=False)["share"]
    least = shares.transform(lambda x: np.nan if x.isna().any() else x.min())
    table = table.assign(kept=np.where(least.isna(), "", np.where(least >= KEPT, "yes", "no")))
    shown = _sum_columns(table)
    shown["share"] = _spreads(table["share"], table["share_std"])
    shown["initial share"] = [_number(x) for x in table["initial_share"]]
    shown["kept"] = table["kept"].replace("", "–")
    again = table.duplicated(["line", "expression"])
    shown.loc[again, ["sum", "lambda", "kept"]] = ""
    pairs = table[~again]["kept"]
    legend = (
        f"{_SUM_LEGEND} share: mean score / mean of tuned over the samples and seeds that have "
        "both, ± standard deviation of the shares of each. initial share: what the bare initial "
        f"prompt has of it. kept: at least {KEPT:.0%} on both tasks, which says little where "
        f"guessing is as good. Kept: {(pairs == 'yes').sum()} of {(pairs != '').sum()} pairs. "
        f"Scores of a mean: {_range(table['score_n'])}."
    )
    names = _names_of(table)
    place = np.where(again, "second", "first")
    shares = [
        pd.DataFrame(
            {
                "task": names,
                "ontology": "",
                "share": table[column],
                "std": std,
                "what": [f"{what}, on the {x} task" for x in place],
            }
        )
        for what, column, std in (
            ("sum", "share", table["share_std"]),
            ("initial prompt alone", "initial_share", np.nan),
        )
    ]
    drawn = {
        f"{what}, on the {x} task": {
            "color": plots.COLOURS[at],
            "marker": marker,
            "linestyle": "none",
            **({"markerfacecolor": "white", "markeredgecolor": plots.COLOURS[at]} if at2 else {}),
        }
        for at2, (what, marker) in enumerate((("sum", "o"), ("initial prompt alone", "s")))
        for at, x in enumerate(("first", "second"))
    }
    note = (
        "test score / that of the tuned prompt; bars: standard deviation; line: what counts as kept"
    )
    long = pd.concat(shares, ignore_index=True)
    figures = _pages(
        "vectors-pairs",
        long,
        lambda page: plots.dots(page, "share", "task", "what", drawn, note, "std", KEPT),
    )
    shown = _without_constants(shown)
    return Section(
        "vectors-pairs", "Sums of two task prompt vectors", legend, table, shown, figures
    )


def _expression_section(table: pd.DataFrame) -> Section:
    shown = _sum_columns(table)
    shown.insert(4, "vector", table["vector"])
    shown["less initial"] = [_number(x, "+") for x in table["score"] - table["initial"]]
    shown["less tuned"] = [_number(x, "+") for x in table["score"] - table["tuned"]]
    shown.loc[table.duplicated(["line", "expression"]), ["sum", "lambda"]] = ""
    legend = (
        f"{_SUM_LEGEND} vector: whether the task's own vector is added, taken away or not in the "
        "sum; a task is unlearned where its vector is taken away and its score falls below "
        f"initial. Scores of a mean: {_range(table['score_n'])}."
    )
    title = "Other sums of task prompt vectors"
    return Section("vectors-expressions", title, legend, table, _without_constants(shown))


# ---- writing -------------------------------------------------------------------------------------

_HTML = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Results</title><style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72em; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
th, td { padding: .2em .8em; text-align: left; border-bottom: 1px solid #ddd; white-space: nowrap }
th { border-bottom: 1.5px solid #555 }
td { font-variant-numeric: tabular-nums }
p { max-width: 50em; color: #444 }
img { max-width: 100%; display: block; margin: 1em 0 }
</style></head><body>
"""


def write_report(sections: Sequence[Section], folder: Path) -> list[Path]:
    """Write ``report.md``, ``report.html``, a CSV file for each section and its figures.

    Args:
        sections: as `make_report` gives them.
        folder: where to; made if it is not there.

    Returns:
        The files, the two reports first.
    """
    files, text, page = [], ["# Results"], [_HTML, "<h1>Results</h1>"]
    for section in sections:
        path = folder / f"{section.name}.csv"
        content = section.table.to_csv(index=False, lineterminator="\n")
        write_atomically(path, content.encode())
        files.append(path)
        text += [f"## {section.title}", section.legend, markdown(section.shown)]
        page += [f"<h2>{html.escape(section.title)}</h2>", f"<p>{html.escape(section.legend)}</p>"]
        page.append(_html_table(section.shown))
        for name, figure in section.figures.items():
            files += plots.save_figure(figure, folder / name)
            text.append(f"![{name}]({name}.png)")
            page.append(f'<img src="{name}.png" alt="{name}" width="{_pixels(figure)}">')
    write_atomically(folder / "report.md", ("\n\n".join(text) + "\n").encode())
    write_atomically(folder / "report.html", ("\n".join([*page, "</body></html>"]) + "\n").encode())
    return [folder / "report.md", folder / "report.html", *files]


def _pixels(figure: Figure) -> int:
    return round(110 * figure.get_size_inches()[0])


def markdown(shown: pd.DataFrame) -> str:
    """A table of text in GitHub's Markdown, aligned as plain text too."""
    cells = shown.astype(str).map(lambda cell: cell.replace("|", r"\|"))
    return cells.to_markdown(index=False, disable_numparse=True)


def _html_table(shown: pd.DataFrame) -> str:
    cells = shown.astype(str).map(
        lambda cell: re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(cell))
    )
    cells.columns = [html.escape(name) for name in cells.columns]
    return cells.to_html(index=False, escape=False, border=0)


def _file_name(words: str) -> str:
    return "_".join(re.findall(r"\w+", words))
