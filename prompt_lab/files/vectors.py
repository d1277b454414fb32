"""Task prompt vectors that places hold, and prompts that are made from prompts.

The vector of a prompt file is its ``prompt`` minus its ``init`` (Belanec et al. 2024, arXiv
2408.01119). Of a grid the prompt of best dev score stands for its task, sample and seed. Prompts
combine by the digests in their files, so no model is loaded. :func:`combine` makes sums of vectors
and mixtures of prompts, for ``VectorArithmetic``, ``vectors apply`` and ``vectors mix``; the
arithmetic itself is in ``prompt_lab.core.vectors``.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

from prompt_lab.files.prompts import FoundPrompt, Prompt, best_found, find_prompts
from prompt_lab.files.results import Start, start_from

Group = tuple[int | None, int | None]
"""Few-shot sample and seed of the initial prompt; None where a file does not say."""


def find_vectors(places: Sequence[str]) -> dict[Group, dict[str, FoundPrompt]]:
    """The tuned prompts of some places, whose task prompt vectors may be combined.

    By sample and seed, in rising order, and by task, the prompt of best dev score; prompts that
    were made from others are passed over.

    Raises:
        FileNotFoundError: a place that is not there or holds no prompt.
        ValueError: a damaged file, or no prompt that was tuned for a task.
    """

    def key_of(known: dict[str, Any]) -> tuple[Group, str] | None:
        is_tuned = known.get("task") and not known.get("made_from")
        return ((known.get("sample"), known.get("init_seed")), known["task"]) if is_tuned else None

    def place(key: tuple[Group, str]) -> tuple[list[float], str]:
        return [-math.inf if number is None else number for number in key[0]], key[1]

    best = best_found(find_prompts(*places), key_of)
    if not best:
        raise ValueError(f"no tuned prompt of a task in {', '.join(places)}: give stores of fits")
    found: dict[Group, dict[str, FoundPrompt]] = {}
    for group, task in sorted(best, key=place):
        found.setdefault(group, {})[task] = best[group, task]
    return found


def complete(
    found: Mapping[Group, Mapping[str, FoundPrompt]], names: Sequence[str], places: Sequence[str]
) -> tuple[dict[Group, dict[str, FoundPrompt]], str]:
    """The prompts of the named tasks, for every sample and seed that has them all.

    Returns:
        Prompts by sample and seed, and by task in the order of ``names``; and which samples and
        seeds have some of the tasks only, in words, or an empty text.

    Raises:
        ValueError: a task without any prompt, or no sample and seed that has all tasks.
    """
    held = {name: [group for group in found if name in found[group]] for name in names}
    tasks = sorted({task for own in found.values() for task in own})
    if lacking := [name for name, groups in held.items() if not groups]:
        joined = [t for t in tasks if lacking[0].startswith(f"{t}-")]
        spaces = [f"a minus needs spaces around it: {t} - ..." for t in joined]
        near = [f"did you mean {t}?" for t in difflib.get_close_matches(lacking[0], tasks, n=1)]
        hint = [*spaces, *near, f"there are: {', '.join(tasks)}"][0]
        raise ValueError(f"no prompt of task {lacking[0]!r} in {', '.join(places)}; {hint}")

    def words(group: Group) -> str:
        sample, seed = ("none" if number is None else number for number in group)
        return f"sample {sample} seed {seed}"

    whole = {
        group: {name: own[name] for name in names}
        for group, own in found.items()
        if all(name in own for name in names)
    }
    if not whole:
        parts = [f"{name} has {listed(map(words, groups))}" for name, groups in held.items()]
        raise ValueError(f"no sample and seed has all tasks: {'; '.join(parts)}")
    partial = [g for g in found if g not in whole and any(g in groups for groups in held.values())]
    return whole, listed(
        f"{words(group)} lacks {', '.join(name for name in names if name not in found[group])}"
        for group in partial
    )


def listed(parts: Iterable[str]) -> str:
    """The first five of some parts, and how many more there are; empty where there is none."""
    parts = list(parts)
    more = f", and {len(parts) - 5} more" if len(parts) > 5 else ""
    return ", ".join(parts[:5]) + more


def check_compatible(*found: FoundPrompt, any_length: bool = False) -> None:
    """Refuse (``ValueError``) prompts of other weights, tokenizers or shapes than the first.

    With ``any_length`` only widths are compared.
    """

    def facts(one: FoundPrompt) -> dict[str, tuple[Any, str]]:
        prompt, weights = one.prompt, one.prompt.backbone_digest
        shape = tuple(prompt.prompt.shape)[any_length:]
        return {
            "backbone": (weights, f"{prompt.backbone!r} with weights {weights[:12]}"),
            "tokenizer": (prompt.tokenizer_digest, prompt.tokenizer_digest[:12]),
            "width" if any_length else "shape": (shape, " x ".join(map(str, shape))),
        }

    for other in found[1:]:
        ours, theirs = facts(found[0]), facts(other)
        for what in ours:
            if ours[what][0] != theirs[what][0]:
                raise ValueError(
                    f"{found[0].where} and {other.where} do not combine: {what} {ours[what][1]} "
                    f"and {theirs[what][1]}"
                )


def common_init(found: Sequence[FoundPrompt], advice: str) -> FoundPrompt:
    """The first of some prompts; a ``ValueError``, with the advice, if their inits differ."""
    first = found[0]
    for other in found[1:]:
        if not first.prompt.init.equal(other.prompt.init):
            raise ValueError(
                f"{first.where} ({first.prompt.start}) and {other.where} ({other.prompt.start}) "
                f"start from different initial prompts: {advice}"
            )
    return first


def combine(
    name: str,
    factors: Mapping[str, float],
    sources: Mapping[str, FoundPrompt],
    base: FoundPrompt | None,
    *,
    role: Literal["sum", "mixture"] = "sum",
    expression: str = "",
    scale: float = 1.0,
    **further: Any,
) -> Prompt:
    """A prompt made from prompts, with where it comes from in ``made_from``.

    A sum is an initial prompt + scale * sum of factor * task prompt vector (arXiv 2408.01119). A
    mixture is the sum of factor * prompt, for a target prompt (arXiv 2110.07904). ``factors`` and
    ``sources`` come by task; ``base`` gives the initial prompt of a sum, None for zeros, or is the
    target of a mixture; :func:`check_compatible` lets all pass. ``expression`` is the sum as it was
    asked for, ``scale`` its lambda, and ``further`` are other fields of :class:`Prompt`, which
    count before those that are made here.

    Raises:
        ValueError: numbers too large for float32.
    """
    import torch

    from prompt_lab import __version__
    from prompt_lab.core.attention_mixture import mix
    from prompt_lab.core.vectors import add_vectors

    used, numbers = [sources[task] for task in factors], list(factors.values())
    word = "weight" if role == "mixture" else "coefficient"
    parts = [{"task": x, word: y, **sources[x].provenance()} for x, y in factors.items()]
    like, start = used[0].prompt, Start("zeros")
    if role == "mixture":
        assert base is not None
        like, start = base.prompt, Start("")
        stacked = torch.stack([source.prompt.prompt for source in used]).double()
        init = prompt = mix(torch.tensor(numbers, dtype=torch.float64), stacked).float()
        made_from = {"target": base.provenance(), "sources": parts}
    else:
        init, origin = torch.zeros_like(like.init), None
        if base is not None:
            init = base.start
            origin = {"tensor": "prompt" if base.is_start else "init", **base.provenance()}
            start = base.prompt.start_fields
            if base.is_start:
                start = start_from(base.metadata, base.path)
        prompt = add_vectors(init, torch.stack([one.vector for one in used]), numbers, scale)
        made_from = {"expression": expression, "scale": scale, "vectors": parts, "init": origin}
    made: dict[str, Any] = {"prompt": prompt, "init": init, "name": name, **asdict(start)}
    for kept in ("backbone", "backbone_digest", "tokenizer_digest", "sample"):
        made[kept] = getattr(like, kept)
    made |= {"init_seed": None if base is None else base.prompt.init_seed, "role": role}
    made |= {"version": __version__, "source_tasks": list(factors), "made_from": made_from}
    return Prompt(**made | further)
