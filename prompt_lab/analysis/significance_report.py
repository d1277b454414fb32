"""Starts of prompt tuning compared: scores over K, and the best against the second best.

Belanec et al. 2024 (arXiv 2408.01119, table 2 and figure 5) tune prompts on a target task from
different starts: a plain initial prompt, the prompt of one source task, one learned on several, a
sum of task prompt vectors, and the attention over source prompts of ATTEMPT. Here a **start** is
what the results call ``initialised``, or the method ``Attempt``. Runs that differ in learning rate
or batch size alone are chosen among by dev; the others are the values of a mean and of a test.

The paper types rounded means and deviations (ddof 0) into its tests, and tests without pairs where
runs share their initial prompts. Here tests take unrounded scores of result files, and are paired
where both starts have the same samples and seeds. Left out: tests over several tasks at once.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, Literal

from prompt_lab.analysis.report import Row, choose_by_dev, part
from prompt_lab.analysis.statistics import Summary, TTest, adjust, summarise, t_test

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    from prompt_lab.analysis.plots import Series

Correction = Literal["holm", "bonferroni", "none"]

Table = tuple[list[str], list[list[str]]]
"""Header and lines."""

Unit = tuple[str, ...]
"""Sample and seeds of a run, whose score is one value of a test."""

Runs = Mapping[Unit, float]
"""Test scores; NaN where a run has none."""

LEVEL = 0.05
"""Corrected p-values up to this one are marked."""

TUNED = (("PromptTuning", "tuned"), ("Attempt", "attempt"))
"""Method and variant of the lines that are compared."""

_LEARNED = "prompt of "

UNTUNED = "0"
"""K of initial prompts as they are."""

_SETTING = ("backbone", "num_virtual_tokens", "decoding", "metric_variant")
"""What starts must have in common to be compared."""

_FILE = re.compile(
    r"file (?P<source>(?:.*/)?[^/]*?)_(?:-?\d+_)?seed(?P<seed>-?\d+)[^/]*\.safetensors"
)
"""A start from a file of a prompt store, whose name tells sample and seed of its prompt."""


@dataclass(frozen=True)
class Panel:
    """All starts on one task under equal settings.

    Attributes:
        label: the task, and the settings that tell the panel from others of the same task.
        task: the task.
        metric: its metric.
        scores: runs by K ("0", "16", ..., "all", rising) and start; K "0" are initial prompts.
    """

    label: str
    task: str
    metric: str
    scores: Mapping[str, Mapping[str, Runs]]


@dataclass(frozen=True)
class Contest:
    """The best start against the second best, on one task and K.

    Attributes:
        panel: label of the panel.
        shots: K.
        best: the start of highest mean.
        second: the next.
        t_test: of best against second.
        adjusted: its p-value, corrected for all contests.
    """

    panel: str
    shots: str
    best: str
    second: str
    t_test: TTest
    adjusted: float


@dataclass(frozen=True)
class StartReport:
    """What results say of starts.

    Attributes:
        panels: tasks with several starts or several K.
        contests: best against second best.
        correction: of the p-values.
        notes: what is not alike or was left out.
    """

    panels: Sequence[Panel] = ()
    contests: Sequence[Contest] = ()
    correction: Correction = "holm"
    notes: Sequence[str] = field(default=())

    @property
    def starts(self) -> list[str]:
        """All starts, in the order of their first lines."""
        per_k = [by_start for panel in self.panels for by_start in panel.scores.values()]
        return list(dict.fromkeys(start for by_start in per_k for start in by_start))


# ---- starts and runs -----------------------------------------------------------------------------


def with_source_seed(row: Row) -> Row:
    """A run with the seed of the prompt file that it started from, for which its own has no use.

    Of "file FOLDER/glue-mnli_100_seed3_lr0.3_bs8.safetensors" the start becomes "prompt of
    FOLDER/glue-mnli" and the seed 3, so that such files are several seeds of one start. Sample,
    learning rate and batch size of the source are passed over. Other starts stay as they are.
    """
    found = _FILE.fullmatch(row.cells["initialised"])
    if not found:
        return row
    start = {"initialised": f"{_LEARNED}{found['source']}", "init_seed": found["seed"]}
    return replace(row, cells={**row.cells, **start})


def start_report(rows: Iterable[Row], correction: Correction = "holm") -> StartReport:
    """Compare starts of prompt tuning.

    A task takes part where it has two starts with two runs each at one K, or several K.

    Args:
        rows: lines of results, of any methods, as `with_source_seed` leaves them.
        correction: for the p-values of all contests.

    Raises:
        ValueError: a K that is neither a number nor "all".
    """
    rows = list(rows)
    tuned = [row for row in rows if _is_tuned(row)]
    untuned = [row for row in rows if _is_untuned(row)]
    names = start_names([*tuned, *untuned])
    by_panel: dict[tuple[str, ...], list[Row]] = defaultdict(list)
    for row in tuned:
        by_panel[_panel_key(row)].append(row)
    repeats, panels = 0, []
    for key, of_panel in by_panel.items():
        label = _panel_label(key, list(by_panel))
        scores, again = _scores(of_panel, names)
        if not _is_comparison(scores):
            continue
        if initial := _initial_scores(key, list(by_panel), untuned, names, scores):
            scores = {UNTUNED: initial, **scores}
        repeats += again
        panels.append(Panel(label, key[0], of_panel[0].cells["metric"], scores))
    contests = [found for panel in panels for found in _contests(panel)]
    p_values = corrected([found.t_test.p for found in contests], correction)
    contests = [replace(one, adjusted=p) for one, p in zip(contests, p_values, strict=True)]
    notes = []
    if repeats:
        notes.append(
            f"{repeats} runs have the start, task, K, sample, seeds, learning rate and batch size "
            "of another, and dev chose among them: runs that should count apart need a "
            "model.init_seed each."
        )
    return StartReport(panels, contests, correction, notes)


def _is_tuned(row: Row) -> bool:
    """Whether a line is of a method that is compared, in the whole space of prompts."""
    kind = (row.cells["method"], row.cells["variant"])
    return kind in TUNED and not row.cells["intrinsic_dim"]


def _is_untuned(row: Row) -> bool:
    """Whether a line is of the initial prompts of such a method."""
    methods = [method for method, _ in TUNED]
    return row.cells["method"] in methods and row.cells["variant"] == "initial_prompt"


def _panel_key(row: Row) -> tuple[str, ...]:
    """Task and settings."""
    return tuple(row.cells[column] for column in ("task", *_SETTING))


def _panel_label(key: Sequence[str], keys: Sequence[Sequence[str]]) -> str:
    """The task, and the settings that tell a panel from others of the task."""
    alike = [other for other in keys if other[0] == key[0]]
    parts = [
        part(name, key[at])
        for at, name in enumerate(_SETTING, 1)
        if len({other[at] for other in alike}) > 1
    ]
    return ", ".join([key[0], *parts])


def _start_key(row: Row) -> tuple[str, str]:
    """Method, and how its prompts were initialised."""
    return row.cells["method"], row.cells["initialised"]


def start_names(rows: Iterable[Row]) -> dict[tuple[str, str], str]:
    """A short name for each start: "prompt of glue-mnli" for the prompts of a task in a store.

    Args:
        rows: lines of results, as `with_source_seed` leaves them.

    Returns:
        Names by method and ``initialised``. Starts from prompts of one name in several folders keep
        their folders.
    """
    keys = list(dict.fromkeys(map(_start_key, rows)))
    short = {key: _short(key, [other for other in keys if other[0] == key[0]]) for key in keys}
    names = list(short.values())
    return {key: name if names.count(name) == 1 else key[1] for key, name in short.items()}


def _short(key: tuple[str, str], alike: Sequence[tuple[str, str]]) -> str:
    """The short name of a start, among all of its method."""
    method, text = key
    if text.startswith(_LEARNED):
        text = _LEARNED + PurePosixPath(text.removeprefix(_LEARNED)).name
    if method == "PromptTuning":
        return text
    return method.lower() if len(alike) == 1 else f"{method.lower()}, {text}"


def _unit(row: Row) -> Unit:
    """Sample and seeds of a run."""
    return tuple(row.cells[column] for column in ("sample", "init_seed", "order_seed"))


def _scores(
    rows: Iterable[Row], names: Mapping[tuple[str, str], str]
) -> tuple[dict[str, dict[str, Runs]], int]:
    """Test scores by K and start, and how many runs repeat another one's settings."""
    by_place: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        by_place[row.cells["shots"], names[_start_key(row)]].append(row)
    repeats = 0
    found: dict[str, dict[str, Runs]] = {}
    for shots in sorted({shots for shots, _ in by_place}, key=_rank):
        found[shots] = {}
        for (own, start), of_place in by_place.items():
            if own != shots:
                continue
            found[shots][start] = {_unit(row): row.test for row in choose_by_dev(of_place)}
            settings = {
                (*_unit(row), str(row.learning_rate), str(row.batch_size)) for row in of_place
            }
            repeats += len(of_place) - len(settings)
    return found, repeats


def _rank(shots: str) -> tuple[int, int]:
    """Order of values of K."""
    if shots == "all":
        return (1, 0)
    if not shots.isdecimal():
        raise ValueError(f"shots is {shots!r}, neither a number nor all; correct it or test again")
    return (0, int(shots))


def _is_comparison(scores: Mapping[str, Mapping[str, Runs]]) -> bool:
    """Whether there is something to compare: several K, or two starts with two runs each."""
    several = [sum(len(runs) > 1 for runs in by_start.values()) for by_start in scores.values()]
    return len(scores) > 1 or max(several) > 1


def _initial_scores(
    key: Sequence[str],
    keys: Sequence[Sequence[str]],
    rows: Iterable[Row],
    names: Mapping[tuple[str, str], str],
    scores: Mapping[str, Mapping[str, Runs]],
) -> dict[str, Runs]:
    """Scores of the initial prompts of a panel's starts, a value for each seed.

    An initial prompt is the same for all K, samples and orders, so these are averaged. Results do
    not say its N: where panels differ in nothing else, there is none.
    """
    if sum(_but_for_n(other) == _but_for_n(key) for other in keys) > 1:
        return {}
    found: dict[str, dict[Unit, list[float]]] = defaultdict(lambda: defaultdict(list))
    tuned = {start for by_start in scores.values() for start in by_start}
    for row in rows:
        start = names[_start_key(row)]
        if start in tuned and _but_for_n(_panel_key(row)) == _but_for_n(key):
            found[start][_unit(row)[1:2]].append(row.test)
    return {
        start: {unit: summarise(tests).mean for unit, tests in by_unit.items()}
        for start, by_unit in found.items()
    }


def _but_for_n(key: Sequence[str]) -> list[str]:
    """Task and settings, without the number of virtual tokens."""
    names = ("task", *_SETTING)
    return [x for name, x in zip(names, key, strict=True) if name != "num_virtual_tokens"]


# ---- tests ---------------------------------------------------------------------------------------


def _contests(panel: Panel) -> Iterator[Contest]:
    """Best against second best at each K; their p-values are not corrected yet."""
    for shots, by_start in panel.scores.items():
        means = {start: summarise(runs.values()).mean for start, runs in by_start.items()}
        ranked = sorted((x for x in means if not math.isnan(means[x])), key=lambda x: -means[x])
        if len(ranked) > 1:
            best, second = ranked[:2]
            result = compare_runs(by_start[best], by_start[second])
            yield Contest(panel.label, shots, best, second, result, math.nan)


def compare_runs(one: Runs, other: Runs) -> TTest:
    """Two-sided t-test: paired where both sides have the same samples and seeds, else Welch's.

    Args:
        one: scores by sample and seeds.
        other: the same.
    """
    if one.keys() == other.keys():
        return t_test([one[unit] for unit in one], [other[unit] for unit in one], "paired")
    return t_test(list(one.values()), list(other.values()), "welch")


def corrected(p_values: Sequence[float], correction: Correction) -> list[float]:
    """p-values of one table, corrected for their number as `statistics.adjust` says.

    Args:
        p_values: as the tests gave them; NaN where there was no test.
        correction: "none" leaves them as they are.
    """
    return list(p_values) if correction == "none" else adjust(p_values, correction)


# ---- tables --------------------------------------------------------------------------------------


def start_sections(report: StartReport) -> Iterator[tuple[str, str, Table]]:
    """Title, legend and table of each section that the report has lines for.

    Tasks that were tuned from the same starts share a table.
    """
    groups: dict[tuple[str, ...], list[Panel]] = defaultdict(list)
    for panel in report.panels:
        groups[tuple(start for start in report.starts if _has(panel, start))].append(panel)
    for starts, panels in groups.items():
        title = "Starts of prompt tuning"
        if len(groups) > 1:
            title += f": {', '.join(panel.label for panel in panels)}"
        legend = _score_legend(report) if panels[0] is report.panels[0] else "As above."
        yield title, legend, _score_table(report, starts, panels)
    if report.contests:
        yield "Best start against second best", _contest_legend(report), _contest_table(report)


def _score_legend(report: StartReport) -> str:
    """What the table of scores is."""
    text = (
        "Test score by task, K and start: mean ± standard deviation (ddof 1) over samples and "
        "seeds, and how many. K 0: the initial prompts as they are, over seeds. Bold: the best. "
    )
    if report.contests:
        text += (
            f"*: better than the second best, p at most {LEVEL:g}, "
            f"{correction_words(report.correction)}; the next table says more."
        )
    return text.strip()


def _score_table(report: StartReport, starts: Sequence[str], panels: Sequence[Panel]) -> Table:
    """A line per task and K, a column per start."""
    contests = {(one.panel, one.shots): one for one in report.contests}
    lines = []
    for panel in panels:
        for shots, by_start in panel.scores.items():
            line = [panel.label, panel.metric, shots]
            contest = contests.get((panel.label, shots))
            means = {start: summarise(runs.values()).mean for start, runs in by_start.items()}
            top = None if contest is None else means[contest.best]
            if all(mean == top for mean in means.values()):
                top = None
            for start in starts:
                text = spread(summarise(by_start.get(start, {}).values()))
                is_best = top is not None and means.get(start) == top
                line.append(f"**{text}**{mark(contest.adjusted)}" if contest and is_best else text)
            lines.append(line)
    return ["task", "metric", "K", *starts], lines


def _contest_legend(report: StartReport) -> str:
    """What the table of tests is."""
    return (
        "Two-sided t-tests of unrounded scores of runs: paired where both starts have the same "
        "samples and seeds, else Welch's. n: runs of either that count. difference: of the means, "
        f"with its 95 % interval, not corrected. p: {correction_words(report.correction)} over the "
        f"{_tests(report)} tests of this table; *: at most {LEVEL:g}. Runs count as independent, "
        "also those that share a sample or a seed, and the two starts were picked by the scores "
        "that are tested. Where there is no p, the last column says why."
    )


def _tests(report: StartReport) -> int:
    """How many tests there are."""
    return sum(not math.isnan(one.t_test.p) for one in report.contests)


def _contest_table(report: StartReport) -> Table:
    """A line per task and K."""
    header = ["task", "K", "best", "second", "n", "difference", "test", "p", ""]
    lines = []
    for one in report.contests:
        result = one.t_test
        low, high = result.interval
        ends = "" if math.isnan(low) else f" ({low:+.3f} to {high:+.3f})"
        counts = " : ".join(map(str, result.counts))
        line = [one.panel, one.shots, one.best, one.second, counts]
        line += [signed(result.difference) + ends, result.kind]
        lines.append([*line, show_p(one.adjusted) + mark(one.adjusted), result.reason])
    return header, lines


def correction_words(correction: Correction) -> str:
    """How p-values of one table are corrected, in words."""
    names = {"holm": "after Holm", "bonferroni": "after Bonferroni"}
    return f"corrected {names[correction]}" if correction in names else "not corrected"


def spread(found: Summary) -> str:
    """Mean, standard deviation and count."""
    if not found.count:
        return "-"
    std = "" if math.isnan(found.std) else f" ± {found.std:.3f}"
    return f"{found.mean:.3f}{std} ({found.count})"


def extent(counts: Sequence[int]) -> str:
    """The least and the most of some counts, at least one."""
    least, most = min(counts), max(counts)
    return f"{least}" if least == most else f"{least} to {most}"


def number(value: float) -> str:
    """Three digits, or a dash."""
    return "-" if math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """Three digits with a sign, or a dash."""
    return "-" if math.isnan(value) else f"{value:+.3f}"


def show_p(p: float) -> str:
    """A p-value, or a dash."""
    return "-" if math.isnan(p) else "<0.001" if p < 0.001 else f"{p:.3f}"


def mark(p: float) -> str:
    """A star where a corrected p-value is at most `LEVEL`."""
    return " *" if p <= LEVEL else ""


# ---- CSV -----------------------------------------------------------------------------------------

_SCORE_COLUMNS = ("panel", "task", "metric", "shots", "start", "mean", "std", "runs", "missing")
_CONTEST_COLUMNS = (
    *("panel", "shots", "best", "second", "test", "best_runs", "second_runs"),
    *("best_missing", "second_missing"),
    *("difference", "difference_low", "difference_high", "t", "degrees_of_freedom", "p"),
    *("correction", "p_corrected", "reason"),
)


def start_tables(
    report: StartReport,
) -> Iterator[tuple[str, tuple[str, ...], Iterator[dict[str, Any]]]]:
    """Name, columns and rows of each CSV file; numbers are not rounded."""
    if report.panels:
        yield "starts.csv", _SCORE_COLUMNS, _score_rows(report)
    if report.contests:
        yield "significance.csv", _CONTEST_COLUMNS, _contest_rows(report)


def _score_rows(report: StartReport) -> Iterator[dict[str, Any]]:
    """A row per task, K and start."""
    for panel in report.panels:
        for shots, by_start in panel.scores.items():
            for start, runs in by_start.items():
                found = summarise(runs.values())
                yield {
                    "panel": panel.label,
                    "task": panel.task,
                    "metric": panel.metric,
                    "shots": shots,
                    "start": start,
                    "mean": found.mean,
                    "std": found.std,
                    "runs": found.count,
                    "missing": found.missing,
                }


def _contest_rows(report: StartReport) -> Iterator[dict[str, Any]]:
    """A row per task and K."""
    for one in report.contests:
        result = one.t_test
        row: dict[str, Any] = {"panel": one.panel, "shots": one.shots, "test": result.kind}
        row |= {"best": one.best, "second": one.second, "correction": report.correction}
        for name, count, lost in zip(
            ("best", "second"), result.counts, result.missing, strict=True
        ):
            row |= {f"{name}_runs": count, f"{name}_missing": lost}
        yield row | test_cells(result) | {"p_corrected": one.adjusted}


def test_cells(found: TTest) -> dict[str, Any]:
    """The cells of a t-test in a CSV file."""
    return {
        "difference": found.difference,
        "difference_low": found.interval[0],
        "difference_high": found.interval[1],
        "t": found.statistic,
        "degrees_of_freedom": found.degrees_of_freedom,
        "p": found.p,
        "reason": found.reason,
    }


# ---- pictures ------------------------------------------------------------------------------------


def draw_starts(report: StartReport, folder: Path) -> list[Path]:
    """Draw, for every task with several K, test scores over K.

    Args:
        report: the report.
        folder: where the pictures go.

    Returns:
        The files.
    """
    from prompt_lab.analysis.plots import Series, file_name, save_figure

    files = []
    for panel in report.panels:
        if len(panel.scores) < 2:
            continue
        series = []
        for start in (start for start in report.starts if _has(panel, start)):
            found = [summarise(of_k.get(start, {}).values()) for of_k in panel.scores.values()]
            series.append(Series(start, [one.mean for one in found], [one.std for one in found]))
        runs = extent([len(runs) for of_k in panel.scores.values() for runs in of_k.values()])
        note = f"{panel.label}; error bars: standard deviation (ddof 1) over {runs} runs"
        if UNTUNED in panel.scores:
            note += "; K 0: initial prompts"
        figure = shot_curves(list(panel.scores), series, f"test {panel.metric}", note)
        files += save_figure(figure, folder / f"starts-{file_name(panel.label)}")
    return files


def _has(panel: Panel, start: str) -> bool:
    """Whether a panel has runs of a start."""
    return any(start in by_start for by_start in panel.scores.values())


def shot_curves(
    shots: Sequence[str], series: Sequence[Series], ylabel: str, note: str = ""
) -> Figure:
    """A score over K on a logarithmic axis, one line per start.

    "0" and "all" have no logarithm: they stand beside the least and the largest K, apart from it by
    a broken line. Lines stand a little beside each other, so that error bars do not hide one
    another.

    Args:
        shots: values of K, rising: "0", numbers, "all".
        series: the lines, with a value per K; NaN where there is none.
        ylabel: what the values are.
        note: what the error bars are, for below the picture.

    Raises:
        ValueError: nothing to draw, or a series without one value per K.
    """
    import numpy as np

    from prompt_lab.analysis.plots import WIDTH, _bars, _check, _legend, _line, _new_figure, _text

    _check(series, len(shots), "K")
    places = np.asarray(shot_places(shots))
    figure, axes = _new_figure(WIDTH, 4.0)
    step = 0.008 * max(float(np.ptp(places)), 0.5)
    handles: list[Artist] = []
    for at, one in enumerate(series):
        values = np.asarray(one.values, dtype=float)
        known = ~np.isnan(values)
        drawn = axes.errorbar(
            places[known] + (at - (len(series) - 1) / 2) * step,
            values[known],
            yerr=_bars(np.asarray(one.std, dtype=float)[known]),
            capsize=2.5,
            elinewidth=0.8,
            **_line(at),
        )
        handles.append(drawn)  # pyright: ignore[reportArgumentType]
    for at in range(len(shots) - 1):
        if shots[at] == UNTUNED or shots[at + 1] == "all":
            axes.axvline(places[at : at + 2].mean(), color="#999", linewidth=0.8, dashes=(2, 2))
    axes.set_xticks(places, shots)
    axes.set_xlabel("K of the few-shot files (logarithmic)")
    axes.set_ylabel(_text(ylabel, 45))
    axes.grid(axis="y", color="#ddd", linewidth=0.6)
    _legend(figure, handles, [one.label for one in series], note)
    return figure


def shot_places(shots: Sequence[str]) -> list[float]:
    """Where K stands: at its decimal logarithm; "0" and "all" half a decade off the rest."""
    known = [math.log10(int(k)) for k in shots if k not in (UNTUNED, "all")] or [0.0]
    ends = {UNTUNED: min(known) - 0.5, "all": max(known) + 0.5}
    return [ends[k] if k in ends else math.log10(int(k)) for k in shots]
