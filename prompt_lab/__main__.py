"""The command ``prompt-lab``, also ``python -m prompt_lab``.

It only finds the command that was asked for, so that ``--help`` needs no heavy import.
"""

from __future__ import annotations

import difflib
import os
import sys

TRAINER_COMMANDS = {
    "fit": "train a bank of prompts from a YAML config",
    "validate": "score the best prompts of a fit on dev",
    "test": "score the best prompts of a fit on test, write results.csv",
}
OFFLINE_COMMANDS = {
    "predict": "answer new inputs under one or many prompts",
    "export": "write prompts for PEFT or as plain tensors",
    "import": "make a prompt file of a PEFT folder or a tensor",
}
TASKS_COMMANDS = {
    "tasks list": "list the tasks that the package knows, or that a folder holds",
    "tasks show": "show what is known of a task, and some of its rows",
    "tasks check": "check the few-shot files of a folder",
    "tasks build": "make few-shot files from data sets of the hub, or from your own rows",
}
VECTORS_COMMANDS = {
    "vectors apply": "add a sum of task prompt vectors to initial prompts",
    "vectors show": "list the task prompt vectors of prompt stores",
    "vectors compare": "how alike prompts and their vectors are: cosines, norms",
    "vectors mix": "mix source prompts by how alike they are to a target's",
}
STUDY_COMMANDS = {
    "sweep": "run the trials of a wandb sweep file one after another",
    "report": "tables and pictures from results.csv files",
    "select": "rank source tasks for target tasks, choose some",
    "select evaluate": "compare rankings of source tasks with measured transfer",
    "interpret": "what prompts say: nearest tokens, drift, spread of runs",
}
COMMANDS = TRAINER_COMMANDS | OFFLINE_COMMANDS | TASKS_COMMANDS | VECTORS_COMMANDS | STUDY_COMMANDS
GROUPS = {
    "tasks": ("[TASK or FOLDER]", TASKS_COMMANDS),
    "vectors": ("EXPRESSION or STORE...", VECTORS_COMMANDS),
}
"""Commands of two words by their first: what follows, and the commands."""


def main() -> int:
    """Run a command; returns the exit status."""
    from prompt_lab import __version__

    given = sys.argv[1:]
    if not given or given[0] in ("-h", "--help"):
        print(_help(__version__))
        return 0
    if given[0] == "--version":
        print(f"prompt-lab {__version__}")
        return 0
    if given[0] in GROUPS and given[1:2] in ([], ["-h"], ["--help"]):
        print("\n".join(_group_help(given[0])))
        return 0
    command = " ".join(given[:2]) if given[0] in GROUPS else given[0]
    names = [word for word in given if word in TRAINER_COMMANDS]
    if command not in COMMANDS and not (command.startswith("-") and names):
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"prompt-lab: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    # On Intel processors matrix products repeat bit for bit from run to run, as exact resume needs.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    try:
        if command not in TRAINER_COMMANDS:
            from prompt_lab.commands.offline import run
        else:
            from prompt_lab.commands.cli import run
        return run()
    except KeyboardInterrupt:
        print("prompt-lab: stopped", file=sys.stderr)
        return 130


def _help(version: str) -> str:
    """What ``prompt-lab --help`` prints."""
    lines = [
        f"prompt-lab {version}: soft prompts on frozen language models",
        "",
        "usage: prompt-lab COMMAND --config FILE.yaml [--run_dir DIR] [--any.setting value ...]",
        "",
        *(f"  {name:<10}{text}" for name, text in TRAINER_COMMANDS.items()),
        "",
        "usage: prompt-lab COMMAND PROMPTS [--setting value ...]",
        "",
        *(f"  {name:<10}{text}" for name, text in OFFLINE_COMMANDS.items()),
        "",
        *(line for group in GROUPS for line in (*_group_help(group), "")),
        "usage: prompt-lab COMMAND FILE... [--setting value ...]",
        "",
        *(f"  {name:<17}{text}" for name, text in STUDY_COMMANDS.items()),
        "",
        "prompt-lab COMMAND --help lists all settings; --print_config (fit, validate, test) shows",
        "their values.",
        "A first run: prompt-lab fit --config configs/quickstart.yaml",
    ]
    return "\n".join(lines)


def _group_help(group: str) -> list[str]:
    """The lines about a group of commands of two words."""
    what, commands = GROUPS[group]
    return [
        f"usage: prompt-lab {group} COMMAND {what} [--setting value ...]",
        "",
        *(f"  {name:<17}{text}" for name, text in commands.items()),
    ]


if __name__ == "__main__":
    sys.exit(main())
