"""Finding and loading a model and its tokenizer, with a sentence for what can go wrong.

Code that comes with a model is never run, and pickled weights are read as tensors alone. What is
run with the model is in ``backbone.py``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prompt_lab.sandbox import ASSETS, SANDBOX

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel

ENCODER_DECODER = ("t5", "mt5", "bart")
DECODER_ONLY = ("gpt2", "bloom", "llama", "qwen2")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(name: str, dtype: str, attention: str) -> tuple[Any, Any]:
    """A model of transformers, in its published dtype, and its tokenizer.

    Args:
        name: hub id, folder, or ``sandbox``.
        dtype: one of ``DTYPES``, which the model is meant to be cast to.
        attention: attention implementation of transformers.

    Raises:
        ValueError: another dtype, no such model, damaged files, a folder without tokenizer, an
            unsupported architecture, one that needs code of its own, or T5 in float16.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    path = ASSETS if name == SANDBOX else name
    config = _read(name, AutoConfig.from_pretrained, path)
    refuse_unsupported(config.model_type, DTYPES[dtype], name)
    _refuse_without_tokenizer(path)
    model = _load_model(name, path, config, attention)
    return model, _read(name, AutoTokenizer.from_pretrained, path)


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over the names, shapes, dtypes and bytes of a model's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def refuse_unsupported(kind: str, dtype: torch.dtype, name: str) -> None:
    """Refuse other architectures, and T5 in float16.

    T5 was trained in bfloat16 and overflows in float16 (transformers issue 9295).
    """
    if kind not in ENCODER_DECODER + DECODER_ONLY:
        known = ", ".join(ENCODER_DECODER + DECODER_ONLY)
        raise ValueError(f"backbone {name!r} is of type {kind!r}; supported types: {known}")
    if kind in ("t5", "mt5") and dtype == torch.float16:
        raise ValueError(
            f"backbone {name!r} is a T5, whose activations overflow in float16: use "
            "dtype bfloat16 or float32"
        )


def _refuse_without_tokenizer(path: str | Path) -> None:
    """Refuse a folder without tokenizer, for which transformers would make up an empty one."""
    folder = Path(path)
    files = ("tokenizer*", "vocab*", "*.model")
    if folder.is_dir() and not any(any(folder.glob(pattern)) for pattern in files):
        raise ValueError(
            f"backbone folder {str(path)!r} holds no tokenizer: put the tokenizer's files beside "
            "the weights (tokenizer.save_pretrained writes them)"
        )


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
                f"a model of one of the types {', '.join(ENCODER_DECODER + DECODER_ONLY)}"
            ) from error
        reason = (str(error).strip().splitlines() or [""])[0]
        if isinstance(error, UnpicklingError):  # whose words advise to run the code
            reason = "pickled weights that hold more than tensors"
        raise ValueError(
            f"backbone {name!r} cannot be loaded ({type(error).__name__}: {reason}); if its files "
            "are damaged or incomplete, get them again"
        ) from error


def _load_model(name: str, path: str | Path, config: Any, attention: str) -> PreTrainedModel:
    """The model in its published dtype, BLOOM with its own attention."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    chosen = {} if config.model_type == "bloom" else {"attn_implementation": attention}
    return _read(name, kind.from_pretrained, path, config=config, dtype="auto", **chosen)


def plain_generation(model: PreTrainedModel) -> GenerationConfig:
    """Generation settings with special ids only: published penalties would change the answers."""
    from transformers import GenerationConfig

    published = getattr(model, "generation_config", None)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    own = {name: getattr(model.config, name, None) for name in names}
    ids = {name: getattr(published, name, None) for name in names}
    return GenerationConfig(**{k: own[k] if v is None else v for k, v in ids.items()})


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
