"""The command ``prompt-lab select``: which source tasks to learn from for given target tasks.

Source tasks are ranked by how alike their tuned prompts are to those of a target, and the highest,
the lowest or random ones are chosen, the three settings of meta prompt tuning (Qin, Li, Zhao and
Joty 2023, appendix A.7). Ranking and choosing know nothing of how similarities are made
(`prompt_lab.similarity`): they take one number for each pair of prompts. Only prompt files are
read, no model and no data. Left out: how well a ranking predicts transfer.
"""

from __future__ import annotations

import math
import random
import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from prompt_lab.atomic_file import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.data.mixtures import Key

Choice = Literal["highest", "lowest", "random"]


@dataclass(frozen=True)
class Likeness:
    """How alike a source task is to one target task, or to several on average.

    Attributes:
        task: the source task.
        mean: mean similarity over pairs of prompts, or over targets.
        std: standard deviation (ddof 1) of the same; NaN where there is one.
        count: number of pairs, or of targets.
        same_samples: whether each pair is of one sample; otherwise all samples are paired with all.
    """

    task: str
    mean: float
    std: float
    count: int
    same_samples: bool = True


def select_command(
    targets: list[str],
    *,
    prompts: list[str],
    sources: list[str] | None = None,
    number: int = 5,
    choose: Choice = "highest",
    seed: int = 0,
    rank: int | None = None,
    energy: float = 0.95,
    out: str | None = None,
) -> Path | None:
    """Rank source tasks by how alike their tuned prompts are to those of target tasks, choose some.

    Similarity is the norm of the projection of one prompt's subspace on the other's, from 0 to 1.
    Of several prompts of a task and sample, the one with the best dev score counts. Samples that
    both tasks have are compared one by one; tasks without a common sample by all pairs. With
    several targets, the mean over targets chooses.

    Args:
        targets: tasks, or sets of partitions such as mpt/cls_to_cls/target.
        prompts: prompt stores, or folders of fits.
        sources: tasks or sets to choose among; without it all tasks of the stores but the targets.
        number: how many source tasks to choose.
        choose: highest, lowest or random.
        seed: seed of random.
        rank: dimensions of each subspace; without it as many as energy needs.
        energy: share of a prompt's squared norm that its subspace keeps, above 0 and at most 1.
        out: YAML file to write with the chosen tasks as data.tasks, a further --config of a fit.

    Returns:
        The YAML file, where one is written.

    Raises:
        FileNotFoundError: no such folder, or tasks that the stores lack.
        ValueError: a target among the sources, fewer sources than ``number``, prompts of several
            backbones or shapes, prompts without a subspace, a rank or an energy out of range.
        IsADirectoryError: ``out`` is a folder.
    """
    from prompt_lab.data.partitions import expand_sets
    from prompt_lab.methods.source_prompts import best_prompts

    if out is not None and Path(out).is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: name a file")
    files = best_prompts(prompts)
    held = list(dict.fromkeys(task for task, _ in files))
    wanted = list(dict.fromkeys(expand_sets(targets)))
    others = [task for task in held if task not in wanted]
    candidates = others if sources is None else list(dict.fromkeys(expand_sets(sources)))
    _check_tasks(wanted, candidates, held, prompts)
    if not 1 <= number <= len(candidates):
        raise ValueError(
            f"--number is {number}, and there are {len(candidates)} source tasks: give 1 to "
            f"{len(candidates)}"
        )
    target_keys, source_keys = (
        [key for key in files if key[0] in tasks] for tasks in (wanted, candidates)
    )
    bank = _read({key: files[key] for key in target_keys + source_keys})
    split = len(target_keys)
    matrix, legend = _by_subspace(bank[:split], bank[split:], energy, rank)
    rankings = rank_sources(target_keys, source_keys, matrix.tolist())
    overall = mean_over_targets(rankings)
    chosen = choose_sources(overall, number, choose, seed)
    what = f"{choose} with seed {seed}" if choose == "random" else choose
    summary = f"{number} of {len(candidates)} source tasks, {what}, for {', '.join(wanted)}"
    print(f"{legend}\n")
    for target in wanted:
        print(f"{target}\n{_table(rankings[target])}\n")
    if len(wanted) > 1:
        print(f"mean over {len(wanted)} targets\n{_table(overall, 'targets')}\n")
    _tell(summary, overall, chosen)
    return None if out is None else _write(Path(out), chosen, summary)


# ---- ranking -------------------------------------------------------------------------------------


def rank_sources(
    targets: Sequence[Key], sources: Sequence[Key], similarities: Sequence[Sequence[float]]
) -> dict[str, list[Likeness]]:
    """Rank the source tasks for each target task, the most alike first, equal ones by name.

    Two tasks that have samples in common are compared on those, sample by sample; others by all
    pairs of their prompts.

    Args:
        targets: task and sample of R prompts.
        sources: task and sample of S prompts.
        similarities: R rows of S numbers.

    Returns:
        By target task, a likeness for each source task.
    """
    ranked = {}
    for target, own in _by_task(targets).items():
        found = []
        for source, other in _by_task(sources).items():
            common = [similarities[own[sample]][other[sample]] for sample in own if sample in other]
            every = [similarities[row][column] for row in own.values() for column in other.values()]
            found.append(_likeness(source, common or every, bool(common)))
        ranked[target] = _sorted(found)
    return ranked


def mean_over_targets(rankings: Mapping[str, Sequence[Likeness]]) -> list[Likeness]:
    """Rank the source tasks by the mean over targets of their similarity.

    Args:
        rankings: by target, a likeness for each of the same source tasks.

    Returns:
        The most alike first, equal ones by name; the counts are of targets.
    """
    values: dict[str, list[float]] = {}
    for ranking in rankings.values():
        for likeness in ranking:
            values.setdefault(likeness.task, []).append(likeness.mean)
    return _sorted([_likeness(task, own, True) for task, own in values.items()])


def choose_sources(
    ranking: Sequence[Likeness], number: int, choose: Choice, seed: int = 0
) -> list[str]:
    """The names of some source tasks.

    Args:
        ranking: the most alike first.
        number: how many.
        choose: the first, the last or random ones.
        seed: seed of the random draw, which depends on the names and not on the ranking.

    Returns:
        The names: most alike first for highest, least alike first for lowest, as drawn for random.

    Raises:
        ValueError: ``number`` is below 1 or above the number of tasks, or ``choose`` is unknown.
    """
    if not 1 <= number <= len(ranking):
        raise ValueError(f"number is {number}: give 1 to {len(ranking)}")
    names = [likeness.task for likeness in ranking]
    chosen = {
        "highest": names[:number],
        "lowest": names[::-1][:number],
        "random": random.Random(seed).sample(sorted(names), number),
    }
    if choose not in chosen:
        raise ValueError(f"choose is {choose!r}; allowed: {', '.join(chosen)}")
    return chosen[choose]


def _likeness(task: str, values: Sequence[float], same_samples: bool) -> Likeness:
    """Mean and spread of some similarities."""
    std = statistics.stdev(values) if len(values) > 1 else math.nan
    return Likeness(task, statistics.fmean(values), std, len(values), same_samples)


def _by_task(keys: Sequence[Key]) -> dict[str, dict[int, int]]:
    """By task and sample, the place of the prompt."""
    places: dict[str, dict[int, int]] = {}
    for place, (task, sample) in enumerate(keys):
        places.setdefault(task, {})[sample] = place
    return places


def _sorted(likenesses: Sequence[Likeness]) -> list[Likeness]:
    """The most alike first, equal ones by name."""
    return sorted(likenesses, key=lambda likeness: (-likeness.mean, likeness.task))


# ---- prompts -------------------------------------------------------------------------------------


def _check_tasks(
    targets: Sequence[str], sources: Sequence[str], held: Sequence[str], stores: Sequence[str]
) -> None:
    """Refuse tasks without prompts, and targets that are sources."""
    for role, tasks in (("target", targets), ("source", sources)):
        missing = [task for task in tasks if task not in held]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(tasks)} {role} tasks have no prompt in "
                f"{', '.join(stores)}: {', '.join(missing)}; tune them first, or leave them out"
            )
    both = [task for task in sources if task in targets]
    if both:
        raise ValueError(f"source and target at once: {', '.join(both)}; take it out of one")
    if not sources:
        raise ValueError(f"{', '.join(stores)} hold no task but the targets: give further stores")


def _read(files: Mapping[Key, Path]) -> Tensor:
    """The prompts of some files, (R, N, D) float32, all of one backbone and one shape."""
    import torch

    from prompt_lab.prompt_file import load_prompt

    found = [(path, load_prompt(path)) for path in files.values()]
    first_path, first = found[0]
    for path, prompt in found:
        if prompt.backbone_digest != first.backbone_digest:
            raise ValueError(
                f"{first_path} was made for backbone {first.backbone!r} with weights "
                f"{first.backbone_digest[:12]}, but {path} for {prompt.backbone!r} with weights "
                f"{prompt.backbone_digest[:12]}: only prompts of one backbone can be compared"
            )
        if prompt.prompt.shape != first.prompt.shape:
            one, other = (" x ".join(map(str, p.prompt.shape)) for p in (first, prompt))
            raise ValueError(
                f"{first_path} is {one}, but {path} is {other}: give prompts of one length"
            )
        if not prompt.prompt.isfinite().all():
            raise ValueError(f"{path} holds NaN or infinite numbers: tune it again or leave it out")
        if not prompt.prompt.any():
            raise ValueError(f"{path} is all zeros and has no subspace: leave its task out")
    return torch.stack([prompt.prompt for _, prompt in found])


def _by_subspace(
    targets: Tensor, sources: Tensor, energy: float, rank: int | None
) -> tuple[Tensor, str]:
    """Similarities (R, S) of the subspaces of two banks, and how to read them."""
    from prompt_lab.similarity import subspace_ranks, subspace_similarities

    matrix = subspace_similarities(targets, sources, energy=energy, rank=rank)
    ones, others = (subspace_ranks(bank, energy=energy, rank=rank) for bank in (targets, sources))
    larger = ones[:, None].maximum(others[None]).double()
    width = targets.shape[2]
    least, most = (int(end) for end in ones.new_tensor([*ones, *others]).aminmax())
    sizes = f"{most}" if least == most else f"{least} to {most}"
    return matrix, (
        f"similarity of prompt subspaces, 0 to 1: {sizes} of {width} dimensions; between random "
        f"subspaces of these sizes about {float((larger.mean() / width).sqrt()):.3f}"
    )


# ---- what is told --------------------------------------------------------------------------------


def _table(ranking: Sequence[Likeness], counted: str = "samples") -> str:
    """A ranking as text, a line for each source task."""
    rows = [("rank", "source", "similarity", counted)]
    for place, likeness in enumerate(ranking, 1):
        spread = "" if math.isnan(likeness.std) else f" ± {likeness.std:.3f}"
        count = f"{likeness.count}" + ("" if likeness.same_samples else " pairs")
        rows.append((f"{place}", likeness.task, f"{likeness.mean:.3f}{spread}", count))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ((c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    lines = ["  ".join(row).rstrip() for row in padded]
    if not all(likeness.same_samples for likeness in ranking):
        lines.append("pairs: no sample in common, so each of one task with each of the other")
    return "\n".join(lines)


def _tell(summary: str, ranking: Sequence[Likeness], chosen: Sequence[str]) -> None:
    """Print what was chosen, with ranks and similarities, and the flag that uses it."""
    print(summary)
    places = {likeness.task: place for place, likeness in enumerate(ranking)}
    for task in chosen:
        print(f"  {task}: rank {places[task] + 1}, similarity {ranking[places[task]].mean:.3f}")
    print(f"--data.tasks {shlex.quote('[' + ', '.join(chosen) + ']')}")


def _write(path: Path, tasks: Sequence[str], comment: str) -> Path:
    """Write tasks as a config that chooses them; returns the path."""
    import yaml

    content = yaml.safe_dump({"data": {"tasks": list(tasks)}}, default_flow_style=None, width=100)
    write_atomically(path, f"# {comment}\n{content}".encode())
    return path
