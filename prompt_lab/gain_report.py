"""Average relative gain (ARG) of prompts learned on other tasks, and how fast they adapt.

Meta prompt tuning (Qin et al. 2023, arXiv 2302.08143, section 4.2 and Table 2) learns a prompt on
source tasks, starts prompt tuning on target tasks from it, and compares with plain prompt tuning:
ARG is the mean over target tasks of (score - reference) / reference. A **setting** is one set of
source tasks under equal settings (backbone, K, N and so on); its methods are the algorithms that
learned the prompt, and fine tuning on the same target tasks for comparison. The paper does not say
over what its deviations are; here they are over few-shot samples.

**Adaptation curves** are the dev scores of the runs that count, over the steps of their training,
from ``curves.csv`` beside their prompts. Fine tuning has no curve here, since its results name no
prompt. Left out: tests of significance, and the layout of tables, which is in
`prompt_lab.report_command`.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

from prompt_lab.report import (
    FIXED,
    FURTHER,
    UPSTREAM,
    Line,
    Row,
    counted,
    listed,
    named_lines,
    part,
    references_among,
    tasks_in_order,
)
from prompt_lab.results import read_csv
from prompt_lab.statistics import DENOMINATOR_RULE, average_relative_gain, summarise

FINE_TUNING = "fine tuning"
PLAIN = "plain"
"""Name of the start that plain prompt tuning has, among the adaptation curves."""

METHODS = (*UPSTREAM, FINE_TUNING)
"""Columns of the table, in order."""

Scores = Mapping[str, Mapping[str, float]]
"""Score by task and sample."""

Cell = tuple[str, str]
"""A task and one of its samples."""

_SETTING = tuple(
    name
    for name in (*FIXED, *FURTHER)
    if name not in ("method", "variant", "intrinsic_dim", "initialised")
)
"""Columns that tell settings apart, beside the sources."""

_MANY = 3
"""Most folders that a note names."""

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
class Curve:
    """Dev scores of one run.

    Attributes:
        dev: dev score by step; at least one.
        ended: whether training ended before its budget, by patience or failure.
    """

    dev: Mapping[int, float]
    ended: bool = False

    @cached_property
    def last(self) -> int:
        """The last step."""
        return max(self.dev)

    def at(self, step: int) -> float | None:
        """Dev score at a step; a run that ended early keeps its last one; None where unknown."""
        if self.ended and step > self.last:
            return self.dev[self.last]
        return self.dev.get(step)


@dataclass(frozen=True)
class Point:
    """One step of an adaptation curve.

    Attributes:
        step: optimizer steps done.
        mean: mean over tasks of the mean over samples of the dev score.
        std: standard deviation (ddof 1) over samples of the mean over tasks; NaN with fewer than
            two samples.
        tasks: number of tasks.
        samples: number of samples.
    """

    step: int
    mean: float
    std: float
    tasks: int
    samples: int


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


# ---- adaptation ----------------------------------------------------------------------------------


def adaptation(curves: Mapping[Cell, Sequence[Curve]]) -> list[Point]:
    """Mean dev score over tasks and samples, at the steps for which every run has one.

    Args:
        curves: the runs of each task and sample; those of several seeds are averaged first.
    """
    steps = {step for of_cell in curves.values() for run in of_cell for step in run.dev}
    points = []
    for step in sorted(steps):
        dev = {cell: [run.at(step) for run in of_cell] for cell, of_cell in curves.items()}
        if any(None in of_cell for of_cell in dev.values()):
            continue
        by_task: dict[str, list[float]] = defaultdict(list)
        by_sample: dict[str, list[float]] = defaultdict(list)
        for (task, sample), of_cell in dev.items():
            value = summarise(x for x in of_cell if x is not None).mean
            by_task[task].append(value)
            by_sample[sample].append(value)
        mean = summarise(summarise(of_task).mean for of_task in by_task.values())
        spread = summarise(summarise(of_sample).mean for of_sample in by_sample.values())
        points.append(Point(step, mean.mean, spread.std, mean.count, spread.count))
    return points


def read_curves(path: Path) -> dict[str, dict[int, float]]:
    """Dev scores by run and step of a ``curves.csv``; steps without a dev score are left out.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that is no such table, or with words for numbers.
    """
    found: dict[str, dict[int, float]] = defaultdict(dict)
    try:
        for row in read_csv(path):
            dev = float(row["dev"] or math.nan)
            if math.isfinite(dev):
                found[row["run"]][int(row["step"])] = dev
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise ValueError(f"{path} is no curves.csv of prompt-lab: {error!r}") from None
    return dict(found)


class _Reader:
    """Curves of runs, with what kept some runs from having one; reads each file once."""

    def __init__(self) -> None:
        """Start with nothing read."""
        self._files: dict[Path, dict[str, dict[int, float]] | str] = {}

    def curves(self, line: Line, tasks: Iterable[str]) -> dict[Cell, list[Curve]]:
        """Curves of the runs of a line that count, on some tasks."""
        found: dict[Cell, list[Curve]] = defaultdict(list)
        for cell, row in _chosen(line, tasks):
            dev = self._dev(row)
            if not isinstance(dev, str):
                found[cell].append(Curve(dev, row.failed or row.stopped))
        return dict(found)

    def problems(self, line: Line, tasks: Iterable[str]) -> Iterator[str]:
        """Why runs of a line that count have no curve."""
        folders: dict[str, list[str]] = defaultdict(list)
        for _, row in _chosen(line, tasks):
            dev = self._dev(row)
            if isinstance(dev, str):
                folders[dev].append(str(_folder(row)))
        for why, of_why in folders.items():
            names = list(dict.fromkeys(of_why))
            more = f" and {len(names) - _MANY} more" if len(names) > _MANY else ""
            yield (
                f"no adaptation curve for {counted(len(of_why), 'run')}, {why}: "
                f"{', '.join(names[:_MANY])}{more}"
            )

    def _dev(self, row: Row) -> dict[int, float] | str:
        """Dev scores of a run by step, or why there are none."""
        name = row.cells.get("prompt_file", "")
        if not name:
            return "which name no prompt file"
        path = _folder(row) / "curves.csv"
        if path not in self._files:
            try:
                self._files[path] = read_curves(path)
            except FileNotFoundError:
                self._files[path] = "without a curves.csv"
            except (OSError, ValueError):
                self._files[path] = "with a curves.csv that cannot be read"
        found = self._files[path]
        if isinstance(found, str):
            return found
        return found.get(Path(name).stem) or "with a curves.csv that has no dev score of them"


def _chosen(line: Line, tasks: Iterable[str]) -> Iterator[tuple[Cell, Row]]:
    """The runs of a line that count, on some tasks, each with its task and sample."""
    for task in tasks:
        if task in line.tasks:
            yield from (((task, row.cells["sample"]), row) for row in line.tasks[task].chosen)


def _folder(row: Row) -> Path:
    """The folder of a run's fit, in which ``prompts/`` and ``curves.csv`` lie."""
    return Path(row.cells.get("prompt_file", "")).parent.parent


def _adaptations(
    lines: Mapping[str, Line], tasks: Sequence[str], reader: _Reader
) -> tuple[dict[str, list[Point]], list[str]]:
    """Adaptation curves by start, on the tasks and samples that all starts have, and notes."""
    found = {start: reader.curves(line, tasks) for start, line in lines.items()}
    found = {start: curves for start, curves in found.items() if curves}
    if not set(found) - {PLAIN}:
        return {}, []
    cells = [set(curves) for curves in found.values()]
    shared = set.intersection(*cells)
    stray = sorted(set.union(*cells) - shared)
    notes, curves, short = [], {}, []
    if stray:
        notes.append(
            f"adaptation curves are of the tasks and samples that all of {', '.join(found)} have; "
            f"left out: {counted(len(stray), 'pair')} of {listed(_tasks_of(stray))}"
        )
    samples = {sample for _, sample in shared}
    if len(shared) < len(_tasks_of(shared)) * len(samples):
        notes.append(
            "not every sample has all tasks, so the spread of adaptation curves holds differences "
            "between tasks"
        )
    for start, of_start in found.items():
        kept = {cell: runs for cell, runs in of_start.items() if cell in shared}
        points = adaptation(kept)
        if points:
            curves[start] = points
            short += _carried(start, kept, points[-1].step)
        elif kept:
            notes.append(f"no adaptation curve of {start}: its runs share no step")
    if short:
        notes.append(
            "adaptation curves carry on the last dev score of runs that ended before the last step "
            f"(patience or failure): {', '.join(short)}"
        )
    return curves, notes


def _carried(start: str, curves: Mapping[Cell, Sequence[Curve]], last: int) -> Iterator[str]:
    """How many runs of a start ended before a step; nothing where none did."""
    runs = [run for of_cell in curves.values() for run in of_cell]
    short = sum(run.ended and run.last < last for run in runs)
    if short:
        yield f"{short} of {counted(len(runs), 'run')} of {start}"


def _tasks_of(cells: Iterable[Cell]) -> list[str]:
    """The tasks of some pairs of task and sample."""
    return sorted({task for task, _ in cells})


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
    plain = [x for x in lines if _is_tuned(x, "PromptTuning") and not x.upstream]
    tuned = [line for line in lines if _is_tuned(line, "FineTuning")]
    reader = _Reader()
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
    return GainReport(settings, [f"{'; '.join(who)}: {text}." for text, who in notes.items()])


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
    labels = "; ".join(line.label for line in found)
    return f"no average relative gain: {name} is several lines ({labels}); --reference names one"


def _make_setting(
    label: str, reference: Line, lines: Mapping[str, Line], reader: _Reader
) -> tuple[Setting, list[tuple[str, str]]]:
    """A setting, and notes on it, each with what it is of."""
    lines = {method: lines[method] for method in METHODS if method in lines}
    upstream = {method: line for method, line in lines.items() if method != FINE_TUNING}
    tasks = tasks_in_order(upstream.values())
    base = sample_scores(reference)
    gains = {m: relative_gain(sample_scores(line), base, tasks) for m, line in lines.items()}
    starts = {PLAIN: reference, **upstream}
    curves, about = _adaptations(starts, tasks, reader)
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
    from prompt_lab.plots import file_name

    names: list[str] = []
    for setting in settings:
        name = file_name(setting.label)[:_LONGEST]
        taken = sum(other.partition("--")[0] == name for other in names)
        names.append(f"{name}--{taken + 1}" if taken else name)
    return names


def _draw_bars(setting: Setting, stem: Path) -> list[Path]:
    """Relative gain per task, a bar per method."""
    from prompt_lab.plots import Series, save_task_bars

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
    from prompt_lab.plots import Series, save_figure, step_curves

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
