"""Which trials of a sweep are trained together, in one fit of ``PromptTuning``.

That method trains a bank: tasks, samples, initialisation seeds, learning rates, batch sizes and
source tasks may be lists, and every run of their product follows the run alone, up to the rounding
of float32. So trials that differ in these settings only, and whose values make a full product, are
one fit with lists: a grid by construction, of random draws those that fit together. The fit is
itself a trial, with lists as settings, and is done, interrupted or failed as one; its folder keeps
in ``bank.json`` whose runs are whose.

Left alone are trials of other methods, and of fits in which runs could know of each other, such as
through a callback; those of another program than this package's command; and trials whose own lists
overlap, for a run would be of two. Where the real parser does not say that a bank is the same, each
trial is a fit, and so is one that has a folder of its own from an earlier sweep.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from prompt_lab.commands.sweep_file import Sweep, Trial, make_trial
from prompt_lab.core.run import grid

BANK, MARKER = "bank.json", "trial.json"
TASKS, SAMPLES, SOURCES = "data.tasks", "data.samples", "model.init.source_tasks"
SEEDS, RATES, SIZES = "model.init_seed", "model.learning_rate", "model.batch_size"
AXES = (TASKS, SAMPLES, SEEDS, RATES, SIZES, SOURCES)
"""The settings that may be lists in a bank, in the order of :func:`prompt_lab.core.run.grid`."""

PROMPT_TUNING = ("prompt_lab.PromptTuning", "prompt_lab.methods.prompt_tuning.PromptTuning")
COUPLING = ("callbacks", "plugins", "max_time", "detect_anomaly")
COUPLING += ("limit_test_batches", "overfit_batches", "fast_dev_run")
"""Settings of the trainer by which a run could feel the others."""

Box = tuple[dict[str, Any], list[Trial]]
"""Settings, some of them lists, and the trials that are their product."""


@dataclass(frozen=True)
class Fit:
    """One process of a sweep: a trial alone, or a bank of several.

    Attributes:
        whole: what is run: the trial, or one whose settings have lists for the bank.
        trials: the trials that it trains, at least one.
        runs: of a bank, the names of each trial's runs by the digest of the trial; else None.
    """

    whole: Trial
    trials: tuple[Trial, ...]
    runs: dict[str, list[str]] | None = None

    def runs_of(self, trial: Trial) -> list[str] | None:
        """Names of the runs of a trial, or None where all runs of the fit are its own."""
        return None if self.runs is None else self.runs[trial.digest]

    def describe_bank(self) -> dict[str, Any]:
        """The content of ``bank.json``."""
        return {"settings": self.whole.settings, "runs": self.runs}


def plan_fits(sweep: Sweep, trials: Sequence[Trial], root: Path) -> list[Fit]:
    """The fits that train the trials, each trial in one of them.

    Banks and trials that have a folder there keep it, whatever else the file asks for by now; a
    bank only while all its trials are in the file. The trials of a bank that failed are then alone,
    since one of them may have failed it.

    Args:
        sweep: the file.
        trials: its trials.
        root: folder of the sweep; it need not be there.

    Returns:
        The fits in the order of their first trials.

    Raises:
        ValueError: a ``bank.json`` that is damaged.
    """
    fits, failed = _kept_banks(sweep, trials, root)
    kept = {trial.digest for fit in fits for trial in fit.trials}
    new = []
    for trial in trials:
        is_alone = trial.digest in failed or trial_folder(root, trial).is_dir()
        if trial.digest not in kept and is_alone:
            fits.append(Fit(trial, (trial,)))
        elif trial.digest not in kept:
            new.append(trial)
    for settings, members in products(sweep, new):
        fits += _fits_of(sweep, settings, members)
    return sorted(fits, key=lambda fit: fit.trials[0].number)


def trial_folder(root: Path, trial: Trial) -> Path:
    """The folder of a trial: the one that has its digest already, or else a new one's name.

    Args:
        root: folder of the sweep.
        trial: the trial; after a change of the file it may have had another number.
    """
    found = sorted(root.glob(f"*-{trial.digest}"))
    return found[0] if found else root / f"{trial.number}-{trial.digest}"


def trial_state(folder: Path) -> tuple[str, float | None]:
    """State of a trial and the seconds that its last process took, as its folder tells them.

    Args:
        folder: the folder of the trial.

    Returns:
        ``done`` (ended with status 0), ``failed`` (another status), ``interrupted`` (started, did
        not end by itself) or ``not run``; the seconds of the first two.

    Raises:
        ValueError: a marker that is damaged.
    """
    path = folder / MARKER
    if path.is_file():
        try:
            marker = json.loads(path.read_text(encoding="utf-8"))
            return str(marker["state"]), float(marker["seconds"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}): delete it to have the trial run or resumed"
            ) from None
    return ("interrupted" if folder.is_dir() else "not run"), None


def _kept_banks(sweep: Sweep, trials: Sequence[Trial], root: Path) -> tuple[list[Fit], set[str]]:
    """The banks of earlier sweeps all of whose trials are still asked for.

    Returns:
        The banks without those that failed, and the digests of the trials of these.
    """
    left, failed = {trial.digest: trial for trial in trials}, set[str]()
    fits = []
    for path in sorted(root.glob(f"*/{BANK}")):
        try:
            noted = json.loads(path.read_text(encoding="utf-8"))
            runs = {str(digest): list(names) for digest, names in noted["runs"].items()}
            if not runs or not left.keys() >= runs.keys():
                continue
            if trial_state(path.parent)[0] == "failed":
                failed |= runs.keys()
                continue
            members = sorted((left[digest] for digest in runs), key=lambda trial: trial.number)
            point = [noted["settings"][parameter.name] for parameter in sweep.parameters]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is damaged ({error!r}): delete it, and the bank is planned anew"
            ) from None
        whole = make_trial(sweep, members[0].number, point)
        if trial_folder(root, whole) == path.parent:
            fits.append(Fit(whole, tuple(members), runs))
            for digest in runs:
                del left[digest]
    return fits, failed


# ---- full products -------------------------------------------------------------------------------


def products(sweep: Sweep, trials: Sequence[Trial]) -> list[Box]:
    """Trials joined to full products over the settings that a bank may have as lists.

    Axis by axis, boxes that agree in all else become one, unless a value would stand in it twice. A
    grid ends as one box for each setting of the other parameters.

    Args:
        sweep: the file.
        trials: some of its trials.

    Returns:
        Settings, as a trial's but with lists, and the trials that they are the product of.
    """
    boxes: list[Box] = [(trial.settings, [trial]) for trial in trials]
    for parameter in sweep.parameters:
        if _axis(parameter.name) in AXES:
            boxes = _joined(boxes, parameter.name)
    return boxes


def _axis(name: str) -> str:
    """The setting that a parameter sets, by its short name."""
    return name.replace("model.init_args.", "model.", 1)


def _items(value: Any) -> list[Any]:
    """The values of a list, or the one value."""
    return value if isinstance(value, list) else [value]


def _joined(boxes: Sequence[Box], name: str) -> list[Box]:
    """Boxes with those joined that differ in one setting only."""
    joined: dict[str, Box] = {}
    for settings, members in boxes:
        key = json.dumps({**settings, name: None}, default=str)
        own = _items(settings[name])
        found = _items(joined[key][0][name]) if key in joined else []
        if {str(item) for item in found} & {str(item) for item in own}:
            joined[f"{key} {members[0].digest}"] = settings, members
        elif found:
            joined[key] = {**settings, name: found + own}, joined[key][1] + members
        else:
            joined[key] = settings, members
    return list(joined.values())


def _fits_of(sweep: Sweep, settings: dict[str, Any], members: Sequence[Trial]) -> list[Fit]:
    """The trials of a box as one bank where that gives the same, else each alone."""
    members = sorted(members, key=lambda trial: trial.number)
    if len(members) > 1:
        whole = make_trial(sweep, members[0].number, list(settings.values()))
        runs = runs_of_trials(whole, members)
        if runs is not None:
            return [Fit(whole, tuple(members), runs)]
    return [Fit(trial, (trial,)) for trial in members]


# ---- the same result -----------------------------------------------------------------------------


def runs_of_trials(whole: Trial, members: Sequence[Trial]) -> dict[str, list[str]] | None:
    """Names of the runs of each trial of a bank, by its digest.

    Args:
        whole: the bank, with lists as settings.
        members: trials that differ from it in these settings only.

    Returns:
        The names, of which each is one trial's, or None where the bank would not be the same as its
        trials alone, or nobody can say.
    """
    config = _parsed(whole.words)
    if config is None or not _is_separable(config):
        return None
    axes = _axes(config)
    try:
        typed = _typed(whole, axes)
        runs = {trial.digest: _run_names(axes | _own(trial, typed)) for trial in members}
        every = _run_names(axes)
    except (ValueError, TypeError):  # a value out of range, twice, or without a name of its own
        return None
    return runs if sorted(name for own in runs.values() for name in own) == sorted(every) else None


def _is_separable(config: Any) -> bool:
    """Whether a fit is one of PromptTuning in which no setting lets a run feel the others."""
    coupled = any(config.trainer[name] not in (None, [], False) for name in COUPLING)
    return config.model.class_path in PROMPT_TUNING and not coupled and not config.ckpt_path


def _typed(whole: Trial, axes: dict[str, list[Any]]) -> dict[str, dict[str, Any]]:
    """By the name of each parameter of an axis, its values as the parser has them by their texts.

    Raises:
        ValueError: the parser has others, since another word of the command sets them.
        TypeError: a value that cannot be of the parser's type.
    """
    typed = {}
    for name in whole.settings:
        if _axis(name) not in AXES or whole.settings[name] is None:
            continue
        given, parsed = _items(whole.settings[name]), axes[_axis(name)]
        if [type(p)(g) for g, p in zip(given, parsed, strict=True)] != parsed:
            raise ValueError(f"{name} is {parsed}, not {given}")
        typed[name] = {str(g): p for g, p in zip(given, parsed, strict=True)}
    return typed


def _own(trial: Trial, typed: dict[str, dict[str, Any]]) -> dict[str, list[Any]]:
    """The lists of one trial on the axes that the sweep sets.

    Raises:
        ValueError: one value where the setting is a list, which the trial alone would be refused.
    """
    for name in typed:
        if _axis(name) in (TASKS, SAMPLES, SOURCES) and not isinstance(trial.settings[name], list):
            raise ValueError(f"{name} is {trial.settings[name]}: give a list")
    return {_axis(n): [typed[n][str(v)] for v in _items(trial.settings[n])] for n in typed}


def _parsed(words: Sequence[str]) -> Any:
    """The settings of a fit as the real command line parses them; None where it is no such fit."""
    program = [sys.executable, "-m", "prompt_lab"]
    if words[0] == "prompt-lab":
        arguments = words[1:]
    elif list(words[:3]) == program:
        arguments = words[3:]
    else:
        return None
    from prompt_lab.commands.cli import PromptLabCLI

    class ParseOnly(PromptLabCLI):
        """Parses and makes nothing."""

        def before_instantiate_classes(self) -> None:
            """Leave the environment and the settings as they are."""

        def instantiate_classes(self) -> None:
            """Make nothing."""

        def _run_subcommand(self, subcommand: str) -> None:
            """Run nothing."""

    silent = StringIO()  # what is wrong is told when the trial is run
    try:
        with redirect_stdout(silent), redirect_stderr(silent):
            config = ParseOnly([*arguments, "--seed_everything=false"]).config
    except (Exception, SystemExit):
        return None
    return config.fit if config.subcommand == "fit" else None


def _axes(config: Any) -> dict[str, list[Any]]:
    """The lists of a bank by the names of their settings, one empty source where there is none."""
    model = config.model.init_args
    in_subspace = model.subspace is not None  # which knows no source tasks
    sources = None if in_subspace else model.init.source_tasks
    return {
        TASKS: config.data.tasks,
        SAMPLES: config.data.samples,
        SEEDS: _items(model.init_seed),
        RATES: _items(model.learning_rate),
        SIZES: _items(model.batch_size),
        SOURCES: [""] if sources is None else [" ".join(source.split()) for source in sources],
    }


def _run_names(axes: dict[str, list[Any]]) -> list[str]:
    """The names of all runs of a bank.

    Raises:
        ValueError: as :func:`prompt_lab.core.run.grid`, or a set of tasks that is not known.
    """
    from prompt_lab.data.partitions import expand_sets

    tasks, samples, seeds, rates, sizes, sources = (axes[name] for name in AXES)
    runs = grid(expand_sets(tasks), samples, seeds, rates, sizes, expand_sets(sources))
    return [run.name for run in runs]
