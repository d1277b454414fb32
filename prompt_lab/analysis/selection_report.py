"""What ``select evaluate`` writes: measured transfer, the quality of rankings, and figures.

All scores, similarities aside, are percent. Left out: a page that joins the figures.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_lab.analysis.old_results import Summary, summarise
from prompt_lab.analysis.selection import KS, Quality
from prompt_lab.analysis.transfer_table import Spread, Table, relative_transfer, spread
from prompt_lab.files.tensors import write_csv

if TYPE_CHECKING:
    from prompt_lab.data.sampling import Key
    from prompt_lab.files.prompts import FoundPrompt

Ratings = dict[str, dict[str, dict[str, float]]]
"""Similarities by method, target and source."""

ByStep = Mapping[int, Mapping[str, Mapping[str, Quality]]]
"""Quality of rankings by step, method and target."""

_ALIKE = ("random", "size")
"""Methods whose ranking is the same for all targets."""

_DOTS = 60
"""Most values of a violin that are shown one by one."""

_SPREAD = ("mean", "std", "low", "high")


@dataclass(frozen=True)
class Study:
    """Measured transfer, and rankings that were judged by it.

    Attributes:
        table: measured transfer.
        ratings: similarities by method, target and source.
        found: quality by method and target, of all k from 1 to the number of sources.
        files: tuned prompts by task and sample; of some tasks, or none.
        by_step: quality by step, method and target; empty without saved steps.
    """

    table: Table
    ratings: Ratings
    found: Mapping[str, Mapping[str, Quality]]
    files: Mapping[Key, FoundPrompt]
    by_step: ByStep


def write_study(folder: Path, study: Study) -> list[Path]:
    """Write all tables and figures of a study; returns the paths."""
    gains = relative_transfer(study.table)
    return [
        *_write_qualities(folder, study),
        *_write_transfer(folder, study.table, gains),
        *_write_top_k(folder, study),
        *_write_steps(folder, study.by_step),
        *_transfer_figures(folder, study.table, gains),
        *_similarity_figures(folder, study),
        *_quality_figures(folder, study),
        *_token_figures(folder, study),
    ]


def measures(with_gain: bool) -> list[str]:
    """Names of the columns of measures."""
    gains = [f"gain@{k}" for k in KS] if with_gain else []
    return ["nDCG", *(f"Regret@{k}" for k in KS), *gains]


def percent(quality: Quality) -> dict[str, float]:
    """All measures in percent, by the names of their columns."""
    values = {"nDCG": 100 * quality.ndcg}
    values |= {f"Regret@{k}": 100 * value for k, value in quality.regret.items()}
    values |= {f"gain@{k}": 100 * value for k, value in quality.gain.items()}
    return values | {f"score@{k}": value for k, value in quality.score.items()}


# ---- tables --------------------------------------------------------------------------------------


def _write_qualities(folder: Path, study: Study) -> list[Path]:
    """Write a line per method, and one per method and target."""
    lines, table = [], study.table
    for method, of_target in study.found.items():
        for target, quality in of_target.items():
            own = study.ratings[method][target]
            likeness = {source: own[source] for source in table.scores[target]}
            top = [source for source, x in likeness.items() if x == max(likeness.values())]
            first = top[0] if len(top) == 1 else f"{len(top)} equal ones"
            facts = {"method": method, "target": target, "sources": quality.sources, "first": first}
            lines.append(facts | percent(quality) | {"no transfer": table.baseline.get(target)})
    scores = [f"score@{k}" for k in KS]
    columns = ["method", "target", "sources", "first", *measures(True), *scores, "no transfer"]
    paths = [folder / "methods.csv", folder / "targets.csv"]
    means = [{"method": name, **_means(own, True)} for name, own in study.found.items()]
    write_csv(paths[0], ["method", *_mean_columns(True)], means)
    write_csv(paths[1], columns, lines)
    return paths


def _means(of_target: Mapping[str, Quality], with_gain: bool) -> dict[str, Any]:
    """Means and standard deviations over targets of the measures of one method."""
    values = [percent(quality) for quality in of_target.values()]
    line: dict[str, Any] = {"targets": len(values)}
    for name in measures(with_gain):
        over = summarise(own[name] for own in values)
        line |= {name: over.mean, f"{name} std": over.std}
    return line


def _mean_columns(with_gain: bool) -> list[str]:
    """Columns of the lines of `_means`."""
    names = (name for measure in measures(with_gain) for name in (measure, f"{measure} std"))
    return ["targets", *names]


def _write_transfer(
    folder: Path, table: Table, gains: Mapping[tuple[str, str], Sequence[float]]
) -> list[Path]:
    """Write a line per target and source, and one per source and per target over the others."""
    lines = []
    for target, source in table.pairs():
        scores = table.scores[target][source].values()
        line = {"target": target, "source": source, "seeds": len(scores)}
        line |= _spread("score", spread(scores)) | {"no transfer": table.baseline.get(target)}
        lines.append(line | _spread("relative", spread(gains.get((target, source), []))))
    parts = [f"{name} {part}" for name in ("score", "relative") for part in _SPREAD]
    paths = [folder / "transfer.csv", folder / "relative_transfer.csv"]
    write_csv(paths[0], ["target", "source", "seeds", *parts[:4], "no transfer", *parts[4:]], lines)
    if not gains:
        return paths[:1]
    over = [
        {"by": by, "task": task, "pairs": len(values)} | _spread("relative", spread(values))
        for by in ("source", "target")
        for task, values in _pair_means(gains, by).items()
    ]
    write_csv(paths[1], ["by", "task", "pairs", *parts[4:]], over)
    return paths


def _spread(name: str, found: Spread) -> dict[str, float]:
    """Cells of a mean and its spread."""
    return {f"{name} {part}": getattr(found, part) for part in _SPREAD}


def _pair_means(
    gains: Mapping[tuple[str, str], Sequence[float]], by: str
) -> dict[str, list[float]]:
    """By source or by target, the mean over seeds of the relative transfer of each pair."""
    found: dict[str, list[float]] = {}
    for (target, source), values in gains.items():
        mean = math.fsum(values) / len(values)
        found.setdefault(source if by == "source" else target, []).append(mean)
    return found


def _top_k(found: Mapping[str, Quality], k: int, of: str) -> Summary:
    """Over targets, score or gain of the best of the first k; of all where there are fewer."""
    values = (getattr(own, of)[min(k, own.sources)] for own in found.values())
    return summarise(100 * value if of == "gain" else value for value in values)


def _write_top_k(folder: Path, study: Study) -> list[Path]:
    """Write a line per method and k."""
    lines = []
    for method, found in study.found.items():
        for k in range(1, max(own.sources for own in found.values()) + 1):
            score, gain = (_top_k(found, k, of) for of in ("score", "gain"))
            line = {"method": method, "k": k, "targets": score.count, "score": score.mean}
            lines.append(
                line | {"score std": score.std, "relative": gain.mean, "relative std": gain.std}
            )
    path = folder / "top_k.csv"
    columns = ["method", "k", "targets", "score", "score std", "relative", "relative std"]
    write_csv(path, columns, lines)
    return [path]


def _write_steps(folder: Path, by_step: ByStep) -> list[Path]:
    """Write a line per step and method, and one per step, method and target."""
    if not by_step:
        return []
    means, lines = [], []
    for step, of_method in by_step.items():
        for method, found in of_method.items():
            facts = {"step": step, "method": method}
            means.append(facts | _means(found, False))
            lines += [facts | {"target": name} | percent(own) for name, own in found.items()]
    paths = [folder / "steps.csv", folder / "steps_targets.csv"]
    write_csv(paths[0], ["step", "method", *_mean_columns(False)], means)
    write_csv(paths[1], ["step", "method", "target", *measures(False)], lines)
    return paths


# ---- figures -------------------------------------------------------------------------------------


def _transfer_figures(
    folder: Path, table: Table, gains: Mapping[tuple[str, str], Sequence[float]]
) -> Iterator[Path]:
    """Draw relative transfer by pair, source and target; scores by pair where there is none."""
    import numpy as np

    from prompt_lab.analysis.interpretation_plots import norm_violins
    from prompt_lab.analysis.old_plots import save_figure
    from prompt_lab.analysis.selection_plots import spread_marks

    known = gains or {
        (target, source): list(table.scores[target][source].values())
        for target, source in table.pairs()
    }
    means = {pair: math.fsum(values) / len(values) for pair, values in known.items()}
    label = "relative transfer in percent" if gains else "score in percent"
    words, form = ("relative transfer\nin percent", "{:+.1f}") if gains else (label, "{:.1f}")
    yield from _map(folder / "transfer", table, means, words, form)
    if not gains:
        return
    for by, other in (("source", "target"), ("target", "source")):
        names = table.sources if by == "source" else list(table.scores)
        place = ("target", "source").index(by)
        every = {
            name: [value for pair, own in gains.items() if pair[place] == name for value in own]
            for name in names
        }
        every = {name: values for name, values in every.items() if values}
        note = f"a value for each {other} and seed; thick line: median; dotted line: no transfer"
        figure = norm_violins(
            list(every), list(map(np.array, every.values())), label, note, dots=_DOTS, level=0.0
        )
        yield from save_figure(figure, folder / f"transfer-by-{by}")
        pairs = _pair_means(gains, by)
        spreads = [spread(pairs[name]) for name in every]
        note = f"over {other}s, the seeds of a pair averaged; dotted line: no transfer"
        figure = spread_marks(list(every), spreads, label, note)
        yield from save_figure(figure, folder / f"transfer-means-by-{by}")


def _map(
    stem: Path, table: Table, values: Mapping[tuple[str, str], float], label: str, form: str
) -> list[Path]:
    """Draw numbers of pairs of target and source as a map, a line per source."""
    import numpy as np

    from prompt_lab.analysis.interpretation_plots import heatmap
    from prompt_lab.analysis.old_plots import save_figure

    targets = list(table.scores)
    rows = [
        [values.get((target, source), math.nan) for target in targets] for source in table.sources
    ]
    lacks = any(math.isnan(value) for row in rows for value in row)
    figure = heatmap(
        table.sources,
        targets,
        np.array(rows),
        label,
        axes_names=("target", "source"),
        form=form,
        note="hatched: no value" if lacks else "",
    )
    return save_figure(figure, stem)


def _similarity_figures(folder: Path, study: Study) -> Iterator[Path]:
    """Draw the similarities of each method whose ranking depends on the target."""
    for method, rating in study.ratings.items():
        if method not in _ALIKE:
            pairs = study.table.pairs()
            values = {(target, source): rating[target][source] for target, source in pairs}
            label = "\n".join(textwrap.wrap(f"similarity {method}", 16))
            stem = _stem(folder, f"similarity {method}")
            yield from _map(stem, study.table, values, label, "{:.3g}")


def _stem(folder: Path, words: str) -> Path:
    """Path of a figure without ending, by words that may be names."""
    from prompt_lab.analysis.old_plots import file_name

    return folder / file_name(words).replace("_", "-")


def _quality_figures(folder: Path, study: Study) -> Iterator[Path]:
    """Draw the best of the first k over k, and nDCG over steps."""
    from prompt_lab.analysis.old_plots import save_figure
    from prompt_lab.analysis.selection_plots import method_curves

    table = study.table
    has_gain = any(base > 0 for base in table.baseline.values())
    of, what = ("gain", "relative transfer") if has_gain else ("score", "score")
    ks = range(1, max(map(len, table.scores.values())) + 1)
    curves = {
        method: [_top_k(found, k, of).mean for k in ks] for method, found in study.found.items()
    }
    names = ("sources tried, k", f"{what} of the best of k, percent")
    note = "mean over targets; random and equal similarities: exact expectation"
    yield from save_figure(method_curves(ks, curves, names, note), folder / "top-k")
    if study.by_step:
        steps = list(study.by_step)
        lines = {
            method: [_ndcg(study.by_step[step][method]) for step in steps]
            for method in study.by_step[steps[0]]
        }
        level = "random (expected)", _ndcg(study.found["random"])
        words = ("step of the target prompts", "nDCG, percent")
        figure = method_curves(steps, lines, words, "mean over targets", level)
        yield from save_figure(figure, folder / "steps-ndcg")


def _ndcg(found: Mapping[str, Quality]) -> float:
    """Mean nDCG over targets in percent."""
    return summarise(100 * own.ndcg for own in found.values()).mean


def _token_figures(folder: Path, study: Study) -> Iterator[Path]:
    """Draw the rows of each target's prompt with those of its best, second and worst source.

    The prompts are those of the target's first sample; a source without it gives its own first.
    """
    import numpy as np

    from prompt_lab.analysis.interpretation_plots import tsne_points
    from prompt_lab.analysis.old_plots import save_figure
    from prompt_lab.analysis.selection_plots import token_map

    samples: dict[str, list[int]] = {}
    for task, sample in sorted(study.files):
        samples.setdefault(task, []).append(sample)
    for target, of_source in study.table.scores.items() if samples else ():
        sample = samples[target][0]
        shown = {f"{target}, no transfer": study.files[target, sample]}
        for words, source in _extremes(of_source).items():
            own = sample if sample in samples[source] else samples[source][0]
            shown[words] = study.files[source, own]
        prompts = [one.load().prompt.numpy() for one in shown.values()]
        rows = np.concatenate(prompts)
        if len(rows) < 4:  # too few for t-SNE
            continue
        points, perplexity = tsne_points(rows)
        groups = [name for name, own in zip(shown, prompts, strict=True) for _ in own]
        note = (
            "rows of prompts (of the same sample where there is one), t-SNE of perplexity "
            f"{perplexity:.3g}; in brackets the target's score in percent from that source"
        )
        figure = token_map(points, groups, note)
        yield from save_figure(figure, _stem(folder, f"tokens {target}"))


def _extremes(of_source: Mapping[str, Mapping[str, float]]) -> dict[str, str]:
    """The best, second and worst source by mean score, equal ones by name; by what to call it."""
    scores = {source: math.fsum(own.values()) / len(own) for source, own in of_source.items()}
    order = sorted(scores, key=lambda source: (-scores[source], source))
    roles = [("best", order[0]), *([("second", order[1])] if len(order) > 2 else [])]
    return {f"{role}: {x} ({scores[x]:.2f})": x for role, x in [*roles, ("worst", order[-1])]}
