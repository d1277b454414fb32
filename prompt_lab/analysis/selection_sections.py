"""Sections of a study of selection: rankings, transfer, the best of the first k, steps, prompts.

The tables of `selection`, as `report.write_report` takes them; scores are percent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.sections import (
    Section,
    bold_best,
    file_name,
    intervals,
    number,
    plus_minus,
)
from prompt_lab.analysis.selection import KS
from prompt_lab.analysis.statistics import tsne

if TYPE_CHECKING:
    from prompt_lab.data.sampling import Key
    from prompt_lab.files.prompts import FoundPrompt


def selection_sections(
    transfer: pd.DataFrame,
    rankings: pd.DataFrame,
    found: pd.DataFrame,
    steps: pd.DataFrame | None = None,
    prompts: Mapping[Key, FoundPrompt] | None = None,
) -> Iterator[Section]:
    """The sections of a report of rankings that were judged by transfer.

    Arguments are what the functions of `selection` give; ``prompts`` are of all tasks.
    """
    every = found["ranking"] if steps is None else pd.concat([found["ranking"], steps["ranking"]])
    names = pd.Series(every.unique())
    lines = names.str.replace(r"-(unit|source)$", "", regex=True)
    looks = plots.looks(pd.DataFrame({"line": lines, "label": names}))
    table, shown = mean_measures(found)
    for name in [*shown][1:-1]:
        ends = [_interval(own) for _, own in found.groupby("ranking", sort=False)[name]]
        table[[f"{name} low", f"{name} high"]] = ends
    shown.insert(2, "95 % interval", intervals(table["nDCG low"], table["nDCG high"], digits=2))
    legend = (
        "Percent, mean ± standard deviation (ddof 1) over targets. nDCG: gains 2^score - 1, all "
        "sources. Regret@k: what the best of the first k lacks to the best of all, as a share. "
        "gain@k: (score of the best of the first k - score without transfer) / score without "
        "transfer. random, and sources of equal similarity: exact expectations. Interval of nDCG; "
        f"the file has those of all. {_INTERVAL}"
    )
    yield Section("rankings", "Rankings of sources", legend, table, shown)
    grid = _grid(found, "target", "ranking", "nDCG")
    rows = [bold_best([number(x, digits=2) for x in row], row) for _, row in grid.iterrows()]
    shown = pd.DataFrame(rows, grid.index, grid.columns).reset_index()
    legend = "nDCG in percent. Bold: the best of a row."
    yield Section("targets", "Rankings by target", legend, found, shown)
    relative = 100 * (transfer["score"] / transfer["baseline"] - 1)
    gains = transfer.assign(relative=relative.where(transfer["baseline"] > 0))
    has_gain = gains["relative"].notna().any()
    yield _transfer_section(gains, "relative" if has_gain else "score")
    if has_gain:
        yield _relative_section(gains)
    yield _top_k_section(found, "gain" if has_gain else "score", looks)
    if steps is not None:
        level = found.loc[found["ranking"] == "random", "nDCG"].mean()
        yield _steps_section(steps, level, looks)
    yield _similarities_section(transfer, rankings, found)
    if prompts:
        yield from _token_section(transfer, prompts)


def _similarities_section(
    transfer: pd.DataFrame, rankings: pd.DataFrame, found: pd.DataFrame
) -> Section:
    pairs = transfer[["target", "source"]].drop_duplicates()
    known = pairs.merge(rankings)[["ranking", "target", "source", "similarity"]]
    figures = {}
    for name, own in known.groupby("ranking", sort=False):
        if name not in ("random", "size"):  # the same for all targets
            grid = _grid(own, "source", "target", "similarity")
            figures[f"similarity-{file_name(name)}"] = plots.heatmap(grid, f"similarity, {name}")
    shown = _grid(found, "target", "ranking", "first").reset_index()
    legend = "The first source of each ranking."
    return Section("similarities", "Similarities", legend, known, shown, figures)


def mean_measures(
    found: pd.DataFrame, by: Sequence[str] = ("ranking",)
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means and standard deviations over targets of what `evaluate` found, as numbers and text."""
    kinds = ["Regret", "gain"] if found["gain@1"].notna().any() else ["Regret"]
    names = ["nDCG", *(f"{kind}@{k}" for kind in kinds for k in KS)]
    groups = found.groupby([*by], sort=False)
    means, stds, counts = groups[names].mean(), groups[names].std(), groups["nDCG"].count()
    texts = {name: plus_minus(means[name], stds[name], 2) for name in names}
    table = means.join(stds.add_suffix(" std")).assign(targets=counts).reset_index()
    return table, table[[*by]].assign(**texts, targets=counts.to_numpy())


def _grid(table: pd.DataFrame, index: str, columns: str, value: str) -> pd.DataFrame:
    """A value by two columns, both in the table's order; names of columns as text."""
    grid = table.pivot(index=index, columns=columns, values=value)
    grid = grid.loc[table[index].unique(), table[columns].unique()]
    return grid.rename(columns=str).rename_axis(columns=None)


def _interval(values: pd.Series) -> tuple[float, float]:
    from scipy.stats import bootstrap

    known = values.dropna().to_numpy()
    if len(known) < 2:
        return math.nan, math.nan
    made = bootstrap((known,), np.mean, n_resamples=9999, method="percentile", rng=0)
    low, high = made.confidence_interval
    return float(low), float(high)


def _spread(values: pd.Series) -> dict[str, float]:
    ends = dict(zip(("low", "high"), _interval(values), strict=True))
    return {"mean": values.mean(), "std": values.std(), **ends}


_INTERVAL = "Interval: 95 %, seeded bootstrap of the mean (percentiles)."


def _transfer_section(gains: pd.DataFrame, value: str) -> Section:
    rows = []
    for (target, source), own in gains.groupby(["target", "source"], sort=False):
        row = {"target": target, "source": source, "seeds": len(own)}
        for name in ("score", "relative"):
            row |= {f"{name} {part}": x for part, x in _spread(own[name]).items()}
        rows.append(row | {"no transfer": own["baseline"].iloc[0]})
    table = pd.DataFrame(rows)
    grid = _grid(table, "source", "target", f"{value} mean")
    sign, centre = ("+", 0.0) if value == "relative" else ("", None)
    shown = grid.map(lambda x: number(x, sign, 2)).reset_index()
    what = "relative transfer (%)" if value == "relative" else "score (%)"
    legend = (
        f"{what.capitalize()}, a row for each source and a column for each target, means over "
        "seeds. Relative: (score - mean score without transfer) / mean score without transfer. The "
        f"file has the spread of each pair over seeds. {_INTERVAL}"
    )
    figures = {"transfer": plots.heatmap(grid, what, centre)}
    return Section("transfer", "Transfer", legend, table, shown, figures)


def _relative_section(gains: pd.DataFrame) -> Section:
    gains, rows, figures = gains[gains["relative"].notna()], [], {}
    means = gains.groupby(["target", "source"], sort=False)["relative"].mean().reset_index()
    note = "relative transfer (%)"
    for by, other in (("source", "target"), ("target", "source")):
        for task, own in means.groupby(by, sort=False)["relative"]:
            rows.append({"by": by, "task": task, "pairs": len(own)} | _spread(own))
        looks = plots.looks(pd.DataFrame({"line": by, "label": gains[by].unique()}))
        figures[f"transfer-by-{by}"] = plots.violins(gains, "relative", by, looks, note, 0.0)
        own = pd.DataFrame([x for x in rows if x["by"] == by]).assign(label="mean", line="mean")
        words = f"{note}, mean over {other}s and its 95 % interval"
        figure = plots.dots(own, "mean", plots.looks(own), words, ("low", "high"), 0.0)
        figures[f"transfer-means-by-{by}"] = figure
    table = pd.DataFrame(rows)
    shown = table[["by", "task", "pairs"]].copy()
    shown["relative transfer"] = plus_minus(table["mean"], table["std"], 2, "+")
    shown["95 % interval"] = intervals(table["low"], table["high"], "+", 2)
    legend = (
        "Relative transfer in percent, mean ± standard deviation (ddof 1) over the other tasks, "
        f"seeds averaged. {_INTERVAL} Violins: a dot for each other task and seed."
    )
    title = "Relative transfer by source and by target"
    return Section("relative_transfer", title, legend, table, shown, figures)


def _top_k_section(found: pd.DataFrame, value: str, looks: plots.Looks) -> Section:
    rows = []
    for ranking, own in found.groupby("ranking", sort=False):
        # Of a target with fewer sources than k, the best of all.
        best = {x: own.filter(regex=f"^{x}@").ffill(axis=1) for x in ("score", "gain")}
        for k in range(1, own["sources"].max() + 1):
            row = {"ranking": ranking, "k": k, "targets": best["score"][f"score@{k}"].count()}
            for name, of_k in best.items():
                row |= {name: of_k[f"{name}@{k}"].mean(), f"{name} std": of_k[f"{name}@{k}"].std()}
            rows.append(row)
    table = pd.DataFrame(rows)
    what = "relative transfer" if value == "gain" else "score"
    shown = table.assign(text=plus_minus(table[value], table[f"{value} std"], 2))
    shown = _grid(shown, "ranking", "k", "text").reset_index()
    note = f"{what} of the best of the first k (%)"
    figure = plots.lines(table, "k", value, "ranking", looks, "sources tried, k", note)
    legend = f"{note.capitalize()}, mean ± standard deviation (ddof 1) over targets."
    return Section("top_k", "The best of the first k", legend, table, shown, {"top-k": figure})


def _steps_section(steps: pd.DataFrame, level: float, looks: plots.Looks) -> Section:
    table, _ = mean_measures(steps, ("step", "ranking"))
    shown = _grid(table, "ranking", "step", "nDCG").map(lambda x: number(x, digits=2))
    words = ("step of the target prompts", "nDCG (%); dashed: random")
    figure = plots.lines(table, "step", "nDCG", "ranking", looks, *words, level=level, steps=True)
    legend = (
        "nDCG in percent of the rankings by the target prompts of each step, mean over targets; "
        f"dashed: random, {level:.2f}. The file has a row for each target."
    )
    title, shown = "Rankings over the steps of the target prompts", shown.reset_index()
    return Section("steps", title, legend, steps, shown, {"steps-ndcg": figure})


def _token_section(transfer: pd.DataFrame, prompts: Mapping[Key, FoundPrompt]) -> Iterator[Section]:
    samples: dict[str, list[int]] = {}
    for task, sample in sorted(prompts):
        samples.setdefault(task, []).append(sample)
    tables, rows, figures = [], [], {}
    for target, own in transfer.groupby("target", sort=False):
        means = own.groupby("source")["score"].mean().sort_values(ascending=False, kind="stable")
        places = {"best": 0, "second": 1, "worst": -1}
        if len(means) < 3:
            places = {"best": 0, "worst": -1} if len(means) == 2 else {}
        texts = {role: f"{means.index[at]} ({means.iloc[at]:.2f})" for role, at in places.items()}
        labels = [f"{target}, no transfer", *(f"{role}: {x}" for role, x in texts.items())]
        parts = []
        for label, task in zip(labels, [target, *means.index[[*places.values()]]], strict=True):
            sample = samples[target][0] if samples[target][0] in samples[task] else samples[task][0]
            parts += [(label, row) for row in prompts[task, sample].prompt.prompt.numpy()]
        if len(parts) < 4:  # too few for t-SNE
            continue
        points, perplexity = tsne(np.stack([row for _, row in parts]))
        table = pd.DataFrame(points, columns=["x", "y"])
        tables.append(table.assign(target=target, prompt=[label for label, _ in parts]))
        words = ("first coordinate of t-SNE", "second coordinate of t-SNE")
        figure = plots.scatter(tables[-1], "x", "y", "prompt", *words)
        figures[f"tokens-{file_name(target)}"] = figure
        rows.append({"target": target, **texts, "perplexity": f"{perplexity:.3g}"})
    if tables:
        legend = (
            "Rows of a target's prompt with those of its best, second and worst source (of the "
            "same sample where there is one), by t-SNE; in brackets the target's score in percent "
            "from that source."
        )
        title = "Rows of prompts"
        table, shown = pd.concat(tables), pd.DataFrame(rows).fillna("–")
        yield Section("tokens", title, legend, table, shown, figures)
