"""Results as one table: read them, name lines, choose by dev, average, relate to a reference.

A **line** is a folder that the user names: its fits are one setting, whose runs share a mean. A
**point** of a line is one value of what is an axis: variant, stage, start, intrinsic dimension and
K. Within a point the learning rate and the batch size are chosen by dev, seeds and samples are
averaged; whatever else differs stops the report. All functions take and give DataFrames.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from prompt_lab.files.results import BASELINES, COLUMNS, choose_by_dev

AXES = ["variant", "stage", "start", "start_of", "intrinsic_dim", "shots"]
POINT = ["line", "label", "name", "family", *AXES]
SEEDS = ["init_seed", "order_seed", "start_seed"]
TASK = ["ontology", "task", "metric"]
SUMS = ("vectors", "vector_alone")
"""Variants of VectorArithmetic that are sums of vectors, which are no method to compare with."""

SHARED = ("no_prompt", "chance", "majority")
"""Baselines that know nothing of a line."""

NUMBERS = [
    *("scale", "num_virtual_tokens", "intrinsic_dim", "learning_rate", "batch_size"),
    *("dev", "test", "test_rows", "cut_train", "cut_dev", "cut_test", "best_step", "seconds"),
    "run",
]
NEEDED = [name for name in COLUMNS if name not in ("start_file", "template", "label_score")]
"""Columns of ``results.csv`` that a report reads."""

FAILED = r"(?i)failed|diverged"
"""What the status of a run that has no good prompt begins with."""

GROUPS = ("cls", "qa", "cg", "other")
"""Groups of CrossFit's ontology, in the order of tables."""

_PER_LINE = ["method", "backbone", "num_virtual_tokens", "optimizer", "metric_variant", "version"]
_PER_TASK = ["ontology", "metric", "decoding"]
_TOLD = {
    *("model.learning_rate", "model.batch_size", "model.init_seed", "model.order_seed"),
    *("model.intrinsic_dim", "model.subspace.intrinsic_dim", "model.init.name"),
    *("model.init.source_tasks", "model.init.seed", "model.study", "model.expressions"),
    *("model.evaluate_on", "model.target_tasks", "model.unseen_tasks", "model.test_baselines"),
    *("data.tasks", "data.samples", "data.shots", "data.order_seed", "data.init_seed"),
}
"""Flags whose values stand in columns of their own, run by run."""

_FILES = {
    *("data.root", "model.init.path", "model.subspace.path", "model.prompts", "model.adapters"),
    "model.backbone.name",
}
"""Flags that name files, which may be others for each task, seed and point."""

_CELL = ["line", *AXES, "expression", "task", "sample", *SEEDS]
"""What is one score once dev has chosen among rates and batch sizes."""


# ---- reading -------------------------------------------------------------------------------------


def find_results(place: str | Path) -> list[Path]:
    """The ``results.csv`` files in a folder, or the file itself; ``FileNotFoundError`` for none."""
    place = Path(place)
    if not place.exists():
        raise FileNotFoundError(f"no file or folder {place}: name the run_dir of a fit")
    files = [place] if place.is_file() else sorted(place.rglob("results.csv"))
    if not files:
        raise FileNotFoundError(
            f"no results.csv in {place} or below: prompt-lab test writes it; name its run_dir"
        )
    return files


def read_text(file: str | Path, what: str, **how: Any) -> pd.DataFrame:
    """A CSV file as text, empty where a cell is; a ``ValueError`` where it is no such file."""
    try:
        return pd.read_csv(file, dtype=str, keep_default_na=False, **how)
    except ValueError as error:  # also pandas' parser errors, and text that is not UTF-8
        raise ValueError(f"{file} is no {what}: {' '.join(str(error).split())}") from None


def read_results(file: str | Path) -> pd.DataFrame:
    """One ``results.csv``: names and seeds as text, numbers as numbers; a column ``folder``.

    A ``ValueError`` for another table, another version, or a cell that is no number.
    """
    frame = read_text(file, "results.csv of prompt-lab")
    if not {"fit_id", "test"} <= {*frame}:
        raise ValueError(f"{file} is no results.csv of prompt-lab: no columns fit_id and test")
    if lacking := [name for name in NEEDED if name not in frame]:
        versions = ", ".join(frame["version"].unique()) if "version" in frame else "unknown"
        raise ValueError(
            f"{file} lacks the columns {', '.join(lacking)}: another version of prompt-lab wrote "
            f"it ({versions}); run prompt-lab test again"
        )
    for line in frame.index[frame["version"].fillna("") == ""] + 2:  # the last column
        raise ValueError(f"{file}, line {line}: fewer cells than columns; is it whole?")
    for name in NUMBERS:
        numbers = pd.to_numeric(frame[name].replace("", None), errors="coerce").astype(float)
        for at, word in frame.loc[numbers.isna() & (frame[name] != ""), name].items():
            what = f"{name} is {word!r}, not a number; correct it or test again"
            raise ValueError(f"{file}, line {at + 2}: {what}")
        frame[name] = numbers.where(np.isfinite(numbers))
    for name in ("sample", "shots", *SEEDS):
        frame[name] = frame[name].str.removesuffix(".0")
    return frame.assign(folder=str(Path(file).parent))


def read_lines(places: Mapping[str, str | Path]) -> pd.DataFrame:
    """All runs of the named folders or files: ``read_results`` with ``line`` and ``label``.

    ``label`` names a point in words: the line, and those of its axes that have several values;
    ``name`` does so without K, and ``family`` without the intrinsic dimension. Runs that stand in
    two files of a line with the same scores are taken once, as are the baselines that need no
    method where all lines agree about them; ``attrs["twice"]`` counts both. Errors are those of
    `find_results` and `read_results`, and a ``ValueError`` for no runs or what differs in a line.
    """
    frames = [
        read_results(file).assign(line=line)
        for line, place in places.items()
        for file in find_results(place)
    ]
    runs = pd.concat(frames, ignore_index=True)
    if missing := [place for line, place in places.items() if line not in {*runs["line"]}]:
        raise ValueError(f"no runs in {missing[0]}: only a header; run prompt-lab test")
    runs["order"] = runs["line"].map([*places].index)
    _refuse_mixtures(runs)
    _tell_starts(runs)
    everything = len(runs)
    runs = _without_repeats(runs)
    _share_baselines(runs)
    for column, without in (("label", ""), ("name", "shots"), ("family", "intrinsic_dim")):
        runs[column] = _labels(runs, without)
    runs = _in_order(_without_repeats(runs))
    assert (runs.groupby("label")[AXES].nunique(dropna=False) <= 1).all(axis=None)
    runs.attrs["twice"] = everything - len(runs)
    return runs


def _refuse_mixtures(runs: pd.DataFrame) -> None:
    own = runs[~runs["variant"].isin(SHARED)]
    table = own.join(flags := flag_table(own))
    facts = {x: ["line"] for x in _PER_LINE} | {x: ["line", "task"] for x in _PER_TASK}
    facts |= {x: _CELL if x in _FILES else ["line"] for x in flags if x not in _TOLD}
    for name, by in facts.items():
        known = table[table[name].notna() & (table[name].astype(str) != "")]
        values = known.groupby(by, dropna=False)[name]
        mixed = known[values.transform("nunique") > 1]
        if mixed.empty:
            continue
        first = mixed.iloc[0]
        mixed = mixed[values.ngroup()[mixed.index] == values.ngroup()[first.name]]
        mixed = mixed.drop_duplicates(name)
        where = [f"{x} ({y})" for x, y in mixed[[name, "folder"]].astype(str).to_numpy()]
        more = f" and {len(where) - 4} more" if len(where) > 4 else ""
        task = f" on {first['task']}" if name in _PER_TASK else ""
        raise ValueError(
            f"{first['line']}: {name}{task} differs within the line: {', '.join(where[:4])}{more}; "
            "name a line for each, as in: report a=FOLDER b=FOLDER"
        )


def flag_table(runs: pd.DataFrame) -> pd.DataFrame:
    """The flags of each run that are not at their defaults, one column each, as JSON text."""
    texts = {}
    for text, folder in runs.drop_duplicates("settings")[["settings", "folder"]].to_numpy():
        try:
            found = json.loads(text or "{}")
            texts[text] = {name: json.dumps(value) for name, value in found.items()}
        except (AttributeError, json.JSONDecodeError):
            raise ValueError(f"{folder}: settings {text!r} are no JSON object") from None
    names = list(dict.fromkeys(name for found in texts.values() for name in found))
    rows = [[texts[text].get(name, "default") for name in names] for text in runs["settings"]]
    return pd.DataFrame(rows, index=runs.index, columns=names)


def _tell_starts(runs: pd.DataFrame) -> None:
    """Empty ``start_of`` where no task of a point has several, so that it is no axis."""
    rest = ["line", "variant", "stage", "start", "intrinsic_dim", "shots"]
    several = runs.groupby([*rest, "task"], dropna=False)["start_of"].transform("nunique") > 1
    tells = several.groupby([runs[x] for x in rest], dropna=False).transform("any")
    tells |= runs["start"].isin(["meta", "multitask"])
    runs["start_of"] = runs["start_of"].where(tells & ~runs["variant"].isin(SUMS), "")


def _without_repeats(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs that stand twice with the same scores once; other scores stop the report."""
    keys = [*_CELL, "learning_rate", "batch_size"]
    runs = runs[~runs.duplicated([*keys, "dev", "test"])]
    clash = runs[runs.duplicated(keys, keep=False)]
    if len(clash):
        first, groups = clash.iloc[0], clash.groupby(keys, dropna=False).ngroup()
        same = clash[groups == groups.iloc[0]]
        raise ValueError(
            f"{first['line']}: {len(same)} scores of one run (task {first['task']}, sample "
            f"{first['sample']}, seed {first['init_seed'] or '-'}) in "
            f"{', '.join(dict.fromkeys(same['folder']))}; name a line for each"
        )
    return runs.reset_index(drop=True)


def _share_baselines(runs: pd.DataFrame) -> None:
    """Give the baselines that need no method a line of their own, where all lines agree."""
    keys = ["task", "sample", "shots"]
    for variant in SHARED:
        own = runs["variant"] == variant
        of_cell = runs[own].groupby(keys)
        if own.any() and (of_cell["test"].nunique(dropna=False) == 1).all():
            dev = of_cell["dev"].transform("first")
            runs.loc[own, ["method", "stage", "start", "start_of", "settings", "fit_id"]] = ""
            runs.loc[own, ["line", "order"]] = [variant, len(runs)]
            runs.loc[own, "dev"] = dev


def _labels(runs: pd.DataFrame, without: str) -> pd.Series:
    """The name of each run's point: the line, and the axes but one in which it has several."""
    labels = pd.Series("", index=runs.index)
    aside = runs["variant"].where(runs["variant"].isin([*BASELINES, *SUMS]), "")
    for (line, variant), of_kind in runs.groupby(["line", aside], sort=False):
        telling = {x for x in AXES if x != without and of_kind[x].nunique(dropna=False) > 1}
        for _, of_point in of_kind.groupby(AXES, dropna=False, sort=False):
            names = [] if line in SHARED else [str(line)]
            names += [variant.replace("_", " ")] if variant else []
            labels[of_point.index] = ", ".join([*names, *_told(of_point.iloc[0], telling)])
    return labels


def _told(point: pd.Series, telling: set[str]) -> Iterator[str]:
    if "variant" in telling and point["variant"] != "tuned":
        yield point["variant"].replace("_", " ")
    if "stage" in telling:
        yield f"stage {point['stage']}"
    if point["start"] and {"start", "start_of"} & telling:
        yield f"{point['start']} {point['start_of']}".strip()
    if "intrinsic_dim" in telling and pd.notna(point["intrinsic_dim"]):
        yield f"{point['intrinsic_dim']:g} dims"
    if "shots" in telling:
        yield f"K {point['shots']}"


def _in_order(runs: pd.DataFrame) -> pd.DataFrame:
    order = runs[["order", "variant", "stage", "start", "start_of"]].assign(
        dim=runs["intrinsic_dim"].fillna(0),
        shots=runs["shots"].map(shots_rank),
        group=runs["ontology"].map(group_rank),
        task=runs["task"],
    )
    order.insert(0, "is_baseline", runs["variant"].isin(BASELINES))
    order = order.sort_values([*order], kind="stable")
    return runs.loc[order.index].drop(columns="order").reset_index(drop=True)


def shots_rank(shots: str) -> float:
    """Order of values of K: numbers, then "all"; a ``ValueError`` for another word."""
    if shots == "all":
        return float("inf")
    if not re.fullmatch(r"\d+", shots):
        raise ValueError(f"shots is {shots!r}, neither a number nor all: correct it or test again")
    return float(shots)


def group_rank(ontology: str) -> tuple[int, str]:
    """Order of ontologies: CrossFit's groups, then others by name."""
    group = ontology.split("/")[0]
    return (GROUPS.index(group) if group in GROUPS else len(GROUPS), group)


def prompt_arrays(folder: str, file: object, *names: str) -> list[np.ndarray]:
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


# ---- averages ------------------------------------------------------------------------------------


def chosen_runs(runs: pd.DataFrame) -> pd.DataFrame:
    """The run that dev chose among rates and batch sizes, of each point, task, sample and seeds."""
    return choose_by_dev(runs, [*POINT, "expression", "task", "sample", *SEEDS])


def task_scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each point and task: mean over seeds, then samples, of the chosen test scores.

    Columns `POINT`, `TASK`, ``score``, ``std`` (ddof 1 over the chosen runs), ``scored`` (chosen
    runs with a score), ``failed`` (of the chosen) and ``runs`` (all, counted out).
    """
    by, how = [*POINT, *TASK], {"dropna": False, "sort": False}
    chosen = chosen_runs(runs)
    chosen = chosen.assign(failed=chosen["status"].str.match(FAILED))
    groups, samples = chosen.groupby(by, **how), chosen.groupby([*by, "sample"], **how)
    table = samples["test"].mean().groupby(by, **how).mean().to_frame("score")
    table["std"], table["scored"] = groups["test"].std(), groups["test"].count()
    table["failed"], table["runs"] = groups["failed"].sum(), runs.groupby(by, **how).size()
    count_out(runs, table)
    return table.reset_index()


def is_method(table: pd.DataFrame) -> pd.Series:
    """Whether each row is of something trained, and no baseline."""
    return ~table["variant"].isin(BASELINES)


def count_out(runs: pd.DataFrame, table: pd.DataFrame) -> None:
    """Runs in equals runs out: the column ``runs`` of a table adds up to the runs that went in."""
    assert table["runs"].sum() == len(runs), f"{len(runs)} runs in, {table['runs'].sum()} out"


def mean_over_tasks(
    scores: pd.DataFrame, value: str = "score", std: str = "std", by: Sequence[str] = POINT
) -> pd.DataFrame:
    """A row for each point: means over tasks of a value and its ``std``; counts of tasks, runs."""
    scores = scores.assign(scored=scores["scored"].where(scores[value].notna(), 0))
    groups = scores.groupby([*by], dropna=False, sort=False)
    table = groups[value].mean().to_frame()
    table["std"], table["tasks"] = groups[std].mean(), groups[value].count()
    table = table.join(groups[["scored", "failed", "runs"]].sum()).reset_index()
    assert table["runs"].sum() == scores["runs"].sum()
    return table


def relate(scores: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Every task's score beside that of a reference: ``ratio`` is what E_rel is the mean of.

    A task is left out, and ``left_out`` says why, where its score or its reference is missing, and
    where its reference is zero or negative, for which a ratio says nothing. A ``ValueError`` for no
    such line, or several of its points with a score of one task and K.
    """
    base = scores[(scores["line"] == reference) & is_method(scores)]
    if base.empty:
        known = ", ".join(scores["line"].unique())
        raise ValueError(f"no reference {reference!r} among the lines {known}")
    keys = ["task", "shots", "metric"]
    if len(twice := base[base.duplicated(keys)]):
        task = twice["task"].iloc[0]
        labels = "; ".join(base.loc[base["task"] == task, "label"].unique())
        raise ValueError(f"{reference} is several references on {task} ({labels}): name one folder")
    base = base[[*keys, "score"]].rename(columns={"score": "reference_score"})
    table = scores.merge(base, on=keys, how="left")
    left_out = pd.Series("", index=table.index)
    left_out[table["reference_score"] < 0] = "reference negative"
    left_out[table["reference_score"] == 0] = "reference zero"
    left_out[table["score"].isna()] = "score missing"
    left_out[table["reference_score"].isna()] = "reference missing"
    ratio = (table["score"] / table["reference_score"]).where(left_out == "")
    return table.assign(reference=reference, ratio=ratio, left_out=left_out)
