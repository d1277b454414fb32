"""``CrossFitDataModule``: few-shot tasks in the layout of the CrossFit gym, tokenised once.

It reads the splits of every (task, sample), checks them, and turns them into token ids by the rules
of the backbone that the method brings along. Everything stays in memory: these are few-shot files.
Methods ask it for the batches of a bank of runs; it draws no rows of its own and computes no score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningDataModule

from prompt_lab.core.backbone import Backbone, Side
from prompt_lab.core.run import Run
from prompt_lab.data.batches import EvaluationSteps, Layout, Rows, TrainSteps
from prompt_lab.data.episodes import EpisodeSteps
from prompt_lab.data.files import (
    DataError,
    Split,
    SplitName,
    check_overlap,
    find_shots,
    read_samples,
)
from prompt_lab.data.mixtures import Key, Mixing, MixtureSteps, task_weights
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.sampling import draw_stratified
from prompt_lab.data.tasks import Shots, Task, find_tasks
from prompt_lab.sandbox import SANDBOX, TASKS, rows
from prompt_lab.sandbox.tasks import SPLIT_ROWS


class CrossFitDataModule(LightningDataModule):
    """Few-shot tasks from a folder in CrossFit's layout, or from the embedded sandbox.

    Args:
        tasks: names of tasks, from the package's table or ``task_file``; a set of a partition,
            such as ``mpt/cls_to_cls/target``, stands for its tasks.
        root: folder that holds one folder per task, with files
            ``<task>_<K>_<sample>_{train,dev,test}.tsv``; or ``sandbox`` for the package's own.
        samples: few-shot samples of each task (CrossFit has 100, 13, 21, 42 and 87).
        task_file: YAML file with rows for your own tasks: ``name: {metric: ACC, labels: [a, b]}``.
        max_input_length: longer inputs are cut to this many tokens, specials included; it does
            not count the prompt, which is never cut.
        task_prefix: put ``[name of the task]`` in front of every input, as CrossFit's loaders do.
        order_seed: seed of the order in which each run sees its training rows.
        allow_overlap: accept files that share a row between splits, as some of CrossFit's own do
            (their sources repeat rows), instead of refusing them.
        shots: K of the file names, a number or ``all``; null takes that of the task table. Of the
            sandbox it is the number of training rows, out of 512.
        truncation_side: the side on which the text of longer inputs is cut, ``right`` (its end) or
            ``left`` (its beginning, a task_prefix included); special tokens are never cut.

    Raises:
        ValueError: a setting out of its range, or an unknown task.
    """

    def __init__(
        self,
        tasks: list[str],
        root: str = SANDBOX,
        samples: list[int] = [100],  # noqa: B006 - read only; a list so that the CLI shows it
        task_file: str | None = None,
        max_input_length: int = 512,
        task_prefix: bool = False,
        order_seed: int = 0,
        allow_overlap: bool = False,
        shots: Shots | None = None,
        truncation_side: Side = "right",
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("data.tasks is empty: name at least one task")
        if max_input_length < 1:
            raise ValueError(f"data.max_input_length is {max_input_length}: give at least 1")
        if len(set(samples)) < len(samples) or not samples:
            raise ValueError(f"data.samples must be distinct and at least one: {samples}")
        if truncation_side not in get_args(Side):
            raise ValueError(
                f"data.truncation_side is {truncation_side!r}; allowed: {', '.join(get_args(Side))}"
            )
        self.given_tasks = list(tasks)  # with sets of partitions as they were named
        self.root, self.samples, self.order_seed = root, list(samples), order_seed
        self.allow_overlap = allow_overlap
        self.truncation_side: Side = truncation_side
        self.max_input_length, self.task_prefix = max_input_length, task_prefix
        chosen = find_tasks(expand_sets(tasks), task_file)
        if shots is not None:
            _check_shots(shots, root)
            chosen = [replace(task, shots=shots) for task in chosen]
        self.tasks: dict[str, Task] = {task.name: task for task in chosen}
        self.splits: dict[tuple[str, int], dict[SplitName, Split]] = {}
        self.layout: Layout | None = None
        self._rows: dict[tuple[str, str, str], Rows] = {}
        self._backbone: Backbone | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the files of every task and sample, once.

        Raises:
            DataError: naming file, line and reason.
            ValueError: a task is not one of the sandbox's.
        """
        for task in list(self.tasks.values()):
            samples = [sample for sample in self.samples if (task.name, sample) not in self.splits]
            if samples:
                for sample, splits in self._read(task, samples).items():
                    self.splits[task.name, sample] = splits

    def _read(self, task: Task, samples: list[int]) -> dict[int, dict[SplitName, Split]]:
        """The three splits of samples of a task; a K that its row left open is filled in."""
        if self.root == SANDBOX:
            return {sample: _sandbox_splits(task, sample) for sample in samples}
        task = self.tasks[task.name] = replace(task, shots=find_shots(self.root, task))
        return read_samples(self.root, task, samples, self.allow_overlap)

    def connect(self, backbone: Backbone) -> None:
        """Take the backbone whose rules make the tokens, when rows are first asked for."""
        if backbone is not self._backbone:
            self._rows.clear()
        self._backbone = backbone
        self.layout = Layout(backbone.pad_id, not backbone.is_encoder_decoder)

    def rows(self, task: str, sample: int, split: SplitName, keep: bool = True) -> Rows:
        """Tokenised rows of one split; equal test sets of several samples are tokenised once.

        Args:
            task: name of the task.
            sample: its few-shot sample.
            split: train, dev or test.
            keep: hold them for the next time.
        """
        data = self.splits[task, sample][split]
        key = (task, data.digest, split)
        rows = self._rows.get(key) or self._tokenise(self.tasks[task], data, split)
        if keep:
            self._rows[key] = rows
        return rows

    def _tokenise(self, task: Task, data: Split, split: SplitName) -> Rows:
        """The tokens of one split."""
        if self._backbone is None:
            raise RuntimeError("rows are asked for before connect() gave a backbone")
        prefix = f" [{task.name}] " if self.task_prefix else ""
        return tokenise(
            self._backbone,
            *(task, data, self.max_input_length, prefix),
            with_targets=split != "test",
            truncation_side=self.truncation_side,
        )

    def rows_of(self, runs: Sequence[Run], split: SplitName) -> dict[tuple[str, int], Rows]:
        """Tokenised rows of every (task, sample) that the runs use."""
        keys = dict.fromkeys((run.task, run.sample) for run in runs)
        return {key: self.rows(*key, split) for key in keys}

    def longest_answer(self, task: str, sample: int) -> int:
        """Tokens of the longest answer in train and dev, which caps what is generated."""
        return max(self.rows(task, sample, split).longest_target for split in ("train", "dev"))

    # A method knows which runs need rows, so it is asked for the batches; it makes them with the
    # two functions below.

    @property
    def method(self) -> Any:
        """The LightningModule of the trainer."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    def train_dataloader(self) -> TrainSteps | MixtureSteps | EpisodeSteps:
        """The batches of every training step."""
        return self.method.train_steps()

    def val_dataloader(self) -> EvaluationSteps:
        """The batches of an evaluation on dev."""
        return self.method.dev_steps()

    def test_dataloader(self) -> EvaluationSteps:
        """The batches of the evaluation on test."""
        return self.method.test_steps()

    def train_steps(
        self,
        runs: Sequence[Run],
        steps: int,
        step: Callable[[], int],
        live: Callable[[], list[int]],
        rank: int,
        world: int,
    ) -> TrainSteps:
        """The training batches of a bank of runs (see :class:`TrainSteps`)."""
        rows = self.rows_of(runs, "train")
        assert self.layout is not None
        return TrainSteps(runs, rows, self.order_seed, self.layout, steps, step, live, rank, world)

    def mixture_steps(
        self,
        keys: Sequence[Key],
        mixing: Mixing,
        batch_size: int,
        seed: int,
        steps: int,
        step: Callable[[], int],
        rank: int,
        world: int,
        temperature: float = 2.0,
        prompts: Mapping[Key, int] | None = None,
    ) -> MixtureSteps:
        """Training batches that mix the rows of several tasks (see :class:`MixtureSteps`).

        Args:
            keys: (task, sample) of each task.
            mixing: how tasks are weighted: ``examples``, ``tasks`` or ``temperature``.
            batch_size: rows of a step over all processes.
            seed: seed of the order.
            steps: number of steps.
            step: returns the number of the next step.
            rank: this process.
            world: number of processes.
            temperature: T of ``temperature``.
            prompts: the prompt of each key; its place in ``keys`` if left out.
        """
        rows = {key: self.rows(*key, "train") for key in keys}
        weights = task_weights([len(own) for own in rows.values()], mixing, temperature)
        chosen = prompts or {key: place for place, key in enumerate(keys)}
        assert self.layout is not None
        return MixtureSteps(
            rows, chosen, weights, batch_size, seed, self.layout, steps, step, rank, world
        )

    def episode_steps(
        self,
        keys: Sequence[Key],
        episodes: int,
        inner_steps: int,
        support_size: int,
        query_size: int,
        seed: int,
        steps: int,
        step: Callable[[], int],
        rank: int,
        world: int,
    ) -> EpisodeSteps:
        """Meta-batches: support rows from train, query rows from dev (see :class:`EpisodeSteps`).

        Args:
            keys: (task, sample) of each item that episodes are made of.
            episodes: M, episodes of a meta-batch.
            inner_steps: K, support batches of an episode.
            support_size: rows of a support batch.
            query_size: rows of the query batch.
            seed: seed of the order.
            steps: number of meta-steps.
            step: returns the number of the next step.
            rank: this process.
            world: number of processes.
        """
        support = {key: self.rows(*key, "train") for key in keys}
        query = {key: self.rows(*key, "dev") for key in keys}
        assert self.layout is not None
        return EpisodeSteps(
            support,
            query,
            episodes,
            inner_steps,
            support_size,
            query_size,
            seed,
            self.layout,
            steps,
            step,
            rank,
            world,
        )

    def evaluation_steps(
        self,
        runs: Sequence[Run],
        split: SplitName,
        tokens_per_forward: int,
        extra_per_row: Callable[[Task, int], int],
        live: Callable[[], list[int]],
        rank: int,
        world: int,
    ) -> EvaluationSteps:
        """The evaluation batches of a bank of runs (see :class:`EvaluationSteps`)."""
        rows = self.rows_of(runs, split)
        longest = {key: self.longest_answer(*key) for key in rows}
        assert self.layout is not None
        return EvaluationSteps(
            runs, rows, self.layout, tokens_per_forward, longest, extra_per_row, live, rank, world
        )


def tokenise(
    backbone: Backbone,
    task: Task,
    data: Split,
    max_input_length: int,
    prefix: str = "",
    with_targets: bool = True,
    truncation_side: Side = "right",
) -> Rows:
    """Apply the rules of a backbone to the rows of a split; equal answers are tokenised once.

    Args:
        backbone: the backbone.
        task: the task of the rows.
        data: the rows.
        max_input_length: longer inputs are cut to this many tokens, specials included.
        prefix: text in front of every input.
        with_targets: whether to give the token ids of the answers, which training needs.
        truncation_side: where longer inputs are cut.

    Returns:
        The tokenised rows.

    Raises:
        ValueError: an input without tokens, naming the file.
    """
    try:
        whole = backbone.encode_inputs([prefix + text for text in data.inputs])
    except ValueError as error:
        raise ValueError(f"{data.path}: {error}") from None
    inputs = [backbone.cut_input(ids, max_input_length, truncation_side) for ids in whole]
    answers = list(dict.fromkeys(chain.from_iterable(data.references)))
    ids = dict(zip(answers, backbone.encode_targets(answers), strict=True))
    return Rows(
        task,
        inputs,
        [[ids[answer] for answer in row] for row in data.references] if with_targets else [],
        data.references,
        longest_target=max(map(len, ids.values())),
        shortest_targets=[min(len(ids[answer]) for answer in row) for row in data.references],
        cut=sum(len(ids) > max_input_length for ids in whole),
    )


def _check_shots(shots: Shots, root: str) -> None:
    """Refuse a K that no file, or no draw from the sandbox's rows, can have."""
    if shots != "all" and (not isinstance(shots, int) or isinstance(shots, bool) or shots < 1):
        raise ValueError(f"data.shots is {shots!r}: give a whole number above 0, or all")
    most = SPLIT_ROWS["train"]
    if root == SANDBOX and (shots == "all" or shots > most):
        raise ValueError(
            f"data.shots is {shots}, but a sandbox task has {most} training rows: give up to "
            f"{most}, or leave it out"
        )


def _sandbox_splits(task: Task, sample: int) -> dict[SplitName, Split]:
    """The generated splits of a sandbox task; of the training rows K, with the labels' shares.

    Raises:
        ValueError: a task that is not one of the sandbox's, or a K that cannot hold all labels.
    """
    if task.name not in TASKS:
        raise ValueError(
            f"task {task.name!r} is not in the sandbox: set data.root to the folder that holds "
            f"its files, or choose among {', '.join(sorted(TASKS))}"
        )
    made: dict[SplitName, Split] = {}
    for name in ("train", "dev", "test"):
        pairs = rows(task.name, sample, name)
        if name == "train" and task.shots != SPLIT_ROWS["train"]:
            pairs = _draw(task, pairs, sample)
        text = "".join(f"{source}\t{target}\n" for source, target in pairs)
        made[name] = Split(
            inputs=[source for source, _ in pairs],
            references=[[target] for _, target in pairs],
            path=Path(f"sandbox/{task.name}/{task.name}_{task.shots}_{sample}_{name}.tsv"),
            digest=hashlib.sha256(text.encode()).hexdigest(),
        )
    check_overlap(made["train"], made["dev"], made["test"])
    return made


def _draw(task: Task, pairs: list[tuple[str, str]], sample: int) -> list[tuple[str, str]]:
    """K of the training rows of a sandbox task: N rows in all, in which labels keep their share."""
    assert isinstance(task.shots, int)
    kinds = [answer if task.labels else "" for _, answer in pairs]
    try:
        chosen, _ = draw_stratified(kinds, task.shots, 0, sample)
    except DataError as error:
        raise DataError(f"{task.name}: {error}") from None
    return [pairs[row] for row in chosen]
