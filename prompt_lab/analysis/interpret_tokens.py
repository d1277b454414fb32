"""Which tokens the rows of prompts are near, and how a token is shown to a reader.

The tokenizer's names of tokens become readable in any script: bytes are decoded, and what cannot be
seen stands as an escape. `interpretation` finds the nearest tokens. Of the model, only
the embeddings and the tokenizer are used.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.analysis.interpret_prompts import Tuned
    from prompt_lab.analysis.interpretation import Drift, Nearest
    from prompt_lab.core.backbone import Backbone

_HIDDEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}
"""Unicode categories that cannot be seen or that move other letters."""

SPACE = "␣"


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


def read_vocabulary(backbone: Backbone, all_rows: bool = False) -> Vocabulary:
    """The tokens of a backbone that may be found.

    Args:
        backbone: the model, of which only the embeddings and the tokenizer are used.
        all_rows: whether special tokens, and rows that no token has, are among them.
    """
    import torch
    from torch import nn

    from prompt_lab.analysis.interpretation import row_norms

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
        return SPACE
    if letter in ("\\", SPACE) or unicodedata.category(letter) in _HIDDEN:
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
        measure: as in :func:`prompt_lab.analysis.interpretation.nearest_tokens`.

    Raises:
        ValueError: prompts of another backbone, or ``top`` out of range.
    """
    from prompt_lab.analysis.interpretation import (
        initial_tokens,
        nearest_tokens,
        row_drift,
        row_norms,
        surviving,
        token_ranks,
    )
    from prompt_lab.files.prompts import check_prompt

    for one in tuned:
        check_prompt(one.prompt, backbone, one.where)
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
