"""The command ``prompt-lab sweep``: the trials of a wandb sweep file, one after another, here.

It reads the YAML that ``wandb sweep FILE`` reads and starts each trial with the words that a wandb
agent would give it, plus a folder of its own by ``--run_dir``. The folder is named by a digest of
the trial's settings and holds a marker once the trial has ended, so that the same command run again
skips what is done, resumes a fit that was interrupted and goes on.

Left out: Bayesian search, early termination and targets, which need the service (``wandb agent``);
trials side by side. The digest does not cover the content of a config file that the command names:
after a change of it take another folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from prompt_lab.atomic_file import held, write_atomically, write_csv
from prompt_lab.results import BASELINES, RESULT_COLUMNS, best_by_dev, read_csv

READ_KEYS = ("name", "program", "command", "method", "parameters", "run_cap", "metric")
SERVICE_KEYS = ("early_terminate", "description", "project", "entity")
"""What only the service uses."""

MACROS = ("${env}", "${interpreter}", "${program}", "${args}")
DEFAULT_COMMAND = list(MACROS)
"""The command of files that give none, as wandb has it."""

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
MARKER, LOG, CHECKPOINT = "trial.json", "log.txt", "checkpoints/last.ckpt"
TAIL_LINES, TAIL_BYTES = 10, 20_000
PATIENCE = 10.0
"""Seconds that a trial has to end after SIGTERM."""


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


def sweep_command(
    file: str,
    run_dir: str | None = None,
    seed: int = 0,
    run_cap: int | None = None,
    dry_run: bool = False,
) -> int:
    """Run the trials of a wandb sweep file one after another, without the wandb service.

    The file is one that wandb sweep FILE takes, with method grid or random. Each trial is a process
    of its own in its own folder below run_dir, with its output in log.txt. Run again, the command
    skips the trials that are done, resumes a fit that was interrupted from its last checkpoint, and
    runs those that failed again. At the end sweep.csv has a line per trial, and results.csv
    the lines of all trials' results.csv.

    Args:
        file: the sweep file.
        run_dir: folder of the sweep; by default runs/ and the name of the file without its ending.
        seed: of the draws of method random; the draws of a trial depend on it and on the trial's
            number only.
        run_cap: most trials; by default the file's run_cap. Method random needs one.
        dry_run: true prints the commands and runs nothing.

    Returns:
        0 if all trials are done, 1 if some are not, 130 after Ctrl-C.

    Raises:
        FileNotFoundError: no such file.
        ValueError: something in the file that cannot be run here, or a folder that is in use.
    """
    sweep = read_sweep(Path(file))
    trials = make_trials(sweep, seed, run_cap)
    root = Path(run_dir or Path("runs", Path(file).stem))
    if dry_run:
        for trial in trials:
            print(shlex.join([*trial.words, f"--run_dir={trial_folder(root, trial)}"]))
        return 0
    program = _launched(trials[0].words)[0]
    if shutil.which(program) is None:
        raise ValueError(f"no program {program!r}: command begins with it in {file}")
    with held(root, "another sweep, or by a trial that one left behind") as lock:
        return _run_all(sweep, trials, root, lock)


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
        if not outer and name in ("run_dir", "ckpt_path"):
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
    if None in values:
        raise ValueError(f'{place}: null would reach the program as None: write "null" in quotes')
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
        if re.match(r"--(run_dir|ckpt_path)(=|$)", word):
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
        trial = _trial(sweep, number, [_in_order(value) for value in point])
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


def _trial(sweep: Sweep, number: int, point: Sequence[Any]) -> Trial:
    """A trial with these values of the parameters."""
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


# ---- running -------------------------------------------------------------------------------------


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


def _run_all(sweep: Sweep, trials: Sequence[Trial], root: Path, lock: int) -> int:
    """Run what is not done, print and write the tables; returns the exit status."""
    folders = [trial_folder(root, trial) for trial in trials]
    done = sum(trial_state(folder)[0] == "done" for folder in folders)
    print(
        f"sweep {sweep.name}: {len(trials)} trials ({sweep.method}) in {root}, {done} done before"
    )
    print("".join(f"{note}\n" for note in sweep.notes), end="", flush=True)
    varying = _varying(trials)
    stopped = False
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for place, (trial, folder) in enumerate(zip(trials, folders, strict=True), 1):
            settings = " ".join(f"{name}={trial.settings[name]}" for name in varying)
            print(f"{place}/{len(trials)}  {settings}  ", end="", flush=True)
            if trial_state(folder)[0] == "done":
                print(f"{_outcome(folder)} (before)", flush=True)
                continue
            ended = _run_trial(trial, folder, lock)
            print(_outcome(folder), flush=True)
            if trial_state(folder)[0] != "done":
                print(f"{ended}; its last lines in {folder / LOG}:\n{_tail(folder / LOG)}")
    except KeyboardInterrupt:
        stopped = True
        print("stopped")
    finally:
        signal.signal(signal.SIGTERM, before)
    return _report(sweep, trials, root, stopped)


def _run_trial(trial: Trial, folder: Path, lock: int) -> str:
    """Run one trial and leave its marker; returns how its process ended.

    Only a trial that was interrupted is resumed: what led a failed one astray may be in its state.
    """
    resumed = trial_state(folder)[0] == "interrupted" and (folder / CHECKPOINT).is_file()
    (folder / MARKER).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    words = [*trial.words, f"--run_dir={folder}"]
    if resumed and "fit" in trial.words:
        words.append("--ckpt_path=last")
    started = time.monotonic()
    with (folder / LOG).open("ab") as log:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        process = subprocess.Popen(
            _launched(words),
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the sweep, which stops the trial
            pass_fds=(lock,),  # a trial that outlives its sweep keeps the folder locked
        )
        try:
            os.truncate(lock, 0)
            os.pwrite(lock, str(process.pid).encode(), 0)
            status = process.wait()
        except BaseException:
            _stop(process)
            raise
    if status < 0:  # ended from outside: no marker, so that it is resumed
        return f"ended by signal {-status}"
    state, seconds = "failed" if status else "done", round(time.monotonic() - started, 1)
    marker = {"state": state, "status": status, "seconds": seconds, "arguments": words}
    write_atomically(folder / MARKER, json.dumps(marker, indent=1).encode())
    return f"ended with status {status}"


def _launched(words: Sequence[str]) -> list[str]:
    """The words with ``prompt-lab`` as that of this interpreter, whatever the search path says."""
    own = [sys.executable, "-m", "prompt_lab"]
    return [*own, *words[1:]] if words[0] == "prompt-lab" else list(words)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a trial and the processes that it started: asked first, then killed."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        process.wait(PATIENCE)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# ---- what is told --------------------------------------------------------------------------------


def read_scores(folder: Path) -> tuple[float | None, float | None]:
    """Mean dev and test score of a trial: over its tasks, samples and seeds, the run best on dev.

    Args:
        folder: of the trial.

    Returns:
        The scores in ``results.csv``; without it those that a fit keeps in its prompt store, which
        has no test score unless the prompts were tested. None where there is no score.

    Raises:
        ValueError: a file that is damaged.
    """
    try:
        rows = [row for row in _rows(folder / "results.csv") if row["variant"] not in BASELINES]
        if not rows:
            index = _rows(folder / "prompts" / "index.csv")
            rows = [{**row, "dev": row["dev_score"], "test": row["test_score"]} for row in index]
        best = best_by_dev(rows)
        dev, test = ([float(row[key]) for row in best if row[key]] for key in ("dev", "test"))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}: results.csv or prompts/index.csv there is damaged ({error!r}): delete "
            f"{MARKER} beside it to have the trial run again"
        ) from None
    return statistics.mean(dev) if dev else None, statistics.mean(test) if test else None


def _rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file, none where there is no file."""
    return read_csv(path) if path.is_file() else []


def _varying(trials: Sequence[Trial]) -> list[str]:
    """Names of the parameters that differ between trials."""
    names = trials[0].settings
    return [name for name in names if len({str(t.settings[name]) for t in trials}) > 1]


def _outcome(folder: Path) -> str:
    """State, seconds and scores of a trial, in a line."""
    state, seconds = trial_state(folder)
    cells = [state] if seconds is None else [state, f"{seconds:.0f} s"]
    scores = zip(("dev", "test"), read_scores(folder), strict=True)
    if state == "done":
        cells += [f"{name} {score:.3f}" for name, score in scores if score is not None]
    return "  ".join(cells)


def _tail(path: Path) -> str:
    """The last lines that the last process wrote to a log."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    last = max((at for at, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    return "\n".join(f"    {line}" for line in lines[last + 1 :][-TAIL_LINES:])


def _report(sweep: Sweep, trials: Sequence[Trial], root: Path, stopped: bool) -> int:
    """Write ``sweep.csv`` and ``results.csv``, print the table; returns the exit status."""
    rows, results = [], []
    for trial in trials:
        folder = trial_folder(root, trial)
        state, seconds = trial_state(folder)
        dev, test = read_scores(folder) if state == "done" else (None, None)
        row = {"trial": trial.number, **trial.settings, "dev": dev, "test": test}
        rows.append(row | {"state": state, "seconds": seconds, "folder": folder.name})
        if state == "done":
            results += [_moved(line, folder) for line in _rows(folder / "results.csv")]
    head = ["trial", *_varying(trials), "dev", "test", "state"]
    write_csv(root / "sweep.csv", [*head, "seconds", "folder"], rows)
    if results:
        write_csv(root / "results.csv", RESULT_COLUMNS, results)
    print(f"\n{_table(head, rows)}\n")
    done = sum(row["state"] == "done" for row in rows)
    files = f"{root / 'sweep.csv'} and {root / 'results.csv'}" if results else root / "sweep.csv"
    print(f"{done} of {len(rows)} trials done; the tables are in {files}")
    if done and not results and "fit" in sweep.command:
        print("no trial wrote results.csv: a fit does with --test_after_fit=true in the command")
    if stopped:
        print("stopped: the same command goes on from here", flush=True)
        return 130
    return int(done < len(rows))


def _moved(line: Mapping[str, str], folder: Path) -> dict[str, str]:
    """A line of a trial's results with its prompt file as seen from the folder of the sweep."""
    name = line.get("prompt_file")
    return {**line, "prompt_file": f"{folder.name}/{name}" if name else ""}


def _table(head: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows under a head, in columns; scores with three digits."""
    lines = [list(head), *([_cell(name, row[name]) for name in head] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    lines.insert(1, ["-" * width for width in widths])
    padded = ((c.ljust(w) for c, w in zip(line, widths, strict=True)) for line in lines)
    return "\n".join("  ".join(line).rstrip() for line in padded)


def _cell(name: str, value: Any) -> str:
    """A cell of the printed table."""
    if value is None:
        return "-"
    return f"{value:.3f}" if name in ("dev", "test") else str(value)
