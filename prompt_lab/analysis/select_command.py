"""The command ``prompt-lab select``: which source tasks to learn from for given target tasks.

Source tasks are ranked for each target, and the highest, the lowest or random ones are chosen, the
three settings of meta prompt tuning (Qin, Li, Zhao and Joty 2023, appendix A.7). The rankings are
those of `similarity` on tuned prompts, and three that need no prompts (Lin et al. 2024):
SIZE, the rows of the source's training set; SEMB, the cosine of mean sentence embeddings of the
inputs; RANDOM. Ranking and choosing know nothing of how similarities are made: they take one number
for each pair. No model is loaded but SEMB's sentence encoder. Left out: rankings by
several measures at once, and how well a ranking predicts transfer, which
`prompt_lab.commands.select_evaluate_command` tells.
"""

from __future__ import annotations

import math
import random
import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast, get_args

from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.data.mixtures import Key
    from prompt_lab.files.prompts import FoundPrompt

Choice = Literal["highest", "lowest", "random"]
PromptMethod = Literal[
    "subspace",
    "feature",
    "feature-unit",
    "unigram",
    "unigram-unit",
    "max",
    "max-source",
    "cosine",
    "frobenius",
]
"""Rankings by prompts; -unit gives all rows length 1 first."""

Method = Literal[PromptMethod, "size", "semb", "random"]

_SANDBOX_SAMPLE = 100
"""Sample whose rows are the sandbox's training sets."""

_CHUNK = 1024
"""Inputs that are embedded at a time."""


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


@dataclass(frozen=True)
class Banks:
    """The prompts of target and source tasks.

    Attributes:
        target_keys: task and sample of R prompts.
        source_keys: task and sample of S prompts.
        targets: (R, N, D).
        sources: (S, N, D).
    """

    target_keys: list[Key]
    source_keys: list[Key]
    targets: Tensor
    sources: Tensor


def select_command(
    targets: list[str],
    *,
    prompts: list[str] | None = None,
    sources: list[str] | None = None,
    method: Method = "subspace",
    number: int = 5,
    choose: Choice = "highest",
    seed: int = 0,
    rank: int | None = None,
    energy: float = 0.95,
    root: str | None = None,
    encoder: str | None = None,
    out: str | None = None,
) -> Path | None:
    """Rank source tasks for target tasks, by default by how alike their prompts are; choose some.

    Methods on tuned prompts: subspace (norm of the projection of one prompt's subspace on the
    other's, from 0 to 1), feature (cosine of mean rows), unigram (cosine of the rows' means), max
    (for each row of the target the largest cosine with a row of the source; max-source the other
    way round), cosine (of all numbers), frobenius (minus the distance). With -unit all rows have
    length 1 first. Of several prompts of a task and sample, the one with the best dev score counts.
    Samples that both tasks have are compared one by one; tasks without a common sample by all
    pairs.

    Methods without prompts: size (rows of the source's training file), semb (cosine of the mean
    sentence embeddings of the training inputs), random (numbers of the seed). A task's training
    file is that of the largest K, of its samples the first; files made with --shots all hold the
    whole set.

    With several targets, the mean over targets chooses.

    Args:
        targets: tasks, or sets of partitions such as mpt/cls_to_cls/target.
        prompts: prompt stores, folders of fits, prompt files or checkpoints; not needed for size,
            semb and random.
        sources: tasks or sets to choose among; without it all tasks of the stores but the targets.
        method: what ranks the sources.
        number: how many source tasks to choose.
        choose: highest, lowest or random.
        seed: seed of random.
        rank: dimensions of each subspace; without it as many as energy needs.
        energy: share of a prompt's squared norm that its subspace keeps, above 0 and at most 1.
        root: folder of few-shot files, or sandbox, for size and semb.
        encoder: id or folder of a sentence-transformers model, for semb.
        out: YAML file to write with the chosen tasks as data.tasks, a further --config of a fit.

    Returns:
        The YAML file, where one is written.

    Raises:
        FileNotFoundError: no such folder, or tasks that the stores or the data root lack.
        ValueError: a target among the sources, fewer sources than ``number``, prompts of several
            backbones or shapes, prompts without a subspace, a rank or an energy out of range, or
            something that the method needs is not given.
        IsADirectoryError: ``out`` is a folder.
    """
    from prompt_lab.data.partitions import expand_sets
    from prompt_lab.files.prompts import best_prompts

    if out is not None and Path(out).is_dir():
        raise IsADirectoryError(f"--out {out} is a folder: name a file")
    files = best_prompts(prompts or [])
    wanted = list(dict.fromkeys(expand_sets(targets)))
    others = [task for task in dict.fromkeys(task for task, _ in files) if task not in wanted]
    candidates = others if sources is None else list(dict.fromkeys(expand_sets(sources)))
    if method in get_args(PromptMethod):
        check_prompts(method, wanted, candidates, files, prompts)
    _check_roles(wanted, candidates, prompts)
    if not 1 <= number <= len(candidates):
        raise ValueError(
            f"--number is {number}, and there are {len(candidates)} source tasks: give 1 to "
            f"{len(candidates)}"
        )
    if method in get_args(PromptMethod):
        banks = load_banks(files, wanted, candidates)
        by_prompts = cast("PromptMethod", method)
        rankings, legend = rank_by_prompts(by_prompts, banks, energy=energy, rank=rank)
    else:
        rankings, legend = _without_prompts(method, wanted, candidates, root, encoder, seed)
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


def rank_by_prompts(
    method: PromptMethod, banks: Banks, *, energy: float = 0.95, rank: int | None = None
) -> tuple[dict[str, list[Likeness]], str]:
    """Rank the source tasks for each target task by their prompts.

    Args:
        method: which similarity.
        banks: the prompts.
        energy: as in `prompt_lab.core.similarity.prompt_subspace`.
        rank: the same.

    Returns:
        By target task, a likeness for each source task; and how to read the similarities.

    Raises:
        ValueError: prompts that cannot be compared so, or a rank or an energy out of range.
    """
    if method == "subspace":
        matrix, legend = _by_subspace(banks.targets, banks.sources, energy, rank)
    else:
        matrix, legend = _by_rows(method, banks.targets, banks.sources)
    return rank_sources(banks.target_keys, banks.source_keys, matrix.tolist()), legend


def _by_subspace(
    targets: Tensor, sources: Tensor, energy: float, rank: int | None
) -> tuple[Tensor, str]:
    """Similarities (R, S) of the subspaces of two banks, and how to read them."""
    from prompt_lab.core.similarity import subspace_ranks, subspace_similarities

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


def _by_rows(method: PromptMethod, targets: Tensor, sources: Tensor) -> tuple[Tensor, str]:
    """Similarities (R, S) of the rows of two banks, and how to read them."""
    from prompt_lab.core import similarity

    unit = method.endswith("-unit")
    rows = "rows of length 1" if unit else "rows"
    if method in ("feature", "feature-unit"):
        matrix = similarity.feature_similarities(targets, sources, unit_rows=unit)
        return matrix, f"cosine of the means of the {rows} of prompts, -1 to 1"
    if method in ("unigram", "unigram-unit"):
        matrix = similarity.unigram_similarities(targets, sources, unit_rows=unit)
        return matrix, f"cosine of the means over width of the {rows} of prompts, -1 to 1"
    if method == "cosine":
        matrix = similarity.cosine_similarities(targets, sources)
        return matrix, "cosine of all numbers of prompts, -1 to 1"
    if method == "frobenius":
        matrix = -similarity.frobenius_distances(targets, sources)
        return matrix, "minus the Frobenius norm of the difference of prompts"
    over: similarity.Direction = "source" if method == "max-source" else "target"
    matrix = similarity.max_similarities(targets, sources, over=over)
    other = "target" if over == "source" else "source"
    return matrix, (
        f"mean over the {over}'s rows of the largest cosine with a row of the {other}, -1 to 1"
    )


def check_prompts(
    method: str,
    targets: Sequence[str],
    sources: Sequence[str],
    files: Mapping[Key, FoundPrompt],
    stores: Sequence[str] | None,
) -> None:
    """Refuse tasks without prompts.

    Args:
        method: what needs them, for the message.
        targets: tasks that need a prompt.
        sources: the same.
        files: what the stores hold, by task and sample.
        stores: the folders.

    Raises:
        ValueError: no store is given.
        FileNotFoundError: tasks that the stores lack, all named.
    """
    if not stores:
        raise ValueError(f"{method} compares tuned prompts: give their stores with --prompts")
    held = {task for task, _ in files}
    for role, tasks in (("target", targets), ("source", sources)):
        missing = [task for task in tasks if task not in held]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(tasks)} {role} tasks have no prompt in "
                f"{', '.join(stores)}: {', '.join(missing)}; tune them first, or leave them out"
            )


def _check_roles(
    targets: Sequence[str], sources: Sequence[str], stores: Sequence[str] | None
) -> None:
    """Refuse targets that are sources, and no sources at all."""
    both = [task for task in sources if task in targets]
    if both:
        raise ValueError(f"source and target at once: {', '.join(both)}; take it out of one")
    if not sources and stores:
        raise ValueError(f"{', '.join(stores)} hold no task but the targets: give further stores")
    if not sources:
        raise ValueError("no source tasks: name them with --sources, or give --prompts")


def load_banks(
    files: Mapping[Key, FoundPrompt], targets: Sequence[str], sources: Sequence[str]
) -> Banks:
    """The prompts of target and source tasks; each file is read once.

    Args:
        files: prompt files by task and sample; those of other tasks are not read.
        targets: tasks that have a file; they may be sources too.
        sources: the same.

    Raises:
        ValueError: prompts of several backbones or shapes, with NaN, or all zeros.
    """
    used = [key for key in files if key[0] in targets or key[0] in sources]
    prompts = dict(zip(used, _read({key: files[key] for key in used}), strict=True))
    target_keys, source_keys = (
        [key for key in used if key[0] in tasks] for tasks in (targets, sources)
    )
    stacked = (_stack([prompts[key] for key in keys]) for keys in (target_keys, source_keys))
    return Banks(target_keys, source_keys, *stacked)


def _stack(prompts: Sequence[Tensor]) -> Tensor:
    """Prompts (N, D) as a bank (R, N, D)."""
    import torch

    return torch.stack(list(prompts))


def _read(files: Mapping[Key, FoundPrompt]) -> list[Tensor]:
    """The prompts of some files, (N, D) float32, all of one backbone and one shape."""
    found = [(one.where, one.load()) for one in files.values()]
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
    return [prompt.prompt for _, prompt in found]


# ---- without prompts -----------------------------------------------------------------------------


def _without_prompts(
    method: str,
    targets: Sequence[str],
    sources: Sequence[str],
    root: str | None,
    encoder: str | None,
    seed: int,
) -> tuple[dict[str, list[Likeness]], str]:
    """Rank the source tasks by size, sentence embeddings or at random; and how to read that."""
    if method == "size":
        sizes = training_sizes(root, sources)
        matrix = [[sizes[source] for source in sources] for _ in targets]
        legend = "rows of the source's training file"
    elif method == "semb":
        matrix = sentence_similarities(targets, sources, root, encoder)
        legend = f"cosine of the mean embeddings of training inputs by {encoder}, -1 to 1"
    else:
        draws = {source: random.Random(f"{seed} {source}").random() for source in sources}
        matrix = [[draws[source] for source in sources] for _ in targets]
        legend = f"random numbers of seed {seed}, which know nothing of the tasks"
    ours, theirs = ([(task, -1) for task in tasks] for tasks in (targets, sources))
    return rank_sources(ours, theirs, matrix), legend


def training_sizes(root: str | None, tasks: Sequence[str]) -> dict[str, float]:
    """SIZE: rows of the training file of each task.

    Args:
        root: folder of few-shot files, or sandbox.
        tasks: tasks.

    Raises:
        ValueError: no root, or a file that cannot be read.
        FileNotFoundError: no such folder, or tasks without a training file, all named.
    """
    return {task: float(len(rows)) for task, rows in _training_inputs(root, tasks).items()}


def sentence_similarities(
    targets: Sequence[str], sources: Sequence[str], root: str | None, encoder: str | None
) -> list[list[float]]:
    """SEMB: cosine of the mean sentence embeddings of targets and sources.

    Lin et al. 2024, section 4.2, after Poth et al. 2021: the mean is over all inputs of the
    training set. The embeddings are taken as the encoder gives them.

    Args:
        targets: R tasks.
        sources: S tasks.
        root: folder of few-shot files, or sandbox.
        encoder: id or folder of a sentence-transformers model.

    Returns:
        R rows of S numbers, -1 to 1.

    Raises:
        ValueError: no root, no encoder, or no package sentence-transformers.
        FileNotFoundError: no such folder, or tasks without a training file, all named.
    """
    from prompt_lab.core.similarity import cosine_similarities

    if encoder is None:
        raise ValueError("semb needs a sentence encoder: give its id or folder with --encoder")
    texts = _training_inputs(root, list(dict.fromkeys([*targets, *sources])))
    means = dict(zip(texts, _mean_embeddings(encoder, texts.values()), strict=True))
    ours, theirs = (_stack([means[task][None] for task in tasks]) for tasks in (targets, sources))
    return cosine_similarities(ours, theirs).tolist()


def _mean_embeddings(encoder: str, texts: Iterable[Sequence[str]]) -> list[Tensor]:
    """Mean embedding (E,), float64, of each of some groups of texts."""
    import torch

    try:
        from sentence_transformers import (  # pyright: ignore[reportMissingImports]
            SentenceTransformer,
        )
    except ImportError:
        raise ValueError(
            "semb needs the package sentence-transformers: pip install 'prompt-lab[semb]'"
        ) from None
    model = SentenceTransformer(encoder)
    means = []
    for group in texts:
        parts = [group[at : at + _CHUNK] for at in range(0, len(group), _CHUNK)]
        sums = [
            torch.as_tensor(model.encode(list(part), show_progress_bar=False)).double().sum(dim=0)
            for part in parts
        ]
        means.append(_stack(sums).sum(dim=0) / len(group))
    return means


def _training_inputs(root: str | None, tasks: Sequence[str]) -> dict[str, list[str]]:
    """Inputs of the training file of each task."""
    from prompt_lab.data.files import parse_line, split_lines
    from prompt_lab.sandbox import SANDBOX, TASKS, rows

    if root is None:
        raise ValueError("size and semb read training files: name their folder with --root")
    if root == SANDBOX:
        known = [task for task in tasks if task in TASKS]
        paths = {}
    else:
        if not Path(root).is_dir():
            raise FileNotFoundError(f"no folder {root}: name the data root with --root")
        paths = {task: path for task in tasks if (path := _training_file(Path(root) / task))}
        known = list(paths)
    missing = [task for task in tasks if task not in known]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(tasks)} tasks have no training file in {root}: "
            f"{', '.join(missing)}; prompt-lab tasks build makes them"
        )
    if root == SANDBOX:
        return {task: [row[0] for row in rows(task, _SANDBOX_SAMPLE, "train")] for task in tasks}
    return {
        task: [
            parse_line(path, line, text)[0]
            for line, text in enumerate(split_lines(path, path.read_bytes()), 1)
        ]
        for task, path in paths.items()
    }


def _training_file(folder: Path) -> Path | None:
    """The train file of the largest K in a task's folder, of its samples the first."""
    from prompt_lab.data.files import list_files

    if not folder.is_dir():
        return None
    found = [(k, sample) for k, sample, split in list_files(folder) if split == "train"]
    if not found:
        return None
    shots = found[-1][0]
    sample = next(sample for k, sample in found if k == shots)
    return folder / f"{folder.name}_{shots}_{sample}_train.tsv"


# ---- what is told --------------------------------------------------------------------------------


def _table(ranking: Sequence[Likeness], counted: str = "samples") -> str:
    """A ranking as text, a line for each source task."""
    rows = [("rank", "source", "similarity", counted)]
    for place, likeness in enumerate(ranking, 1):
        spread = "" if math.isnan(likeness.std) else f" ± {_text(likeness.std)}"
        count = f"{likeness.count}" + ("" if likeness.same_samples else " pairs")
        rows.append((f"{place}", likeness.task, f"{_text(likeness.mean)}{spread}", count))
    lines = aligned(rows)
    if not all(likeness.same_samples for likeness in ranking):
        lines.append("pairs: no sample in common, so each of one task with each of the other")
    return "\n".join(lines)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of equal columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = ((c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in rows)
    return ["  ".join(row).rstrip() for row in padded]


def _text(value: float) -> str:
    """A similarity as text; numbers of rows have no decimals."""
    return f"{value:.0f}" if abs(value) > 1 and value.is_integer() else f"{value:.3f}"


def _tell(summary: str, ranking: Sequence[Likeness], chosen: Sequence[str]) -> None:
    """Print what was chosen, with ranks and similarities, and the flag that uses it."""
    print(summary)
    places = {likeness.task: place for place, likeness in enumerate(ranking)}
    for task in chosen:
        print(f"  {task}: rank {places[task] + 1}, similarity {_text(ranking[places[task]].mean)}")
    print(f"--data.tasks {shlex.quote('[' + ', '.join(chosen) + ']')}")


def _write(path: Path, tasks: Sequence[str], comment: str) -> Path:
    """Write tasks as a config that chooses them; returns the path."""
    import yaml

    content = yaml.safe_dump({"data": {"tasks": list(tasks)}}, default_flow_style=None, width=100)
    write_atomically(path, f"# {comment}\n{content}".encode())
    return path
