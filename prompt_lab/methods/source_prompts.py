"""The tuned prompts of many tasks, as other methods start from them.

Prompts are looked up by task and sample in one or more prompt stores. Where there are several of
one, such as those of a grid, the one with the best dev score is taken, of equal ones the first.
Nothing is replaced: what is not there is named.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from prompt_lab.backbone import Backbone
from prompt_lab.data.mixtures import Key
from prompt_lab.prompt_file import Prompt, PromptStore, load_prompt


def best_prompts(folders: Sequence[str]) -> dict[Key, Path]:
    """The file of the best prompt of each (task, sample) that the stores hold.

    Args:
        folders: prompt stores, or folders of fits (their store is ``<folder>/prompts``).

    Returns:
        Files by task and sample, in the order in which they are found. Prompts without a task are
        left out; -1 stands for no sample.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: a damaged file.
    """
    best: dict[Key, tuple[float, Path]] = {}
    for folder in folders:
        if not Path(folder).is_dir():
            raise FileNotFoundError(
                f"no prompt store {folder}: tune the prompts of the tasks first, and give the "
                "folder of that fit"
            )
        has_store = (Path(folder) / "prompts").is_dir()
        store = PromptStore(Path(folder) / "prompts" if has_store else folder)
        for known in store.index():
            task, sample, dev = (known.get(name) for name in ("task", "sample", "dev_score"))
            key: Key = (task or "", -1 if sample is None else sample)
            score = -math.inf if dev is None else float(dev)
            if task and (key not in best or score > best[key][0]):
                best[key] = score, store.path(known["name"])
    return {key: path for key, (_, path) in best.items()}


def source_prompts(
    folders: Sequence[str], keys: Sequence[Key], backbone: Backbone, num_virtual_tokens: int
) -> list[Prompt]:
    """The best prompt of each (task, sample).

    Args:
        folders: prompt stores, or folders of fits (their store is ``<folder>/prompts``).
        keys: tasks and samples.
        backbone: the model they are meant for.
        num_virtual_tokens: N.

    Returns:
        A prompt for each of ``keys``, in their order.

    Raises:
        FileNotFoundError: a folder without prompts, or prompts that no folder has, all named.
        ValueError: a damaged file, or prompts of another backbone or another N; both sides named.
    """
    best = best_prompts(folders)
    missing = [f"{task} {sample}" for task, sample in keys if (task, sample) not in best]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(keys)} source prompts are not in {', '.join(folders)}: "
            f"{', '.join(missing)}; tune them first, or leave their tasks out"
        )
    found = []
    for key in keys:
        path = best[key]
        prompt = load_prompt(path, backbone)
        if len(prompt.prompt) != num_virtual_tokens:
            raise ValueError(
                f"{path} has {len(prompt.prompt)} virtual tokens, but model.num_virtual_tokens is "
                f"{num_virtual_tokens}"
            )
        found.append(prompt)
    return found
