"""The report of results: lines, scores, relative gains, sets, dimensions, tasks, tests, curves.

Each section is made of the runs that `tables.read_lines` gives; one of all runs counts them again.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.sections import (
    Section,
    bold_best,
    counted,
    file_name,
    intervals,
    number,
    p_values,
    pages,
    plus_minus,
    span,
)
from prompt_lab.analysis.statistics import LEVEL, bootstrap, holm, principal_components, t_test
from prompt_lab.analysis.tables import (
    FAILED,
    POINT,
    SHARED,
    SUMS,
    TASK,
    chosen_runs,
    count_out,
    flag_table,
    group_rank,
    is_method,
    mean_over_tasks,
    prompt_arrays,
    relate,
    shots_rank,
    task_scores,
)
from prompt_lab.analysis.vectors import vector_sections

RULE = (
    "A task is left out of the mean where its score or its reference is missing, and where its "
    "reference is zero or negative, for which a ratio says nothing."
)
INTERVAL = "95 % interval: seeded bootstrap over tasks and runs."
BOLD = "Bold: the best of the lines with the usual number of tasks, baselines apart."


def make_report(
    runs: pd.DataFrame,
    references: Sequence[str] = (),
    partition: Mapping[str, Iterable[str]] | None = None,
) -> list[Section]:
    """All sections that the runs, as `tables.read_lines` gives them, have something for.

    ``references`` are lines to compare with; tests of each task are against the first.
    ``partition`` has tasks by the name of their set. Errors are those of `tables.relate`, and a
    ``ValueError`` for a K that is none.
    """
    compared = runs[~runs["variant"].isin(SUMS)]
    scores = task_scores(compared)
    ratios = [relate(scores, name) for name in references]
    sets = {"ontology": scores["ontology"].str.split("/").str[0]}
    if partition is not None:
        names = {task: name for name, tasks in partition.items() for task in tasks}
        sets["partition"] = scores["task"].map(names).fillna("in no set")
    sections = [_lines_section(runs), _scores_section(compared, scores)]
    sections += [_gains_section(compared, table) for table in ratios]
    for kind, of_kind in sets.items():
        if of_kind.nunique() > 1 or kind == "partition":
            sections += _sets_sections(kind, scores, of_kind, ratios)
    sections += _dimension_sections(scores, ratios)
    sections += [*_task_section(compared), *_tests_section(compared, references[:1])]
    sections += [*_adaptation_section(compared), *_codes_section(compared)]
    return [*sections, *vector_sections(runs)]


# ---- lines and scores ----------------------------------------------------------------------------

_FACTS = [
    *("method", "backbone", "stage", "start", "num_virtual_tokens", "intrinsic_dim", "shots"),
    *("optimizer", "learning_rate", "batch_size", "decoding", "metric_variant"),
]


def _lines_section(runs: pd.DataFrame) -> Section:
    own = runs[~runs["line"].isin(SHARED)]
    flags = flag_table(own)
    facts = pd.concat([own[_FACTS], flags.loc[:, flags.nunique() > 1]], axis=1)
    lines, counts = {}, {}
    for line, part in own.groupby("line", sort=False):
        counts = {"runs": len(part), "tasks": part["task"].nunique()}
        for name in ("sample", "init_seed", "order_seed"):
            counts[f"{name.replace('_', ' ')}s"] = part[name].replace("", None).nunique()
        counts["failed"] = part["status"].str.match(FAILED).sum()
        counts["unfinished"] = (part["status"].str.lower() == "training").sum()
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


def _scores_section(runs: pd.DataFrame, scores: pd.DataFrame) -> Section:
    table = mean_over_tasks(scores)
    ends = {
        label: bootstrap([tests for _, tests in own.groupby("task", sort=False)["test"]])
        for label, own in chosen_runs(runs).groupby("label", sort=False)
    }
    table[["low", "high"]] = [ends[label] for label in table["label"]]
    count_out(runs, table)
    words, counts = _counts(table, tasks="tasks", runs="scored")
    shown = pd.DataFrame({"line": table["label"]})
    shown["score"] = _bold_line(plus_minus(table["score"], table["std"]), table, "score", "tasks")
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


def _bold_line(texts: list[str], table: pd.DataFrame, value: str, tasks: str) -> list[str]:
    like = table["variant"].notna() & is_method(table)
    usual = table.loc[like & (table[tasks] > 0), tasks].mode().max()
    return bold_best(texts, table[value].where(like & (table[tasks] == usual)))


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


def _few(table: pd.DataFrame) -> pd.DataFrame:
    """Of many points those of the largest intrinsic dimension and K, which a figure can show."""
    if table["label"].nunique() <= 6:
        return table
    largest = table.groupby("family")["intrinsic_dim"].transform("max")
    table = table[table["intrinsic_dim"].isna() | (table["intrinsic_dim"] == largest)]
    ranks = table["shots"].map(shots_rank)
    return table[ranks == ranks.groupby(table["name"]).transform("max")]


# ---- relative to a reference ---------------------------------------------------------------------


def _gains_section(runs: pd.DataFrame, ratios: pd.DataFrame) -> Section:
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


def _sets_sections(
    kind: str, scores: pd.DataFrame, sets: pd.Series, ratios: Sequence[pd.DataFrame]
) -> Iterator[Section]:
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


def _dimension_sections(scores: pd.DataFrame, ratios: Sequence[pd.DataFrame]) -> Iterator[Section]:
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
        legend = (
            f"{title} in a subspace, ± standard deviation over runs, mean over tasks. {words} "
            f"{BOLD}{f' Without a subspace: {beside}.' if beside else ''}"
        )
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
        shown[name] = _bold_line(plus_minus(own["mean"], own["std"]), own, "mean", "tasks")
        counts = own.loc[own["tasks"] > 0, "tasks"]
        words += [f"{name}: {span(counts)}"] * (len(counts) > 0)
    return shown, f"Tasks: {', '.join(words) or 'none'}."


# ---- tasks, starts and K -------------------------------------------------------------------------


def _task_section(runs: pd.DataFrame) -> Iterator[Section]:
    """Scores of every task and K, a column for each line and start; over K also curves.

    Over K with the initial prompts, else with no prompt, chance and majority.
    """
    tuned = runs[is_method(runs)]
    if not len(tuned):
        return
    over_k = tuned["shots"].nunique() > 1
    beside = runs[~is_method(runs) & (runs["variant"] != "initial_prompt")]
    shown_too = _initial_prompts(tuned, runs) if over_k else [beside]
    table = task_scores(pd.concat([tuned, *shown_too], ignore_index=True))
    table["rank"] = table["shots"].map(shots_rank)
    table["group"] = table["ontology"].map(group_rank)
    names = list(dict.fromkeys(table["name"]))
    rows = []
    for (_, task, _, k, metric), own in table.groupby(["group", "task", "rank", "shots", "metric"]):
        own = own.drop_duplicates("name").set_index("name").reindex(names)
        scores = own["score"].where(is_method(own))
        texts = bold_best(plus_minus(own["score"], own["std"]), scores)
        row = {"task": task, "metric": metric, "K": k}
        rows.append(row | dict(zip(names, texts, strict=True)))
    shown = pd.DataFrame(rows)
    metrics = ", ".join(shown["metric"].unique())
    one_metric = shown["metric"].nunique() == 1
    shown = shown.drop(columns=["metric"] * one_metric + ["K"] * (not over_k))
    legend = (
        "Test score of each task: mean over seeds, then samples, ± standard deviation (ddof 1) "
        f"over both. {f'Metric: {metrics}. ' if one_metric else ''}Runs that count in a cell: "
        f"{span(table.loc[is_method(table), 'scored'])}. Bold: the best of a row, baselines apart."
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


def _tests_section(runs: pd.DataFrame, references: Sequence[str]) -> Iterator[Section]:
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
    """The t-test of two groups of runs, paired where both have the same samples and seeds."""
    sides = []
    for side in (one, other):  # the seed of a run that starts from a prompt is that of the prompt
        of_source = (side["start"] == "prompt") & (side["start_seed"] != "")
        seed = side["start_seed"].where(of_source, side["init_seed"])
        keys = pd.MultiIndex.from_arrays([side["sample"], seed, side["order_seed"]])
        sides.append(pd.Series(side["test"].to_numpy(), keys))
    a, b = sides
    paired = a.index.is_unique and b.index.is_unique and {*a.index} == {*b.index}
    test = t_test(a, b.reindex(a.index) if paired else b, paired)
    return {"test": "paired" if paired else "Welch", **test}


# ---- what fits leave beside their results --------------------------------------------------------


def _adaptation_section(runs: pd.DataFrame) -> Iterator[Section]:
    chosen = chosen_runs(runs[is_method(runs) & (runs["prompt_file"] != "")])
    read = [*_curves(chosen)]
    if not read:
        return
    curves = pd.concat(read, ignore_index=True)
    lines = curves.groupby(["task", "sample"])["label"].nunique()
    shared = lines[lines == curves["label"].nunique()].index
    curves = curves[curves.set_index(["task", "sample"]).index.isin(shared)]
    tables, carried = [pd.DataFrame()], []
    for (line, label), own in curves.groupby(["line", "label"], sort=False):
        run = ["task", "sample", "place"]
        grid = own.pivot_table(index="step", columns=run, values="dev")
        ended = own.groupby(run)["ended"].first()[grid.columns].to_numpy()
        after = grid.bfill().isna() & ended
        if short := after.any().sum():
            carried.append(f"{short} of {grid.shape[1]} of {label}")
        grid = grid.mask(after, grid.ffill()).dropna()
        cell = grid.T.groupby(level=["task", "sample"]).mean()
        rows = {"line": line, "label": label, "step": grid.index}
        rows["mean_dev"] = cell.groupby(level="task").mean().mean().to_numpy()
        rows["std"] = cell.groupby(level="sample").mean().std().to_numpy()
        tables.append(pd.DataFrame(rows | {"runs": grid.shape[1]}))
    table = pd.concat(tables, ignore_index=True)
    if not len(table):
        return
    tasks, samples = (counted(len(shared.unique(x)), x) for x in ("task", "sample"))
    legend = (
        f"Mean dev score of the runs that count, over {tasks} and {samples} that all "
        "lines have; bands: standard deviation (ddof 1) over samples of the mean over tasks."
    )
    if left := len(lines) - len(shared):
        legend += f" {left} pairs of task and sample that some lines lack are left out."
    if carried:
        legend += f" Runs that ended early keep their last score: {', '.join(carried)}."
    last = table.groupby("label", sort=False).tail(1)
    shown = pd.DataFrame({"line": last["label"], "last step": last["step"]})
    shown["dev score"] = plus_minus(last["mean_dev"], last["std"])
    shown["runs"] = last["runs"]
    drawn, figures = plots.looks(runs), {}
    if table["step"].nunique() > 1:
        words = ("step", "mean dev score", "std" if table["std"].notna().any() else None)
        figure = plots.lines(table, "step", "mean_dev", "label", drawn, *words, steps=True)
        figures["adaptation"] = figure
    yield Section("adaptation", "Adaptation curves", legend, table, shown, figures)


def _curves(chosen: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Dev scores of the chosen runs over steps, from the ``curves.csv`` beside their results."""
    for folder, own in chosen.groupby("folder", sort=False):
        file = Path(folder) / "curves.csv"
        if not file.is_file():
            continue
        try:
            found = pd.read_csv(file, usecols=["step", "run", "dev"], dtype={"run": str}).dropna()
        except (UnicodeDecodeError, ValueError) as error:
            raise ValueError(f"{file} is no curves.csv of prompt-lab: {error}") from None
        kept = own[["line", "label", "task", "sample"]].assign(
            run=[Path(name).stem for name in own["prompt_file"]],
            ended=own["status"].str.match(rf"{FAILED}|stopped early"),
            place=own.index,
        )
        yield kept.merge(found, on="run")


def _codes_section(runs: pd.DataFrame) -> Iterator[Section]:
    chosen = chosen_runs(runs[is_method(runs) & (runs["intrinsic_dim"] >= 2)])
    tables, figures = [], {}
    for label, own in chosen.groupby("label", sort=False):
        codes = [prompt_arrays(x.folder, x.prompt_file, "code") for x in own.itertuples()]
        own = own[[len(code) > 0 for code in codes]]
        if len(own) < 3:
            continue
        points, shares = principal_components(np.stack([code[0] for code in codes if code]))
        kinds = own["ontology"]
        kinds = kinds if kinds.nunique() <= 6 else kinds.str.split("/").str[0]
        table = own[["label", "task", "sample", "init_seed"]]
        tables.append(table.assign(kind=kinds, first=points[:, 0], second=points[:, 1], codes=1))
        words = (f"first component ({shares[0]:.0%} of the variance)", f"second ({shares[1]:.0%})")
        figure = plots.scatter(tables[-1], "first", "second", "kind", *words)
        figures[f"codes-{file_name(label)}"] = figure
    if tables:
        table = pd.concat(tables, ignore_index=True)
        shown = table.groupby("label", sort=False)["codes"].sum().rename_axis("line").reset_index()
        words = "Codes of the runs that count, on the first two principal components of their line."
        yield Section("codes", "Codes in the subspace", words, table, shown, figures)
