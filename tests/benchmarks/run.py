"""Measures the goals of the project and prints them as a table.

    python tests/benchmarks/run.py [--goals G1 G2] [--pairs 15] [--device cpu] [--threads 2]
                                   [--out FILE.jsonl] [--quick]
                                   [--model FOLDER]
    python tests/benchmarks/run.py --table FILE.jsonl

Each goal runs in a process of its own and gives one JSON line per result. A ratio is the time of
PEFT, or of another baseline that the line names, over ours: the median of interleaved pairs. A goal
is met when the median of at least 15 pairs is within 5 % of it or above; upper limits hold as they
are. ``--quick`` runs tiny models, to see that the scripts work; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import answers  # all is imported once, here, for the processes of all goals
import counts
import interpretation
import loading
import loop
import many_prompts
import meta
import peft  # noqa: F401
import ranks
import real_model
import steps
import subspaces
import torch
import transformers
from pairs import Settings, in_own_process, line, table

GOALS = {
    "G1": steps.causal_steps,
    "G2": steps.long_causal_step,
    "G3": steps.t5_steps,
    "G4": steps.causal_bank,
    "G5": steps.t5_banks,
    "G7": answers.causal_answers,
    "G8": answers.t5_answers,
    "G9": meta.memory,
    "G11": meta.time,
    "G12": counts.padded_tokens,
    "G13": counts.file_bytes,
    "G14": loop.lightning_steps,
    "G16": steps.bf16_step,
    "G17": loading.loading,
    "G18": subspaces.subspace_bank,
    "G19": subspaces.subspace_finding,
    "G20": interpretation.nearest,
    "G21": many_prompts.evaluation,
    "G22": ranks.shared_banks,
    "G23": real_model.short_rows,
    "G24": real_model.long_rows,
    "G25": real_model.bank,
    "G26": real_model.answers,
    "G27": real_model.first_step,
}


def main() -> int:
    """Run what the command line asks for; 1 if a goal could not be measured."""
    options = parse()
    if options.table:
        print(table(map(json.loads, options.table.read_text().splitlines())))
        return 0
    pairs = options.pairs or (3 if options.quick else 15)
    settings = Settings(options.device, options.threads, pairs, options.quick, options.model)
    lines, failed = [], []
    for goal in options.goals:
        print(f"{goal} ...", file=sys.stderr, flush=True)
        try:
            lines += in_own_process(settings.device, run_goal, goal, settings, options.out)
        except Exception as error:  # the other goals are still worth measuring
            print(f"{goal} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            failed.append(goal)
    print(f"\n{table(lines)}")
    if failed:
        print(f"could not be measured: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Measure goals and print them as a table.")
    parser.add_argument("--goals", nargs="+", choices=list(GOALS), default=list(GOALS))
    parser.add_argument("--pairs", type=int, help="timed pairs (default 15, with --quick 3)")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--out", type=Path, help="file to which the JSON lines are added")
    parser.add_argument("--model", help="folder of a language model, for G23 to G27")
    parser.add_argument("--quick", action="store_true", help="tiny models, to check the scripts")
    parser.add_argument("--table", type=Path, help="print the table of an earlier file")
    options = parser.parse_args()
    if options.table and not options.table.is_file():
        parser.error(f"no file {options.table}: give one that --out has written")
    if (options.pairs is not None and options.pairs < 1) or options.threads < 1:
        parser.error("--pairs and --threads must be at least 1")
    return options


def run_goal(goal: str, settings: Settings, out: Path | None) -> list[dict[str, Any]]:
    """Measure one goal, printing and writing each result as soon as it is there."""
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("no CUDA device: leave --device out")
    torch.set_num_threads(settings.threads)
    transformers.logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    lines = []
    for what, found in GOALS[goal](settings):
        lines.append(line(goal, what, found, settings))
        text = json.dumps(lines[-1])
        print(text, flush=True)
        if out is not None:
            with out.open("a", encoding="utf-8") as file:
                file.write(f"{text}\n")
    return lines


if __name__ == "__main__":
    sys.exit(main())
