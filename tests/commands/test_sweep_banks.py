"""Banks of a sweep: which trials are one fit, that it gives the same, and how it goes on."""

from __future__ import annotations

import json
import sys
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import CONFIGS

from prompt_lab import load_prompt
from prompt_lab.commands import cli
from prompt_lab.commands.sweep import _parsed, plan_fits, read_scores, sweep_command
from prompt_lab.commands.sweep_trials import Trial, make_trials, read_sweep
from prompt_lab.files.results import read_csv

SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))
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
    Path("tiny.yaml").write_text(yaml.safe_dump(TINY))


def write(values: dict[str, list[Any]], **changes: Any) -> Path:
    """A sweep file: the values of its parameters, and other keys."""
    parameters = {name: {"values": list(given)} for name, given in values.items()}
    content = {"command": COMMAND, "method": "grid", "parameters": parameters}
    Path("s.yaml").write_text(yaml.safe_dump(content | changes))
    return Path("s.yaml")


def planned(values: dict[str, list[Any]], **changes: Any) -> list[Any]:
    sweep = read_sweep(write(values, **changes))
    return plan_fits(sweep, make_trials(sweep), Path("r"))


def values(trial: Trial, *names: str) -> list[Any]:
    return [trial.settings[name] for name in names]


# ---- full products -------------------------------------------------------------------------------


def test_a_grid_is_one_bank_for_each_setting_of_the_rest():
    lists = {RATE: [0.1, 0.3], SEED: [0, 1, 2], SIZE: [4, 8]}
    found = planned(lists | {TOKENS: [5, 6]})
    assert [fit.whole.settings for fit in found] == [lists | {TOKENS: n} for n in (5, 6)]
    assert [len(fit.trials) for fit in found] == [12, 12]


@pytest.mark.parametrize("cap", [7, 20, 60])
def test_draws_are_banks_where_they_are_full_products(cap):
    """Reference: itertools; each trial is in one fit, and a bank is the product of its lists."""
    parameters = {name: {"values": [2, 4]} for name in (SIZE, SEED)} | {
        RATE: {"values": [0.1, 0.2]},
        TOKENS: {"values": [5, 6]},
    }
    names = (RATE, SEED, SIZE)
    found = planned({}, method="random", run_cap=cap, parameters=parameters)
    numbers = [trial.number for fit in found for trial in fit.trials]
    assert len(set(numbers)) == len(numbers)
    for tokens in (5, 6):
        fits = [fit for fit in found if fit.whole.settings[TOKENS] == tokens]
        drawn = {tuple(values(t, *names)) for fit in fits for t in fit.trials}
        lists = [sorted({value[n] for value in drawn}) for n in range(3)]
        is_full = drawn == set(product(*lists)) and len(drawn) > 1
        assert [len(fit.trials) for fit in fits] == ([len(drawn)] if is_full else [1] * len(drawn))
    assert (len(found) == 2) == (cap == 60)


def test_lists_are_joined_unless_they_share_a_value():
    found = planned({"data.tasks": [["sandbox-sst"], ["sandbox-has-food", "sandbox-day"]]})
    (fit,) = found
    assert fit.whole.settings["data.tasks"] == ["sandbox-sst", "sandbox-has-food", "sandbox-day"]
    assert [len(fit.runs[trial.digest]) for trial in fit.trials] == [1, 2]
    assert len(planned({RATE: [[0.1, 0.2], [0.2, 0.3], 0.4]})) == 3


# ---- where it is the same ------------------------------------------------------------------------

BANKS: list[Any] = [
    {},
    {"command": [sys.executable, "-m", "prompt_lab", *COMMAND[1:]]},
    {"command": ["${env}", "${interpreter}", "-m", "prompt_lab", *COMMAND[1:]]},
    {"command": [*COMMAND, "--model=PromptTuning", "--trainer.callbacks=null"]},
    {"command": [*COMMAND, "--model.subspace.path=maps/8.safetensors", "--trainer.devices=2"]},
    {"command": [*COMMAND, "--trainer.logger=WandbLogger", "--model.save_steps=[8]"]},
    {"parameters": {"model": {"parameters": {"learning_rate": {"values": [0.3, "1e-1"]}}}}},
    {"parameters": {"model.init_args.learning_rate": {"values": [1, 0.1]}}},
    {"parameters": {"data.samples": {"values": [[13], [21, 42]]}}},
    {"parameters": {RATE: {"values": [0.3, 0.1]}, "model.init.source_tasks": {"value": None}}},
    {"parameters": {"data.tasks": {"values": [["sandbox/counting/target"], ["sandbox-sst"]]}}},
]
ALONE: list[Any] = [
    {"command": ["env", *COMMAND]},  # a program of its own
    {"command": ["prompt-lab", "validate", *COMMAND[2:]]},
    {"command": [*COMMAND, "--model=MetaPrompt"]},
    {"command": [*COMMAND, "--config=other.yaml"]},
    {"command": [*COMMAND, "--model.learning_rate=0.5"]},
    {"command": [*COMMAND, "--trainer.callbacks+=LearningRateMonitor"]},
    {"command": [*COMMAND, "--trainer.max_time=00:01:00:00"]},
    {"command": [*COMMAND, "--trainer.limit_test_batches=1"]},
    {"command": [*COMMAND, "--no_such_setting=1"]},
    {"parameters": {RATE: {"values": [0.1, 0.10000001]}}},  # one name for both
    {"parameters": {RATE: {"values": [0.1, -0.1]}}},
    {"parameters": {RATE: {"values": [1, 1.0]}}},
    {"parameters": {RATE: {"values": [0.1, "high"]}}},
    {"parameters": {RATE: {"values": [0.1, [0.1, 0.3]]}}},
    {"parameters": {"data.shots": {"values": [4, 8]}}},
    {"parameters": {"data.tasks": {"values": ["sandbox-sst", "sandbox-day"]}}},  # no lists
    {
        "parameters": {
            "data.tasks": {"values": [["sandbox/counting/target"], ["sandbox-count-food"]]}
        }
    },
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


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_fits_of_a_shipped_sweep_are_parsed_to_their_settings(path, tmp_path, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    content = yaml.safe_load(path.read_text())
    if content["method"] == "bayes":
        return
    sweep = read_sweep(path)
    trials = make_trials(sweep)
    fits = plan_fits(sweep, trials, tmp_path)
    assert sorted(trial.number for fit in fits for trial in fit.trials) == [
        trial.number for trial in trials
    ]
    is_bank = path.stem == "prompt_tuning_sandbox_bank"
    assert len(fits) == (2 if is_bank else len(trials))
    for fit in fits if is_bank else ():
        arguments = _parsed(fit.whole.words).model.init_args
        assert {name: arguments[name[len("model.") :]] for name in fit.whole.settings} == (
            fit.whole.settings
        )
        assert len(fit.trials) == 9
        assert {len(fit.runs[trial.digest]) for trial in fit.trials} == {3}


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


# ---- how a sweep goes on, with a stub ------------------------------------------------------------

# A stand-in for a fit: a line of results for each run, whose scores tell rate and seed.
STUB = """
import json, pathlib, sys, time
flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--"))
folder = pathlib.Path(flags.pop("run_dir"))
with open("calls.jsonl", "a") as file:
    print(json.dumps(flags), file=file)
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
STUBBED = ["${interpreter}", "stub.py", "fit", "${args}"]


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub, of which banks are taken to be the same as their trials."""
    Path("stub.py").write_text(STUB)

    def names(whole: Trial, members: list[Trial]) -> dict[str, list[str]]:
        return {t.digest: ["lr{}_s{}".format(*values(t, RATE, SEED))] for t in members}

    monkeypatch.setattr("prompt_lab.commands.sweep.runs_of_trials", names)


def calls() -> list[dict[str, str]]:
    """What the stub was given since the last question."""
    path = Path("calls.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


def swept(rates: list[float], seeds: list[int], *steps: int) -> int:
    """Run the sweep; every trial that is done has its own scores, whatever its fit."""
    parameters = {RATE: rates, SEED: seeds, "steps": list(steps)}
    status = sweep_command(str(write(parameters, command=STUBBED)), "r")
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
    assert calls() == [{SEED: "[0, 1]", RATE: "[0.1, 0.3]", "steps": n} for n in ("5", "6")]
    table = read_csv(Path("r/sweep.csv"))
    assert Counter(row["folder"] for row in table).most_common() == [
        (path.name, 4) for path in sorted(Path("r").glob("[12]-*"))
    ]
    assert len(read_csv(Path("r/results.csv"))) == 8

    assert swept([0.1, 0.3], [0, 1], 5, 6) == 0
    assert calls() == []
    assert "8 done before" in capsys.readouterr().out
    assert swept([1.0, 0.3, 0.1], [0, 1], 5, 6) == 0  # the new rate alone
    assert calls() == [{SEED: "[0, 1]", RATE: "1.0", "steps": n} for n in ("5", "6")]
    assert "12 trials (grid) in 4 fits in r, 8 done before" in capsys.readouterr().out
    assert swept([0.1, 1.0], [0, 1], 5) == 0  # a bank with a trial too many is not used
    assert calls() == [{SEED: "[0, 1]", RATE: "0.1", "steps": "5"}]


def test_the_trials_of_a_bank_that_failed_are_run_alone_and_an_interrupted_one_is_resumed(stub):
    Path("broken").touch()
    assert swept([0.1, 0.3], [0, 1], 5, 6) == 1
    states = Counter(row["state"] for row in read_csv(Path("r/sweep.csv")))
    assert states == {"done": 4, "failed": 4}
    Path("broken").unlink()
    calls()
    assert swept([0.3, 0.1], [1, 0], 5, 6) == 0
    alone = sorted((flags[SEED], flags[RATE], flags["steps"]) for flags in calls())
    assert alone == [(seed, rate, "6") for seed in "01" for rate in ("0.1", "0.3")]
    assert swept([0.3, 0.1], [1, 0], 5, 6) == 0
    assert calls() == []

    (folder,) = (path.parent for path in Path("r").glob("*/trial.json") if "=5" in path.read_text())
    (folder / "trial.json").unlink()  # as killed after a checkpoint
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "last.ckpt").touch()
    assert swept([0.1, 0.3, 0.5], [0, 1], 5) == 0
    assert sorted(calls(), key=len) == [
        {SEED: "[0, 1]", RATE: "0.5", "steps": "5"},
        {SEED: "[0, 1]", RATE: "[0.1, 0.3]", "steps": "5", "resume": "true"},
    ]


def test_a_trial_with_a_folder_of_its_own_is_left_out_of_the_bank(stub):
    assert swept([0.1], [0], 5, 6) == 0
    assert [(flags[SEED], flags[RATE]) for flags in calls()] == [("0", "0.1")] * 2
    assert swept([0.1, 0.3], [0, 1], 5) == 0
    assert sorted(flags[SEED] + flags[RATE] for flags in calls()) == ["00.3", "10.1", "10.3"]


def test_a_damaged_list_of_a_bank_is_told_and_can_be_deleted(stub):
    assert swept([0.1, 0.3], [0, 1], 5) == 0
    (path,) = Path("r").glob("*/bank.json")
    calls()
    for content in ("{", "[]", '{"runs": {"a": 1}}', '{"runs": 3}', '{"runs": {}}'):
        path.write_text(content)
        if content == '{"runs": {}}':  # of no trial
            break
        with pytest.raises(ValueError, match=r"bank\.json is damaged .*: delete it") as refused:
            sweep_command("s.yaml", "r")
        assert "\n" not in str(refused.value)
    path.unlink()
    assert swept([0.1, 0.3], [0, 1], 5) == 0
    assert calls() == []
