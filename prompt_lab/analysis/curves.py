"""Sections of what fits leave beside their results: adaptation curves, and codes in a subspace."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.sections import Section, counted, file_name, plus_minus
from prompt_lab.analysis.statistics import principal_components
from prompt_lab.analysis.tables import chosen_runs, is_method


def adaptation_section(runs: pd.DataFrame) -> Iterator[Section]:
    """Mean dev score over the steps of training, on the tasks and samples that all lines have."""
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
    figures = {}
    if table["step"].nunique() > 1:
        words = ("step", "mean dev score", "std" if table["std"].notna().any() else None)
        figures["adaptation"] = plots.lines(
            table, "step", "mean_dev", "label", plots.looks(runs), *words, steps=True
        )
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
            ended=own["status"].str.match(r"(?i)failed|diverged|stopped early"),
            place=own.index,
        )
        yield kept.merge(found, on="run")


def codes_section(runs: pd.DataFrame) -> Iterator[Section]:
    """The codes of each subspace on their first two principal components."""
    chosen = chosen_runs(runs[is_method(runs) & (runs["intrinsic_dim"] >= 2)])
    tables, figures = [], {}
    for label, own in chosen.groupby("label", sort=False):
        codes = [tensors(x.folder, x.prompt_file, "code") for x in own.itertuples()]
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


def tensors(folder: str, file: object, *names: str) -> list[np.ndarray]:
    """Tensors of a prompt file beside the results, in float64; none where they are not there."""
    from safetensors import SafetensorError, safe_open

    path = Path(folder) / str(file)
    if not path.is_file():
        return []
    try:
        with safe_open(path, "np") as found:
            return [found.get_tensor(name).astype(np.float64) for name in names]
    except SafetensorError:
        return []
