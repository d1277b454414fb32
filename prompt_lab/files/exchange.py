"""Prompts from and for elsewhere: PEFT folders, plain tensors, Lightning checkpoints.

``export_prompts`` and ``import_prompts`` are the commands ``prompt-lab export`` and ``import``.
Nothing that is there is overwritten, and everything is checked before the first file is written.
An import loads the backbone, so that the prompt file it writes names the weights it is for. Files
from elsewhere do not say for which weights they were made: their width is checked, no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.core.backbone import Backbone
    from prompt_lab.files.prompt_file import Prompt

_PICKLES = (".pt", ".pth", ".bin")


def export_prompts(
    source: str,
    out: str,
    format: Literal["peft", "tensor"] = "peft",
    names: list[str] | None = None,
    backbone: str | None = None,
) -> list[Path]:
    """Write prompts for PEFT, or as plain tensors for servers that take prompt embeddings.

    A single prompt file becomes the PEFT folder ``out``; of a store or a checkpoint each prompt
    becomes the folder ``out/NAME``. As a tensor a prompt becomes ``out/NAME.safetensors`` with one
    tensor ``prompt_embeds`` (N, D) float32; a single prompt file also ``out`` itself, if that ends
    with .safetensors.

    Args:
        source: prompt file, folder of a prompt store, or Lightning checkpoint of a fit.
        out: folder to write to; what is there is not overwritten.
        format: peft for a folder that PEFT loads, tensor for one plain tensor.
        names: only the prompts of these names; all by default.
        backbone: hub id or folder to write as the base model; by default the one of each prompt.

    Returns:
        The folders or files that were written.

    Raises:
        FileNotFoundError: a source or a prompt that is not there.
        ValueError: a source of another kind, a prompt that does not answer alone, a target that
            exists, or a backbone whose config cannot be had or that has another width (PEFT needs
            layers, heads and kind of model).
    """
    from prompt_lab.core.attention_mixture import check_answers_alone

    if format not in ("peft", "tensor"):
        raise ValueError(f"format is {format!r}; allowed: peft, tensor")
    prompts = _chosen(_read_prompts(Path(source)), names, source)
    for prompt in prompts:
        check_answers_alone(source, prompt.made_from)
    if backbone is not None:
        prompts = [replace(prompt, backbone=backbone) for prompt in prompts]
    single = Path(source).is_file() and Path(source).suffix != ".ckpt"
    targets = _targets(prompts, Path(out), format, single)
    if format == "tensor":
        for prompt, target in zip(prompts, targets, strict=True):
            _save_tensor(target, prompt)
        return targets
    from prompt_lab.files.peft_format import save_peft

    kinds = {name: _model_facts(name) for name in {prompt.backbone for prompt in prompts}}
    for prompt in prompts:
        width = kinds[prompt.backbone][0]
        if prompt.prompt.shape[1] != width:
            raise ValueError(
                f"{prompt.name}: prompt of width {prompt.prompt.shape[1]}, but backbone "
                f"{prompt.backbone!r} has hidden size {width}"
            )
    for prompt, target in zip(prompts, targets, strict=True):
        save_peft(target, prompt, *kinds[prompt.backbone][1:])
    return targets


def import_prompts(
    source: str,
    out: str,
    backbone: str | None = None,
    task: str = "",
    task_index: int | None = None,
    name: str | None = None,
) -> Path:
    """Write a prompt from elsewhere as a prompt file.

    A PEFT folder or a plain (N, D) tensor is written for the backbone, which is loaded to check its
    width and to note its digests. Whether the prompt was made for these very weights cannot be
    checked. A prompt file is written again under another name or task; a backbone that is given is
    then compared with it by digest.

    Args:
        source: PEFT folder, prompt file, or a file with one tensor (N, D): .safetensors, .npy, or
            .pt, .pth or .bin by torch.save.
        out: a new .safetensors file, or a prompt store (a folder, made if it is not there).
        backbone: hub id or folder; by default what the source names as its base model.
        task: task of the prompt; by default what the source says.
        task_index: which task of a multitask PEFT folder, counted from 0.
        name: name of the prompt; by default that of the file or folder.

    Returns:
        The prompt file that was written.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a source that holds no single prompt, a backbone that is not known, cannot be
            loaded or does not fit, or a target that exists.
    """
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.files.prompt_file import PromptStore, check_backbone, save_prompt

    prompt = _read_foreign(Path(source), task_index)
    if not prompt.prompt.isfinite().all():
        raise ValueError(f"{source}: the prompt holds numbers that are not finite")
    target = Path(out)
    is_file = target.suffix == ".safetensors"
    prompt = replace(
        prompt,
        name=name or (target.stem if is_file else prompt.name),
        task=task or prompt.task,
    )
    store = PromptStore(target.parent if is_file else target)
    path = target if is_file else store.path(prompt.name)
    if path.exists():
        raise ValueError(f"{path} is there and is not overwritten: choose another name")
    if not is_file and store.folder.exists():
        store.index()  # refuses a folder or file of something else
    if backbone or not prompt.backbone_digest:
        if not (backbone or prompt.backbone):
            raise ValueError(f"{source} does not name its model: give it with backbone")
        model = Backbone.load(backbone or prompt.backbone)
        if prompt.backbone_digest:
            check_backbone(prompt, model, source)
        prompt = adopt(prompt, model, source)
    if is_file:
        save_prompt(path, prompt)
    else:
        store.save([prompt])
    return path


def adopt(prompt: Prompt, backbone: Backbone, where: str | Path) -> Prompt:
    """A prompt without digests as one of this backbone; only its width can be checked.

    Raises:
        ValueError: another width than the backbone's, naming both.
    """
    from prompt_lab.files.prompt_file import check_backbone

    adopted = replace(
        prompt,
        backbone=prompt.backbone or "a model it does not name",
        backbone_digest=backbone.digest,
        tokenizer_digest=backbone.tokenizer_digest,
    )
    check_backbone(adopted, backbone, where)
    return replace(adopted, backbone=backbone.name)


def _read_prompts(source: Path) -> list[Prompt]:
    """All prompts of a prompt file, a store or a checkpoint."""
    from prompt_lab.files.checkpoint import load_checkpoint
    from prompt_lab.files.prompt_file import load_prompt

    if source.suffix == ".ckpt":
        return load_checkpoint(source)
    if not source.is_dir():
        return [load_prompt(source)]
    files = sorted(source.glob("*.safetensors"))
    if not files or (source / "adapter_config.json").exists():
        raise ValueError(
            f"{source} is not a prompt store: give a folder of prompt files, such as the folder "
            "prompts of a run"
        )
    return [replace(load_prompt(path), name=path.stem) for path in files]


def _chosen(prompts: list[Prompt], names: Sequence[str] | None, source: str) -> list[Prompt]:
    """The prompts of the given names, in their order; all where none are given."""
    if names is None:
        return prompts
    known = {prompt.name: prompt for prompt in prompts}
    missing = [name for name in names if name not in known]
    if missing:
        raise FileNotFoundError(
            f"{source} has no prompt {', '.join(missing)}; there are: {', '.join(known)}"
        )
    return [known[name] for name in dict.fromkeys(names)]


def _targets(prompts: list[Prompt], out: Path, format: str, single: bool) -> list[Path]:
    """Where each prompt goes, none of it there yet."""
    from prompt_lab.files.prompt_file import PromptStore

    is_file = out.suffix == ".safetensors"
    if is_file and not (single and format == "tensor"):
        raise ValueError(f"{out}: give a folder; only a single prompt as a tensor becomes a file")
    files = [PromptStore(out).path(prompt.name) for prompt in prompts]  # refuses bad names
    if single:
        targets = [out] if is_file or format == "peft" else files
    else:
        targets = files if format == "tensor" else [out / prompt.name for prompt in prompts]
    there = [str(path) for path in targets if _is_used(path)]
    if there:
        more = f" and {len(there) - 3} more" if len(there) > 3 else ""
        raise ValueError(
            f"{', '.join(there[:3])}{more}: there already and not overwritten; choose "
            "another folder"
        )
    return targets


def _is_used(path: Path) -> bool:
    """Whether a path is a file or a folder that holds something."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _save_tensor(path: Path, prompt: Prompt) -> None:
    """One tensor ``prompt_embeds`` (N, D) float32, and which model and task it is for."""
    from safetensors.torch import save

    from prompt_lab.core.atomic_file import write_atomically

    values = prompt.prompt.float().clone().contiguous()
    metadata = {"format": "pt", "backbone": prompt.backbone, "task": prompt.task}
    write_atomically(path, save({"prompt_embeds": values}, metadata))


def _model_facts(name: str) -> tuple[int, Literal["SEQ_2_SEQ_LM", "CAUSAL_LM"], int, int]:
    """Hidden size, PEFT's task type, layers and heads of a model, from its config alone."""
    from transformers import AutoConfig

    from prompt_lab.sandbox import ASSETS, SANDBOX

    try:
        path = ASSETS if name == SANDBOX else name
        config: Any = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"PEFT's config needs layers and heads of backbone {name!r}, whose config cannot be "
            f"had ({reason}): give its folder or hub id with backbone"
        ) from error
    kind = "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"
    return config.hidden_size, kind, config.num_hidden_layers, config.num_attention_heads


def _read_foreign(source: Path, task_index: int | None) -> Prompt:
    """The one prompt of a PEFT folder, a prompt file or a tensor file."""
    from prompt_lab.files.peft_format import is_peft, load_peft

    if source.is_dir():
        return load_peft(source, task_index)
    if task_index is not None:
        raise ValueError(f"{source}: a task index is for multitask PEFT folders: leave it out")
    if source.name.startswith("adapter_model.") and is_peft(source.parent):
        raise ValueError(f"{source} is part of a PEFT folder: give the folder {source.parent}")
    if not source.is_file():
        raise FileNotFoundError(f"no PEFT folder, prompt file or tensor file {source}")
    return _read_tensor(source)


def _read_tensor(source: Path) -> Prompt:
    """The prompt of a prompt file or of a file with one (N, D) tensor."""
    from prompt_lab.files.checkpoint import read_pickle
    from prompt_lab.files.peft_format import read_safetensors
    from prompt_lab.files.prompt_file import Prompt, load_prompt

    metadata: dict[str, str] = {}
    if source.suffix == ".safetensors":
        found, metadata = read_safetensors(source)
        if metadata.get("format") == "prompt_lab":
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
    """The array of a .npy file, never unpickled."""
    import numpy as np
    import torch

    try:
        return torch.from_numpy(np.load(source, allow_pickle=False))
    except (ValueError, TypeError, EOFError, OSError) as error:
        raise ValueError(f"{source}: damaged, or not an array of numbers ({error})") from error


def _only_matrix(found: Any, source: Path) -> Tensor:
    """The (N, D) float32 tensor of a file that holds just one."""
    import torch

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
