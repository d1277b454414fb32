"""The tuned prompts of many tasks, as other methods start from them.

Prompts are looked up by task and sample. Where there are several of one, such as those of a grid,
the one with the best dev score is taken, of equal ones the first. Nothing is replaced: what is not
there is named.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from prompt_lab.files.prompts import FoundPrompt, best_found, find_prompts

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.data.sampling import Key
    from prompt_lab.files.prompts import Prompt


def best_prompts(places: Sequence[str]) -> dict[Key, FoundPrompt]:
    """The best prompt of each (task, sample) that some places hold.

    Args:
        places: as of :func:`prompt_lab.files.prompts.find_prompts`.

    Returns:
        Prompts by task and sample, in the order in which they are found. Prompts without a task
        are left out; -1 stands for no sample.

    Raises:
        FileNotFoundError: a place that is not there or holds no prompt.
        ValueError: a damaged file.
    """

    def key_of(known: dict[str, Any]) -> Key | None:
        task, sample = known.get("task"), known.get("sample")
        return (task, -1 if sample is None else sample) if task else None

    return best_found(find_prompts(*places), key_of)


def source_prompts(
    places: Sequence[str], keys: Sequence[Key], backbone: Backbone, num_virtual_tokens: int
) -> list[Prompt]:
    """The best prompt of each (task, sample).

    Args:
        places: as of :func:`prompt_lab.files.prompts.find_prompts`.
        keys: tasks and samples.
        backbone: the model they are meant for.
        num_virtual_tokens: N.

    Returns:
        A prompt for each of ``keys``, in their order.

    Raises:
        FileNotFoundError: a place without prompts, or prompts that no place has, all named.
        ValueError: a damaged file, or prompts of another backbone or another N; both sides named.
    """
    best = best_prompts(places)
    missing = [f"{task} {sample}" for task, sample in keys if (task, sample) not in best]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(keys)} source prompts are not in {', '.join(places)}: "
            f"{', '.join(missing)}; tune them first, or leave their tasks out"
        )
    found = []
    for key in keys:
        prompt = best[key].load(backbone)
        if len(prompt.prompt) != num_virtual_tokens:
            raise ValueError(
                f"{best[key].where} has {len(prompt.prompt)} virtual tokens, but "
                f"model.num_virtual_tokens is {num_virtual_tokens}"
            )
        found.append(prompt)
    return found
