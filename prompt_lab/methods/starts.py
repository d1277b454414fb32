"""Where the runs of a bank start: initial prompts, and codes in a subspace.

A vocabulary, text or noise prompt depends on (seed, backbone, N) alone; class labels add the task.
PEFT folders do not say for which weights they were made: only their width is compared.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from prompt_lab.core import prompts
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.run import Run
from prompt_lab.core.subspace import Subspace
from prompt_lab.core.text import Frame
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import PLACES, FoundPrompt, best_found, find_prompts, is_single
from prompt_lab.files.results import PlainStart, Start, start_from
from prompt_lab.files.tensors import load_network

ROWS_AT_ONCE = 4096
"""Embeddings that are read at a time where all are."""

InitName = Literal[PlainStart, "file"]


@dataclass
class InitConfig:
    """How prompts are initialised.

    Args:
        name: ``vocab`` samples frequent tokens, ``text`` takes the tokens of a text, ``labels`` the
            task's class labels (then ``vocab``), ``normal`` and ``uniform`` noise, ``file`` a
            prompt file, a prompt store, a PEFT folder or a checkpoint of PromptTuning.
        vocab_size: how many low ids ``vocab`` draws from; null for the whole vocabulary.
        text: the text of ``text``; cut to N tokens, or repeated.
        std: standard deviation of ``normal``.
        limit: largest magnitude of ``uniform``.
        path: prompt file, folder of a prompt store or of a fit, PEFT folder or ``.ckpt`` file, for
            ``file``. ``{init_seed}`` in it becomes the seed of each run, for starts that were made
            once per seed.
        source_tasks: transfer: every run is made once for each of these tasks, and starts from its
            prompt in the store. Sets of partitions stand for their tasks; a sum that ``vectors
            apply`` wrote goes by its expression. Of PromptTuning only.
    """

    name: InitName = "vocab"
    vocab_size: int | None = 5000
    text: str | None = None
    std: float = 0.02
    limit: float = 0.5
    path: str | None = None
    source_tasks: list[str] | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(InitName):
            raise ValueError(f"init.name is {self.name!r}; allowed: {get_args(InitName)}")
        if self.name == "text" and not self.text:
            raise ValueError("init.name is text: give the text with init.text")
        if self.name == "file" and not self.path:
            raise ValueError(f"init.name is file: give {PLACES} with init.path")
        if self.source_tasks is not None and not self.source_tasks:
            raise ValueError("init.source_tasks is empty: name source tasks, or leave it out")
        if self.source_tasks and self.name != "file":
            raise ValueError(
                f"init.source_tasks needs init.name file, with the source prompts in init.path; it "
                f"is {self.name}"
            )

    @property
    def sources(self) -> list[str]:
        """The axis of a grid: source tasks, or one empty name where prompts are not transferred."""
        if self.source_tasks is None:
            return [""]
        return expand_sets([" ".join(source.split()) for source in self.source_tasks])


def initial_prompts(
    config: InitConfig,
    backbone: Backbone,
    runs: Sequence[Run],
    tasks: Mapping[str, Task],
    num_virtual_tokens: int,
    frame: Frame | None = None,
) -> tuple[Tensor, list[Start]]:
    """The initial prompt of every run, (R, N, D) float32 on the CPU, and where it is from.

    Prompts from files that were tuned in another frame than ``frame`` are told in a warning.

    Raises:
        FileNotFoundError: a prompt file, store, folder or checkpoint that is not there.
        ValueError: prompts that a store or checkpoint lacks or has twice, of another shape or
            backbone; a PEFT adapter of another kind; a task without labels for ``labels``; too
            small a vocabulary.
    """
    if config.source_tasks is not None and not all(run.source for run in runs):
        raise ValueError(
            "model.init.source_tasks makes a run for each source: only PromptTuning has it; give "
            "the prompt file of one source as init.path"
        )
    if config.name == "file":
        places: dict[str, list[Run]] = {}
        for run in runs:
            path = (config.path or "").replace("{init_seed}", str(run.init_seed))
            places.setdefault(path, []).append(run)
        found: dict[Run, FoundPrompt] = {}
        for path, own in places.items():
            found |= zip(own, starts_of(Path(path), own), strict=True)
        each = [found[run] for run in runs]
        read = {one: one.load(backbone).prompt for one in dict.fromkeys(each)}
        for run, one in zip(runs, each, strict=True):
            if len(read[one]) != num_virtual_tokens:
                raise ValueError(
                    f"run {run.name}: the prompt in {config.path} has {len(read[one])} virtual "
                    f"tokens, model.num_virtual_tokens is {num_virtual_tokens}"
                )
        for one in read:
            known = {"template": "plain", "system": None, **one.metadata}
            if frame and (known["template"], known["system"]) != (frame.template, frame.system):
                rank_zero_warn(
                    f"data.template is {frame.template} and data.system {frame.system!r}, but "
                    f"{one.where} is of template {known['template']} and system "
                    f"{known['system']!r}"
                )
                break
        starts = [start_from(one.metadata, one.path) for one in each]
        return torch.stack([read[one] for one in each]), starts
    keys = [(run.init_seed, run.task if config.name == "labels" else "") for run in runs]
    unique = {
        key: _make(config, backbone, key[0], tasks.get(key[1]), num_virtual_tokens)
        for key in dict.fromkeys(keys)
    }
    drawn = config.name != "text"
    starts = [Start(config.name, start_seed=run.init_seed if drawn else None) for run in runs]
    return torch.stack([unique[key] for key in keys]), starts


def vocabulary_prompt(
    backbone: Backbone, num_virtual_tokens: int, seed: int = 0, vocab_size: int | None = 5000
) -> Tensor:
    """Embeddings of N of the first ``vocab_size`` tokens (None for all), drawn by seed; (N, D).

    Lester et al. 2021 (arXiv 2104.08691), section 3.2; float32, on the CPU.
    """
    size = min(len(backbone.model.get_input_embeddings().weight), len(backbone.tokenizer))
    ids = prompts.frequent_ids(size, backbone.tokenizer.all_special_ids, vocab_size)
    return _embeddings(backbone, prompts.vocabulary_sample(ids, num_virtual_tokens, seed))


def scale_ratio(backbone: Backbone, init: Tensor) -> float:
    """Standard deviation of prompts (R, N, D) over that of all embeddings, read some at a time."""
    every = torch.arange(len(backbone.model.get_input_embeddings().weight))
    chunks = (_embeddings(backbone, ids) for ids in every.split(ROWS_AT_ONCE))
    return init.double().std().item() / prompts.standard_deviation(chunks)


@torch.no_grad()
def _embeddings(backbone: Backbone, ids: Tensor) -> Tensor:
    """The embeddings of ids (n,) as the model sees them: (n, D) float32, on the CPU."""
    return backbone.embed(ids.to(backbone.device)).float().cpu()


def _make(
    config: InitConfig, backbone: Backbone, seed: int, task: Task | None, count: int
) -> Tensor:
    def tokens(text: str) -> list[int]:
        return backbone.tokenizer(text, add_special_tokens=False)["input_ids"]

    if config.name == "normal":
        return prompts.normal_prompt(count, backbone.hidden_size, config.std, seed)
    if config.name == "uniform":
        return prompts.uniform_prompt(count, backbone.hidden_size, config.limit, seed)
    if config.name == "text":
        return _embeddings(backbone, prompts.text_ids(tokens(config.text or ""), count))
    sampled = vocabulary_prompt(backbone, count, seed, config.vocab_size)
    if config.name == "vocab":
        return sampled
    if task is None or task.labels is None:
        raise ValueError(f"init.name is labels, but task {task and task.name!r} has no label set")
    labels = [_embeddings(backbone, torch.tensor(tokens(label))) for label in task.labels]
    return prompts.label_prompt(labels, sampled)


def starts_of(path: Path, runs: Sequence[Run]) -> list[FoundPrompt]:
    """The prompt that each run starts from: one for all, or by its task or source, sample and seed.

    Raises:
        FileNotFoundError: no such place, or one without prompts.
        ValueError: naming all runs without a prompt, or all with several.
    """
    found = find_prompts(path)
    if is_single(path) and not runs[0].source:
        return found * len(runs)
    matches = [_matches(found, run) for run in runs]
    if missing := [run.name for run, own in zip(runs, matches, strict=True) if not own]:
        held = ", ".join(sorted({_made_for(one.metadata) for one in found}))
        raise ValueError(
            f"{path} has no prompt for {len(missing)} runs: {', '.join(missing)}; it has: "
            f"{held or 'prompts of no task'}"
        )
    if several := [run.name for run, own in zip(runs, matches, strict=True) if len(own) > 1]:
        raise ValueError(
            f"{path} has several prompts for {', '.join(several)}: use a store with one per task, "
            "sample and seed"
        )
    return [own[0] for own in matches]


def _matches(found: Sequence[FoundPrompt], run: Run) -> list[FoundPrompt]:
    """The prompts of a run's task or source, narrowed to its sample and seed where there are those.

    Of several, as a grid leaves them, the one with the best dev score is taken, if all have one.
    """
    wanted = run.source or run.task
    own = [one for one in found if _made_for(one.metadata) == wanted]
    places = (("sample", run.sample), ("init_seed", run.init_seed))
    for key, value in places:
        if len(own) > 1:
            own = [one for one in own if one.metadata.get(key) == value] or own
    is_grid = bool(run.source) or all(
        one.metadata.get(key) == value for one in own for key, value in places
    )
    if is_grid and all(one.dev > -math.inf for one in own):
        return list(best_found(own, lambda _: run).values())
    return own


def _made_for(row: Mapping[str, Any]) -> str:
    """Task of a prompt by its metadata; of a sum of vectors for no task, its expression."""
    return str(row.get("task") or (row.get("made_from") or {}).get("expression") or "")


# ---- codes in a subspace -------------------------------------------------------------------------

RANDOM = "random"
"""The path that stands for a random subspace."""


@dataclass
class SubspaceConfig:
    """The subspace that prompts are tuned in.

    Args:
        path: subspace file that IntrinsicSubspace wrote; or ``random`` for a random subspace.
        intrinsic_dim: I of a random subspace; a file has its own.
        seed: of the weights of a random subspace.
        std: standard deviation of the initial codes, 0.02 in the authors' code.
    """

    path: str
    intrinsic_dim: int | None = None
    seed: int = 0
    std: float = 0.02

    def check(self) -> None:
        """Refuse (``ValueError``) a random subspace without a dimension, or a file with one."""
        if (self.path == RANDOM) != (self.intrinsic_dim is not None):
            raise ValueError(
                f"model.subspace.path is {self.path!r} and model.subspace.intrinsic_dim is "
                f"{self.intrinsic_dim}: give a dimension for a {RANDOM} subspace, and none for a "
                "file"
            )

    def load(self, backbone: Backbone, num_virtual_tokens: int) -> Subspace:
        """The map, frozen; errors as :func:`load_subspace`."""
        if self.intrinsic_dim is None:
            return load_subspace(self.path, backbone, num_virtual_tokens)
        size = (num_virtual_tokens, backbone.hidden_size, self.intrinsic_dim)
        return Subspace(*size, seed=self.seed).requires_grad_(False)

    @property
    def variant(self) -> str:
        """Its name in the results."""
        return "random_subspace" if self.path == RANDOM else "subspace"

    @property
    def is_there(self) -> bool:
        """Whether the map can be made or read."""
        return self.path == RANDOM or Path(self.path).is_file()

    def start(self, seed: int) -> Start:
        """Where codes start that are drawn under a seed."""
        return Start("codes", "", seed, "" if self.path == RANDOM else self.path)


def load_subspace(path: str | Path, backbone: Backbone, num_virtual_tokens: int) -> Subspace:
    """The map of a subspace file; errors as :func:`load_network`, and for another N."""
    found = load_network(path, Subspace, backbone)
    if found.num_virtual_tokens != num_virtual_tokens:
        raise ValueError(
            f"{path}: a subspace of prompts of {found.num_virtual_tokens} virtual tokens, but "
            f"num_virtual_tokens is {num_virtual_tokens}"
        )
    return found


def initial_codes(runs: Sequence[Run], intrinsic_dim: int, std: float) -> Tensor:
    """Normal codes (R, I); those of a run are a function of its initialisation seed."""
    generators = [torch.Generator().manual_seed(run.init_seed) for run in runs]
    return torch.stack([torch.randn(intrinsic_dim, generator=one) for one in generators]) * std
