"""Prompts in the files of others: PEFT folders (without PEFT), plain tensors, checkpoints.

A PEFT folder holds ``adapter_config.json`` and ``adapter_model.safetensors``. Written are prompts
of type PROMPT_TUNING with one submodule, whose one tensor is the (N, D) prompt; PEFT puts it where
this package does, in front of the input embeddings (of the encoder, where there is one). Read are
PROMPT_TUNING and MULTITASK_PROMPT_TUNING with S = 1 or 2 submodules: of their (N * S, D) rows the
first N are the prompt. The other rows are never used by PROMPT_TUNING; MULTITASK_PROMPT_TUNING
puts them in front of the decoder's input, which this package does not do and warns of.

PEFT keeps neither the prompt's start nor digests of the model, so a prompt that is read has
itself as ``init`` and empty digests. LoRA, prefixes and other types are refused.

A plain tensor is a file with one (N, D). A checkpoint of ``PromptTuning`` holds the bank of a fit,
its runs, and the digests of backbone and tokenizer. Nothing is unpickled but tensors and plain
values.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch
from torch import Tensor

from prompt_lab.core.run import Run
from prompt_lab.files.prompts import Prompt, load_prompt
from prompt_lab.files.tensors import FORMAT, write_atomically

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose keys are written."""

TaskType = Literal["SEQ_2_SEQ_LM", "CAUSAL_LM"]

WEIGHTS = "adapter_model.safetensors"
"""The file of a PEFT folder that holds its tensors."""

_CONFIG, _PICKLE = "adapter_config.json", "adapter_model.bin"
_MULTITASK = "MULTITASK_PROMPT_TUNING"
_TYPES = ("PROMPT_TUNING", _MULTITASK)
_TASK_TYPES = ("SEQ_2_SEQ_LM", "CAUSAL_LM")
_PICKLES = (".pt", ".pth", ".bin")
_BANK = ("init", "keeper.kept_bank", "keeper.score", "keeper.step")
_DAMAGE = (UnpicklingError, OSError, RuntimeError, EOFError)
_DAMAGE += (ValueError, LookupError, TypeError, AttributeError)


def is_peft(path: str | Path) -> bool:
    """Whether a path is a folder with an ``adapter_config.json``."""
    return (Path(path) / _CONFIG).is_file()


def save_peft(
    folder: str | Path,
    prompt: Prompt,
    task_type: TaskType,
    num_layers: int,
    num_attention_heads: int,
) -> None:
    """Write a prompt as a PEFT folder, which ``PeftModel.from_pretrained`` loads.

    Three files, each whole or not at all, the config last: without it there is no PEFT folder.
    The prompt's ``init`` and digests are lost.

    Args:
        folder: made where it is not there.
        prompt: (N, D); its ``backbone`` becomes the base model.
        task_type: ``SEQ_2_SEQ_LM`` for encoder-decoder models, else ``CAUSAL_LM``.
        num_layers: layers of the model.
        num_attention_heads: attention heads of its layers.

    Raises:
        ValueError: a prompt that is not (N, D), or another task type.
    """
    from safetensors.torch import save

    if task_type not in _TASK_TYPES:
        raise ValueError(f"task_type is {task_type!r}; allowed: {', '.join(_TASK_TYPES)}")
    if prompt.prompt.dim() != 2:
        raise ValueError(f"prompt {tuple(prompt.prompt.shape)} must be (N, D)")
    count, width = prompt.prompt.shape
    config = {
        "auto_mapping": None,
        "base_model_name_or_path": prompt.backbone,
        "inference_mode": True,
        "modules_to_save": None,
        "num_attention_heads": num_attention_heads,
        "num_layers": num_layers,
        "num_transformer_submodules": 1,
        "num_virtual_tokens": count,
        "peft_type": "PROMPT_TUNING",
        "peft_version": PEFT_VERSION,
        "prompt_tuning_init": "RANDOM",  # any other would tokenise a text when it is loaded
        "prompt_tuning_init_text": None,
        "revision": None,
        "task_type": task_type,
        "token_dim": width,
        "tokenizer_kwargs": None,
        "tokenizer_name_or_path": None,
    }
    values = prompt.prompt.detach().to("cpu", torch.float32, copy=True).contiguous()
    folder = Path(folder)
    write_atomically(folder / WEIGHTS, save({"prompt_embeddings": values}, {"format": "pt"}))
    write_atomically(folder / "README.md", _model_card(prompt, task_type).encode())
    write_atomically(folder / _CONFIG, (json.dumps(config, indent=2) + "\n").encode())


def load_peft(folder: str | Path, task: int | None = None) -> Prompt:
    """Read the prompt of a PEFT folder; (N, D) float32 whatever it is stored in.

    The prompt names the base model that the config names, and no digests: whether it was made for
    the weights at hand cannot be told from the files.

    Args:
        folder: with ``adapter_config.json`` and ``adapter_model.safetensors``.
        task: which task's prompt of a MULTITASK_PROMPT_TUNING, counted from 0.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: another type than the two prompt tunings, damaged or pickled files, tensors
            that are not as the config says, a task that is missing, not there or not needed.
    """
    folder = Path(folder)
    config = _read_config(folder / _CONFIG)
    kind = config["peft_type"]
    count, submodules, width = _sizes(folder, config)
    tensors = _read_weights(folder)
    rows = _tensor(folder, tensors, "prompt_embeddings").float()
    shape = tuple(rows.shape)
    if len(shape) != 2 or shape != (count * submodules, width or shape[1]):
        raise ValueError(
            f"{folder}: the config says {count} virtual tokens x {submodules} submodules of width "
            f"{width}, but prompt_embeddings has shape {shape}"
        )
    if kind == _MULTITASK:
        rows = rows * _task_factors(folder, tensors, shape, task)
        if submodules > 1:
            warnings.warn(
                f"{folder}: only the encoder's prompt is taken; {kind} with {submodules} "
                "submodules has a prompt for the decoder too, so answers differ from PEFT's",
                stacklevel=2,
            )
    elif task is not None:
        raise ValueError(
            f"{folder}: a task index is for {_MULTITASK}, this is {kind}: leave it out"
        )
    prompt = rows[:count].clone()
    return Prompt(
        prompt=prompt,
        init=prompt.clone(),
        name=folder.resolve().name + ("" if task is None else f"_{task}"),
        backbone=str(config.get("base_model_name_or_path") or ""),
        backbone_digest="",
        tokenizer_digest="",
        start="prompt",
        start_file=str(folder),
    )


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a safetensors file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, or not a safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error


def _read_config(path: Path) -> dict[str, Any]:
    """The config of a PEFT folder, its type checked."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}: it is not a PEFT folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged, not JSON ({error})") from error
    if not isinstance(config, dict) or "peft_type" not in config:
        raise ValueError(f"{path}: not a config of PEFT, which names a peft_type")
    kind = config["peft_type"]
    if kind not in _TYPES:
        raise ValueError(
            f"{path.parent}: a PEFT adapter of type {kind}; only soft prompts in front of the "
            f"input can be read: {', '.join(_TYPES)}"
        )
    task_type = config.get("task_type")
    if task_type not in (None, *_TASK_TYPES):
        raise ValueError(
            f"{path.parent}: a PEFT prompt for {task_type}; allowed: {', '.join(_TASK_TYPES)}"
        )
    if config.get("modules_to_save"):
        raise ValueError(
            f"{path.parent}: beside the prompt, {config['modules_to_save']} of the model were "
            "trained (modules_to_save): the prompt alone is of no use"
        )
    return config


def _sizes(folder: Path, config: dict[str, Any]) -> tuple[int, int, int | None]:
    """N, S, and D where the config has it."""
    default = 2 if config.get("task_type") == "SEQ_2_SEQ_LM" else 1
    count, width = config.get("num_virtual_tokens"), config.get("token_dim")
    submodules = config.get("num_transformer_submodules") or default
    for name, value, allowed in (
        ("num_virtual_tokens", count, "1 or more"),
        ("num_transformer_submodules", submodules, "1 or 2"),
        ("token_dim", 1 if width is None else width, "1 or more"),
    ):
        if type(value) is not int or value < 1 or (allowed == "1 or 2" and value > 2):
            raise ValueError(f"{folder / _CONFIG}: {name} is {value!r}; allowed: {allowed}")
    return int(count or 0), int(submodules), width


def _read_weights(folder: Path) -> dict[str, Tensor]:
    """The tensors of a PEFT folder."""
    path = folder / WEIGHTS
    if not path.is_file() and (folder / _PICKLE).is_file():
        raise ValueError(
            f"{folder / _PICKLE} is a pickle, which may run code when it is read: load it with "
            f"PEFT and save it again with save_pretrained, which writes {WEIGHTS}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"no {WEIGHTS} in {folder}, only its config")
    return read_safetensors(path)[0]


def _tensor(folder: Path, tensors: dict[str, Tensor], name: str) -> Tensor:
    """A tensor of floats that must be there."""
    if name not in tensors or not tensors[name].is_floating_point():
        raise ValueError(
            f"{folder / WEIGHTS}: no tensor {name!r} of floats; there are {sorted(tensors)}"
        )
    return tensors[name]


def _task_factors(
    folder: Path, tensors: dict[str, Tensor], shape: tuple[int, ...], task: int | None
) -> Tensor:
    """What the shared prompt is multiplied with for one task: (N * S, D)."""
    left = _tensor(folder, tensors, "prefix_task_cols")  # (tasks, N * S, rank)
    right = _tensor(folder, tensors, "prefix_task_rows")  # (tasks, rank, D)
    count, _, rank = left.shape if left.dim() == 3 else (0, 0, 0)
    if left.shape != (count, shape[0], rank) or right.shape != (count, rank, shape[1]):
        raise ValueError(
            f"{folder}: prefix_task_cols {tuple(left.shape)} and prefix_task_rows "
            f"{tuple(right.shape)} do not fit prompt_embeddings {shape}"
        )
    if task is None or not 0 <= task < count:
        given = "no task index is given" if task is None else f"there is no task {task}"
        raise ValueError(
            f"{folder}: the prompts of {count} tasks ({_MULTITASK}), and {given}: import one of "
            f"0 to {count - 1} with task_index"
        )
    return left[task].float() @ right[task].float()


def _model_card(prompt: Prompt, task_type: TaskType) -> str:
    """A short README for the folder."""
    auto = (
        "AutoPeftModelForSeq2SeqLM" if task_type == "SEQ_2_SEQ_LM" else "AutoPeftModelForCausalLM"
    )
    count, width = prompt.prompt.shape
    trained = "".join(
        f"- {label}: {value}\n"
        for label, value in (
            ("task", prompt.task or None),
            ("few-shot sample", prompt.sample),
            ("started from", " ".join(filter(None, (prompt.start, prompt.start_of))) or None),
            ("learning rate", prompt.learning_rate),
            ("steps", prompt.steps),
            (f"dev {prompt.metric}".strip(), prompt.dev_score),
            (f"test {prompt.metric}".strip(), prompt.test_score),
        )
        if value is not None
    )
    caution = ""
    if task_type == "CAUSAL_LM":
        caution = (
            "\nPEFT puts the prompt in front of the padding: inputs that are padded on\n"
            "the left get other answers than unpadded ones. With transformers 5.24, PEFT 0.21.2\n"
            "repeats the prompt at every token that it generates from a cache: give `generate`\n"
            "the argument `use_cache=False`, or use transformers 5.23.\n"
        )
    return f"""---
base_model: {json.dumps(prompt.backbone)}
library_name: peft
---

# {prompt.name}

A soft prompt of {count} virtual tokens of width {width} for `{prompt.backbone}`, made with
prompt_lab.

{trained}
```python
from peft import {auto}
model = {auto}.from_pretrained("this folder")
```
{caution}"""


# ---- plain tensors -------------------------------------------------------------------------------


def save_plain(path: Path, prompt: Prompt) -> None:
    """Write one tensor ``prompt_embeds`` (N, D) float32, and which model and task it is for."""
    from safetensors.torch import save

    values = prompt.prompt.float().clone().contiguous()
    metadata = {"format": "pt", "backbone": prompt.backbone, "task": prompt.task}
    write_atomically(path, save({"prompt_embeds": values}, metadata))


def read_prompt(source: Path) -> Prompt:
    """The prompt of a prompt file or of a file with one (N, D) tensor.

    Args:
        source: .safetensors, .npy, or .pt, .pth or .bin by torch.save.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or not one tensor of floats (N, D).
    """
    metadata: dict[str, str] = {}
    if source.suffix == ".safetensors":
        found, metadata = read_safetensors(source)
        if metadata.get("format") == FORMAT:
            return load_prompt(source)
    elif source.suffix == ".npy":
        found = _read_numpy(source)
    elif source.suffix in _PICKLES:
        found = read_pickle(source)
    else:
        allowed = ", ".join((".safetensors", ".npy", *_PICKLES))
        raise ValueError(f"{source}: a tensor file ends with one of {allowed}, or is a PEFT folder")
    prompt = _only_matrix(found, source)
    return Prompt(
        prompt=prompt,
        init=prompt.clone(),
        name=source.stem,
        backbone=metadata.get("backbone", ""),
        backbone_digest="",
        tokenizer_digest="",
        task=metadata.get("task", ""),
        start="prompt",
        start_of=metadata.get("task", ""),
        start_file=str(source),
    )


def _read_numpy(source: Path) -> Tensor:
    import numpy as np

    try:
        return torch.from_numpy(np.load(source, allow_pickle=False))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"{source}: damaged, or not an array of numbers ({error})") from error


def _only_matrix(found: Any, source: Path) -> Tensor:
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    tensor = tensors[0] if len(tensors) == 1 else None
    if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or not tensor.numel():
        shapes = [list(getattr(item, "shape", ())) for item in tensors]
        raise ValueError(
            f"{source}: a prompt is one tensor (N, D); the file holds {len(tensors)} things of "
            f"shapes {shapes[:5]}"
        )
    if not tensor.is_floating_point():
        raise ValueError(f"{source}: a prompt is a tensor of floats, this one is {tensor.dtype}")
    return tensor.detach().float().clone()


# ---- checkpoints ---------------------------------------------------------------------------------


def load_checkpoint(path: str | Path) -> list[Prompt]:
    """The prompt of every run of a checkpoint, in the order of its bank.

    The best one by dev; of a run that was never scored, the one of the last step.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a checkpoint, damaged, or of another method.
    """
    saved = read_pickle(path)
    saved = saved if isinstance(saved, dict) else {}
    try:
        state, settings = saved["state_dict"], saved["hyper_parameters"]
        init, best, score, step = (state[name] for name in _BANK)
        prompt = state.get("prompt", best)  # in a subspace there are codes instead
        backbone, starts = str(settings["backbone"]["name"]), saved["starts"]
        digest, tokenizer = str(saved["backbone_digest"]), str(saved["tokenizer_digest"])
        runs = [Run(**run) for run in saved["runs"]]
    except (KeyError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise ValueError(
            f"{path}: not a checkpoint of PromptTuning of this package "
            f"({type(error).__name__}: {error})"
        ) from error
    if not len(runs) == len(starts) == len(prompt) == len(best) == len(init):
        raise ValueError(f"{path}: damaged checkpoint: {len(runs)} runs, {len(best)} prompts")
    prompts = []
    for i, run in enumerate(runs):
        scored = int(step[i]) >= 0
        prompts.append(
            Prompt(
                prompt=(best if scored else prompt)[i].float(),
                init=init[i].float(),
                name=run.name,
                backbone=backbone,
                backbone_digest=digest,
                tokenizer_digest=tokenizer,
                task=run.task,
                sample=run.sample,
                **starts[i],
                init_seed=run.init_seed,
                learning_rate=run.learning_rate,
                batch_size=run.batch_size,
                steps=int(step[i]) if scored else int(saved.get("global_step", 0)),
                dev_score=float(score[i]) if score[i].isfinite() else None,
            )
        )
    return prompts


def read_pickle(path: str | Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values alone.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, another kind of file, or one that would run code.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        raise ValueError(
            f"{path}: not a file of tensors and plain values by torch.save, or damaged "
            f"({type(error).__name__}): give another file"
        ) from error
