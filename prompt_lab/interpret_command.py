"""The command ``prompt-lab interpret``: what tuned prompts say, as a report.

The figures of "Interpreting Prompt-Tuning Across SuperGLUE Tasks" (Dayton, O'Rahilly and Werner)
and what they leave out: nearest tokens of each row with the place of its initial token, drift and
norms, the spread of repeated runs, distances between prompts, and, with a table of transfer, the
rank correlation of the two. `prompt_lab.interpretation` computes, `prompt_lab.interpretation_plots`
draws; here prompts are found, tokens are made readable, and all is laid out.

The model is loaded for its embeddings, its tokenizer and its digest; nothing is run. Left out:
transfer itself, which other commands measure.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prompt_lab.atomic_file import write_atomically, write_csv
from prompt_lab.report_blocks import Block, Token, as_html, as_markdown, as_text

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.backbone import Backbone
    from prompt_lab.interpretation import Drift, Nearest, RankCorrelation, Spread
    from prompt_lab.prompt_file import Prompt

PAGE = 30
"""Prompts in one picture of drift."""

TRANSFER_COLUMNS = ("source", "target", "score", "no_prompt")
"""What a table of transfer has: at least these columns."""

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

_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
"""Unicode categories that cannot be seen or that move other letters."""

_SPACE = "␣"


@dataclass(frozen=True)
class Tuned:
    """A prompt that is interpreted.

    Attributes:
        label: its name in the report, which no other one has.
        path: its file.
        prompt: what the file holds.
    """

    label: str
    path: Path
    prompt: Prompt

    @property
    def group(self) -> str:
        """What it is a run of: its task, or what it was learned as, or itself."""
        return self.prompt.task or self.prompt.origin or self.label


@dataclass(frozen=True)
class Vocabulary:
    """The tokens that may be found.

    Attributes:
        table: (V, D) embeddings.
        ids: the rows of it that count.
        names: by id, the token as a reader sees it.
        norm: median norm of these rows.
        note: how many rows are left out, and why.
    """

    table: Tensor
    ids: Tensor
    names: Mapping[int, str]
    norm: float
    note: str


@dataclass(frozen=True)
class Reading:
    """What one prompt says.

    Attributes:
        tuned: the prompt.
        initial: (N,) token of each initial row, -1 for none.
        ranks: (N,) place of that token now, 0 for none.
        survived: (N,) whether it is still the nearest.
        nearest: ids and scores (N, k).
        drift: of each row (N,).
        norms: (N,) of the tuned rows.
        initial_norms: (N,) of the initial rows.
    """

    tuned: Tuned
    initial: Tensor
    ranks: Tensor
    survived: Tensor
    nearest: Nearest
    drift: Drift
    norms: Tensor
    initial_norms: Tensor


@dataclass(frozen=True)
class Transfer:
    """What prompts of one task give on another, and how that goes with distance.

    Attributes:
        tasks: the T tasks, in the order of the matrices.
        distances: (T, T) mean distance of their prompts.
        gains: (T, T) score less the score without prompt, source by target; NaN where not known.
        rows: the same as lines of a table.
        correlations: of the two, by each method.
    """

    tasks: list[str]
    distances: Tensor
    gains: Tensor
    rows: list[dict[str, Any]]
    correlations: list[RankCorrelation]


def interpret_command(
    prompts: list[str],
    *,
    out: str,
    top: int = 5,
    measure: Literal["cosine", "l2", "dot"] = "cosine",
    compare: Literal["rows", "mean"] = "rows",
    transfer: str | None = None,
    backbone: str | None = None,
    all_rows: bool = False,
    format: Literal["html", "markdown"] = "html",
) -> list[Path]:
    """Report what prompts say: nearest tokens, drift, norms, spread of repeated runs, distances.

    Writes a report (report.html or report.md), tables as CSV, and figures as PNG and SVG. Special
    tokens, and rows of the embedding table that no token has, are left out unless --all_rows is
    given. Of a grid in a folder, the prompt with the best dev score stands for each task, sample
    and seeds; files that are named are all read. With --transfer also how well prompts serve other
    tasks, and whether near ones do so better: a rank correlation with a permutation test.

    Args:
        prompts: prompt files, prompt stores, or folders of fits; of one backbone.
        out: folder for the report.
        top: how many nearest tokens of each row.
        measure: what near means: cosine, l2 (Euclidean distance) or dot (inner product).
        compare: what distances between prompts are of. rows - all rows (Frobenius norm of the
            difference), which needs prompts of one length; mean - their mean rows.
        transfer: CSV file with the columns source (a task, or a prompt that is given), target (a
            task), score, and no_prompt (the score of the target without any prompt); several lines
            of a pair are averaged. Such scores stand in the results.csv that VectorArithmetic
            writes when each task's vector, at scale 1, is evaluated on all tasks - expression is
            the source, task the target, test the score, and the lines of variant no_prompt have
            the last column; or test the prompts on the other tasks in any other way.
        backbone: hub id or folder of the model, where it is not at the place that the prompts name.
        all_rows: also find special tokens and rows that no token has.
        format: html or markdown.

    Returns:
        The files.

    Raises:
        FileNotFoundError: a prompt file, folder or table that is not there.
        ValueError: no prompts, prompts of several backbones, prompts of several lengths where rows
            are compared, numbers that are not finite, ``top`` out of range, or a table of transfer
            that cannot be read.
        NotADirectoryError: ``out`` is a file.
    """
    from prompt_lab.backbone import Backbone

    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"--out {folder} is a file: name a folder")
    if top < 1:
        raise ValueError(f"--top is {top}: give 1 or more")
    tuned, notes = find_prompts(prompts)
    distances = _distances(tuned, compare)
    table = None if transfer is None else read_transfer(Path(transfer), tuned)
    model = Backbone.load(backbone or tuned[0].prompt.backbone)
    vocabulary = read_vocabulary(model, all_rows)
    readings = read_prompts(tuned, model, vocabulary, top, measure)
    found = None if table is None else compare_transfer(table, tuned, distances)
    files = [
        *_write_tables(folder, readings, vocabulary, distances, found),
        *_draw(folder, readings, vocabulary, distances, found, compare),
    ]
    intro = [_about(model, readings, measure), vocabulary.note, *notes, *_start_notes(tuned)]
    summary = list(_summary(intro, readings, vocabulary, distances, compare, found))
    blocks = [*summary, *_pictures(files), *_token_blocks(readings, vocabulary)]
    name, text = "report.html", as_html(blocks, "What the prompts say")
    if format == "markdown":
        name, text = "report.md", as_markdown(blocks)
    write_atomically(folder / name, text.encode())
    print(as_text(summary))
    return [folder / name, *files]


# ---- prompts -------------------------------------------------------------------------------------


def find_prompts(places: Sequence[str]) -> tuple[list[Tuned], list[str]]:
    """The prompts of some files, stores and folders of fits, all of one backbone.

    Args:
        places: where they are.

    Returns:
        The prompts, those of a task together, and notes on what was left out.

    Raises:
        FileNotFoundError: a place that is not there.
        ValueError: no prompts, a damaged file, NaN or infinite numbers, or several backbones.
    """
    from prompt_lab.prompt_file import load_prompt

    paths, left_out = [], 0
    for place in map(Path, places):
        found, fewer = _files(place)
        paths += found
        left_out += fewer
    paths = list(dict.fromkeys(paths))
    if not paths:
        raise ValueError(f"no prompt files in {', '.join(places) or 'nothing'}: give some")
    tuned = []
    for path, label in zip(paths, _labels(paths), strict=True):
        prompt = load_prompt(path)
        if not (prompt.prompt.isfinite().all() and prompt.init.isfinite().all()):
            raise ValueError(f"{path} holds NaN or infinite numbers: tune it again or leave it out")
        tuned.append(Tuned(label, path, prompt))
    first = tuned[0]
    for other in tuned:
        if other.prompt.backbone_digest != first.prompt.backbone_digest:
            raise ValueError(
                f"{first.path} was made for backbone {first.prompt.backbone!r} with weights "
                f"{first.prompt.backbone_digest[:12]}, but {other.path} for "
                f"{other.prompt.backbone!r} with weights {other.prompt.backbone_digest[:12]}: only "
                "prompts of one backbone have one vocabulary"
            )
    order = list(dict.fromkeys(one.group for one in tuned))
    tuned.sort(key=lambda one: order.index(one.group))
    if not left_out:
        return tuned, []
    return tuned, [f"Of grids, {left_out} prompts with a lower dev score are left out."]


def _files(place: Path) -> tuple[list[Path], int]:
    """The prompt files of a place, of a grid the best, and how many are left out."""
    from prompt_lab.prompt_file import read_metadata

    if place.is_file():
        return [place], 0
    if not place.is_dir():
        raise FileNotFoundError(f"no prompt file or folder {place}")
    store = place / "prompts" if (place / "prompts").is_dir() else place
    paths = sorted(store.glob("*.safetensors"))
    best: dict[Any, tuple[float, Path]] = {}
    for path in paths:
        known = read_metadata(path)
        key: Any = path
        if known.get("task") and not known.get("made_from"):
            key = tuple(
                known.get(name)
                for name in ("task", "sample", "init_seed", "order_seed", "initialised")
            )
        dev = known.get("dev_score")
        score = -math.inf if dev is None or math.isnan(dev) else float(dev)
        if key not in best or score > best[key][0]:
            best[key] = score, path
    return [path for _, path in best.values()], len(paths) - len(best)


def _labels(paths: Sequence[Path]) -> list[str]:
    """A name for each file: its own, with as many folders before it as make it different."""
    for depth in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join((*path.parts[:-1], path.stem)[-depth:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _distances(tuned: Sequence[Tuned], compare: str) -> Tensor:
    """Distances (R, R) of all prompts; refuses several lengths where rows are compared."""
    from prompt_lab.interpretation import frobenius_distances, mean_row_distances

    prompts = [one.prompt.prompt for one in tuned]
    if compare == "mean":
        return mean_row_distances(prompts)
    by_length = {len(one.prompt.prompt): one for one in reversed(tuned)}
    if len(by_length) > 1:
        which = ", ".join(f"{one.label} has {n}" for n, one in sorted(by_length.items()))
        raise ValueError(
            f"prompts of several lengths ({which} rows) have no Frobenius distance: give prompts "
            "of one length at a time, tune them again with one num_virtual_tokens, or give "
            "--compare mean, which compares their mean rows"
        )
    return frobenius_distances(prompts)


def _start_notes(tuned: Sequence[Tuned]) -> Iterator[str]:
    """What distances between prompts hold beside what training did."""
    starts = {one.prompt.init.numpy().tobytes() for one in tuned}
    if len(starts) > 1:
        yield (
            f"The prompts start from {len(starts)} different initial prompts, so distances between "
            "them hold what lay between these, too."
        )
    if len({one.prompt.learning_rate for one in tuned}) > 1:
        yield "The prompts differ in learning rate, which spread holds, too."


# ---- tokens --------------------------------------------------------------------------------------


def read_vocabulary(backbone: Backbone, all_rows: bool = False) -> Vocabulary:
    """The tokens of a backbone that may be found.

    Args:
        backbone: the model, of which only the embeddings and the tokenizer are used.
        all_rows: whether special tokens, and rows that no token has, are among them.
    """
    import torch
    from torch import nn

    from prompt_lab.interpretation import row_norms

    layer = backbone.model.get_input_embeddings()
    # A plain layer is its table; others scale it (BART), and only they need a copy.
    table = layer.weight.detach() if type(layer) is nn.Embedding else backbone.embedding_table()
    known = {i: t for t, i in backbone.tokenizer.get_vocab().items() if i < len(table)}
    is_bytes = is_byte_level(known.values())
    special = set(backbone.tokenizer.all_special_ids) & set(known)
    names = {i: readable(t, is_bytes and i not in special) for i, t in known.items()}
    unused = len(table) - len(known)
    words = f"{len(special)} special tokens and {unused} rows that no token has"
    if all_rows:
        ids = torch.arange(len(table))
        note = f"All {len(table):,} rows of the embedding table are looked at, {words} among them."
        names |= {i: f"(row {i})" for i in range(len(table)) if i not in known}
    else:
        ids = torch.tensor(sorted(set(known) - special))
        note = f"{len(ids):,} tokens are looked at; left out are {words}."
    return Vocabulary(table, ids, names, float(row_norms(table, ids).median()), note)


def is_byte_level(tokens: Iterable[str]) -> bool:
    """Whether tokens spell bytes, as those of GPT-2 do: a space is written as Ġ, never as ▁."""
    found = {letter for token in tokens for letter in token if letter in "Ġ▁"}
    return found == {"Ġ"}


def readable(token: str, is_bytes: bool) -> str:
    r"""A token as a reader sees it.

    Bytes are decoded, and those that are no whole letter stand as ``\xe4``. A space is ␣; other
    white space, control characters and marks of direction stand as escapes such as ``\n`` and
    ``\u202e``; a backslash is doubled. A combining mark at the start gets a dotted circle.

    Args:
        token: as the tokenizer names it.
        is_bytes: whether it spells bytes (:func:`is_byte_level`).
    """
    if is_bytes and all(letter in byte_letters() for letter in token):
        raw = bytes(byte_letters()[letter] for letter in token)
        pieces = re.split(r"([\udc80-\udcff])", raw.decode("utf-8", "surrogateescape"))
    else:
        pieces = [token.replace("▁", " ")]
    shown = ""
    for piece in pieces:
        if re.fullmatch(r"[\udc80-\udcff]", piece):
            shown += f"\\x{ord(piece) - 0xDC00:02x}"
        else:
            shown += "".join(map(_visible, piece))
    if shown and unicodedata.category(shown[0]).startswith("M"):
        shown = f"◌{shown}"
    return shown or "(empty)"


def _visible(letter: str) -> str:
    """A character, or its escape where it cannot be seen."""
    if letter == " ":
        return _SPACE
    if letter in ("\\", _SPACE) or unicodedata.category(letter) in _HIDDEN:
        return letter.encode("unicode_escape").decode()
    return letter


@cache
def byte_letters() -> dict[str, int]:
    """The letter that byte-level tokenizers write for each byte (Radford et al. 2019, GPT-2).

    Bytes of printable Latin-1 characters stand for themselves, the others, in their order, for
    the characters from U+0100 on.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + at): b for at, b in enumerate(others)}


def read_prompts(
    tuned: Sequence[Tuned], backbone: Backbone, vocabulary: Vocabulary, top: int, measure: Any
) -> list[Reading]:
    """What each prompt says.

    Args:
        tuned: the prompts.
        backbone: the model, with which they are compared by digest.
        vocabulary: its tokens.
        top: how many nearest tokens.
        measure: as in :func:`prompt_lab.interpretation.nearest_tokens`.

    Raises:
        ValueError: prompts of another backbone, or ``top`` out of range.
    """
    from prompt_lab.interpretation import (
        initial_tokens,
        nearest_tokens,
        row_drift,
        row_norms,
        surviving,
        token_ranks,
    )
    from prompt_lab.prompt_file import check_backbone

    for one in tuned:
        check_backbone(one.prompt, backbone, one.path)
    if top > len(vocabulary.ids):
        raise ValueError(f"--top is {top}: there are {len(vocabulary.ids)} tokens")
    table, ids = vocabulary.table, vocabulary.ids
    starts: dict[bytes, Tensor] = {}
    readings = []
    for one in tuned:
        prompt, init = one.prompt.prompt, one.prompt.init
        key = init.numpy().tobytes()
        if key not in starts:
            starts[key] = initial_tokens(init, table, ids=ids)
        nearest = nearest_tokens(prompt, table, measure, top, ids=ids)
        initial = starts[key]
        has_some = bool((initial >= 0).any())
        ranks = token_ranks(prompt, initial, table, measure, ids=ids) if has_some else 0 * initial
        readings.append(
            Reading(
                *(one, initial, ranks, surviving(initial, nearest), nearest),
                *(row_drift(prompt, init), row_norms(prompt), row_norms(init)),
            )
        )
    return readings


# ---- transfer ------------------------------------------------------------------------------------


def read_transfer(path: Path, tuned: Sequence[Tuned]) -> list[dict[str, Any]]:
    """The lines of a table of transfer between the tasks of some prompts.

    Args:
        path: a CSV file with at least `TRANSFER_COLUMNS`.
        tuned: the prompts.

    Returns:
        One for each pair of tasks that both have prompts: means of score and no_prompt over the
        lines of the pair, their difference as gain, and how many lines there are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a column that is missing, a score that is no number, or no pair of tasks that
            have prompts.
    """
    from prompt_lab.results import read_csv

    if not path.is_file():
        raise FileNotFoundError(f"no table of transfer {path}")
    lines = read_csv(path)
    lacking = [name for name in TRANSFER_COLUMNS if not lines or name not in lines[0]]
    if lacking:
        raise ValueError(
            f"{path} lacks the columns {', '.join(lacking)}, or has no lines: give a CSV file with "
            f"{', '.join(TRANSFER_COLUMNS)}"
        )
    group_of = {name: one.group for one in tuned for name in (one.label, one.prompt.name)}
    group_of |= {one.group: one.group for one in tuned}
    groups = set(group_of.values())
    pairs: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for number, line in enumerate(lines, 2):
        source, target = group_of.get(line["source"] or ""), line["target"] or ""
        if source is None or target not in groups:
            continue
        scores = tuple(_score(line[name], f"{path}, line {number}, {name}") for name in _SCORES)
        pairs.setdefault((source, target), []).append((scores[0], scores[1]))
    if not pairs:
        raise ValueError(
            f"{path} has no line whose source and target are tasks of these prompts "
            f"({', '.join(sorted(groups))})"
        )
    rows = []
    for (source, target), scores in pairs.items():
        score, without = (sum(side) / len(scores) for side in zip(*scores, strict=True))
        found = {"source": source, "target": target, "score": score, "no_prompt": without}
        rows.append({**found, "gain": score - without, "lines": len(scores)})
    return rows


_SCORES = TRANSFER_COLUMNS[2:]


def _score(cell: str | None, where: str) -> float:
    """A number of a table."""
    try:
        number = float(cell or "")
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"{where} is {cell!r}: give a finite number")
    return number


def compare_transfer(
    rows: Sequence[Mapping[str, Any]], tuned: Sequence[Tuned], distances: Tensor
) -> Transfer:
    """Transfer and distance between tasks, and their rank correlations.

    Args:
        rows: as from :func:`read_transfer`.
        tuned: the prompts.
        distances: (R, R) between them.
    """
    import torch

    from prompt_lab.interpretation import group_distances, rank_correlation

    tasks, means = group_distances(distances, [one.group for one in tuned])
    used = [task for task in tasks if any(task in (r["source"], r["target"]) for r in rows)]
    places = torch.tensor([tasks.index(task) for task in used])
    means = means[places][:, places]
    gains = torch.full_like(means, math.nan)
    full = []
    for row in rows:
        at, to = used.index(row["source"]), used.index(row["target"])
        gains[at, to] = row["gain"]
        full.append({**row, "distance": float(means[at, to])})
    full.sort(key=lambda row: (used.index(row["source"]), used.index(row["target"])))
    correlations = [rank_correlation(means, gains, method) for method in ("spearman", "kendall")]
    return Transfer(used, means, gains, full, correlations)


# ---- tables --------------------------------------------------------------------------------------


def _write_tables(
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
    from prompt_lab.interpretation import spread_of_runs

    tuned = [reading.tuned for reading in readings]
    prompts = [one.prompt.prompt for one in tuned]
    return spread_of_runs(prompts, distances, [one.group for one in tuned])


def _prompt_row(reading: Reading, vocabulary: Vocabulary) -> dict[str, Any]:
    """The figures of one prompt."""
    tuned, drift = reading.tuned, reading.drift
    row_norm = float(reading.norms.mean())
    facts = {name: getattr(tuned.prompt, name) for name in ("sample", "init_seed", "order_seed")}
    return {
        **{"prompt": tuned.label, "task": tuned.group, **facts, "file": str(tuned.path)},
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


# ---- pictures ------------------------------------------------------------------------------------


def _draw(
    folder: Path,
    readings: Sequence[Reading],
    vocabulary: Vocabulary,
    distances: Tensor,
    transfer: Transfer | None,
    compare: str,
) -> list[Path]:
    """Draw everything; returns the files."""
    from prompt_lab.interpretation_plots import heatmap
    from prompt_lab.plots import save_figure

    files = [*_draw_drift(folder, readings), _draw_norms(folder, readings, vocabulary)]
    files = [*_draw_drift(folder, readings), *_draw_norms(folder, readings, vocabulary)]
    files += _draw_distances(folder, readings, distances, compare)
    files += _draw_maps(folder, readings, distances, compare)
    if transfer is not None:
        figure = heatmap(
            transfer.tasks,
            transfer.tasks,
            transfer.gains.numpy(),
            "score less score without prompt",
            axes_names=("target", "source of the prompt"),
            form="{:+.3f}",
        )
        files += save_figure(figure, folder / "transfer")
    return files


def _draw_drift(folder: Path, readings: Sequence[Reading]) -> Iterator[Path]:
    """Drift of each row, in pages of some prompts."""
    from prompt_lab.interpretation_plots import drift_map
    from prompt_lab.plots import save_figure

    names = _short([one.tuned.label for one in readings])
    starts = range(0, len(readings), PAGE)
    for number, start in enumerate(starts, 1):
        page = readings[start : start + PAGE]
        figure = drift_map(
            names[start : start + PAGE],
            [one.drift.l2.numpy() for one in page],
            [((one.initial >= 0) & ~one.survived).numpy() for one in page],
        )
        yield from save_figure(figure, folder / ("drift" + f"-{number}" * (len(starts) > 1)))


def _short(labels: Sequence[str]) -> list[str]:
    """Names without the last parts, such as a learning rate, that all of them share."""
    parts = [label.split("_") for label in labels]
    while len(labels) > 1 and min(map(len, parts)) > 1 and len({own[-1] for own in parts}) == 1:
        parts = [own[:-1] for own in parts]
    return ["_".join(own) for own in parts]


def _draw_norms(
    folder: Path, readings: Sequence[Reading], vocabulary: Vocabulary
) -> Iterator[Path]:
    """Norms of rows: of the vocabulary, the initial prompts, and the prompts of each task."""
    import numpy as np
    import torch

    from prompt_lab.interpretation import row_norms
    from prompt_lab.interpretation_plots import norm_violins
    from prompt_lab.plots import save_figure

    # Quantiles stand for a vocabulary of any size.
    norms = row_norms(vocabulary.table, vocabulary.ids).numpy()
    starts = {one.tuned.prompt.init.numpy().tobytes(): one.initial_norms for one in readings}
    groups: dict[str, list[Tensor]] = {}
    for one in readings:
        groups.setdefault(one.tuned.group, []).append(one.norms)
    names = ["vocabulary", "initial prompts", *(f"{n} ({len(p)})" for n, p in groups.items())]
    values = [torch.cat(list(starts.values())), *(torch.cat(parts) for parts in groups.values())]
    quantiles = np.quantile(norms, np.linspace(0, 1, 1001))
    figure = norm_violins(
        names,
        [quantiles, *(part.numpy() for part in values)],
        "norm of a row",
        "line: median, and least to largest; in brackets: number of prompts",
    )
    yield from save_figure(figure, folder / "norms")


def _draw_distances(
    folder: Path, readings: Sequence[Reading], distances: Tensor, compare: str
) -> Iterator[Path]:
    """Distances between prompts, where they are few, and mean distances between tasks."""
    from prompt_lab.interpretation import group_distances
    from prompt_lab.interpretation_plots import MOST_CELLS, heatmap
    from prompt_lab.plots import save_figure

    labels = _short([one.tuned.label for one in readings])
    tasks, means = group_distances(distances, [one.tuned.group for one in readings])
    if len(labels) > 1 and (len(labels) <= MOST_CELLS or len(tasks) in (1, len(labels))):
        others = distances.clone().fill_diagonal_(math.nan).numpy()
        figure = heatmap(labels, labels, others, _distance_name(compare))
        yield from save_figure(figure, folder / "distances")
    if 1 < len(tasks) < len(labels):
        note = "mean over pairs of prompts; on the diagonal, of different runs of one task"
        name = _distance_name(compare)
        yield from save_figure(
            heatmap(tasks, tasks, means.numpy(), name, note=note), folder / "task-distances"
        )


def _distance_name(compare: str) -> str:
    """What distances are."""
    return "Frobenius distance" if compare == "rows" else "distance of mean rows"


def _draw_maps(
    folder: Path, readings: Sequence[Reading], distances: Tensor, compare: str
) -> Iterator[Path]:
    """Maps of the prompts by PCA and t-SNE, where there are four and they differ."""
    import torch

    from prompt_lab.interpretation_plots import prompt_map, tsne_points
    from prompt_lab.plots import principal_components, save_figure

    if len(readings) < 4 or not distances.any():
        return
    prompts = [one.tuned.prompt.prompt.double() for one in readings]
    parts = [p.flatten() if compare == "rows" else p.mean(dim=0) for p in prompts]
    vectors = torch.stack(parts).numpy()
    groups = [one.tuned.group for one in readings]
    points, shares = principal_components(vectors)
    words = (
        f"first component ({shares[0]:.0%} of the variance)",
        f"second component ({shares[1]:.0%})",
    )
    what = f"{len(readings)} prompts; runs of one task are joined"
    yield from save_figure(prompt_map(points, groups, words, what), folder / "map-pca")
    points, perplexity = tsne_points(vectors)
    words = ("first coordinate of t-SNE", "second coordinate")
    what += f"; perplexity {perplexity:.3g}, seed 0; only what is near says something"
    yield from save_figure(prompt_map(points, groups, words, what), folder / "map-tsne")


# ---- the report ----------------------------------------------------------------------------------


def _about(backbone: Backbone, readings: Sequence[Reading], measure: str) -> str:
    """What was read, in a sentence."""
    tasks = len({one.tuned.group for one in readings})
    return (
        f"{len(readings)} prompts of {tasks} tasks, for backbone {backbone.name}. Nearest tokens "
        f"are by {_MEASURES[measure]}."
    )


_MEASURES = {
    "cosine": "cosine (higher is nearer)",
    "l2": "Euclidean distance (lower is nearer)",
    "dot": "inner product (higher is nearer)",
}


def _summary(
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
        f"task, and of those to prompts of other tasks. Distance: {_distance_name(compare)}.",
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
        f"{' '.join(words)}",
    )
    yield Block(
        "table",
        header=("source", "target", "distance", "score", "no prompt", "gain"),
        rows=[
            [
                *(row["source"], row["target"], _number(row["distance"])),
                *(f"{row[name]:.3f}" for name in _SCORES),
                f"{row['gain']:+.3f}",
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


def _pictures(files: Iterable[Path]) -> Iterator[Block]:
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


def _token_blocks(readings: Sequence[Reading], vocabulary: Vocabulary) -> Iterator[Block]:
    """The nearest tokens of every row of every prompt."""
    yield Block("h2", "Tokens")
    yield Block(
        "p",
        "For each row the token it started as, the place of that token now, and the nearest "
        "tokens with their scores, the nearest first; the initial token is strong where it is "
        f"among them. {_SPACE} is a space; what cannot be seen stands as an escape, bytes that are "
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
