"""Equality 6: a fit that is killed and resumed equals one that was not, bit for bit.

A process of its own runs the real command on two threads and is killed by ``os._exit``, which runs
no clean-up; another one resumes. All are forks of one process, which pays for the imports once.
``MetaPrompt`` runs with accumulated meta-batches and a learned inner rate.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from prompt_lab.files.prompts import load_prompt
from prompt_lab.files.results import read_csv

STEPS, EVERY = 12, 3
# Where the process dies: a hook of the method and the step at which it is called.
KILLS = {
    "between evaluations": ("on_train_batch_end", 8),
    "right after an evaluation": ("on_train_batch_start", 6),
    "between scoring and saving": ("_log_evaluation", 9),
}
CASES = [("gpt2", name) for name in KILLS]
CASES += [("meta", "between evaluations")]
SCRIPT = '''
import json, os, signal, sys
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast
from prompt_lab.commands import fit as cli

def die_at(method, hook, step):
    """Let the process die when the method's hook has been called at that step."""
    original = getattr(method, hook)
    def called(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        if self.trainer.global_step == step:
            os._exit(9)
        return result
    setattr(method, hook, called)

for job in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # a process that hangs ends itself
        torch.set_num_threads(2)
        if job["die"]:
            die_at(cli.METHODS[job["method"]], *job["die"])
        sys.argv = ["prompt-lab", *job["words"]]
        os._exit(cli.run())
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code != (9 if job["die"] else 0):
        sys.exit(f"{job} ended with {code}")
'''


def words(kind: str, model: Path, root: Path, run_dir: Path) -> list[str]:
    """The command: a mixed grid in which runs stop at different times, or two meta-batches a step.

    MetaPrompt adapts to a task in every evaluation.
    """
    if kind == "meta":
        own = [
            *("--model=MetaPrompt", "--model.episodes=2", "--model.learning_rate=0.05"),
            *("--model.inner.steps=2", "--model.inner.learning_rate=0.1"),
            *("--model.support_size=2", "--model.inner.learned=per_token"),
            *("--model.adaptation.steps=2", "--model.validation_tasks=[emotion]"),
            *("--data.tasks=[glue-cola, glue-sst2, emotion]", f"--trainer.max_steps={STEPS}"),
            *("--trainer.accumulate_grad_batches=2", f"--trainer.val_check_interval={2 * EVERY}"),
        ]
    else:
        own = [
            *("--model.learning_rate=[0.1, 0.03]", "--model.batch_size=[3, 4]"),
            *("--model.init_seed=2", "--model.patience=2", "--model.optim.warmup_steps=2"),
            *("--data.tasks=[glue-cola, e2e_nlg_cleaned]", f"--trainer.max_steps={STEPS}"),
            f"--trainer.val_check_interval={EVERY}",
        ]
    return [
        *("fit", *own, f"--model.backbone.name={model}", "--model.num_virtual_tokens=5"),
        *("--model.optim.schedule=linear", f"--data.root={root}", "--data.samples=[13]"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false", f"--run_dir={run_dir}"),
    ]


@pytest.fixture(scope="module")
def folders(
    tmp_path_factory: pytest.TempPathFactory,
    model_folder: Callable[[str], Path],
    fewshot_root: Path,
) -> Callable[[str, str], Path]:
    """Function that gives the run folder of a kind of model and a way to die, all made at once."""
    base = tmp_path_factory.mktemp("resume")
    jobs = []
    for kind, name in [*((kind, "whole") for kind in ("gpt2", "meta")), *CASES]:
        given = words(kind, model_folder("gpt2"), fewshot_root, base / f"{kind} {name}")
        die = KILLS.get(name)
        method = "MetaPrompt" if kind == "meta" else "PromptTuning"
        jobs.append({"words": given, "die": die, "method": method})
        if die:
            jobs.append({"words": [*given, "--resume"], "die": None})
    environment = {**os.environ, "OMP_NUM_THREADS": "2", "HF_HUB_OFFLINE": "1"}
    environment["MKL_CBWR"] = "AUTO"  # as `prompt-lab` sets it
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait leave the cores to others
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(jobs)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return lambda kind, name: base / f"{kind} {name}"


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_a_killed_fit_that_is_resumed_equals_the_uninterrupted_one(folders, kind, name):
    """Reference: the files of the fit that nothing interrupted, to the byte but for seconds."""
    whole, resumed = folders(kind, "whole"), folders(kind, name)
    assert (resumed / "curves.csv").read_bytes() == (whole / "curves.csv").read_bytes()
    names = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.safetensors"))
    assert len(names) == (1 if kind == "meta" else 8)
    steps = set()
    for file in names:
        first, second = (load_prompt(folder / file) for folder in (whole, resumed))
        assert first.prompt.numpy().tobytes() == second.prompt.numpy().tobytes()
        assert first.init.numpy().tobytes() == second.init.numpy().tobytes()
        assert {**first.metadata(), "seconds": 0} == {**second.metadata(), "seconds": 0}
        assert not first.prompt.equal(first.init)
        steps.add(first.steps)
    rows = read_csv(whole / "curves.csv")
    ended = {int(row["step"]) for row in rows if row["status"] != "training"}
    if kind != "meta":  # else this would say little about stops and patience
        assert len(ended) > 1 < len(steps)


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_the_last_state_of_bank_and_optimizer_is_that_of_the_uninterrupted_fit(folders, kind, name):
    """Reference: every tensor of the uninterrupted fit's last checkpoint."""
    first, second = (
        torch.load(folders(kind, which) / "checkpoints" / "last.ckpt", weights_only=True)
        for which in ("whole", name)
    )
    for key, value in first["state_dict"].items():
        if key != "seconds":
            assert value.equal(second["state_dict"][key]), key
    states, again = (saved["optimizer_states"][0]["state"] for saved in (first, second))
    assert len(states) == len(again) == (2 if kind == "meta" else 1)  # of the inner rate too
    for of_parameter, moments in states.items():
        assert moments.keys() == again[of_parameter].keys()
        for key, value in moments.items():
            assert value.equal(again[of_parameter][key]), key
