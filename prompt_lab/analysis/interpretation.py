"""What tuned prompts say: nearest tokens, drift, spread of repeated runs, distances, transfer.

The questions are those of Dayton, O'Rahilly and Werner, "Interpreting Prompt-Tuning Across
SuperGLUE Tasks" (sections 5 and 6); what they leave open is a formula here. Of the model only
embeddings and tokenizer are used. `interpretation_sections` lays the tables out.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from prompt_lab.analysis.statistics import Floats
from prompt_lab.analysis.tables import find_results, read_results, read_text
from prompt_lab.core.vectors import parse_expression
from prompt_lab.files.prompts import FoundPrompt, best_found, find_prompts
from prompt_lab.files.vectors import check_compatible

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.core.backbone import Backbone

TRANSFER = ["source", "target", "score", "no_prompt"]
"""Columns of a table of transfer, at least."""

_CHUNK = 8192
_SEEDS = ["sample", "init_seed", "order_seed"]


# ---- prompts and their tokens --------------------------------------------------------------------


def find_tuned(places: Sequence[str]) -> pd.DataFrame:
    """The prompts of some places, all of one backbone; those of a task together.

    Of a grid in a place the prompt of best dev score stands for its task, sample and seeds;
    ``attrs["left_out"]`` counts the others.

    Returns:
        Columns ``prompt`` (a name that no other has), ``task`` (or what it was learned as),
        ``sample``, ``init_seed``, ``order_seed``, ``file`` and ``tuned``, the prompt itself.

    Raises:
        FileNotFoundError: a place that is not there or holds no prompts.
        ValueError: a damaged file, numbers that are not finite, or several backbones.
    """

    def cell(known: dict[str, Any]) -> tuple[Any, ...] | None:  # what the prompts of a grid share
        if not known.get("task") or known.get("made_from"):
            return None
        return tuple(known.get(name) for name in ("task", *_SEEDS, "start", "start_of"))

    found: dict[str, FoundPrompt] = {}
    left_out = 0
    for place in places:
        own = find_prompts(place)
        best = {*best_found(own, cell).values()}
        chosen = [one for one in own if one in best or cell(one.metadata) is None]
        found |= {one.where: one for one in chosen}
        left_out += len(own) - len(chosen)
    check_compatible(*found.values(), any_length=True)
    rows = []
    for label, one in zip(_labels([*found.values()]), found.values(), strict=True):
        tuned = one.prompt
        learned = tuned.source_set and f"{tuned.role} {tuned.source_set}"
        row = {"prompt": label, "task": tuned.task or learned or label}
        row |= {name: getattr(tuned, name) for name in _SEEDS}
        rows.append(row | {"file": one.where, "tuned": tuned})
    table = pd.DataFrame(rows).astype(dict.fromkeys(_SEEDS, "Int64"))
    first_seen = table["task"].unique().tolist().index
    table = table.sort_values("task", key=lambda x: x.map(first_seen), kind="stable")
    table.attrs["left_out"] = left_out
    return table.reset_index(drop=True)


def _labels(found: Sequence[FoundPrompt]) -> list[str]:
    parts = [[*(x for x in one.path.parts[:-1] if x != "prompts"), one.stem] for one in found]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(own[-depth:]) for own in parts]
        if len({*names}) == len(names):
            return names
    return [one.where for one in found]


@dataclass
class Vocabulary:
    """The tokens that may be found: C of the V rows of a table of embeddings."""

    table: Tensor  # (V, D)
    names: pd.Series  # the readable token by its row in the table, in rising order
    norms: Floats  # (C,) Euclidean norms of these rows
    median: float  # of the norms, the lower one of two
    note: str  # how many rows are left out, and why


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
    is_bytes = {x for token in known.values() for x in token if x in "Ġ▁"} == {"Ġ"}
    names = {at: readable(token, tokenizer if is_bytes else None) for at, token in known.items()}
    names |= {at: known[at] for at in special}
    ids = [*range(len(table))] if all_rows else sorted({*known} - special)
    words = f"{len(special)} special tokens and {len(table) - len(known)} rows that no token has"
    note = f"{len(ids):,} tokens are looked at; left out are {words}."
    if all_rows:
        note = f"All {len(table):,} rows of the embedding table are looked at, {words} among them."
    parts = torch.tensor(ids).split(_CHUNK)
    norms = torch.cat([table[part].double().norm(dim=1) for part in parts]).cpu()
    tokens = pd.Series([names.get(at, f"(row {at})") for at in ids], ids, object)
    return Vocabulary(table, tokens, norms.numpy(), float(norms.median()), note)


def readable(token: str, tokenizer: Any = None) -> str:
    r"""A token as a reader sees it: ␣ for a space, an escape such as ``\n`` for what is not seen.

    A tokenizer decodes it where it spells bytes; no whole character keeps its name.
    """
    text = token.replace("▁", " ")
    if tokenizer is not None:
        text = tokenizer.convert_tokens_to_string([token])
    seen = [
        "␣" if x == " " else x if x.isprintable() and x not in "\\␣" else repr(x)[1:-1]
        for x in (token if "\ufffd" in text else text)
    ]
    return "".join(seen) or "(empty)"


def closeness(rows: Tensor, table: Tensor, ids: Tensor, measure: str = "cosine") -> Tensor:
    """How near C tokens of a table (V, D) are to the rows of a prompt (N, D); (N, C), high is near.

    Section 5.1 of the paper, in float64. ``measure`` is "cosine" (0 for a row of zeros), "dot", or
    "l2": 2 a b - |b|^2, which is |a|^2 less the squared distance.
    """
    import torch

    rows = rows.double()
    near = rows.new_empty(len(rows), len(ids))
    for part, own in zip(ids.split(_CHUNK), near.split(_CHUNK, dim=1), strict=True):
        tokens = table[part].double()
        own.copy_(rows @ tokens.T)
        if measure == "cosine":
            lengths = rows.norm(dim=1, keepdim=True) * tokens.norm(dim=1)
            own.div_(lengths.clamp(min=torch.finfo(torch.float64).tiny))
        elif measure == "l2":
            own.mul_(2).sub_(tokens.square_().sum(dim=1))
    return near


def initial_tokens(init: Tensor, table: Tensor, ids: Tensor) -> Tensor:
    """The token whose embedding each row of an initial prompt (N, D) is, also rounded ones.

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
    """A row for each row of each prompt; ``measure`` as of `closeness`, "l2" scored by distances.

    Columns: ``prompt``, ``task``, ``row`` (from 1); ``initial_id``, ``initial_token``,
    ``initial_rank`` (1 is the nearest) and ``survived`` (whether it is), empty for a row that
    started as no token; ``drift`` (Euclidean distance from the initial row), ``cosine`` (with it),
    ``norm``, ``initial_norm``, ``relative_norm`` (over the vocabulary's median); and ``id_1``,
    ``token_1``, ``score_1`` and so on. A ``ValueError`` for more tokens than there are.
    """
    import torch

    table, names = vocabulary.table, vocabulary.names
    if top > len(names):
        raise ValueError(f"--top is {top}: there are {len(names)} tokens")
    ids = torch.tensor(names.index.to_numpy(), device=table.device)
    starts: dict[bytes, Tensor] = {}
    frames = []
    for one in prompts.itertuples():
        prompt, init = (x.double().to(table.device) for x in (one.tuned.prompt, one.tuned.init))
        if (key := one.tuned.init.numpy().tobytes()) not in starts:
            starts[key] = initial_tokens(init, table, ids)
        start = starts[key]
        near = closeness(prompt, table, ids, measure)
        scores, places = near.topk(top)
        if measure == "l2":
            scores = (table[ids[places]].double() - prompt[:, None]).norm(dim=2)
        own = near.gather(1, start.clamp(min=0)[:, None])
        ranks = 1 + (near > own + 1e-12 * own.abs()).sum(dim=1)  # equal ones differ in rounding
        norm, was = prompt.norm(dim=1), init.norm(dim=1)
        frame = {"initial_id": ids[start], "initial_token": start, "initial_rank": ranks}
        frame |= {"survived": ranks == 1, "drift": (prompt - init).norm(dim=1)}
        frame |= {"cosine": ((prompt * init).sum(dim=1) / (norm * was)).clamp(-1, 1), "norm": norm}
        frame |= {"initial_norm": was, "relative_norm": norm / vocabulary.median}
        whole = pd.DataFrame({name: values.cpu() for name, values in frame.items()})
        for name in ("initial_id", "initial_rank", "survived"):
            whole[name] = whole[name].astype("Int64").where((start >= 0).cpu().numpy())
        whole["initial_token"] = whole["initial_id"].map(names)
        for at in range(top):
            nearest = ids[places[:, at]].tolist()
            whole[f"id_{at + 1}"], whole[f"token_{at + 1}"] = nearest, names[nearest].to_numpy()
            whole[f"score_{at + 1}"] = scores[:, at].cpu()
        whole.insert(0, "prompt", one.prompt)
        whole.insert(1, "task", one.task)
        whole.insert(2, "row", range(1, len(init) + 1))
        frames.append(whole)
    return pd.concat(frames, ignore_index=True)


# ---- distances and spread ------------------------------------------------------------------------


def prompt_points(prompts: pd.DataFrame, compare: str = "rows") -> Floats:
    """Each prompt as a point: all its rows (R, N D), or with ``compare`` "mean" their mean (R, D).

    All rows of prompts of several lengths are a ``ValueError``.
    """
    tensors = [one.prompt.double() for one in prompts["tuned"]]
    if compare == "mean":
        return np.stack([tensor.mean(dim=0).numpy() for tensor in tensors])
    first = {len(x): label for x, label in zip(tensors[::-1], prompts["prompt"][::-1], strict=True)}
    if len(first) > 1:
        which = ", ".join(f"{label} has {length}" for length, label in sorted(first.items()))
        raise ValueError(
            f"prompts of several lengths ({which} rows) have no Frobenius distance: give prompts "
            "of one length at a time, or --compare mean, which compares their mean rows"
        )
    return np.stack([tensor.flatten().numpy() for tensor in tensors])


def distance_table(prompts: pd.DataFrame, points: Floats) -> pd.DataFrame:
    """Euclidean distances of every two prompts at points (R, P): section 5.3 of the paper."""
    from scipy.spatial.distance import pdist

    one, other = np.triu_indices(len(prompts), 1)
    label, task = prompts["prompt"].to_numpy(), prompts["task"].to_numpy()
    pairs = {"prompt": label[one], "other": label[other], "task": task[one]}
    return pd.DataFrame(pairs | {"other_task": task[other], "distance": pdist(points)})


def spread_table(prompts: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """How far the runs of each task lie apart: the paper's table 1, variances with ddof 1.

    A row for each task (``group``): mean and variance of the ``norm`` of its prompts, of the
    distances ``within``, between two of them, and ``between``, from one of them to one of another
    task, each with the number of pairs; NaN where there are too few.
    """
    both = _both_ways(pairs)
    is_own = both["task"] == both["other_task"]
    values = {
        "norm": prompt_norms(prompts).groupby(prompts["task"], sort=False),
        "within": both[is_own].iloc[: is_own.sum() // 2].groupby("task")["distance"],
        "between": both[~is_own].groupby("task")["distance"],
    }
    table = pd.DataFrame({"runs": values["norm"].size()})
    for name, of_task in values.items():
        table[f"{name}_mean"], table[f"{name}_variance"] = of_task.mean(), of_task.var()
        if name != "norm":
            table[f"{name}_pairs"] = of_task.size().reindex(table.index, fill_value=0)
    return table.rename_axis("group").reset_index()


def task_distances(prompts: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """Mean distance (T, T) of the prompts of two tasks, and of different prompts of one; or NaN."""
    means = _both_ways(pairs).groupby(["task", "other_task"])["distance"].mean().unstack()
    tasks = prompts["task"].unique()
    return means.reindex(index=tasks, columns=tasks)


def _both_ways(pairs: pd.DataFrame) -> pd.DataFrame:
    mirrored = pairs.rename(columns={"task": "other_task", "other_task": "task"})
    return pd.concat([pairs, mirrored], ignore_index=True)


def prompt_norms(prompts: pd.DataFrame) -> pd.Series:
    """Frobenius norm of each prompt."""
    return prompts["tuned"].map(lambda one: float(one.prompt.double().norm()))


# ---- transfer ------------------------------------------------------------------------------------


def read_transfer(places: Sequence[str], prompts: pd.DataFrame) -> pd.DataFrame:
    """Measured zero-shot transfer between the tasks of some prompts, from tables and from results.

    Of results the lines count in which ``VectorArithmetic`` has tested the vector of one task at
    scale 1, beside the score without prompt. Tables have at least the columns `TRANSFER`; a source
    is a task or the name of a prompt.

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
    tables, files = [], []
    for path in paths:
        if path.is_dir() or "fit_id" in path.read_text(encoding="utf-8").partition("\n")[0]:
            files += find_results(path)
        else:
            tables.append(_table_lines(path))
    if files:
        tables.append(_result_lines(files, prompts["tuned"].iloc[0].backbone_digest))
    lines = pd.concat(tables, ignore_index=True)
    tasks, task_of = prompts["task"], {}
    for names in (prompts["tuned"].map(lambda one: one.name), prompts["prompt"], tasks):
        task_of |= dict(zip(names, tasks, strict=True))
    lines["source"] = lines["source"].map(task_of)
    lines = lines[lines["source"].notna() & lines["target"].isin(prompts["task"])]
    if not len(lines):
        raise ValueError(
            f"{', '.join(places)}: no line whose source and target are tasks of these prompts "
            f"({', '.join(sorted({*prompts['task']}))})"
        )
    for name in TRANSFER[2:]:
        numbers = pd.to_numeric(lines[name], errors="coerce").astype(float)
        for where, cell in lines.loc[~np.isfinite(numbers), ["where", name]].to_numpy()[:1]:
            raise ValueError(f"{where}, {name} is {cell!r}: give a finite number")
        lines[name] = numbers
    pairs = lines.groupby(TRANSFER[:2], sort=False)
    table = pairs[TRANSFER[2:]].mean()
    table["gain"], table["lines"] = table["score"] - table["no_prompt"], pairs.size()
    return table.reset_index()


def _table_lines(path: Path) -> pd.DataFrame:
    lines = read_text(path, "table of transfer", index_col=False)
    lacking = [name for name in TRANSFER if name not in lines]
    if lacking or not len(lines):
        raise ValueError(
            f"{path} lacks the columns {', '.join(lacking or TRANSFER)}, or has no lines: give a "
            f"CSV file with {', '.join(TRANSFER)}, or a results.csv of VectorArithmetic"
        )
    return lines[TRANSFER].assign(where=[f"{path}, line {at + 2}" for at in lines.index])


def _result_lines(files: Sequence[Path], digest: str) -> pd.DataFrame:
    for file in files:
        digests = file.parent / "digests.json"
        known = json.loads(digests.read_text()) if digests.is_file() else {}
        if (tested := known.get("backbone", digest)) != digest:
            raise ValueError(
                f"{file} is of a backbone with weights {tested[:12]}, the prompts are of one with "
                f"{digest[:12]}: give the results of these prompts"
            )
    where = ", ".join(map(str, files))
    runs = pd.concat([read_results(file) for file in files], ignore_index=True)
    answered = ["task", "sample", "decoding", "metric_variant"]
    bare = runs[runs["variant"] == "no_prompt"].drop_duplicates(answered)[[*answered, "test"]]
    runs = runs[(runs["method"] == "VectorArithmetic") & (runs["scale"] == 1)]
    # On its own task a tuned prompt is "single"; "vectors" there has another initial prompt.
    runs = runs[runs["variant"].isin(["single", "vectors"])]
    factors = {text: parse_expression(text) for text in runs["expression"].unique()}
    alone = {text: next(iter(x)) for text, x in factors.items() if [*x.values()] == [1.0]}
    runs = runs.assign(source=runs["expression"].map(alone))
    is_own = runs["source"] == runs["task"]
    runs = runs[runs["source"].notna() & (is_own == (runs["variant"] == "single"))]
    if not len(runs):
        raise ValueError(
            f"{where}: no line of VectorArithmetic with the vector of one task at scale 1: test "
            "the tasks as model.expressions with model.evaluate_on all"
        )
    lines = runs.merge(bare, on=answered, how="left", indicator="beside", suffixes=("", "_bare"))
    if lacking := sorted({*lines.loc[lines["beside"] == "left_only", "task"]}):
        raise ValueError(
            f"{where}: no score without prompt (variant no_prompt) of {', '.join(lacking)}, "
            "answered in the same way: test with model.evaluate_on all, or give the results of a "
            "fit with model.test_baselines, too"
        )
    lines = lines.rename(columns={"task": "target", "test": "score", "test_bare": "no_prompt"})
    return lines[TRANSFER].assign(where=lines["folder"] + " " + lines["prompt_file"])
