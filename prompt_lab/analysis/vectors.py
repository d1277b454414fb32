"""Sections of task prompt vectors: on other initial prompts, sums of two, other sums, cosines.

The tables of Belanec et al. 2024 (arXiv 2408.01119): table 1, figure 4, their future work, and
figures 2 and 3; between tasks the code of the paper averages vectors into figure 2 of prompts too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.sections import (
    Section,
    counted,
    number,
    p_values,
    pages,
    plus_minus,
    span,
)
from prompt_lab.analysis.statistics import LEVEL, holm, t_test
from prompt_lab.analysis.tables import count_out, prompt_arrays
from prompt_lab.core.vectors import parse_expression
from prompt_lab.files.prompts import FoundPrompt

KEPT = 0.5
"""Share of a tuned prompt's score from which a sum keeps a task (arXiv 2408.01119, section 4.3)."""

_CELL = ["line", "task", "sample", "init_seed"]
_SUM = ["line", "expression"]


def vector_sections(runs: pd.DataFrame) -> Iterator[Section]:
    """The sections that the sums of VectorArithmetic give; each K of a line is a line here."""
    counts = runs[runs["variant"] == "vectors"].groupby("line")["shots"].nunique()
    several = runs["line"].isin(counts.index[counts > 1])
    named = runs["line"] + ", K " + runs["shots"].astype(str)
    runs = runs.assign(line=runs["line"].where(~several, named))
    sums = _beside(runs[runs["variant"] == "vectors"], runs)
    alone = {text for text in {*sums["expression"]} if [*parse_expression(text).values()] == [1.0]}
    elsewhere = (sums["start_seed"] != sums["init_seed"]).groupby([sums[x] for x in _SUM])
    is_cross = elsewhere.transform("any").astype(bool) & sums["expression"].isin(alone)
    if is_cross.any():
        yield _cross_section(sums[is_cross], runs[runs["variant"] == "vector_alone"])
    rest = sums[~is_cross]
    if not len(rest):
        return
    table = _sums_table(rest)
    count_out(rest, table)
    pairs, others = (part.drop(columns="pair") for part in (table[table.pair], table[~table.pair]))
    if len(pairs):
        yield _pair_section(pairs)
    if len(others):
        yield _expression_section(others)


def _beside(sums: pd.DataFrame, runs: pd.DataFrame) -> pd.DataFrame:
    """Sums with the scores of their task's tuned prompt and of their bare initial prompt."""
    files = ["folder", "prompt_file"]
    tuned = runs.loc[runs["variant"] == "single", [*_CELL, "test", *files]]
    tuned = tuned.rename(columns={"test": "tuned"}).drop_duplicates(_CELL)
    initial = runs.loc[runs["variant"] == "initial_prompt", [*_CELL, "test"]]
    initial = initial.rename(columns={"test": "initial", "init_seed": "start_seed"})
    place = ["line", "task", "sample", "start_seed"]
    found = sums.drop(columns=files).merge(tuned, on=_CELL, how="left")
    found = found.merge(initial.drop_duplicates(place), on=place, how="left")
    assert len(found) == len(sums)
    return found


def _moments(name: str, values: pd.Series) -> dict[str, float]:
    return {name: values.mean(), f"{name}_std": values.std(), f"{name}_n": values.count()}


_KINDS = {
    **{"own": "own", "chosen": "own, lambda by dev", "other": "other"},
    **{"initial": "initial", "alone": "alone", "ratio": "vector/init"},
}


def _cross_section(cross: pd.DataFrame, alone: pd.DataFrame) -> Section:
    rows = []
    for (line, task, metric), own in cross.groupby(["line", "task", "metric"], sort=False):
        is_own = own["start_seed"] == own["init_seed"]
        cells = own.drop_duplicates(_CELL)
        pairs = own[~is_own].groupby(_CELL).agg(other=("test", "mean"), tuned=("tuned", "first"))
        kinds = {
            "own": cells["tuned"],
            "chosen": own.loc[is_own, "test"],
            "other": own.loc[~is_own, "test"],
            "initial": own.drop_duplicates(["sample", "start_seed"])["initial"],
            "alone": alone.loc[(alone["line"] == line) & (alone["task"] == task), "test"],
            "ratio": pd.Series([_norm_ratio(x) for x in cells.itertuples()], dtype=float),
        }
        row: dict[str, Any] = {"line": line, "task": task, "metric": metric}
        for kind, values in kinds.items():
            row |= _moments(kind, values)
        row |= {"vectors": pairs["other"].count(), "runs": len(own)}
        rows.append(row | t_test(pairs["other"], pairs["tuned"], paired=True))
    table = pd.DataFrame(rows)
    count_out(cross, table)
    table["p_corrected"] = holm(table["p"])
    shown, long = table[["line", "task", "metric"]].copy(), []
    for kind, name in _KINDS.items():
        if not table[f"{kind}_n"].any():
            continue
        shown[name] = plus_minus(table[kind], table[f"{kind}_std"])
        if kind not in ("chosen", "ratio"):
            long.append(_long(table, table["task"], name, kind, f"{kind}_std"))
    shown["other less own"] = [number(x, "+") for x in table["difference"]]
    shown["p"] = p_values(table["p_corrected"])
    legend = (
        "Mean test score ± standard deviation (ddof 1) over prompts. own: each vector on the "
        "initial prompt that it was tuned from, which is the tuned prompt. other: each vector on "
        "each other initial prompt of its sample; these share vectors and initial prompts, so "
        "fewer are independent. initial: the initial prompts with no vector. alone: the vectors "
        "with no initial prompt. vector/init: norm of the vector / norm of its initial prompt. "
        f"Vectors of a task: {span(table['vectors'])}; prompts in other: "
        f"{span(table['other_n'])}. p: paired t-test over samples and seeds of a vector's mean "
        "over other initial prompts against its own score, corrected after Holm over the tests of "
        f"this table; *: at most {LEVEL:g}. It takes vectors for independent."
    )
    names = [*_KINDS.values()]
    drawn = plots.looks(pd.DataFrame({"line": names, "label": names}))
    note = "test score; bars: standard deviation over prompts"
    figures = pages("vectors-cross", pd.concat(long), "value", drawn, note, spread="std")
    title = "Task prompt vectors on other initial prompts"
    return Section("vectors-cross", title, legend, table, _short(shown), figures)


def _norm_ratio(row: Any) -> float:
    """Norm of a prompt file's vector / that of its init; NaN without the file."""
    found = prompt_arrays(str(row.folder), row.prompt_file or "", "prompt", "init")
    size = np.linalg.norm(found[1]) if found else 0
    return float(np.linalg.norm(found[0] - found[1]) / size) if size else np.nan


def _long(
    table: pd.DataFrame, places: pd.Series, what: Any, value: str, std: str | None
) -> pd.DataFrame:
    """A column of a table as a figure of dots takes it; places with their line where needed."""
    places = places if table["line"].nunique() == 1 else places + " (" + table["line"] + ")"
    spread = np.nan if std is None else table[std]
    rows = {"task": places, "ontology": "", "label": what, "value": table[value], "std": spread}
    return pd.DataFrame(rows)


def _short(shown: pd.DataFrame) -> pd.DataFrame:
    """A table without the columns line and metric where these say the same in all rows."""
    return shown.drop(columns=[x for x in ("line", "metric") if shown[x].nunique() == 1])


def _sums_table(sums: pd.DataFrame) -> pd.DataFrame:
    """A row for each sum and task, beside the tuned and the initial prompts of the same cells."""
    rows = []
    for (line, expression), of_sum in sums.groupby(_SUM, sort=False):
        factors = parse_expression(expression)
        pair = [*factors.values()] == [1.0, 1.0] and {*of_sum["task"]} == {*factors}
        for task in dict.fromkeys([*factors, *of_sum["task"]]):
            own = of_sum[of_sum["task"] == task]
            if not len(own):
                continue
            factor = factors.get(task, 0)
            role = "added" if factor > 0 else "taken away" if factor < 0 else "not in it"
            row = {"line": line, "expression": expression, "task": task, "pair": pair}
            row |= {"vector": role, "metric": own["metric"].iloc[0]}
            for name, column in (("score", "test"), ("tuned", "tuned"), ("initial", "initial")):
                row |= _moments(name, own[column])
            for name, column in (("share", "test"), ("initial_share", "initial")):
                both = own[own[column].notna() & own["tuned"].notna()]
                shares = (both[column] / both["tuned"])[both["tuned"] > 0]
                base = both["tuned"].mean()
                row |= _moments(name, shares) | {f"{name}_n": len(both)}
                row[name] = both[column].mean() / base if base > 0 else np.nan
            row |= {"scale": own["scale"].mean(), "scale_std": own["scale"].std()}
            row |= {"scale_least": own["scale"].min(), "scale_largest": own["scale"].max()}
            rows.append(row | {"runs": len(own)})
    return pd.DataFrame(rows)


_LEGEND = (
    "Each sum stands on the initial prompt of its vectors, scaled by the lambda that dev chose "
    "(mean, least to largest). score, tuned and initial: mean ± standard deviation (ddof 1) over "
    "samples and seeds of the sum, of the task's own tuned prompt and of the bare initial prompt. "
)


def _sum_columns(table: pd.DataFrame) -> pd.DataFrame:
    """What all sums show: a row for each sum and task, the sum named in its first."""
    scales = zip(table["scale"], table["scale_least"], table["scale_largest"], strict=True)
    shown = table[["line", "expression", "scale", "task", "metric"]]
    shown = shown.rename(columns={"expression": "sum", "scale": "lambda"})
    shown["lambda"] = [f"{x:.3g}" + (f" ({y:g} to {z:g})" if y < z else "") for x, y, z in scales]
    for name in ("score", "tuned", "initial"):
        shown[name] = plus_minus(table[name], table[f"{name}_std"])
    shown.loc[table.duplicated(_SUM), ["sum", "lambda"]] = ""
    return _short(shown)


def _pair_section(table: pd.DataFrame) -> Section:
    shares = table.groupby(_SUM, sort=False)["share"]
    least = shares.transform("min").where(shares.transform("count") == 2)
    table = table.assign(kept=np.where(least.isna(), "", np.where(least >= KEPT, "yes", "no")))
    again = table.duplicated(_SUM)
    shown = _sum_columns(table)
    shown["share"] = plus_minus(table["share"], table["share_std"])
    shown["initial share"] = [number(x) for x in table["initial_share"]]
    shown["kept"] = table["kept"].replace("", "–").where(~again, "")
    known = table.loc[~again & (table["kept"] != ""), "kept"]
    legend = (
        f"{_LEGEND}share: mean score / mean of tuned over the samples and seeds that have both, ± "
        "standard deviation of the shares of each. initial share: what the bare initial prompt "
        f"has of it. kept: at least {KEPT:.0%} on both tasks, which says little where guessing is "
        f"as good. Kept: {(known == 'yes').sum()} of {counted(len(known), 'pair')}. Scores of "
        f"a mean: {span(table['score_n'])}."
    )
    long, drawn = [], {}
    for what, value, std in (
        ("sum", "share", "share_std"),
        ("initial prompt alone", "initial_share", None),
    ):
        labels = [f"{what}, on the {place} task" for place in ("first", "second")]
        long.append(_long(table, table["expression"], np.where(again, *labels[::-1]), value, std))
        for name, colour in zip(labels, plots.COLOURS, strict=False):
            inside, marker = (colour, "o") if what == "sum" else ("white", "s")
            drawn[name] = {"color": colour, "marker": marker}
            drawn[name] |= {"markeredgecolor": colour, "markerfacecolor": inside}
    note = "test score / that of the tuned prompt; bars: standard deviation; line: kept from here"
    name, title = "vectors-pairs", "Sums of two task prompt vectors"
    figures = pages(name, pd.concat(long), "value", drawn, note, spread="std", level=KEPT)
    return Section(name, title, legend, table, shown, figures)


def _expression_section(table: pd.DataFrame) -> Section:
    shown = _sum_columns(table)
    shown.insert([*shown].index("task") + 1, "vector", table["vector"])
    for name in ("initial", "tuned"):
        shown[f"less {name}"] = [number(x, "+") for x in table["score"] - table[name]]
    legend = (
        f"{_LEGEND}vector: whether the task's own vector is added, taken away or not in the sum; a "
        "task is unlearned where its vector is taken away and its score falls below initial. "
        f"Scores of a mean: {span(table['score_n'])}."
    )
    return Section("vectors-expressions", "Other sums of task prompt vectors", legend, table, shown)


# ---- cosines of prompts and vectors --------------------------------------------------------------


def cosine_table(groups: Mapping[int | None, Sequence[FoundPrompt]]) -> pd.DataFrame:
    """Cosines of all numbers of every two prompts of a sample, of their vectors, and of inits.

    Prompts (N, D) of one shape come by their few-shot sample. A row for each pair has ``what``
    ("prompts", "vectors", "init"), ``task`` and ``other`` in the order of their names,
    ``same_init``, whether both started from the same numbers, and ``cosine``, NaN where one side is
    zero. Each initial prompt counts once, without tasks.
    """
    rows = []
    for sources in groups.values():
        inits = np.stack([x.prompt.init.double().flatten().numpy() for x in sources])
        tuned = np.stack([x.prompt.prompt.double().flatten().numpy() for x in sources])
        _, first, start = np.unique(inits, axis=0, return_index=True, return_inverse=True)
        tasks = np.array([x.prompt.task for x in sources], dtype=object)
        nameless = np.full(len(first), "", dtype=object)
        for what, bank, names, starts in (
            ("prompts", tuned, tasks, start),
            ("vectors", tuned - inits, tasks, start),
            ("init", inits[first], nameless, np.arange(len(first))),
        ):
            one, other = np.triu_indices(len(bank), 1)
            with np.errstate(invalid="ignore"):
                units = bank / np.linalg.norm(bank, axis=1, keepdims=True)
            pairs = {"task": np.minimum(names[one], names[other])}
            pairs |= {"other": np.maximum(names[one], names[other])}
            pairs |= {"same_init": starts[one] == starts[other]}
            pairs |= {"cosine": np.clip((units @ units.T)[one, other], -1, 1)}
            rows.append(pd.DataFrame({"what": what, **pairs}))
    return pd.concat(rows, ignore_index=True)


def norm_table(groups: Mapping[int | None, Sequence[FoundPrompt]]) -> pd.DataFrame:
    """A row for each task: Frobenius norms of its ``vector`` and ``init``, and their ``ratio``.

    Means and, as ``vector_std`` and so on, standard deviations (ddof 1) over its ``prompts``.
    """
    found = [x for sources in groups.values() for x in sources]
    norms = pd.DataFrame({"task": [x.prompt.task for x in found]})
    norms["vector"] = [float(x.vector.norm()) for x in found]
    norms["init"] = [float(x.prompt.init.double().norm()) for x in found]
    norms["ratio"] = (norms["vector"] / norms["init"]).where(norms["init"] > 0)
    by_task = norms.groupby("task")
    table = pd.DataFrame({"prompts": by_task.size()})
    for name in ("vector", "init", "ratio"):
        table[name], table[f"{name}_std"] = by_task[name].mean(), by_task[name].std()
    return table.reset_index()


def cosine_sections(groups: Mapping[int | None, Sequence[FoundPrompt]]) -> list[Section]:
    """Cosines between tasks, of equal and of different initial prompts, and norms."""
    kinds = ["what", "same_init", "task", "other"]
    pairs = cosine_table(groups).groupby(kinds)["cosine"]
    table = pairs.agg(mean="mean", std="std", pairs="count").reset_index()
    initial = table[table["what"] == "init"]
    shown, figures = [], {}
    for (what, same), own in table[table["what"] != "init"].groupby(kinds[:2]):
        mirrored = own.rename(columns={"task": "other", "other": "task"})
        both = pd.concat([own, mirrored]).drop_duplicates(["task", "other"])
        texts = plus_minus(both["mean"], both["std"])
        both["text"] = [f"{x} ({n})" for x, n in zip(texts, both["pairs"], strict=True)]
        both["cell"] = [x.replace(" ±", "\n±") for x in plus_minus(both["mean"], both["std"], 2)]
        grids = both.pivot(index="task", columns="other", values=["mean", "text", "cell"])
        which = "equal" if same else "different"
        heads = pd.DataFrame({"cosine of": what, "initial prompts": which, "task": grids.index})
        heads.loc[1:, ["cosine of", "initial prompts"]] = ""
        texts = grids["text"].fillna("–").reset_index(drop=True)
        shown.append(pd.concat([heads, texts], axis=1))
        if own["pairs"].any():
            label, cells = f"cosine of {what}, {which} initial prompts", grids["cell"].fillna("")
            figures[f"{what}-{which}"] = plots.heatmap(grids["mean"], label, texts=cells)
    found = [x for sources in groups.values() for x in sources]
    zero = [f"prompt of {x.where}" for x in found if not x.prompt.prompt.any()]
    zero += [f"vector of {x.where}" for x in found if not x.vector.any()]
    legend = (
        "Mean cosine ± standard deviation (ddof 1) over all pairs of a prompt of the one task and "
        "a prompt of the other, of one few-shot sample, and their number; on the diagonal over "
        "pairs of two prompts of a task. Equal and different initial prompts are apart, since "
        "prompts of one initial prompt share what is left of it."
    )
    if len(initial):
        cosine = plus_minus(initial["mean"], initial["std"])[0]
        legend += f" Different initial prompts themselves: {cosine} ({initial['pairs'].iloc[0]})."
    if zero:
        legend += f" Left out, as they are zero: {', '.join(zero)}."
    title = "Cosines of prompts and of vectors"
    cosines = Section("similarities", title, legend, table, pd.concat(shown).fillna("–"), figures)
    norms = norm_table(groups)
    shown = norms[["task", "prompts"]].copy()
    for name in ("vector", "init", "ratio"):
        shown[name] = plus_minus(norms[name], norms[f"{name}_std"])
    shown = shown.rename(columns={"ratio": "vector / init"})
    legend = "Frobenius norms: mean ± standard deviation (ddof 1) over the prompts of a task."
    return [cosines, Section("norms", "Norms", legend, norms, shown)]
