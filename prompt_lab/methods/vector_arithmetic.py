"""``VectorArithmetic``: evaluate sums of task prompt vectors as one bank.

A task prompt vector is what tuning added to an initial prompt (Belanec et al. 2024, arXiv
2408.01119). Prompts init + lambda * sum answer side by side; for each sum lambda is the value of a
grid with the best mean dev score (``vector_sums.py``). Left out: a search for a lambda beyond the
grid, and one for each vector of a sum.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.run import Run
from prompt_lab.core.text import some
from prompt_lab.core.vectors import parse_expression
from prompt_lab.data.datamodule import PromptDataModule
from prompt_lab.data.sampling import EvaluationBatch
from prompt_lab.files.prompts import FoundPrompt, Prompt, check_prompt
from prompt_lab.files.results import STARTS, text_table
from prompt_lab.files.tensors import read_metadata, write_csv
from prompt_lab.files.vectors import (
    Group,
    check_compatible,
    combine,
    common_init,
    complete,
    find_vectors,
)
from prompt_lab.methods.configs import as_list
from prompt_lab.methods.evaluation import Report
from prompt_lab.methods.method import PromptMethod
from prompt_lab.methods.vector_sums import MadePrefixes, Trial, VectorSum, best_scale, written

Found = dict[Group, dict[str, FoundPrompt]]
Study = Literal["singles", "pairs", "cross", "expressions"]

GRID = tuple(step / 20 for step in range(1, 21))
"""The paper's 0 < lambda <= 1; the authors' code adds 0, the bare initial prompt."""

VARIANTS = ("vectors", "vector_alone", "single", "initial_prompt", "no_prompt")
"""What is evaluated, in the order of the printed table."""

NO_FIT = "VectorArithmetic trains nothing: use prompt-lab test (or validate, for dev alone)"

SCALES = "scales.csv"
"""The file of a test's folder with the dev score of every value of lambda."""


class VectorArithmetic(PromptMethod):
    """Evaluates sums of task prompt vectors: init + lambda * sum, lambda chosen on dev.

    It has ``validate`` and ``test`` only. Vectors are those of ``data.samples``, one set for each
    seed that the prompt files have. Beside the sums, the tuned prompt of each task (``single``) and
    the bare initial prompt (``initial_prompt``) are evaluated; a sum that is a tuned prompt itself
    is listed as ``single`` on its own task and as ``vectors`` on others. Of equal mean dev scores
    the smaller lambda is taken. A task whose vector is taken away is scored but does not choose
    lambda.

    Args:
        prompts: prompt stores, folders of fits, prompt files or checkpoints, with the tuned
            prompts.
        study: ``singles``, the vector of each of ``data.tasks`` on its own initial prompt;
            ``pairs``, the sum of each two of them, evaluated on both; ``cross``, each vector on
            every initial prompt of its sample, and alone, without one; ``expressions``, those of
            ``expressions``.
        expressions: sums of vectors by the names of their tasks, such as ``glue-qnli + glue-mnli``
            or ``- glue-sst2``, as ``vectors apply`` reads them.
        evaluate_on: what an expression is evaluated on: ``named``, the tasks that it adds; or
            ``all`` of ``data.tasks``, and ``test`` then also scores each without any prompt
            (``no_prompt``). Tasks at scale 1 on all give the transfer of their prompts, for
            ``prompt-lab interpret --transfer``.
        scales: values of lambda, 0 to 1; null for 0.05, 0.1, ... 1 where sums are of several
            vectors or given as expressions, and for 1 in ``singles`` and ``cross``.
        kwargs: the arguments of :class:`PromptMethod`.

    """

    prompts_at_once: int = 128
    trains = False
    fixed = ("num_virtual_tokens", "label_smoothing")
    prompt_baselines = ("no_prompt",)
    guess_baselines = False

    def __init__(
        self,
        prompts: str | list[str],
        study: Study = "pairs",
        expressions: list[str] = [],  # noqa: B006 - read only
        evaluate_on: Literal["named", "all"] = "named",
        scales: list[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_virtual_tokens=0, label_smoothing=0.0, **kwargs)
        self.folders = as_list(prompts)
        self.study, self.evaluate_on = study, evaluate_on
        self.test_baselines = evaluate_on == "all"
        if bool(expressions) != (study == "expressions"):
            raise ValueError(
                f"model.study is {study} and model.expressions has {len(expressions)} expressions: "
                "give expressions with study expressions, and with it only"
            )
        if evaluate_on == "all" and study != "expressions":
            raise ValueError(f"model.evaluate_on all goes with study expressions, not {study}")
        self.expressions: dict[str, dict[str, float]] = {}
        for text in expressions:
            factors = parse_expression(text)
            if same := [other for other, own in self.expressions.items() if own == factors]:
                raise ValueError(
                    f"expressions {same[0]!r} and {text!r} are the same: leave one out"
                )
            self.expressions[" ".join(text.split())] = factors
        if scales is None:
            scales = [1.0] if study in ("singles", "cross") else list(GRID)
        if not scales or len(set(scales)) < len(scales) or not all(0 <= x <= 1 for x in scales):
            raise ValueError(
                f"model.scales is {scales}: give distinct numbers from 0 (the bare initial "
                "prompt) to 1; larger factors go into an expression, such as '2 * qnli'"
            )
        self.scales = tuple(sorted(map(float, scales)))
        self.trials: list[Trial] = []
        self.dev: dict[int, float] = {}
        self._sources: list[FoundPrompt] = []

    # ---- set-up ---------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        if stage == "fit":
            raise ValueError(NO_FIT)
        super().setup(stage)
        for place in (Path(name).resolve() for name in self.folders if self.run_dir):
            folder = place.parent if place.is_file() else place
            fit = folder.parent if folder.name in ("prompts", "checkpoints") else folder
            if self.file(".").resolve() in (folder, fit):
                raise ValueError(
                    f"--run_dir {self.run_dir} holds the tuned prompts, whose results would be "
                    "overwritten: give another folder"
                )

    def make_runs(self, data: PromptDataModule) -> list[Run]:
        """Every sum at every scale on every task; rows of a task come together."""
        found = {
            group: files
            for group, files in find_vectors(self.folders).items()
            if group[0] in data.samples and group[1] is not None
        }
        asked = list(self._sums(data, found))
        sums = list(self._baselines(asked, found))
        for made in asked:
            is_tuned = list(made.coefficients.values()) == [1.0] and made.scales == (1.0,)
            if is_tuned and made.base in made.vectors.values():  # equality 9: init + 1 * tau
                others = tuple(task for task in made.tasks if task not in made.coefficients)
                made = replace(made, tasks=others)  # on its own task it is listed as single
            sums.append(made)
        known: dict[tuple[str, str], VectorSum] = {}
        for made in sums:
            for other in (known.setdefault((made.name, task), made) for task in made.tasks):
                if other is not made:
                    raise ValueError(
                        f"{other.expression!r} and {made.expression!r} have the same name, "
                        f"{made.name}: leave one out"
                    )
        self.trials = [
            Trial(*place, made.seed, math.nan, 0, made, scale)
            for place in data.keys
            for made in sums
            if made.sample == place[1] and place[0] in made.tasks
            for scale in made.scales
        ]
        self._warn(data)
        return list(self.trials)

    def build(self, backbone: Backbone, runs: Sequence[Run]) -> None:
        """Make nothing: prompts are made when their turn comes."""

    def take(self, data: PromptDataModule, fitting: bool = True) -> None:
        """As every method's; other data bring other sums."""
        self.is_built = False
        super().take(data, fitting=False)

    def kept(self) -> dict[str, Tensor]:
        return {}

    def restore_best(self) -> None:
        """Nothing: the prompts are those of the files."""

    def _source(self, found: FoundPrompt) -> FoundPrompt:
        if found not in self._sources:
            prompt = found.prompt
            check_prompt(prompt, self.backbone, found.where)
            check_compatible(*self._sources[:1], found)
            if prompt.prompt.equal(prompt.init):
                self.warn_once(found.where, f"{found.where} adds nothing: it is its own init")
            self.num_virtual_tokens = len(prompt.prompt)
            self._sources.append(found)
        return found

    # ---- the sums of a study --------------------------------------------------------------------

    def _sums(self, data: PromptDataModule, found: Found) -> Iterator[VectorSum]:
        if self.study == "pairs" and len(data.tasks) < 2:
            raise ValueError("study pairs needs at least two data.tasks")
        asked, crosses = self.expressions, self.study == "cross"
        if self.study != "expressions":
            sets = combinations(data.tasks, 2 if self.study == "pairs" else 1)
            asked = {" + ".join(map(written, own)): dict.fromkeys(own, 1.0) for own in sets}
        for expression, factors in asked.items():
            tasks = self._evaluated(expression, factors, data)
            groups = self._groups(list(factors), data, found)
            for sample, seed, vectors in groups:
                if crosses:
                    bases = [own[tasks[0]] for other, _, own in groups if other == sample]
                    if all(bases[0].prompt.init.equal(one.prompt.init) for one in bases):
                        raise ValueError(
                            f"study cross: the prompts of {expression} sample {sample} start from "
                            "one initial prompt: tune some with several model.init_seed"
                        )
                else:
                    advice = "tune them from one, such as model.init.name vocab, or use vectors"
                    bases = [common_init(list(vectors.values()), f"{advice} apply")]
                place = (expression, factors, vectors)
                for base in bases:
                    made = VectorSum(
                        *("vectors", *place, base, sample, seed, tasks, self.scales, crosses)
                    )
                    if len(self.scales) > 1 and not made.counted:
                        raise ValueError(
                            f"expression {expression!r} takes away the vector of every task that "
                            "it is evaluated on, so none can choose lambda: give one number in "
                            "model.scales, or further data.tasks"
                        )
                    yield made
                if crosses:
                    yield VectorSum("vector_alone", *place, None, sample, seed, tasks, (1.0,))

    def _evaluated(
        self, expression: str, factors: Mapping[str, float], data: PromptDataModule
    ) -> tuple[str, ...]:
        if self.evaluate_on == "all":
            return tuple(data.tasks)
        added = tuple(task for task, factor in factors.items() if factor > 0)
        if not added:
            raise ValueError(
                f"expression {expression!r} adds no vector, so it names no task to be evaluated "
                "on: set model.evaluate_on to all"
            )
        if strange := [task for task in added if task not in data.tasks]:
            raise ValueError(
                f"expression {expression!r} is evaluated on {', '.join(strange)}, which data.tasks "
                "has not: add them there, or set model.evaluate_on to all"
            )
        return added

    def _groups(
        self, names: list[str], data: PromptDataModule, found: Found
    ) -> list[tuple[int, int, dict[str, FoundPrompt]]]:
        groups, left_out = complete(found, names, self.folders)
        if absent := [str(n) for n in data.samples if n not in {sample for sample, _ in groups}]:
            raise ValueError(
                f"no seed of sample {', '.join(absent)} has prompts of {' and '.join(names)}: tune "
                "them first, or leave the sample out of data.samples"
            )
        if left_out:
            self.warn_once(f"left out {names}", f"left out: {left_out}")
        return [
            (sample, seed, {task: self._source(one) for task, one in files.items()})
            for (sample, seed), files in groups.items()
            if sample is not None and seed is not None
        ]

    def _baselines(self, sums: Sequence[VectorSum], found: Found) -> Iterator[VectorSum]:
        bases: dict[tuple[str, int, int], FoundPrompt] = {}
        for made in sums:
            if made.base is not None and made.init_seed is not None:
                for task in made.tasks:
                    bases.setdefault((task, made.sample, made.init_seed), made.base)
        for (task, sample, seed), base in bases.items():
            path = found[sample, seed].get(task)
            own = base if path is None else self._source(path)
            name = own.prompt.task
            parts = ({name: 1.0}, {name: own}, own, sample, seed, (task,))
            yield VectorSum("initial_prompt", "", *parts, (0.0,))
            if path is not None:
                yield VectorSum("single", written(task), *parts, (1.0,))

    def _warn(self, data: PromptDataModule) -> None:
        for name in ("task_prefix", "max_input_length", "template", "system"):
            own, prompts = getattr(data, name), [found.prompt for found in self._sources]
            other = {one.name: getattr(one, name) for one in prompts}
            missing = own if name == "system" else None
            other = {key: value for key, value in other.items() if value not in (own, missing)}
            if other:
                was = next(iter(other.values()))
                told = f"data.{name} is {own}, but it was {was} when {some([*other])} were tuned"
                self.warn_once(name, told)
        for task, sample in dict.fromkeys((trial.task, trial.sample) for trial in self.trials):
            given = {answers[0] for answers in data.splits[task, sample]["dev"].references}
            if missing := [one for one in data.tasks[task].labels or () if one not in given]:
                told = f"dev of {task}, sample {sample}, has no row of {some(missing)}"
                self.warn_once(told, f"{told}: lambda is chosen without")

    # ---- evaluation -----------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Refuse; Lightning asks for this before :meth:`setup` can refuse a fit."""
        raise ValueError(NO_FIT)

    def configure_optimizers(self) -> None:
        """No optimizer."""

    def prefixes(self, current: bool) -> MadePrefixes:
        return MadePrefixes(self.backbone, self.evaluated, self.prompts_at_once, self._made)

    @property
    def init(self) -> Tensor:
        """What no prompt is made of: (R, 0, D)."""
        return torch.empty(len(self.runs), 0, self.backbone.hidden_size, device=self.device)

    def _made(self, places: Sequence[int]) -> Tensor:
        trials = [self.trials[place] for place in places]
        return torch.stack([trial.of.prompt(trial.scale) for trial in trials]).to(self.device)

    def on_validation_start(self) -> None:
        self.evaluated = list(range(len(self.trials)))
        super().on_validation_start()

    def validation_step(self, batch: EvaluationBatch, batch_idx: int) -> None:
        """Answer dev rows; the scores stay, the answers of all scales would be too many to keep."""
        self.evaluation.add(batch, self.answer(self._prefixes, batch), keep=False)

    def on_validation_epoch_end(self) -> None:
        scores = self.evaluation.scores()
        self._choose(scores)
        Report(self, self.evaluation, "validate").write(scores)

    def on_test_start(self) -> None:
        """Choose the scales on dev, in the precision of the test; then begin the test."""
        self.evaluated = list(range(len(self.trials)))
        made = self.answer_all("dev", self.evaluated, self.prefixes(current=False), keep=False)
        self._choose(made.scores())
        super().on_test_start()

    def _choose(self, scores: Tensor) -> None:
        dev = scores.tolist()
        by_sum: dict[VectorSum, dict[float, list[float]]] = {}
        for trial, score in zip(self.trials, dev, strict=True):
            if trial.task in (trial.of.counted or trial.of.tasks):
                by_sum.setdefault(trial.of, {}).setdefault(trial.scale, []).append(score)
        best = {
            made: best_scale({scale: statistics.fmean(found) for scale, found in own.items()})
            for made, own in by_sum.items()
        }
        self.evaluated = [i for i, t in enumerate(self.trials) if t.scale == best[t.of]]
        self.dev = {i: dev[i] for i in self.evaluated}
        if self.trainer.is_global_zero and self.run_dir:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            place = ("expression", "variant", "task", "sample", "init_seed", *STARTS, "scale")
            rows = (
                {**t.columns, "task": t.task, "sample": t.sample, "dev": score}
                | {"chosen": t.scale == best[t.of]}
                for t, score in zip(self.trials, dev, strict=True)
            )
            write_csv(self.run_dir / SCALES, (*place, "dev", "chosen"), rows)

    # ---- results --------------------------------------------------------------------------------

    def report_test(self, scores: Tensor) -> None:
        """As every method's; the prompts of an earlier study in the folder go."""
        if self.trainer.is_global_zero and self.run_dir:
            for path in (self.run_dir / "prompts").glob("*.safetensors"):
                if read_metadata(path, "prompt").get("role") == "sum":
                    path.unlink()
        super().report_test(scores)

    def best_prompts(self, test_scores: Tensor | None = None) -> Iterator[Prompt]:
        for i in self.evaluated:
            trial = self.trials[i]
            made = trial.of
            yield combine(
                trial.name,
                made.coefficients,
                made.vectors,
                made.base,
                expression=made.expression or f"0 * {written(next(iter(made.vectors)))}",
                scale=trial.scale,
                task=trial.task,
                sample=trial.sample,
                **asdict(made.start),
                dev_score=None if self.dev[i] != self.dev[i] else self.dev[i],
                test_score=None if test_scores is None else test_scores[i].item(),
                metric=self.datamodule.tasks[trial.task].metric,
                status="finished",
                **self.way_of_answering(trial.task, trial.sample),
            )

    def result_facts(self, run: int) -> dict[str, Any]:
        absent = dict.fromkeys(("learning_rate", "batch_size", "order_seed"))
        return absent | self.trials[run].columns | {"run": self.evaluated.index(run)}

    def digests(self) -> dict[str, Any]:
        files = sorted(source.digest for source in self._sources)
        return {**super().digests(), "prompts": files}

    def summary(self) -> str:
        lines = []
        for variant in dict.fromkeys(trial.of.variant for trial in self.trials):
            own = [trial.of for trial in self.trials if trial.of.variant == variant]
            sums = set(own)
            lines.append(
                f"{variant}: {len(sums)} x {max(len(made.scales) for made in sums)} values of "
                f"lambda, {len(own)} prompts on dev and {sum(len(made.tasks) for made in sums)} on "
                "test"
            )
        return "\n".join([*lines, f"at most {self.prompts_at_once} prompts in memory at a time"])

    def score_table(self, rows: list[dict[str, Any]]) -> str:
        """A line for each variant, expression and task, over samples and seeds.

        ``of single`` is the mean score over that of the task's tuned prompts of the same samples
        and seeds (single-task performance kept).
        """
        import pandas as pd

        frame: Any = pd.DataFrame(rows)
        frame["expression"] = frame["expression"].fillna("-")
        frame["order"] = pd.factorize(frame["expression"])[0]
        frame["kind"] = frame["variant"].map(VARIANTS.index)
        frame = frame.sort_values(["kind", "order"], kind="stable")
        place = ["task", "sample", "init_seed"]
        single = frame[frame["variant"] == "single"].set_index(place)["test"]
        frame["single"] = single.reindex(pd.MultiIndex.from_frame(frame[place])).to_numpy()
        lines, keys = [], ["expression", "variant", "task", "metric"]
        for key, own in frame.astype({"test": float}).groupby(keys, sort=False):
            test, of_single, scale = own["test"], own["single"].mean(skipna=False), own["scale"]
            spread = f" ± {test.std():.3f}" if test.count() > 1 else ""
            score = f"{test.mean():.3f}{spread}" if test.count() else "-"
            kept = f"{test.mean(skipna=False) / of_single:.3f}" if of_single > 0 else "-"
            mean_scale = f"{scale.mean():.3g}" if scale.count() else "-"
            lines.append((*key, score, kept, mean_scale, str(len(own))))
        return text_table((*keys, "score", "of single", "scale", "prompts"), lines)
