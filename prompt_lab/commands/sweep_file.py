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
DEFAULT_COMMAND = list(MACROS)
"""The command of files that give none, as wandb has it."""
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

GRID_DISTRIBUTIONS = ("constant", "categorical")


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

    Returns:
        What it says.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not YAML, an unknown key, or something that only the service can do.
    """
    content = _read_yaml(path)
    unknown = [str(key) for key in content if key not in READ_KEYS + SERVICE_KEYS]
    if unknown:
        known = ", ".join(READ_KEYS + SERVICE_KEYS)
        raise ValueError(f"{path}: unknown key {', '.join(unknown)}; known: {known}")
    method = content.get("method")
    if method == "bayes":
        raise ValueError(f"{path}: method bayes needs the service: use wandb sweep and wandb agent")
    if method not in ("grid", "random"):
        raise ValueError(f"{path}: method is {method!r}; allowed here: grid, random")
    try:
        parameters = tuple(_parameters(content.get("parameters"), ()))
        for parameter in parameters:
            _check_parameter(parameter, method)
        command, program = _check_command(content)
        notes = _notes(content)
        run_cap = _check_run_cap(content.get("run_cap"))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    name = str(content.get("name") or path.stem)
    return Sweep(name, method, command, program, parameters, run_cap, notes)


def _read_yaml(path: Path) -> dict[Any, Any]:
    """The mapping in a YAML file."""
    if not path.is_file():
        raise FileNotFoundError(f"no sweep file {path}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no keys: a sweep file has method and parameters")
    return content


def _parameters(section: Any, outer: tuple[str, ...]) -> Iterator[Parameter]:
    """The parameters of a section and of those nested in it, sorted level by level."""
    place = ".".join(("parameters", *outer))
    if not isinstance(section, dict) or not section:
        raise ValueError(f"{place} is {section!r}: give a mapping of names to values")
    for name in section:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_][\w.-]*", name, re.ASCII):
            raise ValueError(f"{place}: {name!r} is no name of a setting")
        if not outer and name in OF_TRIAL:
            raise ValueError(f"{place}: {name} is set for each trial by the sweep; leave it out")
    for name, given in sorted(section.items()):
        path = (*outer, name)
        if not isinstance(given, dict):
            raise ValueError(f"{place}.{name} is {given!r}: write value: or values: before it")
        if "parameters" not in given:
            yield Parameter(path, str(given.get("distribution", _inferred(given))), given)
        elif len(given) == 1:
            yield from _parameters(given["parameters"], path)
        else:
            raise ValueError(f"{place}.{name}: beside nested parameters nothing else can stand")


def _inferred(given: Mapping[str, Any]) -> str:
    """The distribution of a parameter that names none, as wandb infers it."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    whole = all(isinstance(given.get(key), int) for key in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _check_parameter(parameter: Parameter, method: str) -> None:
    """Refuse a parameter that cannot be set or drawn here."""
    place, given, kind = f"parameters.{parameter.name}", parameter.given, parameter.distribution
    if kind not in DISTRIBUTIONS:
        raise ValueError(
            f"{place}: distribution {kind} is not among those that are drawn here: "
            f"{', '.join(DISTRIBUTIONS)}; or use wandb agent"
        )
    keys = DISTRIBUTIONS[kind]
    lacking = [key for key in keys if key not in given and key != "q"]
    extra = [str(key) for key in given if key not in (*keys, "distribution")]
    if lacking or extra:
        wrong = f"lacks {lacking[0]}" if lacking else f"has no {extra[0]}"
        raise ValueError(f"{place}: distribution {kind} {wrong}; its keys: {', '.join(keys)}")
    if method == "grid" and kind not in GRID_DISTRIBUTIONS:
        raise ValueError(f"{place}: a grid needs a list of values, not {kind}")
    if "min" in keys:
        _check_range(place, kind, given)
    else:
        _check_values(place, given)


def _check_range(place: str, kind: str, given: Mapping[str, Any]) -> None:
    """Refuse a range that is empty or not of numbers."""
    for key in ("min", "max", "q"):
        allowed = int if kind == "int_uniform" else (int, float)
        number = given.get(key, 1)
        if isinstance(number, bool) or not isinstance(number, allowed) or not math.isfinite(number):
            hint = "a whole number" if allowed is int else "a number (YAML needs the dot in 1.0e-3)"
            raise ValueError(f"{place}: {key} is {number!r}: give {hint}")
    if given["min"] > given["max"]:
        raise ValueError(f"{place}: min {given['min']} is above max {given['max']}")
    if "log" in kind and given["min"] <= 0:
        raise ValueError(f"{place}: min is {given['min']}: {kind} needs numbers above 0")
    if given.get("q", 1) <= 0:
        raise ValueError(f"{place}: q is {given['q']}: give a number above 0")


def _check_values(place: str, given: Mapping[str, Any]) -> None:
    """Refuse values, or their probabilities, that cannot be passed or drawn."""
    values = given["values"] if "values" in given else [given["value"]]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{place}: values is {values!r}: give a list")
    shares = given.get("probabilities", [1])
    if not isinstance(shares, list) or any(
        isinstance(share, bool) or not isinstance(share, int | float) or share < 0
        for share in shares
    ):
        raise ValueError(f"{place}: probabilities is {shares!r}: give numbers from 0 to 1")
    if "probabilities" in given and len(shares) != len(values):
        raise ValueError(f"{place}: {len(shares)} probabilities for {len(values)} values")
    if not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise ValueError(f"{place}: the probabilities sum to {sum(shares):g}, not to 1")


def _check_command(content: Mapping[Any, Any]) -> tuple[tuple[str, ...], str | None]:
    """The words of the command, and the program."""
    command, program = content.get("command", DEFAULT_COMMAND), content.get("program")
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
    return words, program


def _check_run_cap(run_cap: Any) -> int | None:
    """A number of trials, at least one."""
    if run_cap is None:
        return None
    if isinstance(run_cap, bool) or not isinstance(run_cap, int) or run_cap < 1:
        raise ValueError(f"run_cap is {run_cap!r}: give a whole number, at least 1")
    return run_cap


def _notes(content: Mapping[Any, Any]) -> tuple[str, ...]:
    """What of the file has no effect here, in lines."""
    notes = []
    metric = content.get("metric")
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

    A grid has wandb's order: parameters sorted by name, the last one fastest. Equal settings, which
    random draws of few values give, are one trial.

    Args:
        sweep: the file.
        seed: of random draws.
        run_cap: most trials; by default the file's.

    Returns:
        At least one trial; numbers of trials that would be equal to an earlier one are left out.

    Raises:
        ValueError: a bad number of trials, or none for random draws.
    """
    cap = sweep.run_cap if run_cap is None else _check_run_cap(run_cap)
    if sweep.method == "random":
        if cap is None:
            raise ValueError("method random never ends by itself: give run_cap")
        points = (_random_point(sweep, seed, number) for number in range(1, cap + 1))
    else:
        choices = [p.given["values"] if "values" in p.given else [p.given["value"]]
                   for p in sweep.parameters]  # fmt: skip
        points = itertools.islice(itertools.product(*choices), cap)
    trials: dict[str, Trial] = {}
    for number, point in enumerate(points, 1):
        trial = make_trial(sweep, number, [_in_order(value) for value in point])
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
    if kind == "categorical":
        return given["values"][int(u * len(given["values"]))]
    if kind == "categorical_w_probabilities":
        bounds = list(itertools.accumulate(given["probabilities"]))
        return given["values"][min(bisect_right(bounds, u * bounds[-1]), len(bounds) - 1)]
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


def _random_point(sweep: Sweep, seed: int, number: int) -> list[Any]:
    """The draws of one trial; each is a function of seed, number and name."""
    return [
        draw(parameter, random.Random(f"{seed}/{number}/{parameter.name}").random())
        for parameter in sweep.parameters
    ]


def _in_order(value: Any) -> Any:
    """A value with the keys of its mappings sorted."""
    if isinstance(value, dict):
        return {key: _in_order(inner) for key, inner in sorted(value.items(), key=_key)}
    return [_in_order(inner) for inner in value] if isinstance(value, list) else value


def _key(item: tuple[Any, Any]) -> str:
    """The key of an item of a mapping, as text, for YAML's may be of any type."""
    return str(item[0])


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
    identity = json.dumps([sweep.command, sweep.program, nested], default=str)
    digest = hashlib.sha256(identity.encode()).hexdigest()[:8]
    settings = {p.name: value for p, value in zip(sweep.parameters, point, strict=True)}
    return Trial(number, settings, tuple(words), digest)
