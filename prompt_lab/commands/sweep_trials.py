"""The file of a sweep: what it says, and the trials that it asks for.

It is the YAML that ``wandb sweep FILE`` reads, and a trial gets the words that a wandb agent would
give it; Bayesian search, early termination and targets need the service. A draw stays the same when
a parameter or a trial is added (scikit-learn's ``ParameterSampler`` has one stream for all).
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
    """One parameter: the words of its name, its distribution, what the file says of it by key."""

    path: tuple[str, ...]
    distribution: str
    given: dict[str, Any]

    @property
    def name(self) -> str:
        """The path in one word."""
        return ".".join(self.path)


@dataclass(frozen=True)
class Sweep:
    """A sweep file that was read and checked."""

    name: str
    method: str
    command: tuple[str, ...]
    program: str | None  # what stands for its macro
    parameters: tuple[Parameter, ...]  # sorted by name, level by level, as wandb sorts them
    run_cap: int | None
    notes: tuple[str, ...]  # what has no effect here, in lines


@dataclass(frozen=True)
class Trial:
    """One setting of all parameters."""

    number: int  # its place in the sweep, from 1
    settings: dict[str, Any]  # the value of each parameter by its name
    words: tuple[str, ...]  # the command without folder
    digest: str  # eight hexadecimal digits of command and settings


# ---- the file ------------------------------------------------------------------------------------


def read_sweep(path: Path) -> Sweep:
    """Read and check a sweep file; a ``ValueError`` for all that cannot be run here."""
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
        known = READ_KEYS + SERVICE_KEYS
        if unknown := [key for key in content if key not in known]:
            raise ValueError(f"unknown key {', '.join(unknown)}; known: {', '.join(known)}")
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
            notes=tuple(_notes(content)),
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _parameters(section: Any, method: str, outer: tuple[str, ...] = ()) -> Iterator[Parameter]:
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
        if "parameters" not in given:
            try:
                yield Parameter((*outer, name), _distribution(given, method), given)
            except ValueError as error:
                raise ValueError(f"{place}.{name}: {error}") from None
        elif len(given) > 1:
            raise ValueError(f"{place}.{name}: beside nested parameters nothing else can stand")
        else:
            yield from _parameters(given["parameters"], method, (*outer, name))


def _distribution(given: Mapping[str, Any], method: str) -> str:
    """The distribution of a parameter, as named or inferred by wandb, which can be drawn here."""
    if "value" in given:
        kind = "constant"
    elif "values" in given:
        kind = "categorical_w_probabilities" if "probabilities" in given else "categorical"
    else:
        whole = all(isinstance(given.get(key), int) for key in ("min", "max"))
        kind = "int_uniform" if whole else "uniform"
    kind = str(given.get("distribution", kind))
    if kind not in DISTRIBUTIONS:
        raise ValueError(
            f"distribution {kind} is not among those that are drawn here: "
            f"{', '.join(DISTRIBUTIONS)}; or use wandb agent"
        )
    keys = DISTRIBUTIONS[kind]
    wrong = [f"lacks {key}" for key in keys if key not in given and key != "q"]
    wrong += [f"has no {key}" for key in given if key not in (*keys, "distribution")]
    if wrong:
        raise ValueError(f"distribution {kind} {wrong[0]}; its keys: {', '.join(keys)}")
    if method == "grid" and kind not in ("constant", "categorical"):
        raise ValueError(f"a grid needs a list of values, not {kind}")
    if "min" in keys:
        _check_range(kind, {key: given.get(key, 1) for key in ("min", "max", "q")})
    elif "values" in keys:
        values, shares = given["values"], given.get("probabilities")
        if not isinstance(values, list) or not values:
            raise ValueError(f"values is {values!r}: give a list")
        known = shares if isinstance(shares, list) and all(map(_is_number, shares)) else []
        is_whole = len(known) == len(values) and math.isclose(sum(known), 1, abs_tol=1e-6)
        if shares is not None and not (is_whole and min(known) >= 0):
            raise ValueError(
                f"probabilities is {shares!r}: give {len(values)} numbers from 0, of sum 1"
            )
    return kind


def _check_range(kind: str, numbers: Mapping[str, Any]) -> None:
    for key, number in numbers.items():
        if kind == "int_uniform" and not _is_number(number, int):
            raise ValueError(f"{key} is {number!r}: give a whole number")
        if not _is_number(number):
            raise ValueError(f"{key} is {number!r}: give a number (YAML needs the dot in 1.0e-3)")
    low, high, q = numbers.values()
    if low > high:
        raise ValueError(f"min {low} is above max {high}")
    if "log" in kind and low <= 0:
        raise ValueError(f"min is {low}: {kind} needs numbers above 0")
    if q <= 0:
        raise ValueError(f"q is {q}: give a number above 0")


def _is_number(value: Any, kind: Any = (int, float)) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)


def _command(content: Mapping[str, Any]) -> tuple[str, ...]:
    command, program = content.get("command", list(MACROS)), content.get("program")
    if not isinstance(command, list) or not command:
        raise ValueError(f"command is {command!r}: give a list of words")
    words = tuple(map(str, command))
    for word in (*words, str(program)):
        if "${" in word and (word not in MACROS or word == program):
            raise ValueError(
                f"{word} in the command is not filled in here; allowed words: {', '.join(MACROS)}"
            )
        if word.startswith("--") and word[2:].split("=")[0] in OF_TRIAL:
            raise ValueError(f"the sweep sets {word.split('=')[0]} for each trial; leave it out")
    if "${program}" in words and not isinstance(program, str):
        raise ValueError(f"program is {program!r}, and the command needs it: give a text")
    if "${args}" not in words:
        raise ValueError("the command has no ${args}: all trials would be the same")
    if not {*words} - {"${env}", "${args}"}:
        raise ValueError("the command has no program: write prompt-lab, fit before ${args}")
    return words


def _run_cap(given: Any) -> int | None:
    if given is not None and (not _is_number(given, int) or given < 1):
        raise ValueError(f"run_cap is {given!r}: give a whole number, at least 1")
    return given


def _notes(content: Mapping[str, Any]) -> Iterator[str]:
    metric = content.get("metric")
    if metric is not None:
        if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
            raise ValueError(f"metric is {metric!r}: give a mapping with name and goal")
        goal = metric.get("goal", "minimize")
        yield f"metric for the service: {metric['name']} ({goal}); here all trials are run"
    if unused := [key for key in SERVICE_KEYS if key in content]:
        yield f"without effect here: {', '.join(unused)}"


# ---- the trials ----------------------------------------------------------------------------------


def make_trials(sweep: Sweep, seed: int = 0, run_cap: int | None = None) -> list[Trial]:
    """The trials of a sweep, at least one; ``run_cap`` is by default the file's.

    A grid has wandb's order: parameters sorted by name, the last one fastest. Each random draw
    depends on seed, number of the trial and name of the parameter only. Equal settings, which
    draws of few values give, are one trial, and the later numbers are left out. A ``ValueError``
    for a bad number of trials, or none for random draws.
    """
    cap = sweep.run_cap if run_cap is None else _run_cap(run_cap)
    if sweep.method == "grid":
        values = (p.given.get("values") or [p.given["value"]] for p in sweep.parameters)
        points = itertools.product(*values)
    elif cap is None:
        raise ValueError("method random never ends by itself: give run_cap")
    else:
        points = (
            [draw(p, random.Random(f"{seed}/{number}/{p.name}").random()) for p in sweep.parameters]
            for number in itertools.count(1)
        )
    trials: dict[str, Trial] = {}
    for number, point in enumerate(itertools.islice(points, cap), 1):
        trial = make_trial(sweep, number, point)
        trials.setdefault(trial.digest, trial)
    return list(trials.values())


def draw(parameter: Parameter, u: float) -> Any:
    """The value of a parameter at a quantile from 0 to below 1: the inverse of its distribution.

    Of quantised distributions it is the multiple of q that is nearest to the one without q.
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
    settings = {p.name: value for p, value in zip(sweep.parameters, point, strict=True)}
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
    return Trial(number, settings, tuple(words), digest)
