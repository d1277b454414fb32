"""One pass over dev or test: the answers of every run, its scores, and the files of a test.

Metric states are tensors that sum over ranks, each row answered by one rank, so scores are those of
one process however the rows are shared. Where whole runs are shared, each rank scores its own, and
what is written is joined in the order of the grid.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompt_lab.core.bank import Prefixes
from prompt_lab.core.metrics import BankMetric, chance_score, majority_score
from prompt_lab.data.batches import EvaluationBatch
from prompt_lab.data.files import SPLITS, SplitName
from prompt_lab.files.prompts import PromptStore
from prompt_lab.files.results import RESULT_COLUMNS, STARTS, write_predictions
from prompt_lab.files.tensors import write_atomically, write_csv
from prompt_lab.methods.run_shares import gather_values

if TYPE_CHECKING:
    from prompt_lab.methods.prompt_method import PromptMethod

Key = tuple[str, int]

IN_COLUMNS = (
    *("data.tasks", "data.samples", "data.shots", "data.order_seed"),
    *("model.init_seed", "model.seed", "model.learning_rate", "model.batch_size"),
    *("model.num_virtual_tokens", "model.intrinsic_dim", "model.subspace.intrinsic_dim"),
    *("model.init.name", "model.init.source_tasks", "model.optim.name", "model.optim"),
    *("model.metric_variant", "model.expressions", "model.scales"),
)
"""Settings that results have as columns of their own, or that differ between tasks."""


class Evaluation:
    """Answers and scores of the runs of a bank on one split.

    Args:
        method: the method whose runs are evaluated.
        split: ``dev`` or ``test``.
        prompts: (R, N, D) the prompts of the runs, which do not change meanwhile; or the prefixes
            of prompts that are made when they are asked for.
    """

    def __init__(self, method: PromptMethod, split: SplitName, prompts: Tensor | Prefixes) -> None:
        assert method.backbone is not None
        self.method = method
        is_made = isinstance(prompts, Prefixes)
        self.prefixes = prompts if is_made else Prefixes(method.backbone, prompts)
        self.split: SplitName = split
        self.members: dict[Key, list[int]] = defaultdict(list)
        for i, run in enumerate(method.runs):
            self.members[run.task, run.sample].append(i)
        self.place = {i: at for of_key in self.members.values() for at, i in enumerate(of_key)}
        self.metrics = {key: self._metric(key, len(runs)) for key, runs in self.members.items()}
        self.predictions: list[tuple[int, int, str]] = []
        self.baseline_predictions: dict[str, list[tuple[int, int, str]]] = {}
        self.told: list[tuple[str, str]] = []  # variant and name of each run, as in the results

    def _metric(self, key: Key, prompts: int) -> BankMetric:
        """The metric of a task's sample for so many prompts."""
        task, rows = self.method.datamodule.tasks[key[0]], self.references(key)
        metric = BankMetric(
            task.metric,
            prompts,
            rows,
            task.labels,
            self.method.metric_variant,
            sync_on_compute=not self.method.shares.divided,
        )
        return metric.to(self.method.device)

    def references(self, key: Key) -> list[list[str]]:
        """Accepted answers of the rows of a task's sample."""
        return self.method.datamodule.splits[key][self.split].references

    def add(self, step: EvaluationBatch) -> None:
        """Answer a batch under its runs' prompts and take the answers."""
        texts = self.method.answers(self.prefixes, step)
        by_key: dict[Key, list[tuple[int, int, str]]] = defaultdict(list)
        for i, row, text in zip(step.batch.prompts, step.batch.rows, texts, strict=True):
            run = self.method.runs[i]
            by_key[run.task, run.sample].append((i, row, text))
        for key, answers in by_key.items():
            runs, rows, found = zip(*answers, strict=True)
            self.metrics[key].update([self.place[i] for i in runs], rows, found)
            self.predictions += answers

    def scores(self) -> Tensor:
        """Score of every run (R,), float64; NaN for runs that were not evaluated."""
        shape, device = (len(self.method.runs),), self.method.device
        scores = torch.full(shape, torch.nan, dtype=torch.float64, device=device)
        for key, runs in self.members.items():
            scores[runs] = self.metrics[key].compute()
        return scores

    def constant_runs(self) -> list[int]:
        """Runs that gave this rank one and the same answer to rows with different references."""
        answers: dict[int, set[str]] = defaultdict(set)
        golds: dict[int, set[str]] = defaultdict(set)
        for i, row, text in self.predictions:
            run = self.method.runs[i]
            answers[i].add(text)
            golds[i].add(self.references((run.task, run.sample))[row][0])
        return [i for i, texts in answers.items() if len(texts) == 1 and len(golds[i]) > 1]

    # ---- files ----------------------------------------------------------------------------------

    def report(self, scores: Tensor, stage: str) -> None:
        """Print the table; on ``test`` also write results, predictions and scored prompts."""
        self.fit_id, settings, self.digests = self.method.identity()
        self.settings = json.dumps(
            {k: v for k, v in self.method.unusual(settings).items() if k not in IN_COLUMNS},
            default=str,
        )
        rows = self.method.shares.join(self._result_rows(scores, stage))
        if stage == "test":
            if self.method.test_baselines:
                rows += self._baseline_rows()
            self._write(rows, scores)
        self._print(rows, stage)

    def _print(self, rows: list[dict[str, Any]], stage: str) -> None:
        """The table on the terminal; ``validate`` shows dev scores in it."""
        if stage == "validate":
            rows = [{**row, "test": row["dev"]} for row in rows]
        if not self.method.trainer.is_global_zero:
            return
        say = self.method.print  # which puts a progress bar out of the way
        say(f"\n{self.split} scores\n{self.method.score_table(rows)}\n", flush=True)
        if stage == "test":
            prompts = self.method.stores_prompts
            kept = "results, predictions and prompts" if prompts else "results and predictions"
            say(f"{kept} are in {self.method.run_dir}", flush=True)

    def _result_rows(self, scores: Tensor, stage: str) -> list[dict[str, Any]]:
        """A line of results per own run."""
        lines = []
        for i, prompt in enumerate(self.method.best_prompts()):
            run = self.method.runs[i]
            line = self._common((run.task, run.sample), stage)
            line |= {
                "init_seed": run.init_seed,
                "order_seed": self.method.datamodule.order_seed,
                **{name: getattr(prompt, name) for name in STARTS},
                "num_virtual_tokens": self.method.num_virtual_tokens,
                "learning_rate": run.learning_rate,
                "batch_size": run.batch_size,
                "dev": prompt.dev_score if stage == "test" else scores[i].item(),
                "test": scores[i].item() if stage == "test" else None,
                "best_step": prompt.steps,
                "seconds": prompt.seconds,
                "status": prompt.status,
                "run": self.method.shares.own[i],
            }
            line |= self.method.result_facts(i)
            if self.method.stores_prompts:
                line["prompt_file"] = f"prompts/{prompt.name}.safetensors"
            lines.append(line)
            self.told.append((line["variant"], prompt.name))
        return lines

    def _common(self, key: Key, stage: str) -> dict[str, Any]:
        """What all lines of a task's sample share."""
        from prompt_lab import __version__

        method = self.method
        assert method.backbone is not None
        task = method.datamodule.tasks[key[0]]
        return {
            "fit_id": self.fit_id,
            "method": type(method).__name__,
            "stage": stage,
            "backbone": method.backbone.name,
            "task": task.name,
            "ontology": task.ontology,
            "sample": key[1],
            "shots": task.shots,
            "decoding": method.describe_decoding(task),
            "metric": task.metric,
            "metric_variant": method.metric_variant,
            "test_rows": len(self.references(key)) if self.split == "test" else None,
            **{
                f"cut_{split}": method.datamodule.rows(*key, split).cut
                for split in (SPLITS if stage == "test" else SPLITS[:2])
            },
            "settings": self.settings,
            "version": __version__,
        }

    def _baseline_rows(self) -> list[dict[str, Any]]:
        """Lines for no prompt, the initial prompt, chance and the majority class."""
        lines = []
        best = list(self.method.best_prompts())
        for variant in ("no_prompt", "initial_prompt"):
            chosen = self._distinct(by_start=variant == "initial_prompt")
            scores = self._score_variant(variant, chosen)
            own: list[dict[str, Any] | None] = [None] * len(self.method.runs)
            for i in chosen:
                run = self.method.runs[i]
                line = self._common((run.task, run.sample), "test") | {"variant": variant}
                if variant == "initial_prompt":
                    line["init_seed"] = run.init_seed
                    line |= {name: getattr(best[i], name) for name in STARTS}
                own[i] = line | {"test": scores[i].item()}
            lines += [line for line in self.method.shares.join(own) if line is not None]
        for key in dict.fromkeys((run.task, run.sample) for run in self.method.all_runs):
            task, variant = self.method.datamodule.tasks[key[0]], self.method.metric_variant
            test = self.references(key)
            train = self.method.datamodule.splits[key]["train"].references
            chance = chance_score(task.metric, task.labels, test, variant)
            common = [answers[0] for answers in train]
            majority = majority_score(task.metric, common, test, task.labels, variant)
            for name, value in (("chance", chance), ("majority", majority)):
                lines.append(self._common(key, "test") | {"variant": name, "test": value})
        return lines

    def _distinct(self, by_start: bool) -> list[int]:
        """Own runs among one per (task, sample), or per (task, sample, initial seed, source)."""
        first: dict[tuple[Any, ...], int] = {}
        for place, run in enumerate(self.method.all_runs):
            start = (run.init_seed, run.source) if by_start else ()
            first.setdefault((run.task, run.sample, *start), place)
        chosen = set(first.values())
        return [i for i, place in enumerate(self.method.shares.own) if place in chosen]

    def _score_variant(self, variant: str, chosen: list[int]) -> Tensor:
        """Scores (R,) of chosen runs with no prompt or with their initial prompt."""
        method = self.method
        prompts = method.init if variant == "initial_prompt" else method.init[:, :0]
        other = Evaluation(method, self.split, prompts)
        with method.trainer.precision_plugin.forward_context():  # as Lightning's own steps have it
            for step in method.evaluation_steps(self.split, lambda: chosen):
                other.add(step.to(method.device))
        self.baseline_predictions[variant] = other.predictions
        return other.scores()

    def _write(self, rows: list[dict[str, Any]], scores: Tensor) -> None:
        """Write what a test leaves behind, once, by the first process."""
        method = self.method
        found = [(*self.told[i], i, row, text) for i, row, text in self.predictions]
        for variant, others in self.baseline_predictions.items():
            found += [(variant, method.runs[i].name, i, row, text) for i, row, text in others]
        places = method.shares.own
        gathered = gather_values([(v, places[i], row, n, text) for v, n, i, row, text in found])
        if method.stores_prompts:
            method.save_prompts(
                PromptStore(Path(method.run_dir) / "prompts"), method.best_prompts(scores)
            )
        if not method.trainer.is_global_zero:
            return
        folder = Path(method.run_dir)
        write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
        write_predictions(folder / "predictions.jsonl", map(self._prediction, sorted(gathered)))
        digests = json.dumps(self.digests, indent=1)
        write_atomically(folder / "digests.json", digests.encode())

    def _prediction(self, found: tuple[str, int, int, str, str]) -> dict[str, Any]:
        """One line of the predictions file."""
        variant, place, row, name, text = found
        run = self.method.all_runs[place]
        return {
            "variant": variant,
            "run": name,
            "task": run.task,
            "row": row,
            "prediction": text,
            "references": self.references((run.task, run.sample))[row],
        }
