"""``prompt-lab sweep``: what a file means, which trials run in which fits, how a sweep goes on."""

from __future__ import annotations

import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
import yaml

from prompt_lab import load_prompt
from prompt_lab.__main__ import main
from prompt_lab.commands import fit as cli
from prompt_lab.commands.sweep import plan_fits, read_scores, sweep_command, trial_folder
from prompt_lab.commands.sweep_trials import Parameter, Trial, draw, make_trials, read_sweep
from prompt_lab.files.results import RESULT_COLUMNS, read_csv

# A stand-in for prompt-lab: tells what it was given, and ends as the files around it say.
STUB = """
import json, pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
folder = pathlib.Path(flags.pop("run_dir"))
with open("calls.jsonl", "a") as file:
    print(json.dumps([folder.name, flags]), file=file)
print("hello from", flags["lr"])
if pathlib.Path("hang").exists() and flags["lr"] == "0.2":
    (folder / "checkpoints").mkdir(exist_ok=True)
    (folder / "checkpoints" / "last.ckpt").touch()
    pathlib.Path("hanging").touch()
    time.sleep(60)
if pathlib.Path("broken").exists() and flags["lr"] == "0.2":
    print(*(f"line {n}" for n in range(30)), "out of luck", sep="\\n")
    sys.exit(3)
if pathlib.Path("untested").exists():  # as after a fit without --test_after_fit
    (folder / "prompts").mkdir()
    lines = f"task,sample,init_seed,dev_score,test_score\\nt,13,0,{flags['lr']},\\n"
    (folder / "prompts" / "index.csv").write_text(lines)
    sys.exit()
(folder / "results.csv").write_text(
    "method,variant,task,sample,init_seed,dev,test,prompt_file\\n"
    f"Stub,tuned,t,13,0,{flags['lr']},0.5,prompts/a.safetensors\\n"
    "Stub,chance,t,13,,,0.25,\\n"
)
"""
SWEEP = {
    "command": ["${interpreter}", "stub.py", "fit", "${args}"],
    "method": "grid",
    "parameters": {"lr": {"values": [0.1, 0.2, 0.3]}, "steps": {"value": 5}},
}
IN_PROCESS = """
import sys
from prompt_lab.commands.sweep import sweep_command
sys.exit(sweep_command("s.yaml", "r"))
"""


RATE, SEED, SIZE, TOKENS = (
    f"model.{name}" for name in ("learning_rate", "init_seed", "batch_size", "num_virtual_tokens")
)
TINY = {
    "model": {
        "class_path": "PromptTuning",
        "init_args": {"backbone": {"name": "sandbox"}, "batch_size": 2, "max_new_tokens": 2},
    },
    "data": {"root": "sandbox", "tasks": ["sandbox-sst"]},
    "trainer": {"accelerator": "cpu", "logger": False, "max_steps": 8, "val_check_interval": 8},
}
COMMAND = ["prompt-lab", "fit", "--config=tiny.yaml", "--test_after_fit=true", "${args}"]


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stub.py").write_text(STUB)
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))


def write(**changes: Any) -> str:
    """The sweep file with other keys; a key that is None is left out."""
    content = {key: value for key, value in (SWEEP | changes).items() if value is not None}
    Path("s.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return "s.yaml"


def trials(seed: int = 0, **changes: Any) -> list[Any]:
    return make_trials(read_sweep(Path(write(**changes))), seed)


def calls() -> list[tuple[str, dict[str, str]]]:
    """What the stub was given since the last question: folder and flags."""
    path = Path("calls.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [tuple(json.loads(line)) for line in lines]


def wait_for(path: str, process: subprocess.Popen[Any]) -> None:
    for _ in range(1200):
        if list(Path().glob(path)):
            return
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError(f"no {path}")


def sweep_when_free() -> int:
    """Run the sweep once the killed trial has let its folder go."""
    for _ in range(100):
        try:
            return sweep_command("s.yaml", "r")
        except ValueError:
            time.sleep(0.05)
    raise AssertionError("still in use")


# ---- the words of a trial ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"command": None, "program": "train.py"},
        {"command": ["${env}", "prompt-lab", "fit", "--config", "a b.yaml", "${args}", 7]},
        {
            "parameters": {
                "model": {"value": "PromptTuning"},
                "model.optim": {
                    "parameters": {"name": {"value": "adamw"}, "clip": {"values": [1.0, None]}}
                },
                "data.tasks": {"values": [["a", "b c"], ["; rm -rf x"]]},
                "flag": {"values": [True, False]},
            }
        },
    ],
    ids=["plain", "default command", "prompt-lab", "nested"],
)
def test_a_trial_has_the_words_that_a_wandb_agent_would_give_it(changes):
    """Reference: wandb's functions, and the agent's way to fill in macros."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    content = yaml.safe_load(Path(write(**changes)).read_text())
    for trial in trials(**changes):
        given = {}
        for name, value in trial.settings.items():
            level, path = given, [name]
            if name.startswith("model.optim."):
                level, path = given.setdefault("model.optim", {"value": {}}), ["value", name[12:]]
            for key in path[:-1]:
                level = level[key]
            level[path[-1]] = value if len(path) > 1 else {"value": value}
        filled = utils.create_sweep_command_args({"args": given})
        filled |= {"env": [], "interpreter": [sys.executable]}
        filled["program"] = [content.get("program")]
        wanted = []
        for word in map(str, utils.create_sweep_command(copy.deepcopy(content.get("command")))):
            macro = word.startswith("${") and word.endswith("}")
            wanted += filled[word[2:-1]] if macro else [word]
        assert list(trial.words) == wanted


def test_a_grid_has_all_combinations_and_the_last_name_varies_fastest():
    """Reference: itertools over the names in sorted order."""
    parameters = {"c": {"values": [1, 2]}, "b": {"value": 0}, "a": {"values": ["x", "y", "z"]}}
    found = trials(parameters=parameters)
    assert [trial.number for trial in found] == list(range(1, 7))
    wanted = itertools.product(["x", "y", "z"], [0], [1, 2])
    assert [tuple(trial.settings.values()) for trial in found] == list(wanted)
    assert list(found[0].settings) == ["a", "b", "c"]
    assert len(trials(parameters=parameters, run_cap=4)) == 4


# ---- random draws --------------------------------------------------------------------------------

RANDOM = {
    "method": "random",
    "run_cap": 40,
    "parameters": {
        "lr": {"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0},
        "n": {"min": 1, "max": 3},
        "w": {"min": 0.0, "max": 1},
        "k": {"parameters": {"v": {"values": ["a", "b"], "probabilities": [0.25, 0.75]}}},
    },
}


@pytest.mark.parametrize(
    ("given", "reference"),
    [
        ({"distribution": "uniform", "min": -1, "max": 3}, scipy.stats.uniform(-1, 4)),
        ({"distribution": "int_uniform", "min": -1, "max": 3}, scipy.stats.randint(-1, 4)),
        (
            {"distribution": "log_uniform_values", "min": 0.01, "max": 10},
            scipy.stats.loguniform(0.01, 10),
        ),
    ],
    ids=lambda value: value["distribution"] if isinstance(value, dict) else "",
)
def test_draws_are_the_inverse_of_the_distribution_function(given, reference):
    """Reference: SciPy."""
    parameter = Parameter(("x",), given["distribution"], given)
    for u in np.linspace(0.001, 0.999, 37):
        assert draw(parameter, float(u)) == pytest.approx(reference.ppf(u))


def test_quantised_draws_and_shares():
    """Reference: NumPy's rounding of the draw without q; counts."""
    for kind, q in itertools.product(("uniform", "log_uniform_values"), (0.25, 2)):
        plain = Parameter(("x",), kind, {"min": 1, "max": 9})
        coarse = Parameter(("x",), f"q_{kind}", {"min": 1, "max": 9, "q": q})
        for u in np.linspace(0, 0.999, 20):
            found = draw(coarse, float(u))
            assert found == np.round(draw(plain, float(u)) / q) * q
            assert isinstance(found, int) == (q == 2)
    given = {"values": ["a", "b", "c"], "probabilities": [0.2, 0.0, 0.8]}
    parameter = Parameter(("x",), "categorical_w_probabilities", given)
    count = Counter(draw(parameter, u) for u in (np.arange(100) + 0.5) / 100)
    assert count == {"a": 20, "c": 80}


def test_draws_depend_on_seed_and_number_only_and_equal_ones_are_one_trial():
    """Reference: a shorter sweep, one with a parameter more, and one of another seed."""
    twice = trials(method="random", run_cap=30, parameters={"a": {"values": [1, 2]}})
    assert sorted(trial.settings["a"] for trial in twice) == [1, 2]
    found = trials(**RANDOM)
    assert trials(**{**RANDOM, "run_cap": 10}) == found[:10]
    more = RANDOM["parameters"] | {"z": {"min": 0.0, "max": 1.0}}
    wider = trials(**{**RANDOM, "parameters": more})
    assert [t.settings["lr"] for t in wider] == [t.settings["lr"] for t in found]
    other = trials(seed=1, **RANDOM)
    assert not {t.settings["lr"] for t in other} & {t.settings["lr"] for t in found}
    assert {t.settings["n"] for t in found} == {1, 2, 3}
    assert all(isinstance(t.settings["w"], float) for t in found)
    assert {t.settings["k.v"] for t in found} == {"a", "b"}


# ---- what is refused -----------------------------------------------------------------------------


def one(**given: Any) -> dict[str, Any]:
    return {"parameters": {"x": given}}


def drawn(**given: Any) -> dict[str, Any]:
    return {"method": "random", "run_cap": 1, **one(**given)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"method": "bayes"}, "method bayes needs the service: use wandb sweep and wandb agent"),
        ({"method": None}, "method is None; allowed here: grid, random"),
        ({"progam": "x"}, "unknown key progam; known: name, program, command"),
        ({"method": "random"}, "method random never ends by itself: give run_cap"),
        ({"run_cap": 0}, "run_cap is 0: give a whole number, at least 1"),
        ({"metric": "val"}, "metric is 'val': give a mapping with name and goal"),
        ({"parameters": None}, "parameters is None: give a mapping"),
        ({"parameters": {"x": 3}}, "parameters.x is 3: write value: or values:"),
        ({"parameters": {"x y": {"value": 1}}}, "'x y' is no name of a setting"),
        ({"parameters": {"run_dir": {"value": 1}}}, "run_dir is set for each trial"),
        (one(parameters={"y": {}}), "parameters.x.y: distribution uniform lacks min"),
        (one(parameters={"y": {"value": 1}}, value=3), "beside nested parameters nothing else"),
        (one(values=[]), "values is []: give a list"),
        (one(value=1, vaules=[1]), "distribution constant has no vaules; its keys: value"),
        (one(min=1, max=3), "a grid needs a list of values, not int_uniform"),
        (drawn(values=[1, 2], probabilities=[1]), "probabilities is [1]: give 2 numbers from 0"),
        (drawn(values=[1, 2], probabilities=[0.5, 0.6]), "is [0.5, 0.6]: give 2 numbers from 0"),
        (drawn(distribution="normal", mu=0), "distribution normal is not among those"),
        (drawn(distribution="uniform", min="1e-3", max=1), "min is '1e-3': give a number (YAML"),
        (drawn(min=3, max=1), "min 3 is above max 1"),
        (drawn(distribution="log_uniform_values", min=0, max=1), "needs numbers above 0"),
        (drawn(distribution="int_uniform", min=0, max=1.5), "max is 1.5: give a whole number"),
        (drawn(distribution="q_uniform", min=0, max=1, q=0), "q is 0: give a number above 0"),
        ({"command": "prompt-lab fit"}, "command is 'prompt-lab fit': give a list of words"),
        ({"command": ["prompt-lab", "fit"]}, "the command has no ${args}"),
        ({"command": ["${env}", "${args}"]}, "the command has no program"),
        ({"command": ["a", "--x=${envvar:HOME}", "${args}"]}, "--x=${envvar:HOME} in the command"),
        ({"command": ["a", "--run_dir", "x", "${args}"]}, "the sweep sets --run_dir"),
        ({"command": None}, "program is None, and the command needs it"),
        ({"command": ["no-such-program", "${args}"]}, "no program 'no-such-program'"),
    ],
    ids=lambda value: "" if isinstance(value, dict) else value[:40],
)
def test_what_cannot_be_run_here_is_refused_in_one_line(changes, sentence):
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the sentence is compared below
        sweep_command(write(**changes))
    assert sentence in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_file_that_is_none_is_refused_in_one_line():
    with pytest.raises(FileNotFoundError, match=r"no sweep file none\.yaml"):
        sweep_command("none.yaml")
    for text, sentence in (("a: [", "is not YAML"), ("- a", "holds no keys")):
        Path("s.yaml").write_text(text)
        with pytest.raises(ValueError, match=sentence) as refused:
            sweep_command("s.yaml")
        assert "\n" not in str(refused.value)


# ---- running, with a stub ------------------------------------------------------------------------


def test_trials_run_in_their_folders_and_their_results_are_joined(capsys):
    file = write(metric={"name": "best/val_score", "goal": "maximize"}, project="p", entity="e")
    assert sweep_command(file) == 0
    out = capsys.readouterr().out
    assert "3 trials (grid) in runs/s, 0 done before" in out
    assert "metric for the service: best/val_score (maximize)" in out
    assert "without effect here: project, entity" in out
    assert "2/3  lr=0.2  done  0 s  dev 0.200  test 0.500\n" in out
    found = trials()
    names = [f"{trial.number}-{trial.digest}" for trial in found]
    assert calls() == [
        (name, {"lr": lr, "steps": "5"})
        for name, lr in zip(names, ("0.1", "0.2", "0.3"), strict=True)
    ]
    assert "hello from 0.1" in Path("runs/s", names[0], "log.txt").read_text()

    table = read_csv(Path("runs/s/sweep.csv"))
    assert list(table[0]) == ["trial", "lr", "dev", "test", "state", "seconds", "folder"]
    assert [row["folder"] for row in table] == names
    assert [row["dev"] for row in table] == ["0.1", "0.2", "0.3"]
    assert {row["state"] for row in table} == {"done"}
    rows = read_csv(Path("runs/s/results.csv"))
    assert list(rows[0]) == list(RESULT_COLUMNS)
    assert [row["variant"] for row in rows] == ["tuned", "chance"] * 3
    assert rows[2]["prompt_file"] == f"{names[1]}/prompts/a.safetensors"
    assert rows[3]["prompt_file"] == ""


def test_what_is_done_is_skipped_and_what_is_new_runs(capsys):
    sweep_command(write())
    before = {path: path.read_bytes() for path in Path("runs/s").glob("*/*")}
    before |= {path: path.read_bytes() for path in Path("runs/s").glob("*.csv")}
    assert len(calls()) == 3
    assert sweep_command(write()) == 0
    assert calls() == []
    assert {path: path.read_bytes() for path in before} == before
    assert capsys.readouterr().out.count("(before)") == 3

    more = {"lr": {"values": [0.05, 0.1, 0.2]}, "steps": {"value": 5}}
    assert sweep_command(write(parameters=more)) == 0
    assert [flags["lr"] for _, flags in calls()] == ["0.05"]  # 0.1 and 0.2 had other numbers
    assert [row["lr"] for row in read_csv(Path("runs/s/sweep.csv"))] == ["0.05", "0.1", "0.2"]


def test_a_failed_trial_stops_no_other_and_runs_again_from_its_start(capsys):
    Path("broken").touch()
    assert sweep_command(write(), run_dir="r") == 1
    out = capsys.readouterr().out
    assert "2/3  lr=0.2  failed" in out
    assert "ended with status 3; its last lines in r/2-" in out
    assert "    line 21\n" in out
    assert "    line 20\n" not in out
    assert "    out of luck\n" in out
    assert "2 of 3 trials done" in out
    states = [row["state"] for row in read_csv(Path("r/sweep.csv"))]
    assert states == ["done", "failed", "done"]
    assert len(read_csv(Path("r/results.csv"))) == 4
    (folder,) = Path("r").glob("2-*")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    calls()

    Path("broken").unlink()
    assert sweep_command(write(), run_dir="r") == 0
    assert calls() == [(folder.name, {"lr": "0.2", "steps": "5", "overwrite": "true"})]
    assert len(read_csv(Path("r/results.csv"))) == 6


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_trial_and_the_next_sweep_resumes_it(number):
    Path("hang").touch()
    write()
    words = [sys.executable, "-c", IN_PROCESS]
    process = subprocess.Popen(
        words,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # "pytest &" ignores it
    )
    wait_for("hanging", process)
    with pytest.raises(ValueError, match="r is in use by another sweep, or by a trial") as refused:
        sweep_command("s.yaml", "r")
    trial = int(str(refused.value).split("(process ")[1].split(")")[0])
    process.send_signal(number)
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "stopped: the same command goes on from here" in out
    with pytest.raises(ProcessLookupError):
        os.kill(trial, 0)
    states = [row["state"] for row in read_csv(Path("r/sweep.csv"))]
    assert states == ["done", "interrupted", "not run"]
    calls()

    Path("hang").unlink()
    assert sweep_command("s.yaml", "r") == 0
    flags = [flags for _, flags in calls()]
    assert flags == [{"lr": "0.2", "steps": "5", "resume": "true"}, {"lr": "0.3", "steps": "5"}]


def test_a_trial_that_outlives_its_sweep_keeps_the_folder_and_is_resumed_when_killed():
    Path("hang").touch()
    write()
    process = subprocess.Popen([sys.executable, "-c", IN_PROCESS], stdout=subprocess.DEVNULL)
    wait_for("hanging", process)
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="in use") as refused:
        sweep_command("s.yaml", "r")
    os.kill(int(str(refused.value).split("(process ")[1].split(")")[0]), signal.SIGKILL)
    Path("hang").unlink()
    calls()
    assert sweep_when_free() == 0
    assert [flags.get("resume") for _, flags in calls()] == ["true", None]


def test_a_dry_run_prints_the_commands_and_writes_nothing(capsys):
    command = ["${env}", "prompt-lab", "fit", "--config", "a b.yaml", "${args}"]
    found = trials(command=command)
    before = sorted(Path().rglob("*"))
    assert main(["sweep", "s.yaml", "--dry_run", "true", "--run_cap", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        f"prompt-lab fit --config 'a b.yaml' --lr={lr} --steps=5 --run_dir=runs/s/{n}-{t.digest}"
        for n, lr, t in zip((1, 2), (0.1, 0.2), found[:2], strict=True)
    ]
    assert sorted(Path().rglob("*")) == before


def test_the_score_of_a_trial_is_the_mean_of_its_best_runs_on_dev():
    """Reference: by hand. Two tasks; of the first, the run with dev 0.6 counts."""
    lines = [
        "variant,task,sample,init_seed,dev,test",
        "tuned,a,13,0,0.5,0.9",
        "tuned,a,13,0,0.6,0.1",
    ]
    lines += ["tuned,b,13,0,0.8,0.3", "majority,a,13,,,1.0", "no_prompt,a,13,,,0.7"]
    Path("results.csv").write_text("\n".join(lines))
    assert read_scores(Path()) == (pytest.approx(0.7), pytest.approx(0.2))


def test_fits_without_a_test_show_dev_and_say_how_to_get_results(capsys):
    Path("untested").touch()
    assert sweep_command(write(), "r") == 0
    out = capsys.readouterr().out
    assert "2/3  lr=0.2  done  0 s  dev 0.200\n" in out
    assert "no trial wrote results.csv: a fit does with --test_after_fit=true" in out
    assert [row["test"] for row in read_csv(Path("r/sweep.csv"))] == ["", "", ""]
    assert not Path("r/results.csv").exists()


# ---- banks ---------------------------------------------------------------------------------------


def planned(values: dict[str, list[Any]], **changes: Any) -> list[Any]:
    """The fits of a grid of these values."""
    parameters = {name: {"values": list(given)} for name, given in values.items()}
    content = {"command": COMMAND, "parameters": parameters}
    sweep = read_sweep(Path(write(**content | changes)))
    return plan_fits(sweep, make_trials(sweep), Path("r"))


def test_a_grid_is_one_bank_for_each_setting_of_the_rest():
    lists = {RATE: [0.1, 0.3], SIZE: [4, 8]}
    found = planned(lists | {TOKENS: [5, 6]})
    assert [fit.whole.settings for fit in found] == [lists | {TOKENS: n} for n in (5, 6)]
    assert [len(fit.trials) for fit in found] == [4, 4]


def test_lists_are_joined_unless_they_share_a_value():
    found = planned({"data.tasks": [["sandbox-sst"], ["sandbox-has-food", "sandbox-day"]]})
    (fit,) = found
    assert fit.whole.settings["data.tasks"] == ["sandbox-sst", "sandbox-has-food", "sandbox-day"]
    assert [len(fit.runs[trial.digest]) for trial in fit.trials] == [1, 2]
    assert len(planned({RATE: [[0.1, 0.2], [0.2, 0.3], 0.4]})) == 3


# ---- where it is the same ------------------------------------------------------------------------


BANKS: list[Any] = [
    {"command": ["${env}", "${interpreter}", "-m", "prompt_lab", *COMMAND[1:]]},
    {"command": [*COMMAND, "--model=PromptTuning", "--trainer.callbacks=null"]},
    {"command": [*COMMAND, "--model.subspace.path=maps/8.safetensors", "--trainer.devices=2"]},
    {"parameters": {"model": {"parameters": {"learning_rate": {"values": [0.3, "1e-1"]}}}}},
    {"parameters": {"model.init_args.learning_rate": {"values": [1, 0.1]}}},
    {"parameters": {"data.samples": {"values": [[13], [21, 42]]}}},
    {"parameters": {RATE: {"values": [0.3, 0.1]}, "model.init.source_tasks": {"value": None}}},
    {"parameters": {"data.tasks": {"values": [["sandbox/counting/target"], ["sandbox-sst"]]}}},
]
ALONE: list[Any] = [
    {"command": ["env", *COMMAND]},  # a program of its own
    {"command": ["prompt-lab", "validate", *COMMAND[2:]]},
    {"command": [*COMMAND, "--config=other.yaml"]},  # another method
    {"command": [*COMMAND, "--model.learning_rate=0.5"]},
    {"command": [*COMMAND, "--trainer.callbacks+=LearningRateMonitor"]},
    {"command": [*COMMAND, "--trainer.max_time=00:01:00:00"]},
    {"command": [*COMMAND, "--no_such_setting=1"]},
    {"parameters": {RATE: {"values": [0.1, 0.10000001]}}},  # one name for both
    {"parameters": {RATE: {"values": [0.1, -0.1]}}},
    {"parameters": {RATE: {"values": [0.1, "high"]}}},
    {"parameters": {RATE: {"values": [0.1, [0.1, 0.3]]}}},
    {"parameters": {"data.shots": {"values": [4, 8]}}},
    {"parameters": {"data.tasks": {"values": ["sandbox-sst", "sandbox-day"]}}},  # no lists
]


@pytest.mark.parametrize("changes", BANKS, ids=str)
def test_a_bank_is_trained_where_the_parser_says_that_it_is_the_same(changes):
    (fit,) = planned({RATE: [0.3, 0.1]}, **changes)
    assert len(fit.trials) == 2
    names = [set(fit.runs[trial.digest]) for trial in fit.trials]
    assert all(names)
    assert not set.intersection(*names)


@pytest.mark.parametrize("changes", ALONE, ids=str)
def test_trials_are_alone_where_a_bank_might_differ(changes, capfd):
    other = {"class_path": "FineTuning", "init_args": {"learning_rate": 0.1}}
    Path("other.yaml").write_text(yaml.safe_dump({"model": other}))
    found = planned({RATE: [0.3, 0.1]}, **changes)
    assert [fit.runs for fit in found] == [None, None]
    assert [fit.whole for fit in found] == [fit.trials[0] for fit in found]
    assert capfd.readouterr() == ("", "")


# ---- the same scores -----------------------------------------------------------------------------


def test_a_bank_has_the_scores_and_prompts_of_its_trials_alone():
    """Reference: the fit of a trial. Rates are far apart, so that runs are told apart."""
    lists = {SEED: [0, 1], RATE: [[3.0, 0.03], 0.3], TOKENS: [4]}
    (fit,) = planned(lists)
    assert len(fit.trials) == 4
    assert cli.run([*fit.whole.words[1:], "--run_dir=bank"]) == 0
    seen = set()
    for trial in fit.trials[::3]:  # two that differ in both
        assert cli.run([*trial.words[1:], "--run_dir=alone", "--overwrite"]) == 0
        names = fit.runs[trial.digest]
        assert sorted(path.stem for path in Path("alone/prompts").glob("*.safetensors")) == (
            sorted(names)
        )
        for name in names:
            own, same = (
                load_prompt(Path(folder, "prompts", f"{name}.safetensors"))
                for folder in ("bank", "alone")
            )
            assert own.init.equal(same.init)
            assert torch.allclose(own.prompt, same.prompt, atol=1e-2)
            assert not own.prompt.equal(own.init)
        scores = read_scores(Path("bank"), names)
        assert scores == read_scores(Path("alone"))
        Path("bank/results.csv").rename("kept.csv")  # then the prompt store tells the scores
        assert read_scores(Path("bank"), names) == scores
        Path("kept.csv").rename("bank/results.csv")
        seen.add(scores)
    assert len(seen) > 1
    assert len(read_csv(Path("bank/results.csv"))) == 6


# A stand-in for a fit: a line of results for each run, whose scores tell rate and seed.
BANK_STUB = """
import json, pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
folder = pathlib.Path(flags.pop("run_dir"))
with open("calls.jsonl", "a") as file:
    print(json.dumps([folder.name, flags]), file=file)
rates, seeds = (json.loads(flags[f"model.{name}"]) for name in ("learning_rate", "init_seed"))
pairs = [
    (rate, seed)
    for rate in (rates if isinstance(rates, list) else [rates])
    for seed in (seeds if isinstance(seeds, list) else [seeds])
]
if pathlib.Path("broken").exists() and flags["steps"] == "6":
    sys.exit(3)
lines = ["method,variant,task,sample,init_seed,dev,test,prompt_file"]
lines += [f"Stub,tuned,t,13,{s},{r},{s},prompts/lr{r}_s{s}.safetensors" for r, s in pairs]
(folder / "results.csv").write_text("\\n".join(lines) + "\\n")
"""


def flags_of_calls() -> list[dict[str, str]]:
    return [flags for _, flags in calls()]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub, of which banks are taken to be the same as their trials."""
    Path("stub.py").write_text(BANK_STUB)

    def names(whole: Trial, members: list[Trial]) -> dict[str, list[str]]:
        return {t.digest: [f"lr{t.settings[RATE]}_s{t.settings[SEED]}"] for t in members}

    monkeypatch.setattr("prompt_lab.commands.sweep.runs_of_trials", names)


def swept(rates: list[float], seeds: list[int], *steps: int) -> int:
    """Run the sweep; every trial that is done has its own scores, whatever its fit."""
    given = {RATE: rates, SEED: seeds, "steps": list(steps)}
    parameters = {name: {"values": values} for name, values in given.items()}
    status = sweep_command(write(parameters=parameters), "r")
    table = read_csv(Path("r/sweep.csv"))
    assert len(table) == len(rates) * len(seeds) * len(steps)
    assert [int(row["trial"]) for row in table] == list(range(1, len(table) + 1))
    for row in table:
        scores = [float(row[name] or "nan") for name in ("dev", "test")]
        wanted = [float(row.get(RATE, rates[0])), float(row.get(SEED, seeds[0]))]
        assert row["state"] != "done" or scores == wanted
    return status


def test_trials_of_banks_have_a_line_each_and_done_banks_are_kept(stub, capsys):
    assert swept([0.1, 0.3], [0, 1], 5, 6) == 0
    out = capsys.readouterr().out
    assert "sweep s: 8 trials (grid) in 2 fits in r, 0 done before\n" in out
    assert (
        "1/2  model.init_seed=[0, 1] model.learning_rate=[0.1, 0.3] steps=5  done  0 s  4 t" in out
    )
    assert flags_of_calls() == [
        {SEED: "[0, 1]", RATE: "[0.1, 0.3]", "steps": n} for n in ("5", "6")
    ]
    table = read_csv(Path("r/sweep.csv"))
    assert Counter(row["folder"] for row in table).most_common() == [
        (path.name, 4) for path in sorted(Path("r").glob("[12]-*"))
    ]
    assert len(read_csv(Path("r/results.csv"))) == 8

    assert swept([0.1, 0.3], [0, 1], 5, 6) == 0
    assert flags_of_calls() == []
    assert "8 done before" in capsys.readouterr().out
    assert swept([1.0, 0.3, 0.1], [0, 1], 5, 6) == 0  # the new rate alone
    assert flags_of_calls() == [{SEED: "[0, 1]", RATE: "1.0", "steps": n} for n in ("5", "6")]
    assert "12 trials (grid) in 4 fits in r, 8 done before" in capsys.readouterr().out
    assert swept([0.1, 1.0], [0, 1], 5) == 0  # a bank with a trial too many is not used
    assert flags_of_calls() == [{SEED: "[0, 1]", RATE: "0.1", "steps": "5"}]


def test_the_trials_of_a_bank_that_failed_are_run_alone_and_an_interrupted_one_is_resumed(stub):
    Path("broken").touch()
    assert swept([0.1, 0.3], [0, 1], 5, 6) == 1
    states = Counter(row["state"] for row in read_csv(Path("r/sweep.csv")))
    assert states == {"done": 4, "failed": 4}
    Path("broken").unlink()
    flags_of_calls()
    assert swept([0.3, 0.1], [1, 0], 5, 6) == 0
    alone = sorted((flags[SEED], flags[RATE], flags["steps"]) for flags in flags_of_calls())
    assert alone == [(seed, rate, "6") for seed in "01" for rate in ("0.1", "0.3")]
    assert swept([0.3, 0.1], [1, 0], 5, 6) == 0
    assert flags_of_calls() == []

    (folder,) = (path.parent for path in Path("r").glob("*/trial.json") if "=5" in path.read_text())
    (folder / "trial.json").unlink()  # as killed after a checkpoint
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    assert swept([0.1, 0.3, 0.5], [0, 1], 5) == 0
    assert sorted(flags_of_calls(), key=len) == [
        {SEED: "[0, 1]", RATE: "0.5", "steps": "5"},
        {SEED: "[0, 1]", RATE: "[0.1, 0.3]", "steps": "5", "resume": "true"},
    ]


def test_a_damaged_list_of_a_bank_is_told_and_can_be_deleted(stub):
    assert swept([0.1, 0.3], [0, 1], 5) == 0
    (path,) = Path("r").glob("*/bank.json")
    flags_of_calls()
    for content in ("{", "[]", '{"runs": {"a": 1}}', '{"runs": 3}', '{"runs": {}}'):
        path.write_text(content)
        if content == '{"runs": {}}':  # of no trial
            break
        with pytest.raises(ValueError, match=r"bank\.json is damaged .*: delete it") as refused:
            sweep_command("s.yaml", "r")
        assert "\n" not in str(refused.value)
    path.unlink()
    assert swept([0.1, 0.3], [0, 1], 5) == 0
    assert flags_of_calls() == []


# ---- the real command ----------------------------------------------------------------------------


def test_a_grid_of_real_fits_is_killed_in_the_second_and_resumed(capsys):
    """Two banks on the sandbox: one is never touched again, the other goes on from its step."""
    settings = TINY | {"trainer": {"accelerator": "cpu", "logger": False, "max_steps": 40}}
    Path("tiny.yaml").write_text(yaml.safe_dump(settings))
    parameters = {
        "model.learning_rate": {"values": [0.3, 0.1]},
        "model.num_virtual_tokens": {"values": [4, 5]},
        "trainer": {"parameters": {"val_check_interval": {"value": 20}}},
    }
    file = write(command=COMMAND, parameters=parameters)
    process = subprocess.Popen([sys.executable, "-c", IN_PROCESS], stdout=subprocess.DEVNULL)
    wait_for("r/2-*/checkpoints/last.ckpt", process)
    trial = int(Path("r/.lock").read_text())
    process.kill()
    os.killpg(trial, signal.SIGKILL)
    process.wait()
    trials = make_trials(read_sweep(Path(file)))
    fits = plan_fits(read_sweep(Path(file)), trials, Path("r"))
    first, second = (trial_folder(Path("r"), fit.whole) for fit in fits)
    assert not (second / "trial.json").exists()
    before = {path: path.read_bytes() for path in first.rglob("*") if path.is_file()}

    assert sweep_when_free() == 0
    out = capsys.readouterr().out
    assert "4 trials (grid) in 2 fits in r, 2 done before" in out
    assert "4 of 4 trials done" in out
    assert {path: path.read_bytes() for path in first.rglob("*") if path.is_file()} == before
    started, again = (second / "log.txt").read_text().split("$ prompt-lab fit")[1:]
    assert "step     20/40" in started
    assert "step     40/40" not in started
    assert "Restored all states from the checkpoint at r/2-" in again
    assert "step     20/40" not in again
    steps = [row["step"] for row in read_csv(second / "curves.csv")]
    assert steps == [str(step) for step in (20, 40) for _ in range(2)]
    table, results = (read_csv(Path("r", name)) for name in ("sweep.csv", "results.csv"))
    names = ("num_virtual_tokens", "learning_rate")
    lines = {tuple(line[name] for name in names): line for line in results}
    assert len(lines) == len(results) == len(table) == 4
    for row in table:
        line = lines[tuple(row[f"model.{name}"] for name in names)]
        assert (row["dev"], row["test"]) == (line["dev"], line["test"])
        assert row["folder"] == Path(line["prompt_file"]).parts[0]
        assert Path("r", line["prompt_file"]).is_file()
