"""The tables and the text of `prompt-lab interpret`.

Tables are CSV files; the text is made of blocks, which `report_blocks` writes as HTML,
Markdown or plain text.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.analysis.interpret_prompts import distance_name
from prompt_lab.analysis.interpret_tokens import SPACE
from prompt_lab.analysis.interpret_transfer import SCORES
from prompt_lab.analysis.report_blocks import Block, Token
from prompt_lab.files.tensors import write_csv

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.analysis.interpret_tokens import Reading, Vocabulary
    from prompt_lab.analysis.interpret_transfer import Transfer
    from prompt_lab.analysis.interpretation import RankCorrelation, Spread
    from prompt_lab.core.backbone import Backbone

PROMPT_COLUMNS = (
    *("prompt", "task", "sample", "init_seed", "order_seed", "file", "rows", "norm"),
    *("row_norm", "relative_norm", "drift", "most_drift", "cosine", "initial_tokens", "survived"),
)

TOKEN_COLUMNS = (
    *("prompt", "task", "row", "initial_id", "initial_token", "initial_rank", "survived"),
    *("drift", "cosine", "norm", "initial_norm", "relative_norm"),
)

SPREAD_COLUMNS = (
    *("group", "runs", "norm_mean", "norm_variance"),
    *("within_mean", "within_variance", "within_pairs"),
    *("between_mean", "between_variance", "between_pairs"),
)

DISTANCE_COLUMNS = ("prompt", "other", "task", "other_task", "distance")

GAIN_COLUMNS = ("source", "target", "distance", "score", "no_prompt", "gain", "lines")


def write_tables(
    folder: Path,
    readings: Sequence[Reading],
    vocabulary: Vocabulary,
    distances: Tensor,
    transfer: Transfer | None,
) -> list[Path]:
    """Write all tables as CSV; returns the files."""
    k = readings[0].nearest.ids.shape[1]
    nearest = [f"{name}_{at}" for at in range(1, k + 1) for name in ("id", "token", "score")]
    spreads = map(vars, _spreads(readings, distances))
    tuned = [reading.tuned for reading in readings]
    pairs = (
        {
            **{"prompt": one.label, "other": other.label, "task": one.group},
            **{"other_task": other.group, "distance": float(distances[at, to])},
        }
        for at, one in enumerate(tuned)
        for to, other in enumerate(tuned)
        if at < to
    )
    tables: dict[str, tuple[Sequence[str], Iterable[Mapping[str, Any]]]] = {
        "prompts": (PROMPT_COLUMNS, (_prompt_row(one, vocabulary) for one in readings)),
        "tokens": (
            (*TOKEN_COLUMNS, *nearest),
            (row for one in readings for row in _token_rows(one, vocabulary)),
        ),
        "spread": (SPREAD_COLUMNS, spreads),
        "distances": (DISTANCE_COLUMNS, pairs),
    }
    if transfer is not None:
        tables["transfer"] = (GAIN_COLUMNS, transfer.rows)
    for name, (columns, rows) in tables.items():
        write_csv(folder / f"{name}.csv", columns, rows)
    return [folder / f"{name}.csv" for name in tables]


def _spreads(readings: Sequence[Reading], distances: Tensor) -> list[Spread]:
    """The spread of each group of prompts."""
    from prompt_lab.analysis.interpretation import spread_of_runs

    tuned = [reading.tuned for reading in readings]
    prompts = [one.prompt.prompt for one in tuned]
    return spread_of_runs(prompts, distances, [one.group for one in tuned])


def _prompt_row(reading: Reading, vocabulary: Vocabulary) -> dict[str, Any]:
    """The figures of one prompt."""
    tuned, drift = reading.tuned, reading.drift
    row_norm = float(reading.norms.mean())
    facts = {name: getattr(tuned.prompt, name) for name in ("sample", "init_seed", "order_seed")}
    return {
        **{"prompt": tuned.label, "task": tuned.group, **facts, "file": tuned.where},
        **{"rows": len(reading.norms), "norm": float(tuned.prompt.prompt.double().norm())},
        **{"row_norm": row_norm, "relative_norm": row_norm / vocabulary.norm},
        **{"drift": float(drift.l2.mean()), "most_drift": float(drift.l2.max())},
        **{"cosine": float(drift.cosine.nanmean())},
        **{"initial_tokens": int((reading.initial >= 0).sum())},
        **{"survived": int(reading.survived.sum())},
    }


def _token_rows(reading: Reading, vocabulary: Vocabulary) -> Iterator[dict[str, Any]]:
    """The figures of each row of a prompt, with its nearest tokens."""
    names = vocabulary.names
    for at in range(len(reading.norms)):
        initial = int(reading.initial[at])
        row: dict[str, Any] = {
            **{"prompt": reading.tuned.label, "task": reading.tuned.group, "row": at + 1},
            **{"drift": float(reading.drift.l2[at]), "cosine": float(reading.drift.cosine[at])},
            **{"norm": float(reading.norms[at]), "initial_norm": float(reading.initial_norms[at])},
            **{"relative_norm": float(reading.norms[at]) / vocabulary.norm},
        }
        if initial >= 0:
            row |= {"initial_id": initial, "initial_token": names[initial]}
            row |= {"initial_rank": int(reading.ranks[at])}
            row |= {"survived": int(reading.survived[at])}
        places = zip(reading.nearest.ids[at].tolist(), reading.nearest.scores[at], strict=True)
        for place, (token, score) in enumerate(places, 1):
            row |= {f"id_{place}": token, f"token_{place}": names[token]}
            row[f"score_{place}"] = float(score)
        yield row


_MEASURES = {
    "cosine": "cosine (higher is nearer)",
    "l2": "Euclidean distance (lower is nearer)",
    "dot": "inner product (higher is nearer)",
}


def about(backbone: Backbone, readings: Sequence[Reading], measure: str) -> str:
    """What was read, in a sentence."""
    tasks = len({one.tuned.group for one in readings})
    return (
        f"{len(readings)} prompts of {tasks} tasks, for backbone {backbone.name}. Nearest tokens "
        f"are by {_MEASURES[measure]}."
    )


def summary_blocks(
    intro: Sequence[str],
    readings: Sequence[Reading],
    vocabulary: Vocabulary,
    distances: Tensor,
    compare: str,
    transfer: Transfer | None,
) -> Iterator[Block]:
    """The part of the report that is printed, too."""
    yield Block("h1", "What the prompts say")
    yield Block("p", " ".join(intro))
    yield Block("h2", "Prompts")
    yield Block(
        "p",
        "Norm: Frobenius norm of the prompt. Row norm: mean over rows, and as a multiple of the "
        f"vocabulary's median, {vocabulary.norm:.4g}. Drift: Euclidean distance of a row from its "
        "initial row. Cosine: between the two. Survived: rows whose nearest token is still the "
        "one that they started as, of those that started as a token.",
    )
    header = ("prompt", "norm", "row norm", "x median", "drift, mean", "largest", "cosine")
    rows = [_prompt_row(one, vocabulary) for one in readings]
    names = ("norm", "row_norm", "relative_norm", "drift", "most_drift", "cosine")
    yield Block(
        "table",
        header=(*header, "survived"),
        rows=[
            [
                *(row["prompt"], *(_number(row[name]) for name in names)),
                f"{row['survived']} of {row['initial_tokens']}" if row["initial_tokens"] else "-",
            ]
            for row in rows
        ],
    )
    if len(readings) > 1:
        yield from _spread_blocks(_spreads(readings, distances), compare)
    if transfer is not None:
        yield from _transfer_blocks(transfer)


def _spread_blocks(spreads: Sequence[Spread], compare: str) -> Iterator[Block]:
    """How far runs of a task lie apart."""
    yield Block("h2", "Repeated runs")
    yield Block(
        "p",
        "Mean and variance (ddof 1) of the prompts' norms, of the distances between runs of one "
        f"task, and of those to prompts of other tasks. Distance: {distance_name(compare)}.",
    )
    header = ("task", "runs", "norm", "variance", "within", "variance", "pairs")
    yield Block(
        "table",
        header=(*header, "to others", "variance", "pairs"),
        rows=[
            [
                *(one.group, str(one.runs), _number(one.norm_mean), _number(one.norm_variance)),
                *(_number(one.within_mean), _number(one.within_variance), str(one.within_pairs)),
                *(_number(one.between_mean), _number(one.between_variance)),
                str(one.between_pairs),
            ]
            for one in spreads
        ],
    )


def _transfer_blocks(transfer: Transfer) -> Iterator[Block]:
    """How well prompts serve other tasks, and whether near ones do so better."""
    words = (_correlation_words(one, len(transfer.tasks)) for one in transfer.correlations)
    yield Block("h2", "Transfer")
    yield Block(
        "p",
        "Score on the target under prompts of the source, less the score without any prompt. If "
        "near prompts serve each other's tasks, gain falls with distance: a negative correlation. "
        "Means over lines of results, such as runs. "
        f"{' '.join(words)}",
    )
    yield Block(
        "table",
        header=("source", "target", "distance", "score", "no prompt", "gain", "lines"),
        rows=[
            [
                *(row["source"], row["target"], _number(row["distance"])),
                *(f"{row[name]:.3f}" for name in SCORES),
                *(f"{row['gain']:+.3f}", str(row["lines"])),
            ]
            for row in transfer.rows
        ],
    )


def _correlation_words(found: RankCorrelation, tasks: int) -> str:
    """A rank correlation in a sentence."""
    name = "Spearman's rho" if found.method == "spearman" else "Kendall's tau"
    if found.reason:
        return f"No {name}: {found.reason}."
    how = "all others" if found.is_exhaustive else "random, seed 0"
    least = f"; p cannot be below 1/{math.factorial(tasks)}" if found.is_exhaustive else ""
    return (
        f"{name} {found.coefficient:+.3f}, p = {found.p:.3g} (two-sided; {found.cells} pairs of "
        f"different tasks, {found.permutations} permutations of the tasks, {how}{least})."
    )


def picture_blocks(files: Iterable[Path]) -> Iterator[Block]:
    """The figures among some files."""
    titles = {
        "drift": "Drift of each row",
        "norms": "Norms of rows",
        "distances": "Distances between prompts",
        "task-distances": "Mean distances between tasks",
        "map-pca": "Prompts on their principal components",
        "map-tsne": "Prompts by t-SNE",
        "transfer": "Gain of a prompt on another task",
    }
    yield Block("h2", "Figures")
    for path in files:
        if path.suffix == ".png":
            stem = re.sub(r"-\d+$", "", path.stem)
            yield Block("image", titles[stem], file=path.name)


def token_blocks(readings: Sequence[Reading], vocabulary: Vocabulary) -> Iterator[Block]:
    """The nearest tokens of every row of every prompt."""
    yield Block("h2", "Tokens")
    yield Block(
        "p",
        "For each row the token it started as, the place of that token now, and the nearest "
        "tokens with their scores, the nearest first; the initial token is strong where it is "
        f"among them. {SPACE} is a space; what cannot be seen stands as an escape, bytes that are "
        "no whole character as \\x and two digits, and a combining mark on ◌.",
    )
    for reading in readings:
        yield Block("h3", reading.tuned.label)
        k = reading.nearest.ids.shape[1]
        yield Block(
            "table",
            header=("row", "started as", "place now", "drift", *map(str, range(1, k + 1))),
            rows=[
                [
                    str(row["row"]),
                    Token(row["initial_token"]) if "initial_id" in row else "-",
                    str(row.get("initial_rank", "-")),
                    _number(row["drift"]),
                    *_near_cells(row, k),
                ]
                for row in _token_rows(reading, vocabulary)
            ],
        )


def _near_cells(row: Mapping[str, Any], k: int) -> Iterator[Token]:
    """The nearest tokens of a row with their scores."""
    for at in range(1, k + 1):
        is_initial = row[f"id_{at}"] == row.get("initial_id")
        yield Token(row[f"token_{at}"], is_initial, _number(row[f"score_{at}"]))


def _number(value: float) -> str:
    """Four digits, or a dash."""
    return "-" if math.isnan(value) else f"{value:.4g}"
