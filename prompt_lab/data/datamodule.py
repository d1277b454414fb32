"""Data modules: the rows of few-shot tasks, tokenised once, and the batches of a bank of runs.

`PromptDataModule` makes tokens by the rules of the backbone that a method brings along, and loaders
from the method's runs and `Progress`. `CrossFitDataModule` reads files in the layout of the
CrossFit gym, `RowsDataModule` takes pairs of texts; a subclass with a method ``rows`` brings any
other source. Everything stays in memory: these are few-shot sets.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

from lightning.pytorch import LightningDataModule

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.metric_names import METRICS
from prompt_lab.core.text import Side, Template, check_template
from prompt_lab.data.few_shot import draw_stratified
from prompt_lab.data.files import (
    SPLITS,
    DataError,
    Split,
    SplitName,
    find_shots,
    label_fault,
    read_task,
)
from prompt_lab.data.partitions import expand_sets
from prompt_lab.data.sampling import Draw, EvaluationSteps, Key, Layout, Progress, Rows, TrainSteps
from prompt_lab.data.tasks import Shots, Task, find_tasks
from prompt_lab.sandbox import SANDBOX, SPLIT_ROWS, TASKS
from prompt_lab.sandbox import rows as sandbox_rows

Pairs = Sequence[tuple[str, str | Sequence[str]]]
"""Input and answer, or accepted answers, of each row."""


class PromptDataModule(LightningDataModule):
    """Rows of tasks for the methods; a subclass gives them by ``rows``.

    Args:
        tasks: the tasks, with metric and labels.
        samples: few-shot samples of each task.
        max_input_length: longer inputs are cut to this many tokens, specials included; it does
            not count the prompt, which is never cut.
        task_prefix: put ``[name of the task]`` in front of every input, as CrossFit's loaders do.
        order_seed: seed of the order in which each run sees its training rows.
        truncation_side: the side on which the text of longer inputs is cut, ``right`` (its end) or
            ``left`` (its beginning, a task_prefix included); special tokens are never cut.
        template: ``plain`` for the bare input and answer, or ``chat`` for the chat template of an
            instruct model's tokenizer: the input as the user's turn, the answer as the
            assistant's. The soft prompt stands in front of all; only the input's text is cut.
        system: system text of the chat; null for what the template does without.

    Raises:
        ValueError: a setting out of its range.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        samples: Sequence[int] = (0,),
        max_input_length: int = 512,
        task_prefix: bool = False,
        order_seed: int = 0,
        truncation_side: Side = "right",
        template: Template = "plain",
        system: str | None = None,
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
        self.tasks: dict[str, Task] = {task.name: task for task in tasks}
        if len(self.tasks) < len(tasks):
            raise ValueError(f"data.tasks names a task twice: {[task.name for task in tasks]}")
        self.given_tasks = list(self.tasks)
        self.samples, self.order_seed = list(samples), order_seed
        check_template(template, system, "data.")
        self.truncation_side: Side = truncation_side
        self.template: Template = template
        self.system = system
        self.max_input_length, self.task_prefix = max_input_length, task_prefix
        self.splits: dict[Key, dict[SplitName, Split]] = {}  # filled by `setup`
        self._backbone: Backbone | None = None
        self._tokens: dict[tuple[str, str, str], Rows] = {}

    def rows(self, task: str, sample: int, split: SplitName) -> Pairs:
        """The rows of one split: (input, answer) or (input, accepted answers) pairs."""
        raise NotImplementedError(f"{type(self).__name__} says no rows: give it a method rows")

    def read(self, task: Task, sample: int) -> dict[SplitName, Split]:
        """The rows of one sample as splits, from ``rows``; a ``DataError`` names what is wrong."""
        made: dict[SplitName, Split] = {}
        for name in SPLITS:
            where = Path(f"{task.name} {sample} {name}")
            made[name] = as_split(self.rows(task.name, sample, name), where)
            for line, answers in enumerate(made[name].references, 1):
                if fault := label_fault(answers, task):
                    raise DataError(f"{where}, line {line}: {fault}")
        return made

    def setup(self, stage: str | None = None) -> None:
        """Read and check the rows of every task and sample, once; a ``DataError`` names a fault."""
        for task, sample in self.keys:
            if (task, sample) not in self.splits:
                self.splits[task, sample] = self.read(self.tasks[task], sample)

    @property
    def keys(self) -> list[Key]:
        """Every (task, sample)."""
        return [(task, sample) for task in self.tasks for sample in self.samples]

    def connect(self, backbone: Backbone) -> None:
        """Take the backbone whose rules make the tokens, when they are first asked for.

        Raises:
            ValueError: a chat template that its tokenizer does not have, or that cannot be used.
        """
        if backbone is not self._backbone:
            self._tokens.clear()
        self._backbone = backbone
        self.frame = backbone.frame(self.template, self.system)
        self.layout = Layout(
            backbone.pad_id, not backbone.is_encoder_decoder, backbone.front(self.frame)
        )

    def tokens(self, task: str, sample: int, split: SplitName, keep: bool = True) -> Rows:
        """Tokenised rows of one split, to keep for the next time; equal test sets are made once."""
        data, kind = self.splits[task, sample][split], self.tasks[task]
        key = (task, data.digest, split)
        if key in self._tokens:
            return self._tokens[key]
        backbone = self._backbone
        assert backbone is not None, "tokens are asked for before connect"
        prefix = f" [{task}] " if self.task_prefix else ""
        try:
            whole = backbone.encode_inputs([prefix + text for text in data.inputs], self.frame)
        except ValueError as error:
            raise ValueError(f"{data.path}: {error}") from None
        most, side = self.max_input_length, self.truncation_side
        answers = list(dict.fromkeys(chain.from_iterable(data.references)))  # each once
        ids = dict(zip(answers, backbone.encode_targets(answers, self.frame), strict=True))
        found = Rows(
            kind,
            [backbone.cut_input(tokens, most, side, self.frame) for tokens in whole],
            [[ids[answer] for answer in row] for row in data.references],
            cut=sum(len(tokens) > most for tokens in whole),
        )
        if keep:
            self._tokens[key] = found
        return found

    def longest_answer(self, task: str, sample: int) -> int:
        """Tokens of the longest answer in train and dev, which caps what is generated."""
        return max(self.tokens(task, sample, split).longest_target for split in ("train", "dev"))

    def feed(
        self,
        progress: Progress,
        draw: Draw | None,
        evaluated: Callable[[], Sequence[int]],
        **steps: Any,
    ) -> None:
        """Take what loaders are made of.

        ``draw`` is None where nothing is trained, ``evaluated`` gives the places of the runs that
        an evaluation answers for, and ``steps`` are fields of :class:`EvaluationSteps`.
        """
        self.progress, self.draw, self.evaluated, self._steps = progress, draw, evaluated, steps

    def evaluation_steps(
        self, split: SplitName, live: Callable[[], Sequence[int]]
    ) -> EvaluationSteps:
        """The batches of an evaluation of some runs."""
        runs = self._steps["runs"]
        keys = list(dict.fromkeys((runs[i].task, runs[i].sample) for i in live()))
        return EvaluationSteps(
            rows={key: self.tokens(*key, split) for key in keys},
            longest_answer={key: self.longest_answer(*key) for key in keys},
            layout=self.layout,
            live=live,
            **self._steps,
        )

    def train_dataloader(self) -> TrainSteps:
        """The batches of a fit: as many as ``trainer.max_steps`` takes, or one pass."""
        trainer = self.trainer
        assert trainer is not None
        assert self.draw is not None
        steps = trainer.max_steps * trainer.accumulate_grad_batches
        return TrainSteps(self.draw, self.progress, steps if steps > 0 else self.draw.one_pass)

    def val_dataloader(self) -> EvaluationSteps:
        """The batches of an evaluation on dev."""
        return self.evaluation_steps("dev", self.evaluated)

    def test_dataloader(self) -> EvaluationSteps:
        """The batches of the evaluation on test."""
        return self.evaluation_steps("test", self.evaluated)

    predict_dataloader = test_dataloader


class RowsDataModule(PromptDataModule):
    """Tasks from pairs of texts.

    Args:
        tasks: for each task its pairs by split: ``{"sst": {"train": [("it was lovely", "great"),
            ...], "dev": [...], "test": [...]}}``; instead of an answer several accepted ones.
        labels: the closed label sets of tasks that have one; answers of others are generated.
        metrics: by task; ACC where there are labels, else EM.
        settings: the other arguments of :class:`PromptDataModule`.
    """

    def __init__(
        self,
        tasks: Mapping[str, Mapping[SplitName, Pairs]],
        labels: Mapping[str, Sequence[str]] | None = None,
        metrics: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        labels, metrics = labels or {}, metrics or {}
        if strange := [name for name in (*labels, *metrics) if name not in tasks]:
            raise ValueError(f"{', '.join(strange)} is none of the tasks {', '.join(tasks)}")
        for name, own in labels.items():
            if isinstance(own, str) or len(own) < 2:
                raise ValueError(f"labels of {name} are {own!r}: give a list of two or more")
        made = []
        for name, of_task in tasks.items():
            if lacking := [split for split in SPLITS if split not in of_task]:
                raise ValueError(f"task {name} has no {', '.join(lacking)}: give train, dev, test")
            own = tuple(labels[name]) if name in labels else None
            metric = metrics.get(name, "ACC" if own else "EM")
            if metric not in METRICS:
                raise ValueError(f"metric {metric} of {name}: choose among {', '.join(METRICS)}")
            made.append(Task(name, "custom", metric, None, own))
        super().__init__(made, **settings)
        self._pairs = tasks

    def rows(self, task: str, sample: int, split: SplitName) -> Pairs:
        """The pairs that were given."""
        return self._pairs[task][split]


class CrossFitDataModule(PromptDataModule):
    """Few-shot tasks from a folder in CrossFit's layout, or from the embedded sandbox.

    Args:
        tasks: names of tasks, from the package's table or ``task_file``; a set of a partition,
            such as ``mpt/cls_to_cls/target``, stands for its tasks.
        root: folder that holds one folder per task, with files
            ``<task>_<K>_<sample>_{train,dev,test}.tsv``; or ``sandbox`` for the package's own.
        samples: few-shot samples of each task (CrossFit has 100, 13, 21, 42 and 87).
        task_file: YAML file with rows for your own tasks: ``name: {metric: ACC, labels: [a, b]}``.
        allow_overlap: accept files that share a row between splits, as some of CrossFit's own do
            (their sources repeat rows), instead of refusing them.
        shots: K of the file names, a number or ``all``; null takes that of the task table. Of the
            sandbox it is the number of training rows, out of 512.
        settings: the other arguments of :class:`PromptDataModule`.
    """

    def __init__(
        self,
        tasks: list[str],
        root: str = SANDBOX,
        samples: list[int] = [100],  # noqa: B006 - read only; a list so that the CLI shows it
        task_file: str | None = None,
        allow_overlap: bool = False,
        shots: Shots | None = None,
        **settings: Any,
    ) -> None:
        chosen = find_tasks(expand_sets(tasks), task_file)
        most = SPLIT_ROWS["train"]
        if shots is not None:
            if shots != "all" and (type(shots) is not int or shots < 1):
                raise ValueError(f"data.shots is {shots!r}: give a whole number above 0, or all")
            if root == SANDBOX and (shots == "all" or shots > most):
                raise ValueError(
                    f"data.shots is {shots}, but a sandbox task has {most} training rows: give up "
                    f"to {most}, or leave it out"
                )
            chosen = [replace(task, shots=shots) for task in chosen]
        super().__init__(chosen, samples, **settings)
        self.given_tasks = list(tasks)  # with sets of partitions as they were named
        self.root, self.allow_overlap = root, allow_overlap
        self._files: dict[str, dict[str, Split]] = {}  # by task and digest

    def read(self, task: Task, sample: int) -> dict[SplitName, Split]:
        """The splits of one sample: files, or generated rows; a ``DataError`` names file, line."""
        if self.root == SANDBOX:
            return super().read(task, sample)
        shots = find_shots(self.root, task)  # fills in a K that the row leaves open
        task = self.tasks[task.name] = replace(task, shots=shots)
        known = self._files.setdefault(task.name, {})
        return read_task(self.root, task, sample, self.allow_overlap, known)

    def rows(self, task: str, sample: int, split: SplitName) -> Pairs:
        """The generated rows of a sandbox task; K training rows keep labels' shares."""
        if task not in TASKS:
            raise ValueError(
                f"task {task!r} is not in the sandbox: set data.root to the folder that holds "
                f"its files, or choose among {', '.join(sorted(TASKS))}"
            )
        pairs, own = sandbox_rows(task, sample, split), self.tasks[task]
        if split != "train" or not isinstance(own.shots, int) or own.shots == len(pairs):
            return pairs
        kinds = [answer if own.labels else "" for _, answer in pairs]
        try:
            chosen, _ = draw_stratified(kinds, own.shots, 0, sample)
        except DataError as error:
            raise DataError(f"{task}: {error}") from None
        return [pairs[row] for row in chosen]


def as_split(pairs: Pairs, where: Path) -> Split:
    """Pairs of texts as the rows of a split; spaces around them are dropped, as in files."""
    rows: list[list[str]] = []
    for number, pair in enumerate(pairs, 1):
        text, answers = pair if isinstance(pair, (tuple, list)) and len(pair) == 2 else (None, ())
        row: list[Any] = [text, answers]
        if isinstance(answers, Iterable) and not isinstance(answers, str):
            row = [text, *answers]
        if len(row) < 2 or not all(isinstance(x, str) and x.strip() for x in row):
            raise DataError(
                f"{where}, row {number}: {pair!r} is no pair of a text and an answer, or a list of "
                "accepted answers, none of them empty"
            )
        rows.append([x.strip() for x in row])
    if not rows:
        raise DataError(f"{where}: no rows: give at least one of each split")
    marks = str.maketrans({"\t": "\\t", "\n": "\\n"})
    told = "".join("\t".join(x.translate(marks) for x in row) + "\n" for row in rows)
    digest = hashlib.sha256(told.encode()).hexdigest()
    return Split([row[0] for row in rows], [row[1:] for row in rows], where, digest)
