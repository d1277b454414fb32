"""Prompts in the files of others: PEFT folders (without PEFT), plain tensors, checkpoints.

Written are PEFT prompts of type PROMPT_TUNING with one submodule, whose one tensor is the (N, D)
prompt. Read are PROMPT_TUNING, P_TUNING (whose saved tensor is what its encoder made: the finished
prompt) and MULTITASK_PROMPT_TUNING with S = 1 or 2 submodules: of their (N * S, D) rows the first N
are the prompt. The other rows are never used by the first two; MULTITASK_PROMPT_TUNING puts them in
front of the decoder's input, which this package does not do and warns of. PEFT keeps neither the
prompt's start nor digests of the model, so a prompt that is read has itself as ``init`` and empty
digests. A chat template and its system text stand in the metadata of the tensor's file.

A plain tensor is a file with one (N, D). Nothing is unpickled but tensors and plain values.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from prompt_lab.core.run import Run
from prompt_lab.files.prompts import Prompt, load_prompt
from prompt_lab.files.tensors import FORMAT, read_safetensors, write_atomically

PEFT_VERSION = "0.21.2"
"""The version of PEFT whose keys are written."""

TaskType = Literal["SEQ_2_SEQ_LM", "CAUSAL_LM"]

WEIGHTS = "adapter_model.safetensors"
"""The file of a PEFT folder that holds its tensors."""

_CONFIG, _MULTITASK = "adapter_config.json", "MULTITASK_PROMPT_TUNING"
_FINISHED = ("PROMPT_TUNING", "P_TUNING")
_PICKLES = (".pt", ".pth", ".bin")
_MISFIT = (ValueError, LookupError, TypeError, AttributeError)
_DAMAGE = (UnpicklingError, OSError, RuntimeError, EOFError, *_MISFIT)


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
    The prompt's ``backbone`` becomes the base model; its ``init`` and digests are lost.
    """
    count, width = prompt.prompt.shape
    config = {
        **{"peft_type": "PROMPT_TUNING", "peft_version": PEFT_VERSION, "task_type": task_type},
        **{"base_model_name_or_path": prompt.backbone, "revision": None, "inference_mode": True},
        **{"num_virtual_tokens": count, "token_dim": width, "num_transformer_submodules": 1},
        **{"num_attention_heads": num_attention_heads, "num_layers": num_layers},
        "prompt_tuning_init": "RANDOM",  # any other would tokenise a text when it is loaded
        **dict.fromkeys(("prompt_tuning_init_text", "tokenizer_kwargs", "tokenizer_name_or_path")),
        **dict.fromkeys(("auto_mapping", "modules_to_save")),
    }
    folder = Path(folder)
    _save(folder / WEIGHTS, "prompt_embeddings", prompt)
    write_atomically(folder / "README.md", _model_card(prompt, task_type).encode())
    text = json.dumps(config, indent=2, sort_keys=True)
    write_atomically(folder / _CONFIG, f"{text}\n".encode())


def save_plain(path: Path, prompt: Prompt) -> None:
    """Write one tensor ``prompt_embeds`` (N, D) float32, and which model and task it is for."""
    _save(path, "prompt_embeds", prompt, backbone=prompt.backbone, task=prompt.task)


def _save(path: Path, name: str, prompt: Prompt, **metadata: str) -> None:
    from safetensors.torch import save

    if prompt.template != "plain":
        metadata["template"] = prompt.template
        metadata |= {} if prompt.system is None else {"system": prompt.system}
    values = prompt.prompt.detach().to("cpu", torch.float32, copy=True).contiguous()
    write_atomically(path, save({name: values}, {"format": "pt", **metadata}))


def load_peft(folder: str | Path, task: int | None = None) -> Prompt:
    """Read the prompt of a PEFT folder, of a MULTITASK_PROMPT_TUNING that of a task, from 0.

    (N, D) float32 whatever it is stored in.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: another type than the three prompt tunings, damaged or pickled files, tensors
            that are not as the config says, a task that is missing, not there or not needed.
    """
    folder = Path(folder)
    for name in (_CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            is_pickle = (folder / "adapter_model.bin").is_file()
            more = "; load its pickle with PEFT and save it again with save_pretrained" * is_pickle
            raise FileNotFoundError(f"no {name} in {folder}: not a PEFT prompt folder{more}")
    try:
        config = json.loads((folder / _CONFIG).read_text(encoding="utf-8"))
        tensors, metadata = read_safetensors(folder / WEIGHTS)
        rows, count = _read_rows(config, tensors, task)
    except _MISFIT as error:
        reason = error if isinstance(error, ValueError) else f"{type(error).__name__} {error}"
        raise ValueError(f"{folder}: not a PEFT prompt folder: {reason}") from error
    if config["peft_type"] == _MULTITASK and len(rows) > count:
        warnings.warn(
            f"{folder}: only the encoder's prompt is taken; {_MULTITASK} with two submodules has a "
            "prompt for the decoder too, so answers differ from PEFT's",
            stacklevel=2,
        )
    name = folder.resolve().name + ("" if task is None else f"_{task}")
    metadata["backbone"], metadata["task"] = str(config.get("base_model_name_or_path") or ""), ""
    return _foreign(rows[:count], name, folder, metadata)


def _foreign(tensor: Tensor, name: str, file: Path, metadata: dict[str, str]) -> Prompt:
    """A prompt of which neither its start nor the digests of its model are known."""
    prompt, task = tensor.detach().float().clone(), metadata.get("task", "")
    known: dict[str, Any] = {"start": "prompt", "start_of": task, "start_file": str(file)}
    known |= {name: metadata[name] for name in ("template", "system") if name in metadata}
    made_for = metadata.get("backbone", "")
    return Prompt(prompt, prompt.clone(), name, made_for, "", "", task=task, **known)


def _read_rows(
    config: dict[str, Any], tensors: dict[str, Tensor], task: int | None
) -> tuple[Tensor, int]:
    kind, task_type = config["peft_type"], config.get("task_type")
    if kind not in (*_FINISHED, _MULTITASK) or task_type not in (None, *get_args(TaskType)):
        raise ValueError(
            f"an adapter of type {kind} for {task_type}; only soft prompts in front of the input "
            f"can be read: {', '.join(_FINISHED)} and {_MULTITASK} for "
            f"{' and '.join(get_args(TaskType))}"
        )
    if trained := config.get("modules_to_save"):
        raise ValueError(
            f"beside the prompt, {trained} of the model were trained (modules_to_save): the prompt "
            "alone is of no use"
        )
    if kind != _MULTITASK and task is not None:
        raise ValueError(f"a task index is for {_MULTITASK}, this is {kind}: leave it out")
    count, rows = config["num_virtual_tokens"], tensors["prompt_embeddings"]
    submodules = config.get("num_transformer_submodules") or 1 + (task_type == "SEQ_2_SEQ_LM")
    size = (count * submodules, config.get("token_dim") or rows.shape[-1])
    if rows.shape != size or not (rows.numel() and rows.is_floating_point()) or submodules > 2:
        raise ValueError(
            f"{count} virtual tokens x {submodules} submodules are {size}, but prompt_embeddings "
            f"are {tuple(rows.shape)} of {rows.dtype}"
        )
    if kind != _MULTITASK:
        return rows.float(), count
    left = tensors["prefix_task_cols"]  # (tasks, N * S, rank)
    right = tensors["prefix_task_rows"]  # (tasks, rank, D)
    tasks, _, rank = left.shape
    if (left.shape[1], *right.shape) != (size[0], tasks, rank, size[1]):
        raise ValueError(
            f"prefix_task_cols {tuple(left.shape)} and prefix_task_rows {tuple(right.shape)} do "
            f"not fit prompt_embeddings {size}"
        )
    if task is None or not 0 <= task < tasks:
        given = "no task index is given" if task is None else f"there is no task {task}"
        which = f"import one of 0 to {tasks - 1} with task_index"
        raise ValueError(f"the prompts of {tasks} tasks ({_MULTITASK}), and {given}: {which}")
    return rows.float() * (left[task].float() @ right[task].float()), count


_CHAT = """
It was trained on chats by the template of the model's tokenizer; inputs are made alike, without a
second start token:

```python
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(model.peft_config["default"].base_model_name_or_path)
chat = [{turns}{{"role": "user", "content": "the input"}}]
inputs = tokenizer.apply_chat_template(
    chat, add_generation_prompt=True, enable_thinking=False, return_tensors="pt", return_dict=True
)
```
"""


def _model_card(prompt: Prompt, task_type: TaskType) -> str:
    auto = f"AutoPeftModelFor{'Seq2SeqLM' if task_type == 'SEQ_2_SEQ_LM' else 'CausalLM'}"
    count, width = prompt.prompt.shape
    facts = {"task": prompt.task or None, "few-shot sample": prompt.sample}
    facts["started from"] = f"{prompt.start} {prompt.start_of}".strip() or None
    facts |= {"learning rate": prompt.learning_rate, "steps": prompt.steps}
    facts |= {f"dev {prompt.metric}".strip(): prompt.dev_score}
    facts |= {f"test {prompt.metric}".strip(): prompt.test_score}
    trained = "".join(f"- {label}: {x}\n" for label, x in facts.items() if x is not None)
    system = prompt.system and f'{{"role": "system", "content": {json.dumps(prompt.system)}}}, '
    turns = "" if prompt.system is None else system
    caution = "" if prompt.template == "plain" else _CHAT.format(turns=turns)
    if task_type == "CAUSAL_LM":
        caution += (
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


# ---- plain tensors and checkpoints --------------------------------------------------------------


def read_prompt(source: Path) -> Prompt:
    """The prompt of a prompt file or of a file with one (N, D) tensor.

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
        try:
            found = torch.from_numpy(np.load(source, allow_pickle=False))
        except (ValueError, TypeError, EOFError, OSError) as error:
            raise ValueError(f"{source}: damaged, or not an array of numbers ({error})") from error
    elif source.suffix in _PICKLES:
        found = read_pickle(source)
    else:
        allowed = ", ".join((".safetensors", ".npy", *_PICKLES))
        raise ValueError(f"{source}: a tensor file ends with one of {allowed}, or is a PEFT folder")
    tensors = list(found.values()) if isinstance(found, dict) else [found]
    whole = [one for one in tensors if isinstance(one, Tensor) and one.is_floating_point()]
    if len(tensors) != 1 or not whole or whole[0].dim() != 2 or not whole[0].numel():
        kinds = [
            f"{getattr(one, 'dtype', type(one).__name__)} {list(getattr(one, 'shape', ()))}"
            for one in tensors[:5]
        ]
        raise ValueError(
            f"{source}: a prompt is one tensor of floats (N, D); the file holds {len(tensors)} "
            f"things: {', '.join(kinds)}"
        )
    return _foreign(whole[0], source.stem, source, metadata)


def load_checkpoint(path: str | Path) -> list[Prompt]:
    """The prompt of every run of a checkpoint, in the order of its bank.

    The best one by dev; of a run that was never scored, the one of the last step.

    Raises:
        FileNotFoundError, ValueError: no such file; no checkpoint, damaged, of another method.
    """
    saved = read_pickle(path)
    try:
        state, settings = saved["state_dict"], saved["hyper_parameters"]
        init, best = state["init"], state["keeper.kept_bank"]
        score, step = state["keeper.score"], state["keeper.step"]
        prompt = state.get("prompt", best)  # in a subspace there are codes instead
        backbone, starts = str(settings["backbone"]["name"]), saved["starts"]
        digest, tokenizer = str(saved["backbone_digest"]), str(saved["tokenizer_digest"])
        runs = [Run(**run) for run in saved["runs"]]
        answers = {name: saved[name] for name in ("template", "system")}
        answers["label_score"] = str(settings["label_score"])
        if not len(runs) == len(starts) == len(prompt) == len(best) == len(init):
            raise ValueError(f"{len(runs)} runs, {len(best)} prompts")
    except _MISFIT as error:
        raise ValueError(
            f"{path}: not a checkpoint of PromptTuning of this package "
            f"({type(error).__name__}: {error})"
        ) from error
    prompts = []
    for i, run in enumerate(runs):
        scored = int(step[i]) >= 0
        tensors = {"prompt": (best if scored else prompt)[i].float(), "init": init[i].float()}
        names = ("name", "task", "sample", "init_seed", "learning_rate", "batch_size")
        known = {"backbone": backbone, "backbone_digest": digest, "tokenizer_digest": tokenizer}
        known |= {name: getattr(run, name) for name in names} | starts[i] | answers
        known["steps"] = int(step[i]) if scored else int(saved.get("global_step", 0))
        known["dev_score"] = float(score[i]) if score[i].isfinite() else None
        prompts.append(Prompt(**tensors, **known))
    return prompts


def read_pickle(path: str | Path) -> Any:
    """What ``torch.save`` wrote, if it is made of tensors and plain values alone.

    Raises:
        FileNotFoundError, ValueError: no such file; damaged, of another kind, or to run code.
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
