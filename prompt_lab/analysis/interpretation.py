"""What tuned prompts say: nearest tokens, drift, spread of repeated runs, distances, transfer.

The questions are those of Dayton, O'Rahilly and Werner, "Interpreting Prompt-Tuning Across
SuperGLUE Tasks" (sections 5 and 6). The paper leaves open how the norm and the variance of its
table 1 are defined, how prompts of 12 to 20 rows are subtracted, and how strong the correlation of
distance and transfer is; here each is a formula, and unequal lengths are refused. Of the model only
the embeddings and the tokenizer are used. Transfer itself is measured by `VectorArithmetic`.
"""

# pandas' own types say of every column that it may be a table, an array or a number.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false, reportReturnType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prompt_lab.analysis import plots
from prompt_lab.analysis.sections import Section, literal
from prompt_lab.analysis.statistics import Floats, mantel, principal_components, tsne
from prompt_lab.analysis.tables import find_results, read_results
from prompt_lab.core.arithmetic import parse_expression
from prompt_lab.files.prompts import FoundPrompt, best_found, check_prompt, find_prompts

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from prompt_lab.core.backbone import Backbone

TRANSFER = ["source", "target", "score", "no_prompt"]
"""Columns of a table of transfer, at least."""

MEASURES = {
    "cosine": "cosine (higher is nearer)",
    "l2": "Euclidean distance (lower is nearer)",
    "dot": "inner product (higher is nearer)",
}
DISTANCES = {"rows": "Frobenius distance", "mean": "distance of mean rows"}

_CHUNK = 8192
_PAGE = 30
"""Prompts in one figure of drift."""

_MOST_CELLS = 16
"""Columns of a heat map with a number in every cell."""


# ---- prompts -------------------------------------------------------------------------------------


def find_tuned(places: Sequence[str]) -> pd.DataFrame:
    """The prompts of some places, all of one backbone; those of a task together.

    Of a grid in a place the prompt of best dev score stands for its task, sample and seeds;
    ``attrs["left_out"]`` counts the others.

    Args:
        places: as of :func:`prompt_lab.files.prompts.find_prompts`.

    Returns:
        Columns ``prompt`` (a name that no other has), ``task`` (or what it was learned as),
        ``sample``, ``init_seed``, ``order_seed``, ``file`` and ``tuned``, the :class:`Prompt`.

    Raises:
        FileNotFoundError: a place that is not there or holds no prompts.
        ValueError: a damaged file, NaN or infinite numbers, or several backbones.
    """
    found: dict[str, FoundPrompt] = {}
    left_out = 0
    for place in places:
        own = find_prompts(place)
        best = {*best_found(own, _cell).values()}
        chosen = [one for one in own if one in best or _cell(one.metadata) is None]
        found |= {one.where: one for one in chosen}
        left_out += len(own) - len(chosen)
    tuned = {where: one.load() for where, one in found.items()}
    first_place, first = next(iter(tuned.items()))
    for where, one in tuned.items():
        if not (one.prompt.isfinite().all() and one.init.isfinite().all()):
            raise ValueError(
                f"{where} holds NaN or infinite numbers: tune it again or leave it out"
            )
        if one.backbone_digest != first.backbone_digest:
            names = [f"{x.backbone!r} with weights {x.backbone_digest[:12]}" for x in (first, one)]
            raise ValueError(
                f"{first_place} was made for backbone {names[0]}, but {where} for {names[1]}: only "
                "prompts of one backbone have one vocabulary"
            )
    rows = [
        {
            "prompt": label,
            "task": one.task or (one.source_set and f"{one.role} {one.source_set}") or label,
            **{name: getattr(one, name) for name in ("sample", "init_seed", "order_seed")},
            "file": where,
            "tuned": one,
        }
        for label, (where, one) in zip(_labels([*found.values()]), tuned.items(), strict=True)
    ]
    seeds = dict.fromkeys(("sample", "init_seed", "order_seed"), "Int64")
    table = pd.DataFrame(rows).astype(seeds)
    order = table["task"].map([*dict.fromkeys(table["task"])].index)
    table = table.loc[order.sort_values(kind="stable").index].reset_index(drop=True)
    table.attrs["left_out"] = left_out
    return table


def _cell(known: dict[str, Any]) -> tuple[Any, ...] | None:
    """What the prompts of a grid have in common; None for one that was not tuned for a task."""
    if not known.get("task") or known.get("made_from"):
        return None
    names = ("task", "sample", "init_seed", "order_seed", "start", "start_of")
    return tuple(known.get(name) for name in names)


def _labels(found: Sequence[FoundPrompt]) -> list[str]:
    """The name of each prompt, with as many of its folders as tell it apart."""
    parts = [[*(x for x in one.path.parts[:-1] if x != "prompts"), one.stem] for one in found]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len({*names}) == len(names):
            return names
    return [one.where for one in found]


# ---- nearest tokens ------------------------------------------------------------------------------


@dataclass
class Vocabulary:
    """The tokens that may be found.

    Attributes:
        table: (V, D) embeddings.
        names: the readable token by its row in the table, in rising order.
        norms: Euclidean norm of each of these rows.
        median: of the norms, the lower one of two.
        note: how many rows are left out, and why.
    """

    table: Tensor
    names: pd.Series
    norms: Floats
    median: float
    note: str


def read_vocabulary(backbone: Backbone, all_rows: bool = False) -> Vocabulary:
    """The tokens of a backbone; special ones and rows that no token has only with ``all_rows``."""
    import torch
    from torch import nn

    layer, tokenizer = backbone.model.get_input_embeddings(), backbone.tokenizer
    # A plain layer is its table; others scale it (BART), and only they need a copy.
    table = layer.weight.detach() if type(layer) is nn.Embedding else backbone.embedding_table()
    known = {at: token for token, at in tokenizer.get_vocab().items() if at < len(table)}
    special = {*tokenizer.all_special_ids} & {*known}
    # Tokens that spell bytes, as those of GPT-2 do, write a space as Ġ and never as ▁.
    letters = {letter for token in known.values() for letter in token if letter in "Ġ▁"}
    is_bytes = letters == {"Ġ"}
    ids = [*range(len(table))] if all_rows else sorted({*known} - special)
    names = [
        readable(known[at], tokenizer if is_bytes and at not in special else None)
        if at in known
        else f"(row {at})"
        for at in ids
    ]
    words = f"{len(special)} special tokens and {len(table) - len(known)} rows that no token has"
    note = f"{len(ids):,} tokens are looked at; left out are {words}."
    if all_rows:
        note = f"All {len(table):,} rows of the embedding table are looked at, {words} among them."
    parts = torch.tensor(ids).split(_CHUNK)
    norms = torch.cat([table[part].double().norm(dim=1) for part in parts])
    tokens = pd.Series(names, index=ids, dtype=object)
    return Vocabulary(table, tokens, norms.cpu().numpy(), float(norms.median()), note)


def readable(token: str, tokenizer: Any = None) -> str:
    r"""A token as a reader sees it: ␣ for a space, an escape such as ``\n`` for what is not seen.

    Args:
        token: as the tokenizer names it.
        tokenizer: decodes it where it spells bytes; bytes that are no whole character keep their
            name.
    """
    text = token.replace("▁", " ")
    if tokenizer is not None:
        decoded = tokenizer.convert_tokens_to_string([token])
        text = token if "\ufffd" in decoded else decoded
    visible = (
        "␣" if x == " " else x if x.isprintable() and x not in "\\␣" else repr(x)[1:-1]
        for x in text
    )
    return "".join(visible) or "(empty)"


def closeness(rows: Tensor, table: Tensor, ids: Tensor, measure: str = "cosine") -> Tensor:
    """How near tokens are to the rows of a prompt (section 5.1 of the paper): higher is nearer.

    Args:
        rows: (N, D).
        table: (V, D) embeddings of any precision, of which a chunk at a time becomes float64.
        ids: (C,) rows of it.
        measure: "cosine", 0 for a row of zeros; "dot"; or "l2", then 2 a b - |b|^2, which is
            |a|^2 less the squared distance.

    Returns:
        (N, C) float64.
    """
    import torch

    rows = rows.double()
    lengths = rows.norm(dim=1, keepdim=True)
    near = rows.new_empty(len(rows), len(ids))
    for part, own in zip(ids.split(_CHUNK), near.split(_CHUNK, dim=1), strict=True):
        tokens = table[part].double()
        own.copy_(rows @ tokens.T)
        if measure == "cosine":
            own.div_((lengths * tokens.norm(dim=1)).clamp(min=torch.finfo(torch.float64).tiny))
        elif measure == "l2":
            own.mul_(2).sub_(tokens.square_().sum(dim=1))
    return near


def initial_tokens(init: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """The token whose embedding each row of an initial prompt is.

    A row is a token's where it equals its embedding, up to a rounding to bfloat16: backbones in
    half precision make initial prompts of rounded rows.

    Args:
        init: (N, D).
        table: (V, D) embeddings.
        ids: (C,) rows of it.

    Returns:
        (N,) places in ``ids``, -1 where there is none, as for a prompt that starts from noise.
    """
    import torch

    places = closeness(init, table, ids, "l2").argmax(dim=1)
    found = table[ids[places]].double()
    is_equal = ((init.double() - found).abs() <= 2.0**-8 * found.abs()).all(dim=1)
    return torch.where(is_equal, places, -1)


def token_table(
    prompts: pd.DataFrame, vocabulary: Vocabulary, top: int = 5, measure: str = "cosine"
) -> pd.DataFrame:
    """A row for each row of each prompt: its initial token and the place of that now, drift, norms.

    Args:
        prompts: as `find_tuned` gives them.
        vocabulary: the tokens of their backbone.
        top: how many nearest tokens.
        measure: what near means, as of `closeness`; scores of "l2" are distances.

    Returns:
        Columns ``prompt``, ``task``, ``row`` (from 1), ``initial_id``, ``initial_token``,
        ``initial_rank`` (1 is the nearest) and ``survived`` (whether it is), all four empty for a
        row that started as no token; ``drift`` (Euclidean distance from the initial row),
        ``cosine`` (with it), ``norm``, ``initial_norm``, ``relative_norm`` (over the vocabulary's
        median); and ``id_1``, ``token_1``, ``score_1`` and so on, the nearest first.

    Raises:
        ValueError: more tokens than there are.
    """
    import torch

    table, names = vocabulary.table, vocabulary.names
    if top > len(names):
        raise ValueError(f"--top is {top}: there are {len(names)} tokens")
    ids = torch.tensor(names.index.to_numpy(), device=table.device)
    starts: dict[bytes, Tensor] = {}
    frames = []
    for one in prompts.itertuples():
        key = one.tuned.init.numpy().tobytes()
        if key not in starts:
            starts[key] = initial_tokens(one.tuned.init.to(table.device), table, ids)
        start = starts[key]
        prompt, init = (x.double().to(table.device) for x in (one.tuned.prompt, one.tuned.init))
        near = closeness(prompt, table, ids, measure)
        scores, places = near.topk(top)
        if measure == "l2":
            scores = (table[ids[places]].double() - prompt[:, None]).norm(dim=2)
        own = near.gather(1, start.clamp(min=0)[:, None])
        ranks = 1 + (near > own + 1e-12 * own.abs()).sum(dim=1)  # equal ones may differ in rounding
        norms, initial_norms = prompt.norm(dim=1), init.norm(dim=1)
        cosine = (prompt * init).sum(dim=1) / (norms * initial_norms)
        is_token = (start >= 0).cpu().numpy()
        frame = pd.DataFrame(
            {"prompt": one.prompt, "task": one.task, "row": range(1, len(init) + 1)}
        )
        frame["initial_id"] = pd.Series(ids[start].cpu()).astype("Int64").where(is_token)
        frame["initial_token"] = frame["initial_id"].map(names)
        frame["initial_rank"] = pd.Series(ranks.cpu()).astype("Int64").where(is_token)
        frame["survived"] = (frame["initial_rank"] == 1).astype("Int64")
        frame["drift"] = (prompt - init).norm(dim=1).cpu()
        frame["cosine"] = cosine.clamp(-1, 1).cpu()
        frame["norm"], frame["initial_norm"] = norms.cpu(), initial_norms.cpu()
        frame["relative_norm"] = frame["norm"] / vocabulary.median
        for at in range(top):
            frame[f"id_{at + 1}"] = ids[places[:, at]].cpu()
            frame[f"token_{at + 1}"] = frame[f"id_{at + 1}"].map(names)
            frame[f"score_{at + 1}"] = scores[:, at].cpu()
        frames.append(frame)
    return pd.concat(frames, ignore_index=True)


def prompt_table(
    prompts: pd.DataFrame, tokens: pd.DataFrame, vocabulary: Vocabulary
) -> pd.DataFrame:
    """A row for each prompt: its norm, and means over its rows.

    Args:
        prompts: as `find_tuned` gives them.
        tokens: as `token_table` gives them.
        vocabulary: the tokens of their backbone.

    Returns:
        Columns of ``prompts`` but the tensors; ``rows``, ``norm`` (Frobenius), ``row_norm`` and its
        ``relative_norm`` over the vocabulary's median; ``drift``, ``most_drift`` and ``cosine`` of
        rows with their initial rows; ``initial_tokens``, rows that started as a token, and
        ``survived``, those that still are nearest to it.
    """
    rows = tokens.groupby("prompt", sort=False).agg(
        rows=("row", "size"),
        row_norm=("norm", "mean"),
        drift=("drift", "mean"),
        most_drift=("drift", "max"),
        cosine=("cosine", "mean"),
        initial_tokens=("initial_id", "count"),
        survived=("survived", "sum"),
    )
    table = prompts.drop(columns="tuned").join(rows, on="prompt")
    table.insert(table.columns.get_loc("row_norm"), "norm", _norms(prompts))
    relative = table["row_norm"] / vocabulary.median
    table.insert(table.columns.get_loc("drift"), "relative_norm", relative)
    return table


def _norms(prompts: pd.DataFrame) -> pd.Series:
    return prompts["tuned"].map(lambda one: float(one.prompt.double().norm()))


# ---- distances and spread ------------------------------------------------------------------------


def prompt_points(prompts: pd.DataFrame, compare: str = "rows") -> Floats:
    """Each prompt as a point: all its rows (R, N D), or their mean (R, D).

    Args:
        prompts: as `find_tuned` gives them.
        compare: "rows" or "mean".

    Raises:
        ValueError: all rows of prompts of several lengths.
    """
    if compare == "mean":
        return np.stack([one.prompt.double().mean(dim=0).numpy() for one in prompts["tuned"]])
    by_length = prompts.groupby(prompts["tuned"].map(lambda one: len(one.prompt)))["prompt"].first()
    if len(by_length) > 1:
        which = ", ".join(f"{label} has {length}" for length, label in by_length.items())
        raise ValueError(
            f"prompts of several lengths ({which} rows) have no Frobenius distance: give prompts "
            "of one length at a time, tune them again with one num_virtual_tokens, or give "
            "--compare mean, which compares their mean rows"
        )
    return np.stack([one.prompt.double().flatten().numpy() for one in prompts["tuned"]])


def distance_table(prompts: pd.DataFrame, points: Floats) -> pd.DataFrame:
    """A row for every two prompts: ``prompt``, ``other``, their tasks, Euclidean ``distance``.

    Args:
        prompts: as `find_tuned` gives them.
        points: (R, P) as of `prompt_points` (the paper, section 5.3).
    """
    from scipy.spatial.distance import pdist

    one, other = np.triu_indices(len(prompts), 1)
    label, task = prompts["prompt"].to_numpy(), prompts["task"].to_numpy()
    columns = {"prompt": label[one], "other": label[other]}
    columns |= {"task": task[one], "other_task": task[other], "distance": pdist(points)}
    return pd.DataFrame(columns)


def spread_table(prompts: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """How far the runs of each task lie apart: the paper's table 1, variances with ddof 1.

    Args:
        prompts: as `find_tuned` gives them.
        pairs: as `distance_table` gives them.

    Returns:
        A row for each task: ``group``, ``runs``, mean and variance of the ``norm`` of its prompts,
        of the distances ``within``, between two of them, and ``between``, from one of them to one
        of another task, each with the number of pairs; NaN where there are too few.
    """
    both = _both_ways(pairs)
    is_own = both["task"] == both["other_task"]
    norms = _norms(prompts).groupby(prompts["task"], sort=False)
    parts = {"norm": norms.agg(["size", "mean", "var"])}
    for name, own in (
        ("within", pairs[pairs["task"] == pairs["other_task"]]),
        ("between", both[~is_own]),
    ):
        parts[name] = own.groupby("task")["distance"].agg(["size", "mean", "var"])
    table = pd.DataFrame({"runs": parts["norm"]["size"]})
    for name, part in parts.items():
        table[f"{name}_mean"], table[f"{name}_variance"] = part["mean"], part["var"]
        if name != "norm":
            table[f"{name}_pairs"] = part["size"].reindex(table.index).fillna(0).astype(int)
    return table.rename_axis("group").reset_index()


def task_distances(prompts: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Mean distance between the prompts of every two tasks (T, T).

    On the diagonal it is the mean over two different prompts of a task; NaN where it has one.
    """
    means = _both_ways(pairs).groupby(["task", "other_task"])["distance"].mean().unstack()
    tasks = [*dict.fromkeys(prompts["task"])]
    return means.reindex(index=tasks, columns=tasks)


def _both_ways(pairs: pd.DataFrame) -> pd.DataFrame:
    names = {"prompt": "other", "other": "prompt", "task": "other_task", "other_task": "task"}
    return pd.concat([pairs, pairs.rename(columns=names)], ignore_index=True)


# ---- transfer ------------------------------------------------------------------------------------


def read_transfer(places: Sequence[str], prompts: pd.DataFrame) -> pd.DataFrame:
    """Measured zero-shot transfer between the tasks of some prompts, from tables and from results.

    Of results the lines count in which ``VectorArithmetic`` has tested the vector of one task at
    scale 1, which on its own initial prompt is the tuned prompt; beside it stands the score without
    prompt of the same task, sample and way of answering.

    Args:
        places: CSV files with at least the columns `TRANSFER`, results.csv files, or folders with
            such.
        prompts: as `find_tuned` gives them; a source may be one of their tasks or names.

    Returns:
        A row for each pair of tasks that is known: ``source``, ``target``, means of ``score`` and
        ``no_prompt``, ``gain``, their difference, and ``lines``, how many were averaged.

    Raises:
        FileNotFoundError: a place that is not there, or a folder without results.
        ValueError: a column that is missing, a score that is no number, results of other weights
            or without scores of no prompt, or no pair of tasks that have prompts.
    """
    paths = [Path(place) for place in dict.fromkeys(places)]
    if missing := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(f"no table of transfer {', '.join(missing)}: name a CSV file")
    named, files = [], []
    for path in paths:
        if path.is_dir() or "fit_id" in path.read_text(encoding="utf-8").partition("\n")[0]:
            files += find_results(path)
        else:
            named.append(_named_transfer(path))
    if files:
        named.append(_tested_transfer(files, prompts["tuned"].iloc[0].backbone_digest))
    lines = pd.concat(named, ignore_index=True)
    task_of = dict(zip(prompts["tuned"].map(lambda one: one.name), prompts["task"], strict=True))
    task_of |= dict(zip(prompts["prompt"], prompts["task"], strict=True))
    task_of |= {task: task for task in prompts["task"]}
    lines["source"] = lines["source"].map(task_of)
    lines = lines[lines["source"].notna() & lines["target"].isin(prompts["task"])]
    if not len(lines):
        tasks = ", ".join(sorted({*prompts["task"]}))
        raise ValueError(
            f"{', '.join(places)}: no line whose source and target are tasks of these prompts "
            f"({tasks})"
        )
    for name in TRANSFER[2:]:
        numbers = pd.to_numeric(lines[name], errors="coerce").astype(float)
        for at in lines.index[~np.isfinite(numbers)]:
            where, cell = lines.loc[at, ["where", name]]
            cell = "" if pd.isna(cell) else cell
            raise ValueError(f"{where}, {name} is {cell!r}: give a finite number")
        lines[name] = numbers
    table = lines.groupby(TRANSFER[:2], sort=False).agg(
        score=("score", "mean"), no_prompt=("no_prompt", "mean"), lines=("score", "size")
    )
    table.insert(2, "gain", table["score"] - table["no_prompt"])
    return table.reset_index()


def _named_transfer(path: Path) -> pd.DataFrame:
    """The lines of a table of anyone's own."""
    try:
        lines = pd.read_csv(path, dtype=str, keep_default_na=False)
    except ValueError as error:  # also pandas' parser errors
        raise ValueError(
            f"{path} is no table of transfer: {' '.join(str(error).split())}"
        ) from None
    lacking = [name for name in TRANSFER if name not in lines]
    if lacking or not len(lines):
        raise ValueError(
            f"{path} lacks the columns {', '.join(lacking or TRANSFER)}, or has no lines: give a "
            f"CSV file with {', '.join(TRANSFER)}, or a results.csv of VectorArithmetic"
        )
    where = [f"{path}, line {at + 2}" for at in lines.index]
    return lines[TRANSFER].assign(where=where)


def _tested_transfer(files: Sequence[Path], digest: str) -> pd.DataFrame:
    """The lines of results that are of a tuned prompt on a task."""
    for file in files:
        digests = file.parent / "digests.json"
        tested = digest
        if digests.is_file():
            tested = json.loads(digests.read_text()).get("backbone", digest)
        if tested != digest:
            raise ValueError(
                f"{file} is of a backbone with weights {tested[:12]}, the prompts are of one with "
                f"{digest[:12]}: give the results of these prompts"
            )
    where = ", ".join(map(str, files))
    runs = pd.concat([read_results(file) for file in files], ignore_index=True)
    answered = ["task", "sample", "decoding", "metric_variant"]
    bare = runs[runs["variant"] == "no_prompt"].drop_duplicates(answered)
    bare = bare[[*answered, "test"]].rename(columns={"test": "no_prompt"})
    is_sum = (runs["method"] == "VectorArithmetic") & runs["variant"].isin(["single", "vectors"])
    sums = runs[is_sum & (runs["scale"] == 1)]
    factors = {text: parse_expression(text) for text in sums["expression"].unique()}
    alone = {text: next(iter(of)) for text, of in factors.items() if [*of.values()] == [1.0]}
    # On its own task a tuned prompt is "single"; "vectors" there has another initial prompt.
    sums = sums.assign(source=sums["expression"].map(alone))
    is_own = sums["source"] == sums["task"]
    sums = sums[sums["source"].notna() & (is_own == (sums["variant"] == "single"))]
    if not len(sums):
        raise ValueError(
            f"{where}: no line of VectorArithmetic with the vector of one task at scale 1: test "
            "the tasks as model.expressions with model.evaluate_on all"
        )
    lines = sums.merge(bare, on=answered, how="left", indicator=True)
    if len(lacking := lines.loc[lines["_merge"] == "left_only", "task"]):
        raise ValueError(
            f"{where}: no score without prompt (variant no_prompt) of "
            f"{', '.join(sorted({*lacking}))}, answered in the same way: test with "
            "model.evaluate_on all, or give the results of a fit with model.test_baselines, too"
        )
    lines = lines.rename(columns={"task": "target", "test": "score"})
    return lines[TRANSFER].assign(where=lines["folder"] + " " + lines["prompt_file"])


# ---- sections ------------------------------------------------------------------------------------


def interpret_prompts(
    prompts: pd.DataFrame,
    backbone: Backbone,
    top: int = 5,
    measure: str = "cosine",
    compare: str = "rows",
    transfer: pd.DataFrame | None = None,
    all_rows: bool = False,
) -> list[Section]:
    """All sections of a report on prompts.

    Args:
        prompts: as `find_tuned` gives them.
        backbone: their model, compared by digest.
        top: how many nearest tokens.
        measure: what near means, as of `closeness`.
        compare: what distances are of, as of `prompt_points`.
        transfer: as `read_transfer` gives it.
        all_rows: whether special tokens, and rows that no token has, may be found.

    Raises:
        ValueError: prompts of another backbone, ``top`` out of range, or several lengths where
            all rows are compared.
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
    table = prompt_table(prompts, tokens, vocabulary)
    names = ["norm", "row_norm", "relative_norm", "drift", "most_drift", "cosine"]
    heads = ["norm", "row norm", "x median", "drift, mean", "largest", "cosine"]
    shown = pd.DataFrame({"prompt": table["prompt"]})
    shown[heads] = table[names].apply(_digits)
    kept = zip(table["survived"], table["initial_tokens"], strict=True)
    shown["survived"] = [f"{x} of {y}" if y else "–" for x, y in kept]
    left_out = prompts.attrs["left_out"]
    legend = (
        f"{len(prompts)} prompts of {prompts['task'].nunique()} tasks, for backbone {backbone}. "
        + (f"Of grids, {left_out} prompts with a lower dev score are left out. " * bool(left_out))
        + "Norm: Frobenius norm of the prompt. Row norm: mean over rows, and as a multiple of the "
        f"vocabulary's median, {vocabulary.median:.4g}. Drift: Euclidean distance of a "
        "row from its initial row. Cosine: between the two. Survived: rows whose nearest token is "
        "still the one that they started as, of those that started as a token. In the figure of "
        "drift a dot marks a row whose nearest token is no longer the initial one."
    )
    figures = {**_drift_figures(tokens), "norms": _norms_figure(tokens, prompts, vocabulary)}
    return Section("prompts", "Prompts", legend, table, shown, figures)


def _drift_figures(tokens: pd.DataFrame) -> dict[str, Figure]:
    """Drift of each row, some prompts a page."""
    drift = tokens.pivot_table(index="prompt", columns="row", values="drift", sort=False)
    lost = (tokens["survived"] == 0).fillna(False).map({True: "•", False: ""})
    marks = tokens.assign(mark=lost).pivot(index="prompt", columns="row", values="mark")
    drift = drift.reindex(columns=sorted(drift.columns))
    marks = marks.reindex_like(drift).fillna("")
    drift.index = _short_names([*drift.index])
    figures = {}
    for at in range(0, len(drift), _PAGE):
        stem = "drift" if len(drift) <= _PAGE else f"drift-{at // _PAGE + 1}"
        figures[stem] = plots.heatmap(
            drift.iloc[at : at + _PAGE],
            "distance from initial row",
            texts=marks.iloc[at : at + _PAGE],
            xlabel="row of the prompt",
        )
    return figures


def _short_names(labels: Sequence[str]) -> list[str]:
    """Names without the last parts, such as a learning rate, that all of them share."""
    parts = [label.split("_") for label in labels]
    while len(labels) > 1 and min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    return ["_".join(own) for own in parts]


def _norms_figure(tokens: pd.DataFrame, prompts: pd.DataFrame, vocabulary: Vocabulary) -> Figure:
    """Norms of rows: of the vocabulary, the initial prompts, and the prompts of each task."""
    inits = prompts["tuned"].map(lambda one: one.init.numpy().tobytes())
    starts = tokens[tokens["prompt"].isin(prompts["prompt"][~inits.duplicated()])]
    quantiles = np.quantile(vocabulary.norms, np.linspace(0, 1, 201))  # for any vocabulary
    count = tokens["task"].map(prompts["task"].value_counts())
    parts = [
        pd.DataFrame({"label": "vocabulary", "norm": quantiles}),
        pd.DataFrame({"label": "initial prompts", "norm": starts["initial_norm"]}),
        pd.DataFrame(
            {
                "label": [f"{x} ({n})" for x, n in zip(tokens["task"], count, strict=True)],
                "norm": tokens["norm"],
            }
        ),
    ]
    table = pd.concat(parts, ignore_index=True)
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
    shown = means.apply(_digits).rename_axis("task").reset_index()
    legend = (
        f"{distance[0].upper()}{distance[1:]}: means over two prompts of either task; on the "
        "diagonal, of different runs of one."
    )
    starts = prompts["tuned"].map(lambda one: one.init.numpy().tobytes()).nunique()
    if starts > 1:
        legend += (
            f" The prompts start from {starts} different initial prompts, so distances between "
            "them hold what lay between these, too."
        )
    if prompts["tuned"].map(lambda one: one.learning_rate).nunique(dropna=False) > 1:
        legend += " The prompts differ in learning rate, which spread holds, too."
    figures = {}
    if len(prompts) <= 24 or len(means) in (1, len(prompts)):
        names = _short_names([*prompts["prompt"]])
        square = pd.DataFrame(squareform(pairs["distance"]), names, names)
        square = square.mask(np.eye(len(square), dtype=bool))
        figures["distances"] = plots.heatmap(square, distance, texts=_cells(square, ".3g"))
    if 1 < len(means) < len(prompts):
        label = f"mean {distance}"
        figures["task-distances"] = plots.heatmap(means, label, texts=_cells(means, ".3g"))
    if len(prompts) >= 4 and pairs["distance"].any():
        legend += " The maps show each prompt as a point: on its principal components, and by t-SNE"
        at, shares = principal_components(points)
        axes = [f"first component ({shares[0]:.0%} of the variance)"]
        axes.append(f"second component ({shares[1]:.0%})")
        figures["map-pca"] = _map(prompts, at, axes)
        at, perplexity = tsne(points)
        axes = ["first coordinate of t-SNE", "second coordinate"]
        figures["map-tsne"] = _map(prompts, at, axes)
        legend += f" (perplexity {perplexity:.3g}, seed 0), where only what is near says something."
    return Section("distances", "Distances", legend, pairs, shown, figures)


def _cells(table: pd.DataFrame, form: str) -> pd.DataFrame:
    """The numbers of a heat map as text; none where the cells are small."""
    if table.shape[1] > _MOST_CELLS:
        return table.map(lambda _: "")
    return table.map(lambda x: "" if pd.isna(x) else f"{x:{form}}")


def _map(prompts: pd.DataFrame, points: Floats, axes: Sequence[str]) -> Figure:
    table = pd.DataFrame({"x": points[:, 0], "y": points[:, 1], "task": prompts["task"]})
    return plots.scatter(table, "x", "y", "task", *axes)


def _transfer_section(transfer: pd.DataFrame, distances: pd.DataFrame) -> Section:
    used = {*transfer["source"], *transfer["target"]}
    tasks = [task for task in distances.index if task in used]
    distances = distances.loc[tasks, tasks]
    gains = transfer.pivot(index="source", columns="target", values="gain")
    gains = gains.reindex(index=tasks, columns=tasks)
    far = distances.stack(future_stack=True).rename("distance").rename_axis(TRANSFER[:2])
    order = ["source", "target", "distance", "score", "no_prompt", "gain", "lines"]
    table = transfer.join(far, on=TRANSFER[:2])[order]
    table = table.sort_values(TRANSFER[:2], key=lambda x: x.map(tasks.index), ignore_index=True)
    shown = table[["source", "target"]].copy()
    shown["distance"] = _digits(table["distance"])
    shown["score"] = [f"{x:.3f}" for x in table["score"]]
    shown["no prompt"] = [f"{x:.3f}" for x in table["no_prompt"]]
    shown["gain"] = [f"{x:+.3f}" for x in table["gain"]]
    shown["lines"] = table["lines"]
    legend = (
        "Score on the target under prompts of the source, less the score without any prompt. If "
        "near prompts serve each other's tasks, gain falls with distance: a negative correlation. "
        f"Means over lines of results, such as runs. {_correlation(distances, gains)}"
    )
    figure = plots.heatmap(
        gains,
        "gain over no prompt",
        0.0,
        texts=_cells(gains, "+.3f"),
        xlabel="target",
        ylabel="source of the prompt",
    )
    return Section("transfer", "Transfer", legend, table, shown, {"transfer": figure})


def _correlation(distances: pd.DataFrame, gains: pd.DataFrame) -> str:
    """How gains go with distances, in a sentence."""
    found = mantel(distances, gains)
    if math.isnan(found["rho"]):
        return (
            "No rank correlation with distance: it needs three tasks, three pairs of different "
            "tasks, and distances and gains that are not all equal."
        )
    orders = math.factorial(len(gains))
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
    started = tokens["initial_token"]
    shown["started as"] = ["–" if pd.isna(x) else literal(x) for x in started]
    shown["place now"] = tokens["initial_rank"].astype(object).fillna("–")
    shown["drift"] = _digits(tokens["drift"])
    for at in range(1, top + 1):
        is_initial = (tokens[f"id_{at}"] == tokens["initial_id"]).fillna(False)
        scores = _digits(tokens[f"score_{at}"])
        cells = zip(tokens[f"token_{at}"].map(literal), scores, is_initial, strict=True)
        shown[str(at)] = [
            f"**{x}** {score}" if bold else f"{x} {score}" for x, score, bold in cells
        ]
    legend = (
        f"{note} For each row the token it started as, the place of that token now, and the "
        f"nearest tokens with their scores, the nearest first, by {MEASURES[measure]}; the initial "
        "token is bold where it is among them. ␣ is a space; what cannot be seen stands as an "
        "escape, and bytes that are no whole character as the tokenizer names them."
    )
    return Section("tokens", "Tokens", legend, tokens, shown)
