"""A bank of 200 runs on real tasks, killed ten times at random, against one that nothing disturbs.

    PROMPT_LAB_TEST_DATA=FOLDER python tests/benchmarks/kills.py [--kills 10] [--seed 0]
                                                                 [--folder runs/kills]

Eight tasks with labels or open answers x five samples x five initialisation seeds, on stories260K:
16 steps, evaluated every 4, and the test. The disturbed fit is ended by ``kill -9`` of all its
processes after a random time and taken up again by the same words, of which one is ``--resume``
(anew where there is no checkpoint yet), until so many kills have hit; then it runs to its end.
Results, predictions, curves and prompts are compared to the byte, seconds aside.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TASKS = ("tweet_eval-stance_climate", "tweet_eval-stance_atheism", "tweet_eval-stance_abortion")
TASKS += ("ade_corpus_v2-dosage", "superglue-cb", "glue-wnli", "ethos-gender", "poem_sentiment")
STEPS, EVERY = 16, 4


def main() -> None:
    """Run both and say whether they are the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the times of the kills")
    parser.add_argument("--folder", type=Path, default=Path("runs/kills"), help="a new one")
    options = parser.parse_args()
    data = Path(os.environ["PROMPT_LAB_TEST_DATA"])
    whole, killed = options.folder / "whole", options.folder / "killed"
    options.folder.mkdir(parents=True)
    seconds = run(words(data, whole), options.folder, None)
    print(f"undisturbed: {seconds:.0f} s", flush=True)
    moments = kill_at_random([*words(data, killed), "--resume"], killed, options, seconds)
    different = differences(whole, killed)
    found = {"kills": len(moments), "moments": moments, "seed": options.seed, "runs": 200}
    print(json.dumps({"name": "kills", **found, "seconds": seconds, "different": different}))
    sys.exit(bool(different))


def words(data: Path, run_dir: Path) -> list[str]:
    """The command of the fit."""
    return [
        *("fit", f"--model.backbone.name={data / 'models' / 'stories260K'}"),
        *("--model.num_virtual_tokens=5", "--model.init_seed=[0, 1, 2, 3, 4]"),
        *("--model.learning_rate=0.1", "--model.batch_size=2", "--model.max_new_tokens=8"),
        *(f"--data.root={data / 'crossfit'}", f"--data.tasks=[{', '.join(TASKS)}]"),
        *("--data.samples=[100, 13, 21, 42, 87]", "--data.max_input_length=48"),
        *(f"--trainer.max_steps={STEPS}", f"--trainer.val_check_interval={EVERY}"),
        *("--trainer.accelerator=cpu", "--trainer.logger=false", "--test_after_fit"),
        f"--run_dir={run_dir}",
    ]


def run(command: list[str], folder: Path, limit: float | None) -> float | None:
    """Seconds of a fit that ended by itself; None where it was killed after ``limit`` seconds."""
    started = time.monotonic()
    with (folder / "log.txt").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prompt_lab", *command],
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return None
    if status:
        sys.exit(f"the fit ended with status {status}: see {folder / 'log.txt'}")
    return time.monotonic() - started


def kill_at_random(
    command: list[str], run_dir: Path, options: Any, seconds: float | None
) -> list[str]:
    """Run a fit that is killed so many times; returns where each kill found it.

    A process lives five seconds, in which it starts, and up to a third of the undisturbed time.
    """
    assert seconds is not None
    rng, moments = random.Random(options.seed), []
    while len(moments) < options.kills:
        if run(command, options.folder, rng.uniform(5, 5 + seconds / 3)) is None:
            moments.append(describe(run_dir))
            print(f"kill {len(moments)}: {moments[-1]}", flush=True)
    run(command, options.folder, None)
    return moments


def describe(run_dir: Path) -> str:
    """What a killed process leaves to see of where it was."""
    curves = run_dir / "curves.csv"
    lines = curves.read_text().splitlines()[1:] if curves.is_file() else []
    step = lines[-1].split(",")[0] if lines else "0"
    drafts = [path.name for path in run_dir.rglob(".*.part")]
    tested = ", tested" if (run_dir / "results.csv").is_file() else ""
    written = " while a file was written" if drafts else ""
    return f"after the evaluation at step {step}{tested}{written}"


def differences(whole: Path, killed: Path) -> list[str]:
    """Names of the files that differ, seconds aside."""
    from safetensors.torch import load_file

    from prompt_lab.files.results import read_csv

    found = []
    for name in ("curves.csv", "predictions.jsonl"):
        if (whole / name).read_bytes() != (killed / name).read_bytes():
            found.append(name)
    tables = [read_csv(folder / "results.csv") for folder in (whole, killed)]
    if not all(len(table) >= 200 for table in tables) or (
        [{**row, "seconds": ""} for row in tables[0]]
        != [{**row, "seconds": ""} for row in tables[1]]
    ):
        found.append("results.csv")
    for path in sorted((whole / "prompts").glob("*.safetensors")):
        one, other = load_file(path), load_file(killed / "prompts" / path.name)
        if any(one[name].numpy().tobytes() != other[name].numpy().tobytes() for name in one):
            found.append(path.name)
    return found


if __name__ == "__main__":
    main()
