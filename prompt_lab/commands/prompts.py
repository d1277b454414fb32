"""The commands ``prompt-lab export`` and ``import``: prompts for and from elsewhere.

Nothing that is there is overwritten, and everything is checked before the first file is written.
An import loads the backbone, so that the prompt file it writes names the weights it is for. Files
from elsewhere do not say for which weights they were made: their width is checked, no more.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from prompt_lab.files.prompts import Prompt


def export_prompts(
    source: str,
    out: str,
    format: Literal["peft", "tensor"] = "peft",
    names: list[str] | None = None,
    backbone: str | None = None,
) -> list[Path]:
    """Write prompts for PEFT, or as plain tensors for servers that take prompt embeddings.

    A single prompt file becomes the PEFT folder ``out``; of a store, a fit or a checkpoint each
    prompt becomes the folder ``out/NAME``. As a tensor a prompt becomes ``out/NAME.safetensors``
    with one tensor ``prompt_embeds`` (N, D) float32; a single prompt file also ``out`` itself, if
    that ends with .safetensors.

    Args:
        source: prompt file, prompt store, folder of a fit, PEFT folder, or checkpoint of a fit.
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
    from prompt_lab.files.peft import save_peft, save_plain
    from prompt_lab.files.prompts import check_answers_alone, find_prompts, is_single

    if format not in ("peft", "tensor"):
        raise ValueError(f"format is {format!r}; allowed: peft, tensor")
    single = is_single(source)
    found = find_prompts(source)
    known = {one.metadata["name"] if single else one.stem: one for one in found}
    missing = [name for name in names or () if name not in known]
    if missing:
        raise FileNotFoundError(
            f"{source} has no prompt {', '.join(missing)}; there are: {', '.join(known)}"
        )
    chosen = dict.fromkeys(known if names is None else names)
    prompts = [replace(known[name].load(), name=name) for name in chosen]
    for prompt in prompts:
        check_answers_alone(source, prompt.made_from)
    if backbone is not None:
        prompts = [replace(prompt, backbone=backbone) for prompt in prompts]
    targets = _targets(prompts, Path(out), format, single)
    if format == "tensor":
        for prompt, target in zip(prompts, targets, strict=True):
            save_plain(target, prompt)
        return targets
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
    from prompt_lab.files.prompts import PromptStore, check_prompt, save_prompt

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
        check_prompt(prompt, model, source)
        prompt = replace(
            prompt,
            backbone=model.name,
            backbone_digest=model.digest,
            tokenizer_digest=model.tokenizer_digest,
        )
    if is_file:
        save_prompt(path, prompt)
    else:
        store.save([prompt])
    return path


def _targets(prompts: list[Prompt], out: Path, format: str, single: bool) -> list[Path]:
    from prompt_lab.files.prompts import PromptStore

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
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _model_facts(name: str) -> tuple[int, Literal["SEQ_2_SEQ_LM", "CAUSAL_LM"], int, int]:
    """Hidden size, PEFT's task type, layers and heads, from the config alone."""
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
    from prompt_lab.files.peft import is_peft, load_peft, read_prompt

    if source.is_dir():
        return load_peft(source, task_index)
    if task_index is not None:
        raise ValueError(f"{source}: a task index is for multitask PEFT folders: leave it out")
    if source.name.startswith("adapter_model.") and is_peft(source.parent):
        raise ValueError(f"{source} is part of a PEFT folder: give the folder {source.parent}")
    if not source.is_file():
        raise FileNotFoundError(f"no PEFT folder, prompt file or tensor file {source}")
    return read_prompt(source)
