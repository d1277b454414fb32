"""How well rankings by prompts predict transfer, over the steps of tuning the target prompts.

A fit with ``model.save_steps`` keeps the prompts of some steps as prompt stores. At each step the
target prompts are compared with the best source prompts, as Lin et al. 2024 do from 5,000 to 30,000
steps (section 6, figures 5 and 7).

**Seeds.** With "mean" the similarities of a target's prompts are averaged, and the ranking is
judged by the transfer scores averaged over seeds. With "each" the ranking of every prompt is judged
by the scores of its own seed, and the measures are averaged. Its own are those of its sample, its
initialisation seed and its order seed, if every source has such; otherwise those of its sample and
order seed (a run that starts from a file is drawn from no seed), otherwise those of its sample,
otherwise all; several are averaged. Left out: steps of the source prompts.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from prompt_lab.analysis.select_command import Likeness, PromptMethod, load_banks, rank_by_prompts
from prompt_lab.analysis.selection import Quality, Seeds, evaluate, judge, mean_quality
from prompt_lab.analysis.transfer_table import Table, some
from prompt_lab.files.prompts import FoundPrompt, find_prompts
from prompt_lab.files.results import PLAIN_STARTS

if TYPE_CHECKING:
    from prompt_lab.data.sampling import Key

OWN = (
    "their sample and both seeds",
    "their sample and order seed",
    "their sample",
    "all seeds together",
)
"""By what the scores are found that judge a prompt, the closest first."""


@dataclass(frozen=True)
class StepPrompt:
    """The prompt of a target task at some step.

    Attributes:
        found: where it is.
        task: the target task.
        sample: its sample; -1 for none.
        init_seed: its initialisation seed; -1 for none.
        order_seed: its order seed; -1 for none.
        dev: dev score at that step; minus infinity where there is none.
    """

    found: FoundPrompt
    task: str
    sample: int
    init_seed: int
    order_seed: int
    dev: float

    @property
    def seeds(self) -> tuple[str, int, int, int]:
        """What tells it from the prompts that count beside it."""
        return self.task, self.sample, self.init_seed, self.order_seed


Steps = dict[int, list[StepPrompt]]
"""By step, in order, the prompts of target tasks."""


def find_steps(folders: Sequence[str], targets: Sequence[str]) -> tuple[Steps, list[str]]:
    """The saved prompts of target tasks, by step.

    Of several runs of one task, sample and seeds, such as those of a grid of learning rates, the
    one with the best dev score at any step counts at all steps, of equal ones the first. Prompts of
    other tasks, and those that start from another task's prompt, are left out.

    Args:
        folders: folders of fits with saved steps.
        targets: the target tasks.

    Returns:
        Prompts by step, and notes on what was left out or is there at some steps only.

    Raises:
        FileNotFoundError: a folder without saved steps, or a step without a prompt of some target.
        ValueError: a damaged prompt file.
    """
    found: Steps = {}
    others = 0
    for folder in dict.fromkeys(Path(folder).resolve() for folder in folders):
        shown = next(given for given in folders if Path(given).resolve() == folder)
        for step, place in _step_folders(Path(shown)):
            prompts, strangers = _prompts(place, targets)
            found.setdefault(step, []).extend(prompts)
            others += strangers
    kept = _best_runs(found)
    _check_targets(kept, folders, targets)
    notes = []
    if others:
        notes.append(f"left out, {others} saved prompts of other tasks or other starts")
    most = max(map(len, kept.values()))
    fewer = [f"{len(own)} at step {step}" for step, own in kept.items() if len(own) < most]
    if fewer:
        notes.append(f"not all of {most} target prompts were saved: {some(fewer)}")
    return kept, notes


def judge_steps(
    table: Table, steps: Steps, files: Mapping[Key, FoundPrompt], seeds: Seeds
) -> dict[int, dict[str, dict[str, Quality]]]:
    """Judge the rankings by the target prompts of each step.

    Args:
        table: measured transfer.
        steps: the target prompts.
        files: the best source prompts, by task and sample; a prompt is compared with the source's
            of its sample, or with all of them where the source has none of that.
        seeds: whether similarities and scores are averaged over seeds first.

    Returns:
        By step, method and target.

    Raises:
        ValueError: prompts of several backbones or shapes, with NaN, or all zeros.
    """
    sources = {key: path for key, path in files.items() if key[0] in table.sources}
    found: dict[int, dict[str, dict[str, Quality]]] = {}
    for step, prompts in steps.items():
        # Each prompt goes by its path, so that all of one task and sample are ranked by themselves.
        own = {(prompt.found.where, prompt.sample): prompt.found for prompt in prompts}
        banks = load_banks(own | sources, [name for name, _ in own], table.sources)
        found[step] = {
            method: _judge(table, prompts, rank_by_prompts(method, banks)[0], seeds)
            for method in get_args(PromptMethod)
        }
    return found


def own_scores(
    of_source: Mapping[str, Mapping[str, float]], prompt: StepPrompt
) -> tuple[list[float], int]:
    """The transfer scores that judge the ranking of one prompt.

    Args:
        of_source: scores of its task by source and seed, which is "sample/init seed/order seed".
        prompt: the prompt.

    Returns:
        A score for each source, and how they were found: the place in `OWN`.
    """
    sample, init, order = map(str, (prompt.sample, prompt.init_seed, prompt.order_seed))
    ways = [{0: sample, 1: init, 2: order}, {0: sample, 2: order}, {0: sample}]
    for way, wanted in enumerate(ways):
        rows = [
            [score for label, score in own.items() if _matches(label, wanted)]
            for own in of_source.values()
        ]
        if all(rows):
            return [math.fsum(row) / len(row) for row in rows], way
    return [math.fsum(own.values()) / len(own) for own in of_source.values()], len(ways)


def tell_matches(table: Table, steps: Steps) -> str:
    """How many target prompts are judged by scores of which seeds, as a sentence."""
    prompts = {prompt.seeds: prompt for own in steps.values() for prompt in own}.values()
    ways = Counter(own_scores(table.scores[prompt.task], prompt)[1] for prompt in prompts)
    parts = [f"{ways[way]} by those of {OWN[way]}" for way in sorted(ways)]
    return f"{len(prompts)} target prompts are judged by transfer scores: {', '.join(parts)}"


def _matches(label: str, wanted: Mapping[int, str]) -> bool:
    """Whether the label of a seed has these parts."""
    parts = label.split("/")
    return len(parts) == 3 and all(parts[at] == part for at, part in wanted.items())


def _judge(
    table: Table,
    prompts: Sequence[StepPrompt],
    rankings: Mapping[str, Sequence[Likeness]],
    seeds: Seeds,
) -> dict[str, Quality]:
    """The quality of one method's rankings at one step, by target."""
    likeness: dict[str, list[tuple[StepPrompt, dict[str, float]]]] = {}
    for prompt in prompts:
        values = {one.task: one.mean for one in rankings[prompt.found.where]}
        likeness.setdefault(prompt.task, []).append((prompt, values))
    if seeds == "mean":
        means = {
            target: {
                source: math.fsum(values[source] for _, values in own) / len(own)
                for source in table.sources
            }
            for target, own in likeness.items()
        }
        return evaluate(table, means, seeds)
    return {
        target: mean_quality(
            [
                judge(
                    own_scores(of_source, prompt)[0],
                    [values[source] for source in of_source],
                    table.baseline.get(target, math.nan),
                )
                for prompt, values in likeness[target]
            ]
        )
        for target, of_source in table.scores.items()
    }


def _step_folders(folder: Path) -> list[tuple[int, Path]]:
    """The saved steps of a fit, in order, each with its prompt store."""
    place = folder / "steps"
    if not folder.is_dir() or not place.is_dir():
        what = "folder" if not folder.is_dir() else "saved steps in"
        raise FileNotFoundError(
            f"no {what} {folder}: give folders of fits of the target tasks with model.save_steps"
        )
    steps = [(int(path.name), path) for path in place.iterdir() if path.name.isdecimal()]
    if not steps:
        raise FileNotFoundError(
            f"{place} holds no saved step: fit the target tasks with model.save_steps"
        )
    return sorted(steps)


def _prompts(store: Path, targets: Sequence[str]) -> tuple[list[StepPrompt], int]:
    """The prompts of target tasks in a store, and the number of others."""
    known = find_prompts(store)
    prompts = []
    for one in known:
        facts = one.metadata
        if facts.get("task") not in targets or facts.get("start") not in PLAIN_STARTS:
            continue
        seeds = (facts.get(name) for name in ("sample", "init_seed", "order_seed"))
        prompts.append(
            StepPrompt(
                one,
                facts["task"],
                *(-1 if seed is None else int(seed) for seed in seeds),
                dev=one.dev,
            )
        )
    return prompts, len(known) - len(prompts)


def _best_runs(found: Steps) -> Steps:
    """By step, the prompts of the run that dev chose, of those of one task, sample and seeds."""
    best: dict[tuple[str, int, int, int], dict[tuple[Path, str], float]] = {}
    for prompts in found.values():
        for prompt in prompts:
            runs = best.setdefault(prompt.seeds, {})
            runs[_run(prompt)] = max(prompt.dev, runs.get(_run(prompt), -math.inf))
    chosen = {seeds: max(runs, key=lambda run: runs[run]) for seeds, runs in best.items()}
    return {
        step: [prompt for prompt in found[step] if _run(prompt) == chosen[prompt.seeds]]
        for step in sorted(found)
    }


def _run(prompt: StepPrompt) -> tuple[Path, str]:
    """Folder and name of the run that a prompt is of."""
    return prompt.found.path.parent.parent, prompt.found.path.name


def _check_targets(steps: Steps, folders: Sequence[str], targets: Sequence[str]) -> None:
    """Refuse targets without saved prompts, and steps that lack some targets."""
    held = {step: {prompt.task for prompt in prompts} for step, prompts in steps.items()}
    never = [target for target in targets if not any(target in own for own in held.values())]
    if never:
        raise FileNotFoundError(
            f"{len(never)} of {len(targets)} target tasks have no saved step in "
            f"{', '.join(folders)}: {some(never)}; fit them with model.save_steps, from a start "
            "without transfer"
        )
    lacking = [
        f"step {step} lacks {some([target for target in targets if target not in own])}"
        for step, own in held.items()
        if not own.issuperset(targets)
    ]
    if lacking:
        raise FileNotFoundError(
            f"not every saved step has all target tasks: {some(lacking)}; save the same steps of "
            "all (a run that patience ended has no later ones), or move those steps away"
        )
