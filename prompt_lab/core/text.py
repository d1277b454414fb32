"""From texts to tokens: the special tokens of a model, and the frame around input and answer.

A plain row is what the tokenizer itself puts in front, the input, the answer and an end token. With
a chat template the input is the user's turn and the answer the assistant's: rows are rendered by
the tokenizer's own template, whole, and made tokens at once, so that they are those of
``apply_chat_template``. The soft prompt stands in front of all. Only the input's text is ever cut.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, get_args

Side = Literal["right", "left"]
"""Where the text of an input that is too long is cut."""

Template = Literal["plain", "chat"]
"""What stands around input and answer."""

_IDS_ALONE = {"return_attention_mask": False, "return_token_type_ids": False}
"""What tokenizers need not make: masks follow from lengths elsewhere."""

_PROBES = ("a", "1", "the", ".")
"""Texts whose neighbours in a row show what is always there."""

_INPUT, _ANSWER = "<<the input>>", "<<the answer>>"

_FIXED_DAY = "{% macro strftime_now(format) %}26 Jul 2024{% endmacro %}\n"
"""In front of a template that writes the date: rows stay the same. Llama 3's own default."""


def check_template(template: str, system: str | None, where: str = "") -> None:
    """Refuse (``ValueError``) another template, or a system text where there is no chat.

    ``where`` stands in front of the names of the settings.
    """
    if template not in get_args(Template):
        allowed = ", ".join(get_args(Template))
        raise ValueError(f"{where}template is {template!r}; allowed: {allowed}")
    if template == "plain" and system is not None:
        raise ValueError(f"{where}system is a part of a chat: give {where}template chat with it")


class Frame:
    """Plain rows; what stands around their inputs and answers.

    Args:
        tokenizer: of the model.
        specials: its special tokens.
        is_encoder_decoder: whether answers are a decoder's alone.
        name: of the model, for messages.

    Attributes:
        template: ``plain`` or ``chat``.
        system: the system text of a chat, or None.
        front: tokens in front of every input's text.
        back: tokens between it and the answer.
        ends: tokens at which a generated answer ends.
        digest: SHA-256 of what a template writes around the texts; empty where there is none.
    """

    template: Template = "plain"
    system: str | None = None
    digest: str = ""

    def __init__(
        self, tokenizer: Any, specials: Specials, is_encoder_decoder: bool, name: str
    ) -> None:
        self.tokenizer, self.specials, self.name = tokenizer, specials, name
        self.is_encoder_decoder = is_encoder_decoder
        self.front, self.back = specials.front, specials.back if is_encoder_decoder else []
        self.ends = specials.ends
        self._adds_space = "".join(tokenizer.tokenize("a")).startswith("▁")

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of inputs, whole, with what stands around them.

        Of plain rows these are the special tokens that the tokenizer itself adds. Encoder-decoder
        models get them on both sides (T5 ``text </s>``, BART ``<s> text </s>``); decoder-only
        models in front alone (Llama ``<s> text``; GPT-2, BLOOM and SmolLM2 add none).

        Raises:
            ValueError: a text without tokens where there is no special token either.
        """
        made = self._tokens(texts)
        empty = next((text for text, ids in zip(texts, made, strict=True) if not ids), None)
        if empty is not None and not self.front + self.back:
            raise ValueError(
                f"an input has no tokens for backbone {self.name!r}, {empty[:40]!r}: give it some "
                "text that its tokenizer knows"
            )
        return [self.front + ids + self.back for ids in made]

    def cut_input(self, ids: list[int], max_length: int, side: Side = "right") -> list[int]:
        """An input of at most ``max_length`` tokens; of a longer one the text is cut at a side.

        Args:
            ids: as :meth:`encode_inputs` makes them.
            max_length: most tokens, those around the text included.
            side: ``right`` leaves the text's beginning, ``left`` its end.

        Raises:
            ValueError: another side, or no room beside the tokens around the text.
        """
        if side not in get_args(Side):
            raise ValueError(f"truncation_side is {side!r}; allowed: {', '.join(get_args(Side))}")
        if len(ids) <= max_length:
            return ids
        front = _shared([self.front, ids])  # all of it, unless a text's beginning merges with it
        back = _shared([self.back[::-1], ids[::-1]])
        text, room = ids[front : len(ids) - back], max_length - front - back
        if room < 1:
            what = "special tokens" if self.template == "plain" else "tokens of the chat template"
            raise ValueError(
                f"max_input_length is {max_length}, but {front + back} {what} stand around "
                f"every input of backbone {self.name!r}: give at least {front + back + 1}"
            )
        kept = text[:room] if side == "right" else text[len(text) - room :]
        return ids[:front] + kept + ids[len(ids) - back :]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of answers, never cut, with the end token.

        Plain decoder-only answers follow their input after one space (which SentencePiece adds
        itself).
        """
        space = "" if self.is_encoder_decoder or self._adds_space else " "
        made = self._tokens([space + text for text in texts], self.is_encoder_decoder)
        end, back = self.specials.end, self.specials.back if self.is_encoder_decoder else []
        if end in back[:-1]:  # mBART names its language behind the end
            made = [ids[: len(ids) - len(back) + back.index(end) + 1] for ids in made]
        return [ids if ids[-1:] == [end] else [*ids, end] for ids in made]

    def look_alikes(self, answers: Sequence[str]) -> list[list[str]]:
        """Groups of answers whose tokens are the same, which the model cannot tell apart."""
        groups: dict[tuple[int, ...], list[str]] = {}
        for answer, ids in zip(answers, self.encode_targets(answers), strict=True):
            groups.setdefault(tuple(ids), []).append(answer)
        return [group for group in groups.values() if len(group) > 1]

    def _tokens(self, texts: Sequence[str], specials: bool = False) -> list[list[int]]:
        """Token ids of texts, whatever length the tokenizer thinks right."""
        if not texts:
            return []
        return self.tokenizer(
            list(texts), add_special_tokens=specials, verbose=False, **_IDS_ALONE
        )["input_ids"]


class ChatFrame(Frame):
    """Rows by the tokenizer's chat template: the user's turn, then the assistant's.

    An answer goes on to the end token of the assistant's turn, and no further; where the template
    writes none it ends with the model's own. Nothing is put in front of what the template writes.

    Args:
        plain: the model's plain frame.
        system: system text in front of the user's turn; None for what the template does without.

    Raises:
        ValueError: an encoder-decoder model, a tokenizer without template, or a template that fails
            or leaves out the system text, the user's turn or the assistant's.
    """

    template = "chat"

    def __init__(self, plain: Frame, system: str | None = None) -> None:
        super().__init__(plain.tokenizer, plain.specials, plain.is_encoder_decoder, plain.name)
        self.system = system
        if self.is_encoder_decoder:
            raise ValueError(
                f"template is chat, but backbone {self.name!r} is an encoder-decoder, whose "
                "answers stand apart from the input: use plain"
            )
        if not self.tokenizer.chat_template:
            raise ValueError(
                f"template is chat, but the tokenizer of backbone {self.name!r} has no chat "
                "template: use plain, or the instruct version of the model"
            )
        (whole,) = self._rendered([_INPUT], [_ANSWER])
        parts = {"user": _INPUT, "assistant": _ANSWER, "system": (system or "").strip()}
        if lost := [role for role, text in parts.items() if text not in whole]:
            raise ValueError(
                f"the chat template of backbone {self.name!r} leaves out the {lost[0]}'s turn: "
                + ("leave out the system text" if lost == ["system"] else "use template plain")
            )
        self.digest = hashlib.sha256(whole.encode()).hexdigest()
        # From here on the answer's turn: its end token, and what is written behind that.
        written = whole.rpartition(_ANSWER)[2]
        known = {*self.tokenizer.added_tokens_decoder, *self.specials.ends}
        words = {self.tokenizer.convert_ids_to_tokens(i): i for i in known}
        found = [(written.index(word), -len(word), word) for word in words if word in written]
        at, _, word = min(found, default=(0, 0, ""))
        self._behind = len(written) - at - len(word)  # characters that no answer needs
        self._end = None if found else self.specials.end
        self.ends = list(dict.fromkeys([*self.specials.ends, words.get(word, self.specials.end)]))
        # Some templates end in a space, which becomes a part of the answer's first token.
        self._lead: list[int] = []
        (head,) = self._tokens(self._prompts(_PROBES[:1]))
        kept = _shared([head, *self._answered(_PROBES)])
        self._lead, self._loose = head[:kept], len(head) - kept
        inputs = self.encode_inputs(_PROBES)
        self.front = inputs[0][: _shared(inputs)]
        back = _shared([ids[::-1] for ids in inputs])
        self.back = inputs[0][len(inputs[0]) - back :]

    def encode_inputs(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of a chat up to the assistant's answer, whole."""
        return [ids[: len(ids) - self._loose] for ids in self._tokens(self._prompts(texts))]

    def encode_targets(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of answers as the assistant's, never cut, up to the end of its turn.

        Raises:
            ValueError: an answer that becomes one token with what stands in front of it.
        """
        made = self._answered(texts)
        for text, ids in zip(texts, made, strict=True):
            if ids[: len(self._lead)] != self._lead:
                raise ValueError(
                    f"the answer {text[:40]!r} begins within a token of the chat template of "
                    f"backbone {self.name!r}: use template plain, or another answer"
                )
        end = [] if self._end is None else [self._end]
        return [ids[len(self._lead) :] + end for ids in made]

    def _answered(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of chats of one and the same input up to the end of each answer's turn."""
        whole = self._rendered(_PROBES[:1] * len(texts), texts)
        return self._tokens([text[: len(text) - self._behind] for text in whole])

    def _prompts(self, texts: Sequence[str]) -> list[str]:
        """Chats up to the assistant's answer."""
        whole = self._rendered(texts, [_ANSWER] * len(texts))
        return [text.rpartition(_ANSWER)[0] for text in whole]

    def _rendered(self, inputs: Sequence[str], answers: Sequence[str]) -> list[str]:
        """What the template writes of chats."""
        from jinja2 import TemplateError

        first = [] if self.system is None else [{"role": "system", "content": self.system}]
        chats = [
            [*first, {"role": "user", "content": text}, {"role": "assistant", "content": answer}]
            for text, answer in zip(inputs, answers, strict=True)
        ]
        if not chats:
            return []
        try:
            template = self.tokenizer.get_chat_template()
            if "strftime_now" in template:
                template = _FIXED_DAY + template
            return self.tokenizer.apply_chat_template(chats, chat_template=template, tokenize=False)
        except (TemplateError, ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            advice = "" if self.system is None else "; leave out the system text if it takes none"
            raise ValueError(
                f"the chat template of backbone {self.name!r} cannot be used ({reason}){advice}"
            ) from None


def _shared(rows: Sequence[Sequence[int]]) -> int:
    """How many leading tokens some rows have in common."""
    return next(
        (at for at, tokens in enumerate(zip(*rows, strict=False)) if len({*tokens}) > 1),
        min(map(len, rows)),
    )


def some(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


# ---- special tokens ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Specials:
    """The special tokens with which rows are made and answers end.

    Attributes:
        front: what the tokenizer itself puts in front of a text.
        back: what it puts behind one.
        end: the token that answers are trained to end with.
        ends: the tokens at which an answer ends: the union of what tokenizer, config and generation
            config name.
        pad: what fills padding, which is never looked at.
        start: what the decoder of an encoder-decoder model starts from; -1 where there is none.
    """

    front: list[int]
    back: list[int]
    end: int
    ends: list[int]
    pad: int
    start: int


def find_specials(model: Any, tokenizer: Any, name: str) -> Specials:
    """Bring together what tokenizer, config and generation config say.

    Raises:
        ValueError: tokens that the model has no row for, a tokenizer that makes no tokens, or no
            token to end with or for a decoder to start from.
    """
    sources = (model.config, model.generation_config)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    size = min(layer.weight.shape[0] for layer in (embeddings, head))
    pad = tokenizer.pad_token_id
    beyond = sorted(i for i in tokenizer.get_vocab().values() if i >= size and i != pad)
    if beyond:
        words = [repr(tokenizer.convert_ids_to_tokens(i)) for i in beyond]
        raise ValueError(
            f"the tokenizer of backbone {name!r} has tokens that the model's tables of {size} rows "
            f"have no place for: {some(words)}; use the tokenizer that the model was trained with"
        )
    if 2 * len(tokenizer) < size:
        warnings.warn(
            f"the tokenizer of backbone {name!r} has {len(tokenizer)} tokens, the model's tables "
            f"{size} rows: is it the tokenizer that the model was trained with?",
            stacklevel=2,
        )
    for source, field in product(
        sources, ("eos_token_id", "pad_token_id", "decoder_start_token_id")
    ):
        for given in _ids(getattr(source, field, None)):
            if not isinstance(given, int):
                raise ValueError(
                    f"config or generation config of backbone {name!r} has {given!r} as {field}: "
                    "give the number of a token"
                )
    named = [getattr(source, "eos_token_id", None) for source in (tokenizer, *sources)]
    ends = list(dict.fromkeys(i for ids in map(_ids, named) for i in ids if 0 <= i < size))
    if not ends:
        raise ValueError(
            f"backbone {name!r} has no end token: neither tokenizer nor config names one that the "
            "model knows; set eos_token in tokenizer_config.json"
        )
    _tell_of_ordinary(tokenizer, ends, name)
    pads = (pad, *(getattr(source, "pad_token_id", None) for source in sources), ends[0])
    return Specials(
        *_added(tokenizer, name),
        end=ends[0],
        ends=ends,
        pad=next(i for i in pads if i is not None and 0 <= i < size),
        start=_decoder_start(*sources, size, name) if model.config.is_encoder_decoder else -1,
    )


def _ids(value: Any | list[int] | None) -> list[int]:
    """None, one id or several, as a list."""
    return [] if value is None else list(value) if isinstance(value, (list, tuple)) else [value]


def _added(tokenizer: Any, name: str) -> tuple[list[int], list[int]]:
    """The tokens that a tokenizer puts in front of a text and behind it."""
    for text in ("a", "1", "the", "."):
        bare = tokenizer(text, add_special_tokens=False)["input_ids"]
        full = tokenizer(text)["input_ids"]
        for at in range(len(full) - len(bare) + 1) if bare else ():
            if full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
    raise ValueError(
        f"the tokenizer of backbone {name!r} makes no tokens of plain text such as 'a' or '1': its "
        "files are damaged or not those of a language model"
    )


def _tell_of_ordinary(tokenizer: Any, ends: list[int], name: str) -> None:
    """Tell of ends that are ordinary words to the tokenizer, at which answers would stop."""
    known = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    words = [repr(tokenizer.convert_ids_to_tokens(i)) for i in ends if i not in known]
    if words:
        warnings.warn(
            f"config or generation config of backbone {name!r} name {some(words)} as an end, "
            "which is no special token of its tokenizer: answers stop there",
            stacklevel=2,
        )


def _decoder_start(config: Any, generation: Any, size: int, name: str) -> int:
    """The token that a decoder starts from: the config's, as in training, in generation too."""
    named = [getattr(source, "decoder_start_token_id", None) for source in (config, generation)]
    known = [i for i in named if i is not None and 0 <= i < size]
    if not known:
        raise ValueError(
            f"backbone {name!r} does not say what its decoder starts from: set "
            "decoder_start_token_id in config.json (T5: the padding token, BART: </s>)"
        )
    if named[0] not in (None, *known):
        warnings.warn(
            f"config.json of backbone {name!r} names token {named[0]}, which the model has no row "
            f"for, as what its decoder starts from; {known[0]} of generation_config.json is taken",
            stacklevel=2,
        )
    if len(set(known)) > 1:
        warnings.warn(
            f"backbone {name!r}: its decoder starts from token {known[0]} by config.json and from "
            f"{known[1]} by generation_config.json; {known[0]} is taken everywhere",
            stacklevel=2,
        )
    return known[0]
