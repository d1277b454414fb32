"""The command ``prompt-lab vectors mix``: a start for a target task, mixed from source prompts.

SPoT (Vu et al. 2022, arXiv 2110.07904, section 3) tunes a prompt on the target task first, compares
it with the prompts of source tasks, and tunes again from their sum, weighted by similarity. This
command stands between the two fits: it reads prompt files and writes prompt files. No model is
loaded. Left out: the choice of the most similar sources, which ``prompt-lab select`` makes.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.files.prompts import FoundPrompt, best_found, find_prompts
from prompt_lab.methods.source_prompts import best_prompts
from prompt_lab.methods.task_vectors import check_compatible, load_source

if TYPE_CHECKING:
    from prompt_lab.files.prompts import Prompt


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
        target: prompt file of the target task, tuned briefly or to the end; or a prompt store, the
            folder of a fit or a checkpoint with those of several tasks, of which the best by dev of
            each task, sample and seed is taken.
        prompts: prompt stores, folders of fits, prompt files or checkpoints with source prompts.
        out: prompt store to write to; made if it is not there.
        sources: source tasks, or sets of partitions; by default all tasks of the stores but the
            target's own.
        sample: few-shot sample of the source prompts; by default that of the target prompt.

    Returns:
        The prompt files that were written.

    Raises:
        FileNotFoundError: a target or source prompt that is not there.
        ValueError: no source, prompts of different backbones or shapes, a source without a
            similarity, or a file that exists.
    """
    from prompt_lab.data.partitions import expand_sets
    from prompt_lab.files.prompts import PromptStore

    store = PromptStore(out)
    if store.folder.exists():
        store.index()  # refuses a folder of something else
    found, seeded = best_prompts(prompts), best_found(find_prompts(*prompts), _seeded)
    targets = find_prompts(target)
    if len(targets) > 1:
        targets = list(best_found(targets, _seeded).values())
    if not targets:
        raise FileNotFoundError(f"no prompts of tasks in {target}: tune a prompt of the target")
    made = []
    for one in targets:
        task, of_sample, seed = _key(one.metadata)
        of_sample = of_sample if sample is None else sample
        others = [name for name, own in found if own == of_sample and name != task]
        names = expand_sets(sources) if sources else others
        missing = [name for name in names if (name, of_sample) not in found]
        if missing or not names:
            raise FileNotFoundError(
                f"no source prompt of sample {'none' if of_sample < 0 else of_sample} in "
                f"{', '.join(prompts)} for {', '.join(missing) or 'any task'}: tune them, or give "
                "another --sample"
            )
        own = {name: seeded.get((name, of_sample, seed), found[name, of_sample]) for name in names}
        made.append(_mixture(one, own))
    there = [path for path in (store.path(prompt.name) for prompt in made) if path.exists()]
    if there:
        raise ValueError(f"{there[0]} is there and is not overwritten: choose another folder")
    store.save(made)
    for prompt in made:
        for part in (prompt.made_from or {})["sources"]:
            print(f"{prompt.name}\t{part['task']}\t{part['weight']:.4f}")
    return [store.path(prompt.name) for prompt in made]


def _key(known: dict[str, Any]) -> tuple[str, int, int]:
    """Task, sample and initialisation seed of a prompt; -1 stands for none."""
    numbers = (known.get(name) for name in ("sample", "init_seed"))
    sample, seed = (-1 if number is None else number for number in numbers)
    return known.get("task") or "", sample, seed


def _seeded(known: dict[str, Any]) -> tuple[str, int, int] | None:
    """The same of a prompt of a task."""
    return _key(known) if known.get("task") else None


def _mixture(found: FoundPrompt, sources: dict[str, FoundPrompt]) -> Prompt:
    """The mixture for a target prompt, with where it comes from; it answers as the target's."""
    import torch

    from prompt_lab import __version__
    from prompt_lab.core.attention_mixture import mix, similarity_weights

    target = load_source(found)
    loaded = {task: load_source(one) for task, one in sources.items()}
    for source in loaded.values():
        check_compatible(target, source)
    stacked = torch.stack([source.prompt.prompt for source in loaded.values()]).double()
    try:
        weights = similarity_weights(target.prompt.prompt, stacked)
    except ValueError as error:
        raise ValueError(f"{found.where}: {error}") from None
    mixed = mix(weights, stacked).float()
    parts = [
        {"task": task, "weight": weight, **source.provenance()}
        for (task, source), weight in zip(loaded.items(), weights.tolist(), strict=True)
    ]
    return replace(
        target.prompt,
        prompt=mixed,
        init=mixed,
        code=None,
        name=f"{target.prompt.name}_mixture",
        start="",
        start_of="",
        start_seed=None,
        start_file="",
        learning_rate=None,
        batch_size=None,
        steps=None,
        dev_score=None,
        test_score=None,
        status="",
        seconds=None,
        version=__version__,
        role="mixture",
        source_tasks=list(sources),
        made_from={"target": target.provenance(), "sources": parts},
    )
