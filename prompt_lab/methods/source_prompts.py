"""The tuned prompts of many tasks, as other methods start from them.

Prompts are looked up by task and sample, or by another key, in one or more prompt stores. Where
there are several of one, such as those of a grid, the one with the best dev score is taken, of
equal ones the first. Nothing is replaced: what is not there is named.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone
    from prompt_lab.data.mixtures import Key
    from prompt_lab.files.prompt_file import Prompt

Found = TypeVar("Found", bound=Hashable)


def prompt_files(folder: Path) -> list[Path]:
    """The prompt files of a store, or of the store in the folder of a fit, sorted by name.

    Raises:
        FileNotFoundError: a folder that is not there.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"no prompt store {folder}: tune the prompts first, and give their folder or that of "
            "the fit"
        )
    inner = folder / "prompts"
    return sorted((inner if inner.is_dir() else folder).glob("*.safetensors"))


def best_files(
    folders: Sequence[str], key_of: Callable[[dict[str, Any]], Found | None]
) -> dict[Found, Path]:
    """The prompt file of best dev score for each key; of equal ones the first.

    Args:
        folders: prompt stores, or folders of fits (their store is ``<folder>/prompts``).
        key_of: returns the key of a prompt by the metadata of its file; None leaves it out.

    Returns:
        Files by key, in the order in which keys are found. A file without a dev score is the worst.

    Raises:
        FileNotFoundError: a folder that is not there.
        ValueError: a damaged file.
    """
    from prompt_lab.files.prompt_file import read_metadata

    best: dict[Found, tuple[float, Path]] = {}
    for path in (path for folder in folders for path in prompt_files(Path(folder))):
        known = read_metadata(path)
        key, dev = key_of(known), known.get("dev_score")
        score = -math.inf if dev is None else float(dev)
        if key is not None and (key not in best or score > best[key][0]):
            best[key] = score, path
    return {key: path for key, (_, path) in best.items()}


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

    def key_of(known: dict[str, Any]) -> Key | None:
        """Task and sample."""
        task, sample = known.get("task"), known.get("sample")
        return (task, -1 if sample is None else sample) if task else None

    return best_files(folders, key_of)


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
    from prompt_lab.files.prompt_file import load_prompt

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
