"""The file of a sweep: what it says, and the trials that it asks for.

It is the YAML that ``wandb sweep FILE`` reads. A trial gets the words that a wandb agent would give
it, of null the word ``None``, which this package's commands read as null. Left out: Bayesian
search, early termination and targets, which need the service (``wandb agent``).
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

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
        kind = str(given.get("distribution", _inferred(given)))
        try:
            _check(kind, given, method)
        except ValueError as error:
            raise ValueError(f"{place}.{name}: {error}") from None
        yield Parameter((*outer, name), kind, given)


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
