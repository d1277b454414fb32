"""The command ``prompt-lab sweep``: the trials of a wandb sweep file, one after another, here.

Each trial (``sweep_trials.py``) has a folder, named by a digest of its settings, with a marker once
its fit has ended: the same command again skips what is done and resumes what was interrupted. The
digest does not cover what is in a config file that the command names.

Trials of ``PromptTuning`` that are equal in all but :data:`AXES`, and a full product of these, are
one fit with lists, where the command line's own parser says that its runs are theirs: a bank, done,
interrupted or failed as one; ``bank.json`` tells whose runs are whose.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

from prompt_lab.commands.sweep_trials import Sweep, Trial, make_trial, make_trials, read_sweep
from prompt_lab.files.results import BASELINES, RESULT_COLUMNS, best_by_dev, read_csv, text_table
from prompt_lab.files.tensors import held, write_atomically, write_csv

BANK, MARKER, LOG = "bank.json", "trial.json", "log.txt"
AXES = ("data.tasks", "data.samples", "model.init_seed", "model.learning_rate")
AXES += ("model.batch_size", "model.init.source_tasks")
"""The settings that may be lists in a bank."""
PROMPT_TUNING = ("prompt_lab.PromptTuning", "prompt_lab.methods.prompt_tuning.PromptTuning")
COUPLING = ("callbacks", "plugins", "max_time", "detect_anomaly")
COUPLING += ("limit_test_batches", "overfit_batches", "fast_dev_run")
"""Settings of the trainer by which a run could feel the others."""
TAIL_LINES, TAIL_BYTES = 10, 20_000
PATIENCE = 10.0
"""Seconds that a trial has to end after SIGTERM."""


@dataclass(frozen=True)
class Fit:
    """One process of a sweep: a trial alone, or a bank of several."""

    whole: Trial  # what is run: the trial, or one whose settings have lists for the bank
    trials: tuple[Trial, ...]  # those that it trains, at least one
    runs: dict[str, list[str]] | None = None  # of a bank: names of each trial's runs by its digest


def sweep_command(
    file: str,
    run_dir: str | None = None,
    seed: int = 0,
    run_cap: int | None = None,
    dry_run: bool = False,
) -> int:
    """Run the trials of a wandb sweep file one after another, without the wandb service.

    The file is one that wandb sweep FILE takes, with method grid or random. Each trial is a process
    of its own in its own folder below run_dir, with its output in log.txt; trials of PromptTuning
    that differ only in tasks, samples, seeds, learning rates, batch sizes or source tasks are one
    fit with lists, in one folder, where they make a full product. Run again, the command skips what
    is done, resumes a fit that was interrupted from its last checkpoint, and runs those that failed
    again. At the end sweep.csv has a line per trial, with its own scores and the seconds of its
    fit, and results.csv the lines of all fits' results.csv. The exit status is 0 if all trials are
    done, 1 if some are not, 130 after Ctrl-C.

    Args:
        file: the sweep file.
        run_dir: folder of the sweep; by default runs/ and the name of the file without its ending.
        seed: seed of the draws of method random; a draw depends on it, on the trial's number and on
            the name of the parameter only.
        run_cap: most trials; by default the file's run_cap. Method random needs one.
        dry_run: print the commands, one per fit, and run nothing.
    """
    sweep = read_sweep(Path(file))
    trials = make_trials(sweep, seed, run_cap)
    root = Path(run_dir or Path("runs", Path(file).stem))
    if dry_run:
        for fit in plan_fits(sweep, trials, root):
            print(shlex.join([*fit.whole.words, f"--run_dir={trial_folder(root, fit.whole)}"]))
        return 0
    program = _launched(trials[0].words)[0]
    if shutil.which(program) is None:
        raise ValueError(f"no program {program!r}: command begins with it in {file}")
    with held(root, "another sweep, or by a trial that one left behind") as lock:
        fits = plan_fits(sweep, trials, root)
        stopped = not _run_all(sweep, trials, fits, root, lock)
        return _report(sweep, trials, fits, root, stopped)


def trial_folder(root: Path, trial: Trial) -> Path:
    """The folder of a trial: the one that has its digest, whatever its number, or a new one's."""
    found = sorted(root.glob(f"*-{trial.digest}"))
    return found[0] if found else root / f"{trial.number}-{trial.digest}"


def trial_state(folder: Path) -> tuple[str, float | None]:
    """State of a trial by its folder, and the seconds that its last process took if it ended.

    The state is ``done`` (ended with status 0), ``failed`` (another status), ``interrupted``
    (started, did not end by itself) or ``not run``. A ``ValueError`` for a damaged marker.
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
    """The fits that train the trials, each trial in one of them, in the order of the trials.

    Banks and trials that have a folder below ``root`` keep it, a bank only while all its trials are
    in the file. The trials of a bank that failed are alone from then on, since one of them may have
    failed it. A ``ValueError`` for a damaged ``bank.json``.
    """
    fits, failed = _kept_banks(sweep, trials, root)
    kept = {trial.digest for fit in fits for trial in fit.trials}
    groups: dict[str, list[Trial]] = {}
    for trial in trials:
        rest = {n: v for n, v in trial.settings.items() if n.replace(".init_args", "") not in AXES}
        is_alone = trial.digest in failed or trial_folder(root, trial).is_dir()
        if trial.digest not in kept:
            key = trial.digest if is_alone else json.dumps(rest)
            groups.setdefault(key, []).append(trial)
    for members in groups.values():
        bank = _bank(sweep, members)
        fits += [bank] if bank else [Fit(trial, (trial,)) for trial in members]
    return sorted(fits, key=lambda fit: fit.trials[0].number)


def _kept_banks(sweep: Sweep, trials: Sequence[Trial], root: Path) -> tuple[list[Fit], set[str]]:
    """Banks of earlier sweeps whose trials are all still asked for; digests of what failed."""
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


def _bank(sweep: Sweep, members: Sequence[Trial]) -> Fit | None:
    """The bank of trials that are equal in all but the axes, if they are a full product."""
    settings, size = dict(members[0].settings), 1
    for name in settings:
        values = {str(trial.settings[name]): trial.settings[name] for trial in members}.values()
        size *= len(values)
        if len(values) > 1:
            lists = [value if isinstance(value, list) else [value] for value in values]
            settings[name] = [item for own in lists for item in own]
    if len(members) == 1 or size != len(members):
        return None
    whole = make_trial(sweep, members[0].number, list(settings.values()))
    runs = runs_of_trials(whole, members)
    return Fit(whole, tuple(members), runs) if runs else None


def runs_of_trials(whole: Trial, members: Sequence[Trial]) -> dict[str, list[str]] | None:
    """Names of the runs of each trial of a bank, by its digest.

    None where they are not, together, those of the bank, or nobody can say.
    """
    every = _run_names(whole.words) or []
    own = {trial.digest: _run_names(trial.words) or [] for trial in members} if every else {}
    names = [name for runs in own.values() for name in runs]
    return own if every and sorted(names) == sorted(every) else None


def _run_names(words: Sequence[str]) -> list[str] | None:
    """The names of the runs of a fit of ``PromptTuning``, as the real command line makes them."""
    launched = _launched(words)
    if launched[:3] != [sys.executable, "-m", "prompt_lab"]:
        return None
    from prompt_lab.commands.fit import ParseOnly
    from prompt_lab.data.datamodule import CrossFitDataModule
    from prompt_lab.methods.prompt_tuning import PromptTuning

    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):  # said when it is run
            config = ParseOnly(launched[3:]).config.fit
            is_alone = any(config.trainer[name] not in (None, [], False) for name in COUPLING)
            if is_alone or config.ckpt_path or config.model.class_path not in PROMPT_TUNING:
                return None
            data = CrossFitDataModule(**config.data.as_dict())
            method = PromptTuning(**config.model.init_args.as_dict())
            return [run.name for run in method.make_runs(data)]
    except (Exception, SystemExit):
        return None


# ---- running -------------------------------------------------------------------------------------


def _run_all(
    sweep: Sweep, trials: Sequence[Trial], fits: Sequence[Fit], root: Path, lock: int
) -> bool:
    placed = [(fit, trial_folder(root, fit.whole)) for fit in fits]
    done = sum(len(fit.trials) for fit, folder in placed if trial_state(folder)[0] == "done")
    count = "1 fit" if len(fits) == 1 else f"{len(fits)} fits"
    banks = f" in {count}" if len(fits) < len(trials) else ""
    print(
        f"sweep {sweep.name}: {len(trials)} trials ({sweep.method}){banks} in {root}, "
        f"{done} done before"
    )
    print("".join(f"{note}\n" for note in sweep.notes), end="", flush=True)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for place, (fit, folder) in enumerate(placed, 1):
            settings = " ".join(f"{name}={fit.whole.settings[name]}" for name in _varying(trials))
            print(f"{place}/{len(fits)}  {settings}  ", end="", flush=True)
            if trial_state(folder)[0] == "done":
                print(f"{_outcome(fit, folder)} (before)", flush=True)
                continue
            ended = _run_fit(fit, folder, lock)
            print(_outcome(fit, folder), flush=True)
            if trial_state(folder)[0] != "done":
                print(f"{ended}; its last lines in {folder / LOG}:\n{_tail(folder / LOG)}")
        return True
    except KeyboardInterrupt:
        print("stopped")
        return False
    finally:
        signal.signal(signal.SIGTERM, before)


def _run_fit(fit: Fit, folder: Path, lock: int) -> str:
    """Run one trial, or a bank of them, and leave its marker; returns how its process ended."""
    # What led a failed one astray may be in its state, so it is not resumed.
    again = {"interrupted": ["--resume=true"], "failed": ["--overwrite=true"]}
    words = [*fit.whole.words, f"--run_dir={folder}"]
    if "fit" in fit.whole.words:
        words += again.get(trial_state(folder)[0], [])
    (folder / MARKER).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    if fit.runs is not None:
        noted = {"settings": fit.whole.settings, "runs": fit.runs}
        write_atomically(folder / BANK, json.dumps(noted, indent=1).encode())
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
    own = [sys.executable, "-m", "prompt_lab"] if words[0] == "prompt-lab" else [words[0]]
    return [*own, *words[1:]]


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


def read_scores(
    folder: Path, runs: Collection[str] | None = None
) -> tuple[float | None, float | None]:
    """Mean dev and test score of a trial: over its tasks, samples and seeds, the run best on dev.

    From the ``results.csv`` of its fit, else from its prompt store; None where there is no score.
    ``runs`` are the names of the trial's runs in a bank, None for all. A ``ValueError`` for a
    damaged file.
    """
    try:
        rows = [row for row in _rows(folder / "results.csv") if row["variant"] not in BASELINES]
        if not rows:
            index = _rows(folder / "prompts" / "index.csv")
            rows = [{**row, "dev": row["dev_score"], "test": row["test_score"]} for row in index]
        if runs is not None:
            rows = [r for r in rows if (r.get("name") or Path(r["prompt_file"]).stem) in runs]
        best = best_by_dev(rows)
        dev, test = ([float(row[key]) for row in best if row[key]] for key in ("dev", "test"))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{folder}: results.csv or prompts/index.csv there is damaged ({error!r}): delete "
            f"{MARKER} beside it to have the trial run again"
        ) from None
    return statistics.mean(dev) if dev else None, statistics.mean(test) if test else None


def _rows(path: Path) -> list[dict[str, str]]:
    return read_csv(path) if path.is_file() else []


def _varying(trials: Sequence[Trial]) -> list[str]:
    names = trials[0].settings
    return [name for name in names if len({str(t.settings[name]) for t in trials}) > 1]


def _outcome(fit: Fit, folder: Path) -> str:
    state, seconds = trial_state(folder)
    cells = [state] if seconds is None else [state, f"{seconds:.0f} s"]
    if fit.runs is not None:
        cells.append(f"{len(fit.trials)} trials")
    elif state == "done":
        scores = zip(("dev", "test"), read_scores(folder), strict=True)
        cells += [f"{name} {score:.3f}" for name, score in scores if score is not None]
    return "  ".join(cells)


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    last = max((at for at, line in enumerate(lines) if line.startswith("$ ")), default=-1)
    return "\n".join(f"    {line}" for line in lines[last + 1 :][-TAIL_LINES:])


def _report(
    sweep: Sweep, trials: Sequence[Trial], fits: Sequence[Fit], root: Path, stopped: bool
) -> int:
    rows, results = [], []
    for fit in fits:
        folder = trial_folder(root, fit.whole)
        state, seconds = trial_state(folder)
        for trial in fit.trials:
            runs = fit.runs and fit.runs[trial.digest]
            dev, test = read_scores(folder, runs) if state == "done" else (None, None)
            row = {"trial": trial.number, **trial.settings, "dev": dev, "test": test}
            rows.append(row | {"state": state, "seconds": seconds, "folder": folder.name})
        for line in _rows(folder / "results.csv") if state == "done" else ():
            name = line.get("prompt_file")  # as seen from the folder of the sweep
            results.append(line | {"prompt_file": f"{folder.name}/{name}" if name else ""})
    rows.sort(key=lambda row: row["trial"])
    head = ["trial", *_varying(trials), "dev", "test", "state"]
    write_csv(root / "sweep.csv", [*head, "seconds", "folder"], rows)
    if results:
        write_csv(root / "results.csv", RESULT_COLUMNS, results)
    shown = {name: lambda score: f"{score:.3f}" for name in ("dev", "test")}
    cells = [["-" if r[n] is None else shown.get(n, str)(r[n]) for n in head] for r in rows]
    print(f"\n{text_table(head, cells)}\n")
    done = sum(row["state"] == "done" for row in rows)
    files = f"{root / 'sweep.csv'} and {root / 'results.csv'}" if results else root / "sweep.csv"
    print(f"{done} of {len(rows)} trials done; the tables are in {files}")
    if done and not results and "fit" in sweep.command:
        print("no trial wrote results.csv: a fit does with --test_after_fit=true in the command")
    if stopped:
        print("stopped: the same command goes on from here", flush=True)
        return 130
    return int(done < len(rows))
