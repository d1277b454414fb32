"""The report of `prompt-lab interpret`: sections and figures of the tables of `interpretation`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.interpretation import (
    TRANSFER,
    Vocabulary,
    distance_table,
    prompt_norms,
    prompt_points,
    read_vocabulary,
    spread_table,
    task_distances,
    token_table,
)
from prompt_lab.analysis.sections import Section, literal
from prompt_lab.analysis.statistics import Floats, mantel, principal_components, tsne
from prompt_lab.files.prompts import check_prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from prompt_lab.core.backbone import Backbone

MEASURES = {
    "cosine": "cosine (higher is nearer)",
    "l2": "Euclidean distance (lower is nearer)",
    "dot": "inner product (higher is nearer)",
}
DISTANCES = {"rows": "Frobenius distance", "mean": "distance of mean rows"}


def interpret_prompts(
    prompts: pd.DataFrame,
    backbone: Backbone,
    top: int = 5,
    measure: str = "cosine",
    compare: str = "rows",
    transfer: pd.DataFrame | None = None,
    all_rows: bool = False,
) -> list[Section]:
    """All sections of a report on prompts; the tokens, which are many, come last.

    Arguments are those of the functions of `interpretation`, by their names, and so are errors; a
    ``ValueError`` too for prompts of another backbone.
    """
    points = prompt_points(prompts, compare)
    for one in prompts.itertuples():
        check_prompt(one.tuned, backbone, one.file)
    vocabulary = read_vocabulary(backbone, all_rows)
    tokens = token_table(prompts, vocabulary, top, measure)
    pairs = distance_table(prompts, points)
    sections = [_prompts_section(prompts, tokens, vocabulary, backbone.name)]
    if len(prompts) > 1:
        sections.append(_spread_section(spread_table(prompts, pairs), DISTANCES[compare]))
        sections.append(_distances_section(prompts, points, pairs, DISTANCES[compare]))
    if transfer is not None:
        sections.append(_transfer_section(transfer, task_distances(prompts, pairs)))
    return [*sections, _tokens_section(tokens, top, measure, vocabulary.note)]


def _digits(values: pd.Series) -> list[str]:
    return ["–" if pd.isna(x) else f"{x:.4g}" for x in values]


def _prompts_section(
    prompts: pd.DataFrame, tokens: pd.DataFrame, vocabulary: Vocabulary, backbone: str
) -> Section:
    facts = tokens.groupby("prompt", sort=False).agg(
        rows=("row", "size"),
        row_norm=("norm", "mean"),
        relative_norm=("relative_norm", "mean"),
        drift=("drift", "mean"),
        most_drift=("drift", "max"),
        cosine=("cosine", "mean"),
        initial_tokens=("initial_id", "count"),
        survived=("survived", "sum"),
    )
    facts.insert(1, "norm", prompt_norms(prompts).to_numpy())
    table = prompts.drop(columns="tuned").join(facts, on="prompt")
    heads = {"norm": "norm", "row_norm": "row norm", "relative_norm": "x median"}
    heads |= {"drift": "drift, mean", "most_drift": "largest", "cosine": "cosine"}
    shown = table[["prompt", *heads]].rename(columns=heads)
    shown[[*heads.values()]] = shown[[*heads.values()]].apply(_digits)
    kept = zip(table["survived"], table["initial_tokens"], strict=True)
    shown["survived"] = [f"{x} of {y}" if y else "–" for x, y in kept]
    left_out = prompts.attrs["left_out"]
    legend = (
        f"{len(prompts)} prompts of {prompts['task'].nunique()} tasks, for backbone {backbone}. "
        + (f"Of grids, {left_out} prompts with a lower dev score are left out. " * bool(left_out))
        + "Norm: Frobenius norm of the prompt. Row norm: mean over rows, and as a multiple of the "
        f"vocabulary's median, {vocabulary.median:.4g}. Drift: Euclidean distance of a row from "
        "its initial row. Cosine: between the two. Survived: rows whose nearest token is still the "
        "one that they started as, of those that started as a token; a dot in the figure of drift "
        "marks one that is not."
    )
    figures = {**_drift_figures(tokens), "norms": _norms_figure(tokens, prompts, vocabulary)}
    return Section("prompts", "Prompts", legend, table, shown, figures)


def _drift_figures(tokens: pd.DataFrame) -> dict[str, Figure]:
    marks = np.where((tokens["survived"] == 0).fillna(False), "•", "")
    order = tokens["prompt"].unique()
    whole = tokens.assign(mark=marks).pivot(index="prompt", columns="row", values=["drift", "mark"])
    whole = whole.loc[order].set_axis(_short_names(order))
    figures, words = {}, {"label": "distance from initial row", "xlabel": "row of the prompt"}
    for at in range(0, len(whole), 30):  # thirty prompts a page
        page = whole.iloc[at : at + 30]
        stem = "drift" if len(whole) <= 30 else f"drift-{at // 30 + 1}"
        figures[stem] = plots.heatmap(page["drift"], texts=page["mark"].fillna(""), **words)
    return figures


def _short_names(labels: Sequence[str]) -> list[str]:
    """Names without the last parts, such as a learning rate, that all of them share."""
    parts = [label.split("_") for label in labels]
    while len(labels) > 1 and min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    return ["_".join(own) for own in parts]


def _norms_figure(tokens: pd.DataFrame, prompts: pd.DataFrame, vocabulary: Vocabulary) -> Figure:
    again = prompts["tuned"].map(lambda one: one.init.numpy().tobytes()).duplicated()
    inits = tokens.loc[~tokens["prompt"].isin(prompts.loc[again, "prompt"]), "initial_norm"]
    quantiles = np.quantile(vocabulary.norms, np.linspace(0, 1, 201))  # for any vocabulary
    counts = " (" + tokens["task"].map(prompts["task"].value_counts()).astype(str) + ")"
    parts = {"vocabulary": pd.Series(quantiles), "initial prompts": inits}
    parts |= dict([*tokens["norm"].groupby(tokens["task"] + counts, sort=False)])
    table = pd.concat([pd.DataFrame({"label": x, "norm": own}) for x, own in parts.items()])
    drawn = plots.looks(table.assign(line=table["label"]))
    return plots.violins(table, "norm", "label", drawn, "norm of a row")


def _spread_section(table: pd.DataFrame, distance: str) -> Section:
    shown = pd.DataFrame({"task": table["group"], "runs": table["runs"]})
    for name, head in (("norm", "norm"), ("within", "within"), ("between", "to others")):
        shown[head] = _digits(table[f"{name}_mean"])
        shown[f"variance of {head}"] = _digits(table[f"{name}_variance"])
        if name != "norm":
            shown[f"pairs {head}"] = table[f"{name}_pairs"]
    legend = (
        "Mean and variance (ddof 1) of the prompts' norms, of the distances between runs of one "
        f"task, and of those to prompts of other tasks. Distance: {distance}."
    )
    return Section("spread", "Repeated runs", legend, table, shown)


def _distances_section(
    prompts: pd.DataFrame, points: Floats, pairs: pd.DataFrame, distance: str
) -> Section:
    from scipy.spatial.distance import squareform

    means = task_distances(prompts, pairs)
    starts = prompts["tuned"].map(lambda one: one.init.numpy().tobytes()).nunique()
    rates = prompts["tuned"].map(lambda one: one.learning_rate).nunique(dropna=False)
    legend = f"Mean {distance} of two prompts; on the diagonal, of different runs of one task."
    if starts > 1:
        legend += (
            f" The prompts start from {starts} different initial prompts, so distances between "
            "them hold what lay between these, too."
        )
    if rates > 1:
        legend += " The prompts differ in learning rate, which spread holds, too."
    figures = {}
    if len(prompts) <= 24 or len(means) in (1, len(prompts)):
        names = _short_names(prompts["prompt"])
        square = pd.DataFrame(squareform(pairs["distance"]), names, names)
        square = square.mask(np.eye(len(square), dtype=bool))
        figures["distances"] = plots.heatmap(square, distance, texts=_cells(square, ".3g"))
    if 1 < len(means) < len(prompts):
        texts = _cells(means, ".3g")
        figures["task-distances"] = plots.heatmap(means, f"mean {distance}", texts=texts)
    if len(prompts) >= 4 and pairs["distance"].any():
        (pca, shares), (near, perplexity) = principal_components(points), tsne(points)
        words = (f"first component ({shares[0]:.0%} of the variance)", f"second ({shares[1]:.0%})")
        maps = {"map-pca": (pca, *words)}
        maps["map-tsne"] = (near, "first coordinate of t-SNE", "second coordinate")
        for name, (places, *axes) in maps.items():
            table = pd.DataFrame(places, columns=["x", "y"]).assign(task=prompts["task"])
            figures[name] = plots.scatter(table, "x", "y", "task", *axes)
        legend += (
            " The maps show each prompt as a point: on its principal components, and by t-SNE "
            f"(perplexity {perplexity:.3g}, seed 0), where only what is near says something."
        )
    shown = means.apply(_digits).rename_axis("task").reset_index()
    return Section("distances", "Distances", legend, pairs, shown, figures)


def _cells(table: pd.DataFrame, form: str) -> pd.DataFrame:
    """The numbers of a heat map as text, where there is room for them."""
    small = table.shape[1] > 16
    return table.map(lambda x: "" if small or pd.isna(x) else f"{x:{form}}")


def _transfer_section(transfer: pd.DataFrame, distances: pd.DataFrame) -> Section:
    used = {*transfer["source"], *transfer["target"]}
    tasks = [task for task in distances.index if task in used]
    distances = distances.loc[tasks, tasks]
    gains = transfer.pivot(index="source", columns="target", values="gain")
    gains = gains.reindex(index=tasks, columns=tasks)
    far = distances.stack(future_stack=True).rename("distance").rename_axis(TRANSFER[:2])
    table = transfer.join(far, on=TRANSFER[:2])
    table = table[[*TRANSFER[:2], "distance", *TRANSFER[2:], "gain", "lines"]]
    table = table.sort_values(TRANSFER[:2], key=lambda x: x.map(tasks.index), ignore_index=True)
    shown = table.rename(columns={"no_prompt": "no prompt"})
    shown["distance"] = _digits(table["distance"])
    for name, form in (("score", ".3f"), ("no prompt", ".3f"), ("gain", "+.3f")):
        shown[name] = shown[name].map(lambda x, form=form: f"{x:{form}}")
    legend = (
        "Score on the target under prompts of the source, less the score without any prompt. If "
        "near prompts serve each other's tasks, gain falls with distance: a negative correlation. "
        f"Means over lines of results, such as runs. {_correlation(distances, gains)}"
    )
    labels = {"xlabel": "target", "ylabel": "source of the prompt"}
    texts = _cells(gains, "+.3f")
    figures = {"transfer": plots.heatmap(gains, "gain over no prompt", 0.0, texts, **labels)}
    return Section("transfer", "Transfer", legend, table, shown, figures)


def _correlation(distances: pd.DataFrame, gains: pd.DataFrame) -> str:
    found, orders = mantel(distances, gains), math.factorial(len(gains))
    if math.isnan(found["rho"]):
        return (
            "No rank correlation with distance: it needs three tasks, three pairs of different "
            "tasks, and distances and gains that are not all equal."
        )
    is_all = found["permutations"] == orders - 1
    how = f"all others; p cannot be below 1/{orders}" if is_all else "random, seed 0"
    return (
        f"Spearman's rho {found['rho']:+.3f}, p = {found['p']:.3g} (two-sided, Mantel's test; "
        f"{found['cells']:g} pairs of different tasks, {found['permutations']:g} permutations of "
        f"the tasks, {how})."
    )


def _tokens_section(tokens: pd.DataFrame, top: int, measure: str, note: str) -> Section:
    shown = pd.DataFrame({"prompt": tokens["prompt"].mask(tokens["prompt"].duplicated(), "")})
    shown["row"] = tokens["row"]
    started = zip(tokens["initial_token"], tokens["initial_rank"], strict=True)
    started = [("–", "–") if pd.isna(place) else (literal(x), place) for x, place in started]
    shown[["started as", "place now"]] = started
    shown["drift"] = _digits(tokens["drift"])
    for at in range(1, top + 1):
        names = tokens[f"token_{at}"].map(literal)
        is_initial = (tokens[f"id_{at}"] == tokens["initial_id"]).fillna(False)
        shown[str(at)] = (
            names.mask(is_initial, "**" + names + "**") + " " + _digits(tokens[f"score_{at}"])
        )
    legend = (
        f"{note} For each row the token it started as, the place of that token now, and the "
        f"nearest tokens with their scores, the nearest first, by {MEASURES[measure]}; the initial "
        "token is bold where it is among them. ␣ is a space; what cannot be seen stands as an "
        "escape, and bytes that are no whole character as the tokenizer names them."
    )
    return Section("tokens", "Tokens", legend, tokens, shown)
