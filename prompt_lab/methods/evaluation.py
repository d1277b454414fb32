"""One pass over dev or test: the answers of every run and its scores, and the records of a test.

Metric states are tensors that sum over ranks, each row answered by one rank, so scores are those of
one process however the rows are shared. Where whole runs are shared, each rank scores its own, and
what is written is joined in the order of the grid.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.bank import Prefixes, is_out_of_memory
from prompt_lab.core.batch import Batch
from prompt_lab.core.candidates import LabelScore
from prompt_lab.core.metrics import BankMetric, chance_score, majority_score
from prompt_lab.core.text import Frame
from prompt_lab.data.files import SPLITS, SplitName
from prompt_lab.data.sampling import EvaluationBatch, Key
from prompt_lab.files.results import RESULT_COLUMNS, STARTS, write_predictions
from prompt_lab.files.tensors import write_atomically, write_csv
from prompt_lab.methods.identity import fit_id, unusual
from prompt_lab.methods.sharing import gather_values

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod

PrefixOf = Callable[[Batch], tuple[Prefix, Batch]]
"""What the rows of a batch need of their prompts, and the rows numbered by its order."""


@dataclass(frozen=True)
class Way:
    """How answers to a task are made.

    Attributes:
        labels: what scored answers are chosen from; None where answers are generated.
        max_new_tokens: longest generated answer; None for that of the batch.
        num_beams: beams of generated answers.
        label_score: what a label's score is of its tokens' log-likelihoods.
        frame: what stands around inputs and answers; None for plain rows.
    """

    labels: list[str] | None
    max_new_tokens: int | None
    num_beams: int
    label_score: LabelScore = "sum"
    frame: Frame | None = None

    @property
    def described(self) -> str:
        """The way, for the results."""
        if self.labels is not None:
            return "score"
        return f"generate beams={self.num_beams} tokens={self.max_new_tokens or 'longest'}"


def answers(backbone: Backbone, prefix_of: PrefixOf, step: EvaluationBatch, way: Way) -> list[str]:
    """One answer per row of an evaluation batch; a batch too large for memory is halved."""

    def of_rows(prefix: Prefix, batch: Batch) -> list[str]:
        if way.labels is not None:
            chosen = backbone.choose(prefix, batch, way.labels, way.label_score, way.frame)
            return [way.labels[i] for i in chosen]
        length = way.max_new_tokens or step.max_new_tokens
        return backbone.generate(prefix, batch, length, way.num_beams, way.frame)

    try:
        return of_rows(*prefix_of(step.batch))
    except RuntimeError as error:
        if not is_out_of_memory(error) or len(step.batch) < 2:
            raise
    # Here the failed prefix is gone, which no name of this frame held.
    half = len(step.batch) // 2
    parts = (step.batch.slice(0, half), step.batch.slice(half, len(step.batch)))
    return [
        text
        for part in parts
        for text in answers(backbone, prefix_of, replace(step, batch=part), way)
    ]


class Evaluation:
    """Answers and scores of the runs of a method's bank on one split."""

    def __init__(self, method: PromptMethod, split: SplitName) -> None:
        self.data, self.runs = method.datamodule, method.runs
        self.split: SplitName = split
        # Apple's GPUs have no float64, in which scores are summed.
        self.device = torch.device("cpu") if method.device.type == "mps" else method.device
        self.members: dict[Key, list[int]] = defaultdict(list)
        for i, run in enumerate(self.runs):
            if (run.task, run.sample) in self.data.splits:
                self.members[run.task, run.sample].append(i)
        self.place = {i: at for of_key in self.members.values() for at, i in enumerate(of_key)}
        self.metrics = {
            key: BankMetric(
                self.data.tasks[key[0]].metric,
                len(members),
                self.references(key),
                self.data.tasks[key[0]].labels,
                method.metric_variant,
                sync_on_compute=method.row_share[1] > 1,
            ).to(self.device)
            for key, members in self.members.items()
        }
        self.predictions: list[tuple[int, int, str]] = []

    def references(self, key: Key) -> list[list[str]]:
        """Accepted answers of the rows of a task's sample."""
        return self.data.splits[key][self.split].references

    def add(self, step: EvaluationBatch, texts: Sequence[str], keep: bool = True) -> None:
        """Take the answers to a batch; ``keep`` them as predictions too."""
        prompts, rows = step.batch.prompts, step.batch.rows  # all of one task and sample
        run = self.runs[prompts[0]]
        places = [self.place[i] for i in prompts]
        self.metrics[run.task, run.sample].update(places, rows, texts)
        if keep:
            self.predictions += zip(prompts, rows, texts, strict=True)

    def scores(self) -> Tensor:
        """Score of every run (R,), float64, over the rows seen; NaN where there is none."""
        scores = torch.full((len(self.runs),), torch.nan, dtype=torch.float64, device=self.device)
        for key, members in self.members.items():
            scores[members] = self.metrics[key].compute()
        return scores

    def rows_seen(self) -> list[int]:
        """Rows that each run was scored on, of all processes."""
        seen = torch.zeros(len(self.runs), dtype=torch.long)
        for key, members in self.members.items():
            seen[members] = self.metrics[key].rows_seen.long().cpu()
        return seen.tolist()

    def constant_runs(self) -> list[int]:
        """Runs that gave this rank one and the same answer to rows with different references."""
        texts: dict[int, set[str]] = defaultdict(set)
        golds: dict[int, set[str]] = defaultdict(set)
        for i, row, text in self.predictions:
            texts[i].add(text)
            golds[i].add(self.references((self.runs[i].task, self.runs[i].sample))[row][0])
        return [i for i, found in texts.items() if len(found) == 1 and len(golds[i]) > 1]


# ---- the records of a test -----------------------------------------------------------------------

IN_COLUMNS = (
    *("data.tasks", "data.samples", "data.shots", "data.order_seed"),
    *("model.init_seed", "model.seed", "model.learning_rate", "model.batch_size"),
    *("model.num_virtual_tokens", "model.intrinsic_dim", "model.subspace.intrinsic_dim"),
    *("model.init.name", "model.init.source_tasks", "model.optim.name", "model.optim"),
    *("model.metric_variant", "model.expressions", "model.scales"),
)
"""Settings that results have as columns of their own, or that differ between tasks."""


class Report:
    """The table of a method's evaluation, and on ``test`` the files that it leaves behind."""

    def __init__(self, method: PromptMethod, evaluation: Evaluation, stage: str) -> None:
        self.method, self.evaluation, self.testing = method, evaluation, stage == "test"
        self.fit_id, settings, self.digests = fit_id(method)
        known = {k: v for k, v in unusual(method, settings).items() if k not in IN_COLUMNS}
        self.settings = json.dumps(known, default=str)
        self.predictions: list[tuple[str, int, int, str, str]] = []

    def write(self, scores: Tensor) -> None:
        """Print the table; on ``test`` also write results, predictions and scored prompts."""
        method, folder = self.method, self.method.run_dir if self.testing else None
        rows = method.shares.join_some(self._result_rows(scores))
        shown = rows if self.testing else [{**row, "test": row["dev"]} for row in rows]
        if self.testing and method.test_baselines:
            rows += self._baseline_rows()
        predictions = sorted(gather_values(self.predictions)) if self.testing else []
        if folder and method.stores_prompts:
            method.save_prompts(method.store, method.best_prompts(scores))
        if not method.trainer.is_global_zero:
            return
        say = method.print  # which puts a progress bar out of the way
        say(f"\n{self.evaluation.split} scores\n{method.score_table(shown)}\n", flush=True)
        if folder:
            lines = []
            for variant, place, row, name, text in predictions:
                run = method.all_runs[place]
                references = self.evaluation.references((run.task, run.sample))[row]
                told = {"variant": variant, "run": name, "task": run.task, "row": row}
                lines.append(told | {"prediction": text, "references": references})
            write_predictions(folder / "predictions.jsonl", lines)
            digests = json.dumps(self.digests, indent=1).encode()
            write_atomically(folder / "digests.json", digests)
            write_csv(folder / "results.csv", RESULT_COLUMNS, rows)
            kept = "predictions and prompts" if method.stores_prompts else "predictions"
            say(f"results, {kept} are in {folder}", flush=True)

    def _result_rows(self, scores: Tensor) -> dict[int, dict[str, Any]]:
        """A line of results per own run that was evaluated, by its place."""
        method, place_of = self.method, self.method.shares.own
        seen = self.evaluation.rows_seen()
        found: dict[int, list[tuple[int, str]]] = defaultdict(list)
        for i, row, text in self.evaluation.predictions:
            found[i].append((row, text))
        lines: dict[int, dict[str, Any]] = {}
        for i, prompt in zip(method.evaluated, method.best_prompts(), strict=True):
            run, score = method.runs[i], scores[i].item()
            line = self._common((run.task, run.sample)) | {
                "init_seed": run.init_seed,
                "order_seed": method.datamodule.order_seed,
                **{name: getattr(prompt, name) for name in STARTS},
                "num_virtual_tokens": method.num_virtual_tokens,
                "learning_rate": run.learning_rate,
                "batch_size": run.batch_size,
                "dev": prompt.dev_score if self.testing else score,
                "test": score if self.testing else None,
                "test_rows": seen[i] if self.testing else None,
                "best_step": prompt.steps,
                "seconds": prompt.seconds,
                "status": prompt.status,
                "run": place_of[i],
            }
            if method.stores_prompts:
                line["prompt_file"] = f"{method.prompt_folder}/{prompt.name}.safetensors"
            lines[i] = line = line | method.result_facts(i)
            told = (line["variant"], place_of[i])
            self.predictions += [(*told, row, prompt.name, text) for row, text in found[i]]
        return lines

    def _common(self, key: Key) -> dict[str, Any]:
        from prompt_lab import __version__

        method, data = self.method, self.method.datamodule
        task = data.tasks[key[0]]
        way = method.way(task)
        splits = SPLITS if self.testing else SPLITS[:2]
        return {
            "fit_id": self.fit_id,
            "method": type(method).__name__,
            "stage": "test" if self.testing else "validate",
            "backbone": method.backbone.name,
            "task": task.name,
            "ontology": task.ontology,
            "sample": key[1],
            "shots": task.shots,
            "template": data.template,
            "decoding": way.described,
            "label_score": way.label_score if way.labels is not None else None,
            "metric": task.metric,
            "metric_variant": method.metric_variant,
            "test_rows": len(self.evaluation.references(key)) if self.testing else None,
            **{f"cut_{split}": data.tokens(*key, split).cut for split in splits},
            "settings": self.settings,
            "version": __version__,
        }

    def _baseline_rows(self) -> list[dict[str, Any]]:
        method, data, lines = self.method, self.method.datamodule, []
        best = dict(zip(method.evaluated, method.best_prompts(), strict=True))
        for variant in method.prompt_baselines:
            by_start = variant == "initial_prompt"
            chosen = self._distinct(by_start)
            made = Prefixes(method.backbone, method.init if by_start else method.init[:, :0])
            other = method.answer_all(self.evaluation.split, chosen, made)
            self.predictions += [
                (variant, method.shares.own[i], row, method.runs[i].name, text)
                for i, row, text in other.predictions
            ]
            scores = other.scores()
            own: dict[int, dict[str, Any]] = {}
            for i in chosen:
                run = method.runs[i]
                line = self._common((run.task, run.sample)) | {"variant": variant}
                if by_start:
                    line["init_seed"] = run.init_seed
                    line |= {name: getattr(best[i], name) for name in STARTS}
                own[i] = line | {"test": scores[i].item()}
            lines += method.shares.join_some(own)
        keys = dict.fromkeys((run.task, run.sample) for run in method.all_runs)
        for key in keys if method.guess_baselines else ():
            if key in data.splits:
                task, test = data.tasks[key[0]], self.evaluation.references(key)
                train = [row[0] for row in data.splits[key]["train"].references]
                given = (test, task.labels, method.metric_variant)
                chance = chance_score(task.metric, task.labels, test, method.metric_variant)
                majority = majority_score(task.metric, train, *given)
                lines.append(self._common(key) | {"variant": "chance", "test": chance})
                lines.append(self._common(key) | {"variant": "majority", "test": majority})
        return lines

    def _distinct(self, by_start: bool) -> list[int]:
        """Own runs among one per (task, sample), or per (task, sample, initial seed, source)."""
        method, own = self.method, self.method.shares.own
        first: dict[tuple[Any, ...], int] = {}
        for place in sorted(method.shares.gather([own[i] for i in method.evaluated])):
            run = method.all_runs[place]
            start = (run.init_seed, run.source) if by_start else ()
            first.setdefault((run.task, run.sample, *start), place)
        chosen = set(first.values())
        return [i for i in method.evaluated if own[i] in chosen]
