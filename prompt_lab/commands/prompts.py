"""The commands ``export``, ``import`` and ``vectors show | compare | apply | mix``.

``vectors apply`` makes sums of task prompt vectors (Belanec et al. 2024, arXiv 2408.01119), ``mix``
a start for a target task from source prompts (SPoT, Vu et al. 2022, arXiv 2110.07904, section 3).
Everything is checked before the first file is written, and nothing that is there is overwritten.
Prompts combine by the digests in their files; ``import`` alone loads a backbone, to note these.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from prompt_lab.core.text import check_template
from prompt_lab.core.vectors import expression_name, parse_expression, shortened
from prompt_lab.data.partitions import expand_sets
from prompt_lab.files.prompts import (
    FoundPrompt,
    Prompt,
    PromptStore,
    best_found,
    best_prompts,
    check_prompt,
    find_prompts,
    is_single,
    save_prompt,
)
from prompt_lab.files.vectors import check_compatible, combine, common_init, complete, find_vectors

LONGEST_NAME = 200
"""Characters in a file's name; what is longer is cut there and gets a digest."""

OF_TASK = ("labels", "metric")
ANSWERS = (
    *("decoding", "max_new_tokens", "num_beams", "max_input_length", "truncation_side"),
    *("label_score", "template", "system"),
)
"""Fields that say how a prompt answers; the first two belong to its task."""


def export_prompts(
    source: str,
    out: str,
    format: Literal["peft", "tensor"] = "peft",
    names: list[str] | None = None,
    backbone: str | None = None,
) -> list[Path]:
    """Write prompts for PEFT, or as plain tensors for servers that take prompt embeddings.

    A single prompt file becomes the PEFT folder OUT; of a store, a fit or a checkpoint each prompt
    becomes the folder OUT/NAME. As a tensor a prompt becomes OUT/NAME.safetensors with one tensor
    prompt_embeds (N, D) float32; a single prompt file also OUT itself, if that ends with
    .safetensors.

    Args:
        source: prompt file, prompt store, folder of a fit, PEFT folder, or checkpoint of a fit.
        out: folder to write to; what is there is not overwritten.
        format: peft for a folder that PEFT loads, tensor for one plain tensor.
        names: only the prompts of these names; all by default.
        backbone: hub id or folder to write as the base model; by default the one of each prompt.

    Raises:
        FileNotFoundError: a source or a prompt that is not there.
        ValueError: a source of another kind, a prompt that does not answer alone, a target that
            exists, or a backbone whose config cannot be had or that has another width.
    """
    from prompt_lab.files.peft import save_peft, save_plain

    single = is_single(source)
    known = {one.metadata["name"] if single else one.stem: one for one in find_prompts(source)}
    chosen = dict.fromkeys(known if names is None else names)
    if missing := [name for name in chosen if name not in known]:
        raise FileNotFoundError(
            f"{source} has no prompt {', '.join(missing)}; there are: {', '.join(known)}"
        )
    for name in chosen:
        known[name].check_answers_alone()
    told = {} if backbone is None else {"backbone": backbone}
    prompts = [replace(known[name].load(), name=name, **told) for name in chosen]
    targets = _targets(out, list(chosen), single, as_tensor=format == "tensor")
    if format == "tensor":
        for prompt, target in zip(prompts, targets, strict=True):
            save_plain(target, prompt)
        return targets
    facts = {name: _model_facts(name) for name in {prompt.backbone for prompt in prompts}}
    for prompt in prompts:
        width, needed = prompt.prompt.shape[1], facts[prompt.backbone][0]
        if width != needed:
            raise ValueError(
                f"{prompt.name}: prompt of width {width}, but backbone {prompt.backbone!r} has "
                f"hidden size {needed}"
            )
    for prompt, target in zip(prompts, targets, strict=True):
        save_peft(target, prompt, *facts[prompt.backbone][1:])
    return targets


def _targets(out: str, names: Sequence[str], single: bool, as_tensor: bool) -> list[Path]:
    folder, is_file = Path(out), out.endswith(".safetensors")
    if is_file and not (single and as_tensor):
        raise ValueError(f"{out}: give a folder; only a single prompt as a tensor becomes a file")
    targets = [PromptStore(folder).path(name) for name in names]  # refuses bad names
    if single and (is_file or not as_tensor):
        targets = [folder]
    elif not as_tensor:
        targets = [target.with_suffix("") for target in targets]
    for target in targets:
        if any(target.iterdir()) if target.is_dir() else target.exists():
            raise ValueError(f"{target}: there already and not overwritten; choose another folder")
    return targets


def import_prompts(
    source: str,
    out: str,
    backbone: str | None = None,
    task: str = "",
    task_index: int | None = None,
    name: str | None = None,
    template: Literal["plain", "chat"] | None = None,
    system: str | None = None,
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
        template: chat for a prompt that was trained on chats by the tokenizer's template; by
            default what the source says, or else plain.
        system: system text of those chats.

    Raises:
        FileNotFoundError: no such source.
        ValueError: a source that holds no single prompt, a backbone that is not known, cannot be
            loaded or does not fit, or a target that exists.
    """
    prompt, target = _from_elsewhere(source, task_index), Path(out)
    is_file = target.suffix == ".safetensors"
    name = name or (target.stem if is_file else prompt.name)
    prompt = replace(prompt, name=name, task=task or prompt.task)
    if template is not None or system is not None:
        frame = {"template": template or prompt.template, "system": system}
        check_template(**frame)
        prompt = replace(prompt, **frame)
    path = target if is_file else PromptStore(target).path(name)
    if path.exists():
        raise ValueError(f"{path} is there and is not overwritten: choose another name")
    store = None if is_file else _open_store(out)
    if backbone or not prompt.backbone_digest:
        prompt = _of_backbone(prompt, backbone or prompt.backbone, source)
    if store is None:
        save_prompt(path, prompt)
    else:
        store.save([prompt])
    return path


def _from_elsewhere(source: str, task_index: int | None) -> Prompt:
    from prompt_lab.files.peft import is_peft, load_peft, read_prompt

    place = Path(source)
    if place.name.startswith("adapter_model.") and is_peft(place.parent):
        raise ValueError(f"{source} is part of a PEFT folder: give the folder {place.parent}")
    if task_index is not None and not place.is_dir():
        raise ValueError(f"{source}: a task index is for multitask PEFT folders: leave it out")
    if not place.exists():
        raise FileNotFoundError(f"no PEFT folder, prompt file or tensor file {source}")
    prompt = load_peft(place, task_index) if place.is_dir() else read_prompt(place)
    if not prompt.prompt.isfinite().all():
        raise ValueError(f"{source}: the prompt holds numbers that are not finite")
    return prompt


def _of_backbone(prompt: Prompt, name: str, source: str) -> Prompt:
    from prompt_lab.core.backbone import Backbone

    if not name:
        raise ValueError(f"{source} does not name its model: give it with backbone")
    model = Backbone.load(name)
    check_prompt(prompt, model, source)
    model.frame(prompt.template, prompt.system)  # refuses a template that is not there
    digests = {"backbone_digest": model.digest, "tokenizer_digest": model.tokenizer_digest}
    return replace(prompt, backbone=model.name, **digests)


def _model_facts(name: str) -> tuple[int, Literal["SEQ_2_SEQ_LM", "CAUSAL_LM"], int, int]:
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


def show_vectors(prompts: list[str]) -> None:
    """List the task prompt vectors of prompt stores, one line for each.

    A line has the task, sample and seed, the norm of the vector and of the initial prompt (both
    Frobenius), their ratio, and the cosine between the vector and the mean of those of the other
    tasks of the same sample and seed. A - stands where there is none: a single task, or a vector of
    norm 0.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints.

    Raises:
        FileNotFoundError, ValueError: no tuned prompts there, or such as do not combine.
    """
    import pandas as pd
    import torch

    groups = find_vectors(prompts)
    check_compatible(*(one for own in groups.values() for one in own.values()))
    rows = []
    for (sample, seed), own in groups.items():
        for task, one in own.items():
            others = [other.vector for name, other in own.items() if name != task]
            vector, init = one.vector, one.prompt.init.double().norm()
            mean = torch.stack(others or [0 * vector]).mean(0)
            cosine = (vector * mean).sum() / (vector.norm() * mean.norm())  # NaN where one is 0
            ratio = vector.norm() / init if init > 0 else torch.tensor(math.nan)
            numbers = (vector.norm(), init, ratio, cosine)
            rows.append((task, sample, seed, *(number.item() for number in numbers)))
    names = ["task", "sample", "seed", "vector", "init", "ratio", "cosine to others"]
    table = pd.DataFrame(rows, columns=names).astype({"sample": "Int64", "seed": "Int64"})
    table = table.sort_values("task", kind="stable").astype(object).where(table.notna(), "-")
    print(table.to_string(index=False, float_format="{:.4g}".format))


def compare_vectors(prompts: list[str], *, out: str) -> list[Path]:
    """Cosines of tuned prompts, and of task prompt vectors, between tasks and initial prompts.

    Writes report.md and report.html with similarities.csv (mean, standard deviation and number of
    pairs), norms.csv (norms of vectors and initial prompts, and their ratio), and four heat maps
    (PNG, SVG): prompts and vectors, from different initial prompts and from one and the same. An
    entry is the mean over all such pairs of few-shot samples in common; on the diagonal over pairs
    of two prompts of a task. Prints both tables.

    Of a grid the prompt of best dev score stands for its task, sample and seed. A prompt that is
    its own initial prompt has no vector, and is named and left out there.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with tuned prompts of
            several tasks or seeds.
        out: folder for pictures and tables.

    Raises:
        FileNotFoundError, ValueError, NotADirectoryError: what lacks or is wrong, in a sentence.
    """
    from prompt_lab.analysis.sections import check_folder, markdown, write_report
    from prompt_lab.analysis.vectors import cosine_sections

    folder = check_folder(out)
    groups: dict[int | None, list[FoundPrompt]] = {}
    for (sample, _), own in find_vectors(prompts).items():
        groups.setdefault(sample, []).extend(own.values())
    check_compatible(*(found for own in groups.values() for found in own))
    if max(map(len, groups.values())) < 2:
        raise ValueError(
            f"only one tuned prompt of each sample in {', '.join(prompts)}: nothing to compare; "
            "tune several tasks, or several model.init_seed"
        )
    sections = cosine_sections(groups)
    files = write_report(sections, folder, "How alike prompts and vectors are")
    for section in sections:
        print(f"{section.title}\n\n{section.legend}\n\n{markdown(section.shown)}\n")
    return files


def apply_vectors(
    expression: str,
    *,
    prompts: list[str],
    out: str,
    init: str | None = None,
    scale: float = 1.0,
    task: str | None = None,
) -> list[Path]:
    """Write the prompts init + scale * EXPRESSION, EXPRESSION being a sum of task prompt vectors.

    An expression names tasks: 'qnli + mnli', 'qnli - 0.5 mnli', '- sst2'. A minus needs spaces
    around it, as names may hold one. Names that do not begin with a letter, or hold other marks
    than - . _ go in quotes. '0 * qnli' is the bare initial prompt.

    It is evaluated for every sample and seed that all its tasks have; others are named and left
    out. In each file, init is the initial prompt it was applied to, and made_from tells the
    expression, the scale, and the files that took part with their digests. It answers as the
    prompts of its tasks where they agree. Nothing is overwritten.

    Args:
        expression: sum of vectors, by the names of their tasks.
        prompts: prompt stores, folders of fits, prompt files or checkpoints with tuned prompts.
        out: prompt store to write to; made if it is not there.
        init: what to apply to: the initial prompt that a prompt file was tuned from, or every
            different one of a prompt store, fit or checkpoint; the prompt itself of a file that was
            made to start from, as by MetaPrompt. By default the initial prompt that the vectors
            share.
        scale: factor of the whole expression, the paper's lambda.
        task: task that the written prompts are for; by default the one of the expression, and none
            where there are several.

    Raises:
        FileNotFoundError, ValueError: what lacks, does not combine or is there already.
    """
    factors = parse_expression(expression)
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}: give a finite number")
    if task is None:
        task = next(iter(factors)) if len(factors) == 1 else ""
    store = _open_store(out)
    groups, left_out = complete(find_vectors(prompts), list(factors), prompts)
    if left_out:
        print(f"prompt-lab: left out: {left_out}", file=sys.stderr)
    given: dict[bytes, FoundPrompt] = {}  # the first of every different initial prompt
    for one in [] if init is None else find_prompts(init):
        given.setdefault(one.start.numpy().tobytes(), one)
    vectors = [one for own in groups.values() for one in own.values()]
    check_compatible(*vectors, *given.values())
    _warn_of_vectors(vectors)
    advice, made = "name one to apply to with --init", []
    asked = {"expression": " ".join(expression.split()), "scale": scale, "task": task}
    for (sample, seed), own in groups.items():
        stem = expression_name(factors, scale)
        stem += ("" if sample is None else f"_{sample}") + ("" if seed is None else f"_seed{seed}")
        answers = _answers(task, [one.prompt for one in own.values()])
        for base in given.values() or [common_init(list(own.values()), advice)]:
            name = shortened(f"{stem}_on_{base.stem}", LONGEST_NAME) if given else stem
            made.append(combine(name, factors, own, base, **asked, **answers))
    return _save(store, made)


def _warn_of_vectors(vectors: Sequence[FoundPrompt]) -> None:
    if len({(one.prompt.template, one.prompt.system) for one in vectors}) > 1:
        print(
            "prompt-lab: the prompts were tuned with different templates or system texts; a sum "
            "answers by that of its own task's prompt, or by plain rows",
            file=sys.stderr,
        )
    for one in vectors:
        if one.prompt.prompt.equal(one.prompt.init):
            print(f"prompt-lab: {one.where} adds nothing: it is its own init", file=sys.stderr)


def _answers(task: str, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """How a sum answers: as the task's own prompt, or where all prompts agree.

    Labels and metric of a task that has no part in the sum are not known here.
    """
    own = [prompt for prompt in prompts if prompt.task == task] or prompts
    names = ANSWERS if own is prompts and task else (*ANSWERS, *OF_TASK)
    values = {name: [getattr(prompt, name) for prompt in own] for name in names}
    agreed = {name: found[0] for name, found in values.items() if found.count(found[0]) == len(own)}
    if not {"template", "system"} <= {*agreed}:  # half a frame is none
        agreed.pop("template", None)
        agreed.pop("system", None)
    return {**agreed, "task_prefix": bool(task) and all(prompt.task_prefix for prompt in own)}


def mix_prompts(
    target: str,
    *,
    prompts: list[str],
    out: str,
    sources: list[str] | None = None,
    sample: int | None = None,
) -> list[Path]:
    """Write a sum of source prompts, weighted by how alike they are to a target prompt.

    The similarity of two prompts is the cosine of their mean rows; weights are similarities over
    their sum, and negative ones count as 0. Of a store of target prompts each gets a mixture of its
    own, so that PromptTuning with init.name file and init.path OUT starts each task, sample and
    seed from its own. Source prompts are those of the target prompt's seed where the stores have
    them, and otherwise the best by dev of all seeds. The weights are printed, and kept in made_from
    with the files and their digests. Nothing is overwritten.

    Args:
        target: prompt of the target task; or a prompt store, the folder of a fit or a checkpoint,
            of which the best by dev of each task, sample and seed is taken.
        prompts: prompt stores, folders of fits, prompt files or checkpoints with source prompts.
        out: prompt store to write to; made if it is not there.
        sources: source tasks, or sets of partitions; by default all of the stores but the target.
        sample: few-shot sample of the source prompts; by default that of the target prompt.

    Raises:
        FileNotFoundError, ValueError: what lacks, does not combine or is there already.
    """
    store = _open_store(out)
    best, seeded = best_prompts(prompts), best_found(find_prompts(*prompts), _place_of_task)
    targets = find_prompts(target)
    if len(targets) > 1:
        targets = list(best_found(targets, _place_of_task).values())
    if not targets:
        raise FileNotFoundError(f"no prompts of tasks in {target}: tune a prompt of the target")
    made = []
    for one in targets:
        task, of_sample, seed = _place(one.metadata)
        of_sample = of_sample if sample is None else sample
        others = [name for name, own in best if own == of_sample and name != task]
        names = expand_sets(sources) if sources else others
        missing = [name for name in names if (name, of_sample) not in best]
        if missing or not names:
            raise FileNotFoundError(
                f"no source prompt of sample {'none' if of_sample < 0 else of_sample} in "
                f"{', '.join(prompts)} for {', '.join(missing) or 'any task'}: tune them, or give "
                "another --sample"
            )
        own = {name: seeded.get((name, of_sample, seed), best[name, of_sample]) for name in names}
        factors = _weights(one, own)
        kept = (*ANSWERS, *OF_TASK, "task", "task_prefix", "order_seed", "run", "source_set")
        further = {name: getattr(one.prompt, name) for name in kept}
        name = f"{one.prompt.name}_mixture"
        made.append((combine(name, factors, own, one, role="mixture", **further), factors))
    paths = _save(store, [prompt for prompt, _ in made])
    for prompt, factors in made:
        for task, weight in factors.items():
            print(f"{prompt.name}\t{task}\t{weight:.4f}")
    return paths


def _place(known: dict[str, Any]) -> tuple[str, int, int]:
    sample, seed = (known.get(name) for name in ("sample", "init_seed"))
    return known.get("task") or "", -1 if sample is None else sample, -1 if seed is None else seed


def _place_of_task(known: dict[str, Any]) -> tuple[str, int, int] | None:
    return _place(known) if known.get("task") else None


def _weights(target: FoundPrompt, sources: dict[str, FoundPrompt]) -> dict[str, float]:
    import torch

    from prompt_lab.core.attention_mixture import similarity_weights

    check_compatible(target, *sources.values())
    stacked = torch.stack([source.prompt.prompt for source in sources.values()]).double()
    try:
        weights = similarity_weights(target.prompt.prompt, stacked)
    except ValueError as error:
        raise ValueError(f"{target.where}: {error}") from None
    return dict(zip(sources, weights.tolist(), strict=True))


def _open_store(out: str) -> PromptStore:
    store = PromptStore(out)
    if store.folder.is_file():
        raise ValueError(f"out is the file {out}: give a folder")
    if store.folder.exists():
        store.index()  # refuses a folder of something else
    return store


def _save(store: PromptStore, made: Sequence[Prompt]) -> list[Path]:
    paths = [store.path(prompt.name) for prompt in made]
    if there := [path for path in paths if path.exists()]:
        raise ValueError(f"{there[0]} is there and is not overwritten: choose another folder")
    store.save(made)
    return paths
