"""``CrossFitDataModule``: few-shot tasks in the layout of the CrossFit gym, tokenised once.

It reads the splits of every (task, sample), checks them, and turns them into token ids by the rules
of the backbone that the method brings along. Everything stays in memory: these are few-shot files.
Methods ask it for the batches of a bank of runs; it draws no rows of its own and computes no score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule

from prompt_lab.backbone import Backbone
from prompt_lab.data.batches import EvaluationSteps, Layout, Rows, TrainSteps
from prompt_lab.data.files import Split, SplitName, check_overlap, read_task
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.tasks import Task, find_tasks
from prompt_lab.run import Run
from prompt_lab.sandbox import SANDBOX, TASKS, rows


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
    ) -> None:
        super().__init__()
        if not tasks:
            raise ValueError("data.tasks is empty: name at least one task")
        if max_input_length < 1:
            raise ValueError(f"data.max_input_length is {max_input_length}: give at least 1")
        if len(set(samples)) < len(samples) or not samples:
            raise ValueError(f"data.samples must be distinct and at least one: {samples}")
        self.root, self.samples, self.order_seed = root, list(samples), order_seed
        self.allow_overlap = allow_overlap
        self.max_input_length, self.task_prefix = max_input_length, task_prefix
        chosen = find_tasks(expand_sets(tasks), task_file)
        self.tasks: dict[str, Task] = {task.name: task for task in chosen}
        self.splits: dict[tuple[str, int], dict[SplitName, Split]] = {}
        self.layout: Layout | None = None
        self._rows: dict[tuple[str, int, str], Rows] = {}
        self._backbone: Backbone | None = None

    def setup(self, stage: str | None = None) -> None:
        """Read and check the files of every task and sample, once.

        Raises:
            DataError: naming file, line and reason.
        """
        for task in self.tasks.values():
            for sample in self.samples:
                if (task.name, sample) not in self.splits:
                    self.splits[task.name, sample] = self._read(task, sample)

    def _read(self, task: Task, sample: int) -> dict[SplitName, Split]:
        """The three splits of a task's sample."""
        if self.root == SANDBOX:
            return _sandbox_splits(task, sample)
        return read_task(self.root, task, sample, self.allow_overlap)

    def connect(self, backbone: Backbone) -> None:
        """Take the backbone whose rules make the tokens, when rows are first asked for."""
        if backbone is not self._backbone:
            self._rows.clear()
        self._backbone = backbone
        self.layout = Layout(backbone.pad_id, not backbone.is_encoder_decoder)

    def rows(self, task: str, sample: int, split: SplitName) -> Rows:
        """Tokenised rows of one split; equal test sets of several samples are tokenised once."""
        data = self.splits[task, sample][split]
        key = (task, data.digest, split)
        if key not in self._rows:
            self._rows[key] = self._tokenise(self.tasks[task], data, split)  # type: ignore[index]
        return self._rows[key]  # type: ignore[index]

    def _tokenise(self, task: Task, data: Split, split: SplitName) -> Rows:
        """Apply the backbone's rules to one split."""
        if self._backbone is None:
            raise RuntimeError("rows are asked for before connect() gave a backbone")
        prefix = f" [{task.name}] " if self.task_prefix else ""
        flat = [answer for answers in data.references for answer in answers]
        encoded = iter(self._backbone.encode_targets(flat))
        targets = [[next(encoded) for _ in answers] for answers in data.references]
        return Rows(
            task=task,
            inputs=self._backbone.encode_inputs(
                [prefix + text for text in data.inputs], self.max_input_length
            ),
            targets=targets if split == "train" else [],
            references=data.references,
            longest_target=max(len(ids) for answers in targets for ids in answers),
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

    def train_dataloader(self) -> TrainSteps:
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


def _sandbox_splits(task: Task, sample: int) -> dict[SplitName, Split]:
    """The generated splits of a sandbox task.

    Raises:
        ValueError: a task that is not one of the sandbox's.
    """
    if task.name not in TASKS:
        raise ValueError(
            f"task {task.name!r} is not in the sandbox: set data.root to the folder that holds "
            f"its files, or choose among {', '.join(sorted(TASKS))}"
        )
    made: dict[SplitName, Split] = {}
    for name in ("train", "dev", "test"):
        pairs = rows(task.name, sample, name)
        text = "".join(f"{source}\t{target}\n" for source, target in pairs)
        made[name] = Split(
            inputs=[source for source, _ in pairs],
            references=[[target] for _, target in pairs],
            path=Path(f"sandbox/{task.name}/{task.name}_{task.shots}_{sample}_{name}.tsv"),
            digest=hashlib.sha256(text.encode()).hexdigest(),
        )
    check_overlap(made["train"], made["dev"], made["test"])
    return made
