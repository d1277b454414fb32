"""Average relative gain (ARG) of prompts learned on other tasks, and how fast they adapt.

Meta prompt tuning (Qin et al. 2023, arXiv 2302.08143, section 4.2 and Table 2) learns a prompt on
source tasks, starts prompt tuning on target tasks from it, and compares with plain prompt tuning:
ARG is the mean over target tasks of (score - reference) / reference. A **setting** is one set of
source tasks under equal settings (backbone, K, N and so on); its methods are the algorithms that
learned the prompt, and fine tuning on the same target tasks for comparison. The paper does not say
over what its deviations are; here they are over few-shot samples.

Left out: tests of significance, and the layout of tables, which is in `report_command`.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from prompt_lab.analysis.adaptation_curves import PLAIN, Cell, CurveReader, Point, adaptations
from prompt_lab.analysis.report import (
    FIXED,
    FURTHER,
    UPSTREAM,
    Line,
    counted,
    few,
    listed,
    named_lines,
    part,
    references_among,
    tasks_in_order,
)
from prompt_lab.analysis.statistics import DENOMINATOR_RULE, average_relative_gain, summarise

FINE_TUNING = "fine tuning"
METHODS = (*UPSTREAM, FINE_TUNING)
"""Columns of the table, in order."""

Scores = Mapping[str, Mapping[str, float]]
"""Score by task and sample."""

_SETTING = tuple(
    name
    for name in (*FIXED, *FURTHER)
    if name not in ("method", "variant", "intrinsic_dim", "initialised")
)
"""Columns that tell settings apart, beside the sources."""

_LONGEST = 100
"""Most characters of a setting in the name of a file."""


@dataclass(frozen=True)
class TaskGain:
    """Relative gain on one task.

    Attributes:
        value: (score - reference) / reference, of the means over samples; NaN where left out.
        std: standard deviation (ddof 1) over samples of the gain of each; NaN with fewer than two.
        samples: samples that have a gain.
        score: mean over samples.
        reference: the reference's mean over samples.
        left_out: why it is not in the mean over tasks; empty where it is.
    """

    value: float
    std: float
    samples: int
    score: float
    reference: float
    left_out: str


@dataclass(frozen=True)
class Gain:
    """Average relative gain of a line.

    Attributes:
        value: mean over tasks of their gains, which is E_rel less 1; NaN without a task.
        std: standard deviation (ddof 1) over samples of the mean over tasks of a sample's gains;
            NaN with fewer than two samples.
        tasks: tasks in the mean.
        samples: samples that have such a mean.
        by_task: the tasks, with those that are left out.
        lacking: task and sample pairs without a gain, and why, among the tasks in the mean.
    """

    value: float
    std: float
    tasks: int
    samples: int
    by_task: Mapping[str, TaskGain]
    lacking: Mapping[Cell, str]

    @cached_property
    def left_out(self) -> dict[str, str]:
        """Tasks that are not in the mean, and why."""
        return {task: gain.left_out for task, gain in self.by_task.items() if gain.left_out}


@dataclass(frozen=True)
class Setting:
    """One set of source tasks under equal settings.

    Attributes:
        label: the set's name, and what tells the setting apart from others of the same set.
        sources: the set's name.
        reference: the line of plain prompt tuning.
        lines: line of each method, in the order of `METHODS`.
        tasks: all target tasks of the lines that start from a learned prompt, in report order.
        gains: average relative gain of each method, over these tasks.
        curves: adaptation curve by start, `PLAIN` first; empty where there is nothing to draw.
    """

    label: str
    sources: str
    reference: Line
    lines: Mapping[str, Line]
    tasks: Sequence[str]
    gains: Mapping[str, Gain]
    curves: Mapping[str, Sequence[Point]]


@dataclass(frozen=True)
class GainReport:
    """What the results say of prompts learned on other tasks.

    Attributes:
        settings: the settings that have a reference.
        notes: what is missing, left out or not clear.
    """

    settings: Sequence[Setting] = ()
    notes: Sequence[str] = field(default=())


# ---- relative gain -------------------------------------------------------------------------------


def relative_gain(scores: Scores, reference: Scores, tasks: Iterable[str]) -> Gain:
    """Average relative gain over tasks, with its spread over samples.

    The value is that of the means over samples, so that it is E_rel less 1. The spread is over the
    samples' own gains. Within both, tasks are left out by `DENOMINATOR_RULE`; tasks that are left
    out of the value count in no sample.

    Args:
        scores: scores of the line; NaN and what is not there are missing.
        reference: scores of the reference.
        tasks: the tasks to keep to.
    """
    tasks = list(tasks)
    mean, base = _task_means(scores, tasks), _task_means(reference, tasks)
    whole = average_relative_gain(mean, base)
    places = [at for at in range(len(tasks)) if at not in whole.left_out]
    inside = [tasks[at] for at in places]
    samples = dict.fromkeys(s for of in (scores, reference) for t in inside for s in of.get(t, {}))
    by_sample, lacking = {}, {}
    for sample in samples:
        pair = ([of.get(t, {}).get(sample, math.nan) for t in inside] for of in (scores, reference))
        by_sample[sample] = average_relative_gain(*pair)
        lacking |= {(inside[at], sample): why for at, why in by_sample[sample].left_out.items()}
    spread = summarise(found.mean for found in by_sample.values())
    of_task = {
        task: summarise(found.values[at] for found in by_sample.values())
        for at, task in enumerate(inside)
    }
    nothing = summarise([])
    by_task = {
        task: TaskGain(
            value=whole.values[at],
            std=of_task.get(task, nothing).std,
            samples=of_task.get(task, nothing).count,
            score=mean[at],
            reference=base[at],
            left_out=whole.left_out.get(at, ""),
        )
        for at, task in enumerate(tasks)
    }
    return Gain(whole.mean, spread.std, whole.count, spread.count, by_task, lacking)


def _task_means(scores: Scores, tasks: Sequence[str]) -> list[float]:
    """Mean over samples of each task; NaN where there is none."""
    return [summarise(scores.get(task, {}).values()).mean for task in tasks]


def sample_scores(line: Line) -> dict[str, dict[str, float]]:
    """Test score of a line by task and sample: the mean over seeds of the runs that count."""
    scores = {}
    for task, result in line.tasks.items():
        tests: dict[str, list[float]] = defaultdict(list)
        for row in result.chosen:
            tests[row.cells["sample"]].append(row.test)
        scores[task] = {sample: summarise(of_sample).mean for sample, of_sample in tests.items()}
    return scores


# ---- settings ------------------------------------------------------------------------------------


def find_gains(lines: Sequence[Line], names: Sequence[str] | None = None) -> GainReport:
    """Settings, their gains and curves.

    The reference of a line that starts from a learned prompt is plain prompt tuning on the same
    backbone: the one that ``names`` name if they name one, and of several the one that also agrees
    in K, way of answering and metric variant. That of fine tuning is found in the same way.

    Args:
        lines: all lines of a report.
        names: labels or methods that the user wants as references.

    Returns:
        The report; empty where no line starts from a learned prompt. What has no clear reference
        is a note, no error.
    """
    by_key: dict[tuple[str, ...], dict[str, Line]] = defaultdict(dict)
    for line in lines:
        if line.upstream and _is_tuned(line, "PromptTuning"):
            by_key[_setting_key(line)][line.upstream[0]] = line
    named = [line.label for name in names or () for line in named_lines(name, lines)]
    plain = named_lines("PromptTuning", lines)
    tuned = [line for line in lines if _is_tuned(line, "FineTuning")]
    reader = CurveReader()
    settings, notes = [], defaultdict(list)
    for key, of_key in by_key.items():
        label = _setting_label(key, list(by_key))
        first = next(iter(of_key.values()))
        found = _closest(first, plain, named)
        if len(found) != 1:
            notes[_unclear("plain prompt tuning", found)].append(label)
            continue
        others = _closest(first, tuned, named)
        if len(others) > 1:
            notes[_unclear(FINE_TUNING, others)].append(f"{label}, {FINE_TUNING}")
        if len(others) == 1:
            of_key[FINE_TUNING] = others[0]
        setting, about = _make_setting(label, found[0], of_key, reader)
        settings.append(setting)
        for who, text in about:
            notes[text].append(who)
    return GainReport(settings, [f"{few(who)}: {text}." for text, who in notes.items()])


def _is_tuned(line: Line, method: str) -> bool:
    """Whether a line is a method as such, not in a subspace and no baseline."""
    return line.key["method"] == method and line.key["variant"] == "tuned" and not line.dimension


def _setting_key(line: Line) -> tuple[str, ...]:
    """Sources and settings of a line, whichever the algorithm."""
    assert line.upstream is not None
    return (line.upstream[1], *(line.key[name] for name in _SETTING))


def _setting_label(key: Sequence[str], keys: Sequence[Sequence[str]]) -> str:
    """Sources, and the settings that tell the setting apart from others of the same sources."""
    alike = [other for other in keys if other[0] == key[0]]
    parts = [
        part(name, value)
        for at, (name, value) in enumerate(zip(_SETTING, key[1:], strict=True), 1)
        if value and len({other[at] for other in alike}) > 1
    ]
    return ", ".join([key[0], *parts])


def _closest(line: Line, candidates: Sequence[Line], named: Sequence[str]) -> list[Line]:
    """The candidates that a line can be compared with; named ones go before others."""
    wanted = [other for other in candidates if other.label in named]
    return references_among(line, wanted) or references_among(line, candidates)


def _unclear(name: str, found: Sequence[Line]) -> str:
    """Why there is no gain."""
    if not found:
        return f"no average relative gain: no line of {name} on the same backbone"
    labels = few([line.label for line in found])
    return f"no average relative gain: {name} is several lines ({labels}); --reference names one"


def _make_setting(
    label: str, reference: Line, lines: Mapping[str, Line], reader: CurveReader
) -> tuple[Setting, list[tuple[str, str]]]:
    """A setting, and notes on it, each with what it is of."""
    lines = {method: lines[method] for method in METHODS if method in lines}
    upstream = {method: line for method, line in lines.items() if method != FINE_TUNING}
    tasks = tasks_in_order(upstream.values())
    base = sample_scores(reference)
    gains = {m: relative_gain(sample_scores(line), base, tasks) for m, line in lines.items()}
    starts = {PLAIN: reference, **upstream}
    curves, about = adaptations(starts, tasks, reader)
    notes = [
        (f"{label}, {method}", text) for method in gains for text in _gain_notes(gains[method])
    ]
    notes += [
        (f"{label}, {s}", x) for s, line in starts.items() for x in reader.problems(line, tasks)
    ]
    notes += [(label, text) for text in about]
    sources = next(iter(upstream.values())).upstream
    assert sources is not None
    return Setting(label, sources[1], reference, lines, tasks, gains, curves), notes


def _gain_notes(gain: Gain) -> Iterator[str]:
    """What is left out of a gain, and of its spread."""
    reasons = sorted(gain.left_out.items(), key=lambda item: item[1])
    for why, group in groupby(reasons, key=lambda item: item[1]):
        yield f"left out of ARG, {why}: {listed([task for task, _ in group])}"
    tasks: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (task, sample), why in gain.lacking.items():
        tasks[sample, why].append(task)
    samples: dict[tuple[str, str], list[str]] = defaultdict(list)
    for (sample, why), of_sample in tasks.items():
        samples[why, listed(of_sample)].append(sample)
    for (why, names), of_names in samples.items():
        yield f"left out of the spread of ARG, in sample {', '.join(of_names)}, {why}: {names}"


# ---- tables --------------------------------------------------------------------------------------


def gain_legend(report: GainReport) -> str:
    """What the table of gains is, in a paragraph."""
    references: dict[str, list[str]] = defaultdict(list)
    for setting in report.settings:
        references[setting.reference.label].append(setting.label)
    against = "; ".join(references)
    if len(references) > 1:
        against = "; ".join(f"{x} (for {', '.join(of)})" for x, of in references.items())
    return (
        "ARG in % of prompt tuning that starts from a prompt learned on the named source tasks: "
        "mean over target tasks of (score - reference) / reference, where scores are means over "
        f"seeds, then samples. {FINE_TUNING.capitalize()} is on the same target tasks. Reference: "
        f"{against}. ± standard deviation (ddof 1) over samples of "
        "the mean over tasks of a sample's own gains. (12/5) means 12 tasks and 5 samples. "
        f"{DENOMINATOR_RULE[0].upper()}{DENOMINATOR_RULE[1:]}; so also within a sample."
    )


def gain_table(report: GainReport) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the table: a row per setting, a column per method."""
    methods = [m for m in METHODS if any(m in setting.gains for setting in report.settings)]
    rows = [
        [setting.label, *(show_gain(setting.gains.get(method)) for method in methods)]
        for setting in report.settings
    ]
    return ["sources", *methods], rows


def show_gain(gain: Gain | None) -> str:
    """A gain in %, with its spread and the number of its tasks and samples."""
    if gain is None or not gain.tasks:
        return "-"
    spread = "" if math.isnan(gain.std) else f" ± {100 * gain.std:.2f}"
    return f"{100 * gain.value:.2f}{spread} ({gain.tasks}/{gain.samples})"


GAIN_COLUMNS = (
    *("setting", "sources", "backbone", "method", "line", "reference", "task"),
    *("relative_gain", "std", "tasks", "samples", "score", "reference_score", "left_out"),
)
CURVE_MEAN_COLUMNS = (
    *("setting", "initialisation", "step", "mean_dev", "std", "tasks", "samples"),
)


def gain_rows(report: GainReport) -> Iterator[dict[str, Any]]:
    """Rows of ``gains.csv``: per setting and method the mean (empty task), then every task.

    Gains are fractions, not %. In the rows of means, ``left_out`` names tasks; in those of tasks it
    says why.
    """
    for setting in report.settings:
        for method, gain in setting.gains.items():
            row = {
                "setting": setting.label,
                "sources": setting.sources,
                "backbone": setting.reference.key["backbone"],
                "method": method,
                "line": setting.lines[method].label,
                "reference": setting.reference.label,
            }
            yield row | {
                "relative_gain": gain.value,
                "std": gain.std,
                "tasks": gain.tasks,
                "samples": gain.samples,
                "left_out": " ".join(gain.left_out),
            }
            for task, of_task in gain.by_task.items():
                yield row | {
                    "task": task,
                    "relative_gain": of_task.value,
                    "std": of_task.std,
                    "tasks": int(not of_task.left_out),
                    "samples": of_task.samples,
                    "score": of_task.score,
                    "reference_score": of_task.reference,
                    "left_out": of_task.left_out,
                }


def adaptation_rows(report: GainReport) -> Iterator[dict[str, Any]]:
    """Rows of ``adaptation.csv``: one per setting, start and step."""
    for setting in report.settings:
        for start, points in setting.curves.items():
            for point in points:
                yield {
                    "setting": setting.label,
                    "initialisation": start,
                    "step": point.step,
                    "mean_dev": point.mean,
                    "std": point.std,
                    "tasks": point.tasks,
                    "samples": point.samples,
                }


# ---- pictures ------------------------------------------------------------------------------------


def draw_gains(report: GainReport, folder: Path) -> list[Path]:
    """Draw, for every setting, gains per task as bars and the adaptation curves.

    Args:
        report: the report.
        folder: where the pictures go.

    Returns:
        The files.
    """
    files = []
    for setting, name in zip(report.settings, _file_names(report.settings), strict=True):
        if any(gain.tasks for gain in setting.gains.values()):
            files += _draw_bars(setting, folder / f"gains-{name}")
        if setting.curves:
            files += _draw_curves(setting, folder / f"adaptation-{name}")
    return files


def _file_names(settings: Iterable[Setting]) -> list[str]:
    """A file name per setting; equal ones are numbered."""
    from prompt_lab.analysis.plots import file_name

    names: list[str] = []
    for setting in settings:
        name = file_name(setting.label)[:_LONGEST]
        taken = sum(other.partition("--")[0] == name for other in names)
        names.append(f"{name}--{taken + 1}" if taken else name)
    return names


def _draw_bars(setting: Setting, stem: Path) -> list[Path]:
    """Relative gain per task, a bar per method."""
    from prompt_lab.analysis.plots import Series, save_task_bars

    series = []
    for method, gain in setting.gains.items():
        found = [gain.by_task[task] for task in setting.tasks]
        percent = [100 * one.value for one in found]
        series.append(Series(method, percent, [100 * one.std for one in found]))
    spread = any(not math.isnan(std) for one in series for std in one.std)
    bars = "error bars: standard deviation (ddof 1) over samples" if spread else "one sample"
    note = f"from {setting.label}, against {setting.reference.label}; {bars}"
    return save_task_bars(setting.tasks, series, "relative gain (%)", note, stem)


def _draw_curves(setting: Setting, stem: Path) -> list[Path]:
    """Mean dev score over steps, a line per start."""
    from prompt_lab.analysis.plots import Series, save_figure, step_curves

    curves = setting.curves
    steps = sorted({point.step for points in curves.values() for point in points})
    series = []
    for start, points in curves.items():
        at = {point.step: point for point in points}
        mean = [at[step].mean if step in at else math.nan for step in steps]
        series.append(Series(start, mean, [at[s].std if s in at else math.nan for s in steps]))
    point = next(iter(curves.values()))[0]
    counts = f"{counted(point.tasks, 'task')} and {counted(point.samples, 'sample')}"
    bars = "; error bars: standard deviation (ddof 1) over samples of the mean over tasks"
    note = f"from {setting.label}: {counts}{bars if point.samples > 1 else ''}"
    return save_figure(step_curves(steps, series, "mean dev score", note), stem)
