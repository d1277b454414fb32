"""The file of a sweep, the trials that it asks for, and which of them are trained together.

The file is the YAML that ``wandb sweep FILE`` reads. A trial gets the words that a wandb agent
would give it, of null the word ``None``, which this package's commands read as null. Left out:
Bayesian search, early termination and targets, which need the service (``wandb agent``).

``PromptTuning`` trains a bank: tasks, samples, initialisation seeds, learning rates, batch sizes
and source tasks may be lists, and every run of their product follows the run alone, up to the
rounding of float32. So trials that are equal in all other settings and a full product of these are
one fit with lists. It is itself a trial, and is done, interrupted or failed as one; its folder
keeps in ``bank.json`` whose runs are whose. Where the command line's own parser does not say that
the bank is the same as its trials, each trial is a fit.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import random
import re
import sys
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import yaml

from prompt_lab.core.run import grid

READ_KEYS = ("name", "program", "command", "method", "parameters", "run_cap", "metric")
SERVICE_KEYS = ("early_terminate", "description", "project", "entity")
"""What only the service uses."""
MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
"""What is filled in; also the command of files that give none, as wandb has it."""
OF_TRIAL = ("run_dir", "ckpt_path", "resume", "overwrite")
"""Flags that the sweep gives each trial as it needs them."""
DISTRIBUTIONS = {
    "constant": ("value",),
    "categorical": ("values",),
    "categorical_w_probabilities": ("values", "probabilities"),
    "int_uniform": ("min", "max"),
    "uniform": ("min", "max"),
    "log_uniform_values": ("min", "max"),
    "q_uniform": ("min", "max", "q"),
    "q_log_uniform_values": ("min", "max", "q"),
}
"""The keys of each distribution; q is 1 where it is left out."""

BANK, MARKER = "bank.json", "trial.json"
AXES = ("data.tasks", "data.samples", "model.init_seed", "model.learning_rate")
AXES += ("model.batch_size", "model.init.source_tasks")
"""The settings that may be lists in a bank, in the order of :func:`prompt_lab.core.run.grid`."""
PROMPT_TUNING = ("prompt_lab.PromptTuning", "prompt_lab.methods.prompt_tuning.PromptTuning")
COUPLING = ("callbacks", "plugins", "max_time", "detect_anomaly")
COUPLING += ("limit_test_batches", "overfit_batches", "fast_dev_run")
"""Settings of the trainer by which a run could feel the others."""


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Attributes:
        path: its name; several where it is nested.
        distribution: one of ``DISTRIBUTIONS``.
        given: what the file says of it, by key.
    """

    path: tuple[str, ...]
    distribution: str
    given: dict[str, Any]

    @property
    def name(self) -> str:
        """The path in one word."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read and checked.

    Attributes:
        name: the file's own, or else that of the file.
        method: grid or random.
        command: words and macros.
        program: what stands for ``${program}``.
        parameters: sorted by name, level by level, as wandb sorts them.
        run_cap: most trials.
        notes: lines that tell what has no effect here.
    """

    name: str
    method: str
    command: tuple[str, ...]
    program: str | None
    parameters: tuple[Parameter, ...]
    run_cap: int | None
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Trial:
    """One setting of all parameters.

    Attributes:
        number: its place in the sweep, from 1.
        settings: the value of each parameter by its name.
        words: the command without folder.
        digest: eight hexadecimal digits of command and settings.
    """

    number: int
    settings: dict[str, Any]
    words: tuple[str, ...]
    digest: str


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


# ---- the file ------------------------------------------------------------------------------------


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file.

    Args:
        path: a YAML file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, or something that only the service can do.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no sweep file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content = json.loads(json.dumps(content, sort_keys=True, default=str))
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys: a sweep file has method and parameters")
    try:
        unknown = [key for key in content if key not in READ_KEYS + SERVICE_KEYS]
        if unknown:
            known = ", ".join(READ_KEYS + SERVICE_KEYS)
            raise ValueError(f"unknown key {', '.join(unknown)}; known: {known}")
        method = content.get("method")
        if method == "bayes":
            raise ValueError("method bayes needs the service: use wandb sweep and wandb agent")
        if method not in ("grid", "random"):
            raise ValueError(f"method is {method!r}; allowed here: grid, random")
        return Sweep(
            name=str(content.get("name") or path.stem),
            method=method,
            command=_command(content),
            program=content.get("program"),
            parameters=tuple(_parameters(content.get("parameters"), method)),
            run_cap=_run_cap(content.get("run_cap")),
            notes=_notes(content),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parameters(section: Any, method: str, outer: tuple[str, ...] = ()) -> Iterator[Parameter]:
    """The parameters of a section and of those nested in it."""
    place = ".".join(("parameters", *outer))
    if not isinstance(section, dict) or not section:
        raise ValueError(f"{place} is {section!r}: give a mapping of names to values")
    for name, given in section.items():
        if not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            raise ValueError(f"{place}: {name!r} is no name of a setting")
        if not outer and name in OF_TRIAL:
            raise ValueError(f"{place}: {name} is set for each trial by the sweep; leave it out")
        if not isinstance(given, dict):
            raise ValueError(f"{place}.{name} is {given!r}: write value: or values: before it")
        if "parameters" in given and len(given) > 1:
            raise ValueError(f"{place}.{name}: beside nested parameters nothing else can stand")
        if "parameters" in given:
            yield from _parameters(given["parameters"], method, (*outer, name))
            continue
        parameter = Parameter((*outer, name), given.get("distribution") or _inferred(given), given)
        try:
            _check(parameter.distribution, given, method)
        except ValueError as error:
            raise ValueError(f"{place}.{name}: {error}") from None
        yield parameter


def _inferred(given: Mapping[str, Any]) -> str:
    """The distribution of a parameter that names none, as wandb infers it."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    whole = all(isinstance(given.get(key), int) for key in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _check(kind: str, given: Mapping[str, Any], method: str) -> None:
    """Refuse a parameter that cannot be set or drawn here."""
    if kind not in DISTRIBUTIONS:
        known = ", ".join(DISTRIBUTIONS)
        raise ValueError(
            f"distribution {kind} is not among those that are drawn here: {known}; or use wandb "
            "agent"
        )
    keys = DISTRIBUTIONS[kind]
    wrong = [f"lacks {key}" for key in keys if key not in given and key != "q"]
    wrong += [f"has no {key}" for key in given if key not in (*keys, "distribution")]
    if wrong:
        raise ValueError(f"distribution {kind} {wrong[0]}; its keys: {', '.join(keys)}")
    if method == "grid" and kind not in ("constant", "categorical"):
        raise ValueError(f"a grid needs a list of values, not {kind}")
    if "min" in keys:
        _check_range(kind, given["min"], given["max"], given.get("q", 1))
    elif "values" in keys:
        _check_values(given["values"], given.get("probabilities"))


def _check_range(kind: str, low: Any, high: Any, q: Any) -> None:
    """Refuse a range that is empty or not of numbers."""
    for key, number in {"min": low, "max": high, "q": q}.items():
        if kind == "int_uniform" and not _is_number(number, int):
            raise ValueError(f"{key} is {number!r}: give a whole number")
        if not _is_number(number):
            raise ValueError(f"{key} is {number!r}: give a number (YAML needs the dot in 1.0e-3)")
    if low > high:
        raise ValueError(f"min {low} is above max {high}")
    if "log" in kind and low <= 0:
        raise ValueError(f"min is {low}: {kind} needs numbers above 0")
    if q <= 0:
        raise ValueError(f"q is {q}: give a number above 0")


def _check_values(values: Any, shares: Any) -> None:
    """Refuse values, or their probabilities, that cannot be passed or drawn."""
    if not isinstance(values, list) or not values:
        raise ValueError(f"values is {values!r}: give a list")
    if shares is None:
        return
    if not isinstance(shares, list) or not all(_is_number(s) and s >= 0 for s in shares):
        raise ValueError(f"probabilities is {shares!r}: give numbers from 0 to 1")
    if len(shares) != len(values):
        raise ValueError(f"{len(shares)} probabilities for {len(values)} values")
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"the probabilities sum to {sum(shares):g}, not to 1")


def _command(content: Mapping[str, Any]) -> tuple[str, ...]:
    """The words of the command."""
    command, program = content.get("command", list(MACROS)), content.get("program")
    if not isinstance(command, list) or not command:
        raise ValueError(f"command is {command!r}: give a list of words")
    words = tuple(str(word) for word in command)
    for word in (*words, str(program)):
        if "${" in word and (word not in MACROS or word == program):
            known = ", ".join(MACROS)
            raise ValueError(f"{word} in the command is not filled in here; allowed words: {known}")
        if word.startswith("--") and word[2:].split("=")[0] in OF_TRIAL:
            raise ValueError(f"the sweep sets {word.split('=')[0]} for each trial; leave it out")
    if "${program}" in words and not isinstance(program, str):
        raise ValueError(f"program is {program!r}, and the command needs it: give a text")
    if "${args}" not in words:
        raise ValueError("the command has no ${args}: all trials would be the same")
    if all(word in ("${env}", "${args}") for word in words):
        raise ValueError("the command has no program: write prompt-lab, fit before ${args}")
    return words


def _run_cap(given: Any) -> int | None:
    """A number of trials, at least one."""
    if given is not None and (not _is_number(given, int) or given < 1):
        raise ValueError(f"run_cap is {given!r}: give a whole number, at least 1")
    return given


def _notes(content: Mapping[str, Any]) -> tuple[str, ...]:
    """What of the file has no effect here, in lines."""
    notes, metric = [], content.get("metric")
    if metric is not None:
        if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
            raise ValueError(f"metric is {metric!r}: give a mapping with name and goal")
        goal = metric.get("goal", "minimize")
        notes.append(f"metric for the service: {metric['name']} ({goal}); here all trials are run")
    unused = [key for key in SERVICE_KEYS if key in content]
    if unused:
        notes.append(f"without effect here: {', '.join(unused)}")
    return tuple(notes)


# ---- the trials ----------------------------------------------------------------------------------


def make_trials(sweep: Sweep, seed: int = 0, run_cap: int | None = None) -> list[Trial]:
    """The trials of a sweep.

    A grid has wandb's order: parameters sorted by name, the last one fastest. Each random draw
    depends on seed, number of the trial and name of the parameter only. Equal settings, which
    draws of few values give, are one trial.

    Args:
        sweep: the file.
        seed: of random draws.
        run_cap: most trials; by default the file's.

    Returns:
        At least one trial; numbers of trials that would be equal to an earlier one are left out.

    Raises:
        ValueError: a bad number of trials, or none for random draws.
    """
    cap = sweep.run_cap if run_cap is None else _run_cap(run_cap)
    if sweep.method == "random" and cap is None:
        raise ValueError("method random never ends by itself: give run_cap")
    if sweep.method == "random":
        points = (
            [
                draw(parameter, random.Random(f"{seed}/{number}/{parameter.name}").random())
                for parameter in sweep.parameters
            ]
            for number in itertools.count(1)
        )
    else:
        points = itertools.product(
            *(p.given["values"] if "values" in p.given else [p.given["value"]]
              for p in sweep.parameters)
        )  # fmt: skip
    trials: dict[str, Trial] = {}
    for number, point in enumerate(itertools.islice(points, cap), 1):
        trial = make_trial(sweep, number, point)
        trials.setdefault(trial.digest, trial)
    return list(trials.values())


def draw(parameter: Parameter, u: float) -> Any:
    """The value of a parameter at a quantile: the inverse of its distribution function.

    Args:
        parameter: any parameter.
        u: at least 0 and below 1.

    Returns:
        A value; of quantised distributions the multiple of q that is nearest to the one without q.
    """
    given, kind = parameter.given, parameter.distribution
    if kind == "constant":
        return given["value"]
    if "values" in given:
        values = given["values"]
        bounds = list(itertools.accumulate(given.get("probabilities", [1] * len(values))))
        return values[min(bisect_right(bounds, u * bounds[-1]), len(values) - 1)]
    low, high = given["min"], given["max"]
    if kind == "int_uniform":
        return low + int(u * (high - low + 1))
    if "log" in kind:
        value = math.exp(math.log(low) + u * (math.log(high) - math.log(low)))
    else:
        value = low + u * (high - low)
    if not kind.startswith("q_"):
        return value
    q = given.get("q", 1)
    return round(value / q) * (int(q) if float(q).is_integer() else q)


def make_trial(sweep: Sweep, number: int, point: Sequence[Any]) -> Trial:
    """The trial with these values of the parameters, in the order of ``sweep.parameters``."""
    nested: dict[str, Any] = {}
    for parameter, value in zip(sweep.parameters, point, strict=True):
        *outer, last = parameter.path
        level = nested
        for name in outer:
            level = level.setdefault(name, {})
        level[last] = value
    replaced = {
        "${env}": [],
        "${interpreter}": [sys.executable],
        "${program}": [sweep.program],
        "${args}": [f"--{name}={value}" for name, value in nested.items()],
    }
    words = [new for word in sweep.command for new in replaced.get(word, [word])]
    identity = json.dumps([sweep.command, sweep.program, nested])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    settings = {p.name: value for p, value in zip(sweep.parameters, point, strict=True)}
    return Trial(number, settings, tuple(words), digest)


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
    if not path.is_file():
        return ("interrupted" if folder.is_dir() else "not run"), None
    try:
        marker = json.loads(path.read_text(encoding="utf-8"))
        return str(marker["state"]), float(marker["seconds"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is damaged ({error!r}): delete it to have the trial run or resumed"
        ) from None


# ---- banks ---------------------------------------------------------------------------------------


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
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {n: value for n, value in trial.settings.items() if _axis(n) not in AXES}
        is_alone = trial.digest in failed or trial_folder(root, trial).is_dir()
        if trial.digest not in kept:
            key = trial.digest if is_alone else json.dumps(rest)
            groups.setdefault(key, []).append(trial)
    for members in groups.values():
        bank = _bank(sweep, members)
        fits += [bank] if bank else [Fit(trial, (trial,)) for trial in members]
    return sorted(fits, key=lambda fit: fit.trials[0].number)


def _kept_banks(sweep: Sweep, trials: Sequence[Trial], root: Path) -> tuple[list[Fit], set[str]]:
    """The banks of earlier sweeps all of whose trials are still asked for.

    Those that failed are left out; the digests of their trials come second.
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


def _axis(name: str) -> str:
    """The setting that a parameter sets, by its short name."""
    return name.replace("model.init_args.", "model.", 1)


def _items(value: Any) -> list[Any]:
    """The values of a list, or the one value."""
    return value if isinstance(value, list) else [value]


def _bank(sweep: Sweep, members: Sequence[Trial]) -> Fit | None:
    """The bank of trials that are equal in all but the axes; None where there is none."""
    settings, size = dict(members[0].settings), 1
    for name in settings:
        values = {str(trial.settings[name]): trial.settings[name] for trial in members}
        size *= len(values)
        if len(values) > 1:
            settings[name] = [item for value in values.values() for item in _items(value)]
    if len(members) == 1 or size != len(members):
        return None
    whole = make_trial(sweep, members[0].number, list(settings.values()))
    runs = runs_of_trials(whole, members)
    return Fit(whole, tuple(members), runs) if runs else None


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
    if config is None or config.model.class_path not in PROMPT_TUNING or config.ckpt_path:
        return None
    if any(config.trainer[name] not in (None, [], False) for name in COUPLING):
        return None
    model = config.model.init_args
    sources = None if model.subspace else model.init.source_tasks  # a subspace knows none
    sources = [""] if sources is None else [" ".join(source.split()) for source in sources]
    runs_over = (model.init_seed, model.learning_rate, model.batch_size)
    values = (config.data.tasks, config.data.samples, *map(_items, runs_over), sources)
    axes = dict(zip(AXES, values, strict=True))
    own = {trial.digest: dict(axes) for trial in members}
    try:
        for name, given in whole.settings.items():
            axis = _axis(name)
            if axis not in AXES or given is None:
                continue
            parsed = axes[axis]
            typed = {str(g): p for g, p in zip(_items(given), parsed, strict=True)}
            if [type(p)(g) for g, p in zip(_items(given), parsed, strict=True)] != parsed:
                return None  # another word of the command sets it
            for trial in members:
                value = trial.settings[name]
                if axis in ("data.tasks", "data.samples") or axis == AXES[-1]:
                    value = value if isinstance(value, list) else None  # which is refused
                own[trial.digest][axis] = [typed[str(v)] for v in _items(value)]
        runs = {digest: _run_names(axes) for digest, axes in own.items()}
        every = _run_names(axes)
    except (ValueError, TypeError, KeyError):  # a value out of range, twice, or without a name
        return None
    return runs if sorted(name for own in runs.values() for name in own) == sorted(every) else None


def _parsed(words: Sequence[str]) -> Any:
    """The settings of a fit as the real command line parses them; None where it is no such fit."""
    program = [sys.executable, "-m", "prompt_lab"]
    if words[0] != "prompt-lab" and list(words[:3]) != program:
        return None
    arguments = words[1:] if words[0] == "prompt-lab" else words[3:]
    from prompt_lab.commands.cli import PromptLabCLI

    class ParseOnly(PromptLabCLI):
        """Parses, makes nothing and runs nothing."""

        def _nothing(self, *given: Any) -> None: ...

        before_instantiate_classes = instantiate_classes = _run_subcommand = _nothing

    silent = StringIO()  # what is wrong is told when the trial is run
    try:
        with redirect_stdout(silent), redirect_stderr(silent):
            config = ParseOnly([*arguments, "--seed_everything=false"]).config
    except (Exception, SystemExit):
        return None
    return config.fit if config.subcommand == "fit" else None


def _run_names(axes: Mapping[str, list[Any]]) -> list[str]:
    """The names of all runs of a bank; a value out of range or a set not known: ValueError."""
    from prompt_lab.data.partitions import expand_sets

    tasks, samples, seeds, rates, sizes, sources = (axes[name] for name in AXES)
    runs = grid(expand_sets(tasks), samples, seeds, rates, sizes, expand_sets(sources))
    return [run.name for run in runs]
