"""Rankings of source tasks that need no prompts (Lin et al. 2024): SIZE, SEMB and RANDOM.

SEMB is the cosine of mean sentence embeddings (section 4.2, after Poth et al. 2021). A task's
training file is that of the largest K, of its samples the first.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from prompt_lab.data.files import file_name, list_files, read_lines
from prompt_lab.sandbox import SANDBOX, TASKS, rows

CHUNK = 1024
"""Inputs that are embedded at a time."""


def rank_by_data(
    method: str, pairs: pd.DataFrame, root: str | None, encoder: str | None, seed: int = 0
) -> tuple[pd.Series, str]:
    """Similarities of pairs (columns target and source) by size, semb or random; how to read them.

    ``root`` is the folder of few-shot files or sandbox, ``encoder`` the id or folder of a
    sentence-transformers model. A ``FileNotFoundError`` for no such folder or training file, a
    ``ValueError`` for no encoder or no package.
    """
    if method == "random":
        legend = f"random numbers of seed {seed}, which know nothing of the tasks"
        return pairs["source"].map(lambda x: random.Random(f"{seed} {x}").random()), legend
    if method == "size":
        sizes = {task: len(own) for task, own in _training_inputs(root, pairs["source"]).items()}
        return pairs["source"].map(sizes), "rows of the source's training file"
    if encoder is None:
        raise ValueError("semb needs a sentence encoder: give its id or folder with --encoder")
    texts = _training_inputs(root, [*pairs["target"], *pairs["source"]])
    try:
        import sentence_transformers  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ValueError(
            "semb needs the package sentence-transformers: pip install 'prompt-lab[semb]'"
        ) from None
    model, units = sentence_transformers.SentenceTransformer(encoder), {}
    for task, own in texts.items():
        parts = [own[at : at + CHUNK] for at in range(0, len(own), CHUNK)]
        sums = [np.sum(model.encode(x, show_progress_bar=False), 0, dtype=float) for x in parts]
        units[task] = np.sum(sums, 0) / np.linalg.norm(np.sum(sums, 0))
    values = [float(units[a] @ units[b]) for a, b in pairs[["target", "source"]].to_numpy()]
    legend = f"cosine of the mean embeddings of training inputs by {encoder}, -1 to 1"
    return pd.Series(values, pairs.index), legend


def _training_inputs(root: str | None, tasks: Iterable[str]) -> dict[str, list[str]]:
    if root is None:
        raise ValueError("size and semb read training files: name their folder with --root")
    if root != SANDBOX and not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root}: name the data root with --root")
    found: dict[str, list[str]] = {}
    names = dict.fromkeys(tasks)
    for task in names:
        folder = Path(root, task)
        if root == SANDBOX and task in TASKS:
            found[task] = [row[0] for row in rows(task, 100, "train")]
        elif root != SANDBOX and folder.is_dir():
            files = [key for key in list_files(folder) if key[2] == "train"]
            if files:
                key = next(key for key in files if key[0] == files[-1][0])
                path = folder / file_name(task, *key)
                found[task] = [fields[0] for fields in read_lines(path, path.read_bytes())]
    if missing := [task for task in names if task not in found]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} tasks have no training file in {root}: "
            f"{', '.join(missing)}; prompt-lab tasks build makes them"
        )
    return found
