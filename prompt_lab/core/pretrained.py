"""Finding and loading a model and its tokenizer, with a sentence for what can go wrong.

Tokenizer, config, generation config and weights are four files that people edit, and they may
disagree. What is run follows them as far as they can be brought together (:class:`Specials`); what
cannot is refused here, at loading. Code that comes with a model is never run, and pickled weights
are read as tensors alone. What is run with the model is in ``backbone.py``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prompt_lab.sandbox import ASSETS, SANDBOX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(name: str, dtype: str, attention: str) -> tuple[Any, Any]:
    """A model of transformers, in its published dtype, and its tokenizer.

    Args:
        name: hub id, folder, or ``sandbox``.
        dtype: one of ``DTYPES``, which the model is meant to be cast to.
        attention: attention implementation of transformers.

    Raises:
        ValueError: another dtype, no such model, damaged files, weights that are missing, of
            another shape or not finite, a folder without tokenizer, an unsupported architecture,
            one that needs code of its own, or T5 in float16.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    path = ASSETS if name == SANDBOX else name
    config = _read(name, AutoConfig.from_pretrained, path)
    refuse_unsupported(config, DTYPES[dtype], name)
    _refuse_without_tokenizer(path)
    _refuse_damaged_generation_config(Path(path))
    model = _load_model(name, path, config, attention)
    return model, _read(name, AutoTokenizer.from_pretrained, path)


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 over the bytes of a tensor."""
    return hashlib.sha256(_content(tensor)).hexdigest()


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(_content(tensor))
    return digest.hexdigest()


def _content(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def refuse_unsupported(config: Any, dtype: torch.dtype, name: str) -> None:
    """Refuse what is no language model with keys and values, and T5 in float16.

    T5 was trained in bfloat16 and overflows in float16 (transformers issue 9295).
    """
    kind = config.model_type
    if _class_of(config) is None:
        raise ValueError(
            f"backbone {name!r} is of type {kind!r}, which transformers has no language model for: "
            "take a decoder-only or an encoder-decoder language model"
        )
    if getattr(_class_of(config), "_is_stateful", False):
        raise ValueError(
            f"backbone {name!r} is of type {kind!r}, which carries a state in place of keys and "
            "values, so that no prompt can be shared by rows: take a model with attention"
        )
    if kind in ("t5", "mt5", "umt5") and dtype == torch.float16:
        raise ValueError(
            f"backbone {name!r} is a T5, whose activations overflow in float16: use "
            "dtype bfloat16 or float32"
        )


def _class_of(config: Any) -> Any:
    """The class of transformers that runs a config as a language model; None for none."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto._model_mapping.get(type(config), None)


def _refuse_without_tokenizer(path: str | Path) -> None:
    """Refuse a folder without tokenizer, for which transformers would make up an empty one."""
    folder = Path(path)
    files = ("tokenizer*", "vocab*", "*.model")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in files):
        raise ValueError(
            f"backbone folder {str(path)!r} holds no tokenizer: put the tokenizer's files beside "
            "the weights (tokenizer.save_pretrained writes them)"
        )


def _refuse_damaged_generation_config(folder: Path) -> None:
    """Refuse a generation config that cannot be read, which transformers would leave out."""
    file = folder / "generation_config.json"
    try:
        if file.is_file():
            json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged, not JSON ({error}): get it again") from None


def _read(name: str, read: Callable[..., Any], path: str | Path, **settings: Any) -> Any:
    """What transformers reads of a model, without running code that comes with it.

    Raises:
        ValueError: no such model, damaged files, or a model that needs such code.
    """
    try:
        return read(path, trust_remote_code=False, **settings)
    except OSError as error:
        raise ValueError(_missing_model(name, error)) from error
    except Exception as error:  # the libraries that read the files have kinds of their own
        if "custom code" in str(error):
            raise ValueError(
                f"backbone {name!r} needs Python code that comes with it, which is never run: take "
                "a model of a type that transformers has itself"
            ) from error
        reason = " ".join(str(error).split())[:300]
        if isinstance(error, UnpicklingError):  # whose words advise to run the code
            reason = "pickled weights that hold more than tensors"
        raise ValueError(
            f"backbone {name!r} cannot be loaded ({type(error).__name__}: {reason}); if its files "
            "are damaged or incomplete, get them again"
        ) from error


def _load_model(name: str, path: str | Path, config: Any, attention: str) -> PreTrainedModel:
    """The model in its published dtype, its weights all there; eager where it has no sdpa."""
    from transformers.utils import logging

    kind = _class_of(config)
    settings: dict[str, Any] = {"config": config, "dtype": "auto", "output_loading_info": True}
    settings["ignore_mismatched_sizes"] = True  # they are refused below, by name
    if attention == "sdpa" and not kind._supports_sdpa:
        attention = "eager"
        warnings.warn(
            f"backbone {name!r}: transformers has no sdpa attention for "
            f"{config.model_type} models; eager is taken",
            stacklevel=2,
        )
    settings["attn_implementation"] = attention
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # transformers tells the same in a table
    try:
        model, found = _read(name, kind.from_pretrained, path, **settings)
    finally:
        logging.set_verbosity(before)
    wrong = sorted(str(key if isinstance(key, str) else key[0]) for key in found["mismatched_keys"])
    for names, what in (
        (sorted(found["missing_keys"]), "lacks weights that its config asks for"),
        (wrong, "has weights of another shape than its config asks for"),
    ):
        if names:
            raise ValueError(
                f"backbone {name!r} {what}: {_some(names)}. Trained behind such a model, a prompt "
                "is worth nothing: get the files again, or mend config.json (model_type, sizes, "
                "tie_word_embeddings)"
            )
    if found["unexpected_keys"]:
        warnings.warn(
            f"backbone {name!r} has weights that a {config.model_type} of its config does not use: "
            f"{_some(sorted(found['unexpected_keys']))}; is config.json right?",
            stacklevel=2,
        )
    return model


def refuse_not_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that hold NaN or infinity, as a cast to a smaller dtype may leave.

    Raises:
        ValueError: naming the weights.
    """
    names = [own for own, weight in model.named_parameters() if not weight.isfinite().all()]
    if names:
        raise ValueError(
            f"backbone {name!r} has weights that are not finite: {_some(names)}; get the files "
            "again, or use another dtype if they are too large for this one"
        )


def _some(names: list[str]) -> str:
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
            f"have no place for: {_some(words)}; use the tokenizer that the model was trained with"
        )
    if 2 * len(tokenizer) < size:
        warnings.warn(
            f"the tokenizer of backbone {name!r} has {len(tokenizer)} tokens, the model's tables "
            f"{size} rows: is it the tokenizer that the model was trained with?",
            stacklevel=2,
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


def _ids(value: int | list[int] | None) -> list[int]:
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
            f"config or generation config of backbone {name!r} name {_some(words)} as an end, "
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
    if len(set(known)) > 1:
        warnings.warn(
            f"backbone {name!r}: its decoder starts from token {known[0]} by config.json and from "
            f"{known[1]} by generation_config.json; {known[0]} is taken everywhere",
            stacklevel=2,
        )
    return known[0]


def _missing_model(name: str, error: OSError) -> str:
    """What to do when a model cannot be found."""
    reason = str(error).strip().splitlines()[0]
    if Path(name).is_dir():
        return f"no backbone in folder {name}: {reason}"
    return (
        f"no backbone {name!r}: it is neither a folder with config.json, tokenizer and weights, "
        f"nor could it be had from the hub or its cache ({reason}). Without network, first run "
        f"`hf download {name}` on a machine that has it, copy the cache folder (HF_HOME) and set "
        "HF_HUB_OFFLINE=1, or "
        "give the path of a local copy; `sandbox` is the model that ships with the package"
    )
