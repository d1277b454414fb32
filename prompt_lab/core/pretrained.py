"""Finding and loading a model and its tokenizer, with a sentence for what can go wrong.

Tokenizer, config, generation config and weights are four files that people edit, and they may
disagree. What is run follows them as far as they can be brought together (``text.Specials``); what
cannot is refused at loading. Code that comes with a model is never run, and pickled weights are
read as tensors alone. What is run with the model is in ``backbone.py``.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from prompt_lab.core.text import some
from prompt_lab.sandbox import ASSETS, SANDBOX

if TYPE_CHECKING:
    from transformers import PreTrainedModel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_pretrained(name: str, dtype: str, attention: str) -> tuple[Any, Any]:
    """A model of transformers, in its published dtype, and its tokenizer.

    Args:
        name: hub id, folder, ``.gguf`` file (whose weights are unpacked), or ``sandbox``.
        dtype: one of ``DTYPES``, which the model is meant to be cast to.
        attention: attention implementation of transformers.

    Raises:
        ValueError: another dtype, no such model, a GGUF file that transformers cannot read, damaged
            files, weights that are missing, of another shape or not finite, a folder without
            tokenizer, an unsupported architecture, one that needs code of its own, or T5 in
            float16.
    """
    from transformers import AutoConfig, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    if dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; allowed: {', '.join(DTYPES)}")
    path = ASSETS if name == SANDBOX else name
    file: dict[str, str] = {}
    if name.endswith(".gguf"):
        _refuse_without_reader(name)
        path, file = str(Path(name).parent), {"gguf_file": Path(name).name}
    config = _read(name, AutoConfig.from_pretrained, path, **file)
    refuse_unsupported(config, DTYPES[dtype], name)
    if not file:
        _refuse_without_tokenizer(path)
        _refuse_damaged_generation_config(Path(path))
    model = _load_model(name, path, config, attention, file)
    tokenizer = _read(name, AutoTokenizer.from_pretrained, path, **file)
    if file:
        embeddings: Any = model.get_input_embeddings()
        tokenizer = _as_in_file(tokenizer, len(embeddings.weight))
    return model, tokenizer


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


def _refuse_without_reader(name: str) -> None:
    """Refuse a GGUF file that is not there, or that no installed package can read."""
    if not all(find_spec(package) for package in ("gguf", "accelerate")):
        raise ValueError(
            f"backbone {name!r} is a GGUF file, which the packages gguf and accelerate read: "
            "install them with pip install 'prompt-lab[gguf]'"
        )
    if Path(name).parent.is_dir() and not Path(name).is_file():
        raise ValueError(f"no backbone {name!r}: there is no such file in its folder")


def _as_in_file(tokenizer: Any, size: int) -> Any:
    """A GGUF file's tokenizer without the tokens that its class adds beyond the model's tables."""
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    rules = json.loads(tokenizer.backend_tokenizer.to_str())
    rules["added_tokens"] = [one for one in rules["added_tokens"] if one["id"] < size]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(rules)),
        chat_template=tokenizer.chat_template,
        clean_up_tokenization_spaces=False,
        **tokenizer.special_tokens_map,
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
        if name.endswith(".gguf") and "not supported" in reason:
            raise ValueError(
                f"backbone {name!r} is a GGUF file that transformers cannot read ({reason}): take "
                "the model in the Hugging Face layout"
            ) from error
        if isinstance(error, UnpicklingError):  # whose words advise to run the code
            reason = "pickled weights that hold more than tensors"
        raise ValueError(
            f"backbone {name!r} cannot be loaded ({type(error).__name__}: {reason}); if its files "
            "are damaged or incomplete, get them again"
        ) from error


def _load_model(
    name: str, path: str | Path, config: Any, attention: str, file: dict[str, str]
) -> PreTrainedModel:
    """The model in its published dtype, its weights all there; eager where it has no sdpa."""
    from transformers import GgufConfig
    from transformers.utils import logging

    kind = _class_of(config)
    settings: dict[str, Any] = {"config": config, "dtype": "auto", "output_loading_info": True}
    settings["ignore_mismatched_sizes"] = True  # they are refused below, by name
    if file:
        settings |= {**file, "quantization_config": GgufConfig(dequantize=True)}
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
                f"backbone {name!r} {what}: {some(names)}. Trained behind such a model, a prompt "
                "is worth nothing: get the files again, or mend config.json (model_type, sizes, "
                "tie_word_embeddings)"
            )
    if found["unexpected_keys"]:
        warnings.warn(
            f"backbone {name!r} has weights that a {config.model_type} of its config does not use: "
            f"{some(sorted(found['unexpected_keys']))}; is config.json right?",
            stacklevel=2,
        )
    return model


def refuse_not_finite(model: nn.Module, name: str) -> None:
    """Refuse weights that hold NaN or infinity, as a cast to a smaller dtype may leave.

    Raises:
        ValueError: naming the weights.
    """
    ends = {own: weight.detach().aminmax() for own, weight in model.named_parameters()}
    names = [own for own, pair in ends.items() if not all(end.isfinite() for end in pair)]
    if names:
        raise ValueError(
            f"backbone {name!r} has weights that are not finite: {some(names)}; get the files "
            "again, or use another dtype if they are too large for this one"
        )


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
