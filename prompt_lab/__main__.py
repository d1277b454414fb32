"""The command ``prompt-lab``, also ``python -m prompt_lab``: one table from command to function.

``fit``, ``validate`` and ``test`` have the flags of LightningCLI. Any other command is one
function, whose flags are made from its signature and its docstring: a first parameter without
default is positional (unless it is keyword-only), a list takes several words, and what has no
default is required. Paths that a function returns are printed; a number is the exit status. The
modules of the functions load torch only when they run, so that ``--help`` is fast.
"""

from __future__ import annotations

import difflib
import inspect
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace

from prompt_lab.commands.parsing import NULLS, PlainParser, plain_warnings

TRAINER_COMMANDS = {
    "fit": ("fit.run", "train a bank of prompts from a YAML config"),
    "validate": ("fit.run", "score the best prompts of a fit on dev"),
    "test": ("fit.run", "score the best prompts of a fit on test, write results.csv"),
}
USAGES = {
    "COMMAND --config FILE.yaml [--run_dir DIR] [--any.setting value ...]": TRAINER_COMMANDS,
    "COMMAND PROMPTS [--setting value ...]": {
        "predict": ("predict.predict_command", "answer new inputs under one or many prompts"),
        "export": ("prompts.export_prompts", "write prompts for PEFT or as plain tensors"),
        "import": ("prompts.import_prompts", "make a prompt file of a PEFT folder or a tensor"),
    },
    "tasks COMMAND [TASK or FOLDER] [--setting value ...]": {
        "tasks list": ("tasks.list_tasks", "list the tasks that the package or a folder holds"),
        "tasks show": ("tasks.show_task", "show what is known of a task, and some of its rows"),
        "tasks check": ("tasks.check_tasks", "check the few-shot files of a folder"),
        "tasks build": ("build.build_tasks", "make few-shot files from the hub or your own rows"),
    },
    "vectors COMMAND EXPRESSION or STORE... [--setting value ...]": {
        "vectors apply": ("prompts.apply_vectors", "add task prompt vectors to initial prompts"),
        "vectors show": ("prompts.show_vectors", "list the task prompt vectors of prompt stores"),
        "vectors compare": ("prompts.compare_vectors", "how alike prompts and their vectors are"),
        "vectors mix": ("prompts.mix_prompts", "mix source prompts by how alike they are"),
    },
    "COMMAND FILE... [--setting value ...]": {
        "sweep": ("sweep.sweep_command", "run the trials of a wandb sweep file one by one"),
        "report": ("report.report_command", "tables and pictures from results.csv files"),
        "select": ("select.select_command", "rank source tasks for target tasks, choose some"),
        "select evaluate": ("select.evaluate_command", "compare rankings with measured transfer"),
        "interpret": ("interpret.interpret_command", "what prompts say: tokens, drift, spread"),
    },
}
COMMANDS = {name: entry for commands in USAGES.values() for name, entry in commands.items()}
"""Function below ``prompt_lab.commands`` and what it does, by the one or two words of a command."""


def main(words: list[str] | None = None) -> int:
    """Run a command; returns the exit status.

    Errors of the user are one sentence and status 1, or 2 for flags. A reader that closes the pipe
    early, as ``head`` does, ends the command quietly.
    """
    from prompt_lab import __version__

    given = sys.argv[1:] if words is None else words
    first = given[0] if given else "--help"
    if first == "--version":
        print(f"prompt-lab {__version__}")
        return 0
    group = [usage for usage in USAGES if usage.startswith(f"{first} ")]
    if group and given[1:2] in ([], ["-h"], ["--help"]):
        print(_usage(group[0]))
        return 0
    if first in ("-h", "--help"):
        print(f"prompt-lab {__version__}: soft prompts on frozen language models\n")
        print("\n\n".join(_usage(usage) for usage in USAGES))
        print(
            "\nprompt-lab COMMAND --help lists all settings; --print_config (fit, validate, test)\n"
            "shows their values.\nA first run: prompt-lab fit --config configs/quickstart.yaml"
        )
        return 0
    pair = " ".join(given[:2])
    command = pair if group or pair in COMMANDS else first
    if first.startswith("-"):  # flags before the command, which LightningCLI takes
        command = next((word for word in given if word in TRAINER_COMMANDS), first)
    if command not in COMMANDS:
        near = difflib.get_close_matches(command, COMMANDS, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"commands: {', '.join(COMMANDS)}"
        print(f"prompt-lab: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    # On Intel processors matrix products repeat bit for bit from run to run, as exact resume needs.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    try:
        if command in TRAINER_COMMANDS:
            return _function(command)(words)
        return _run(command, given[len(command.split()) :])
    except KeyboardInterrupt:
        print("prompt-lab: stopped", file=sys.stderr)
        return 130


def _usage(usage: str) -> str:
    """The lines about the commands of a usage."""
    lines = [f"  {name:<17}{text}" for name, (_, text) in USAGES[usage].items()]
    return "\n".join([f"usage: prompt-lab {usage}", "", *lines])


def _function(command: str) -> Callable[..., Any]:
    """The function behind a command."""
    module, _, name = COMMANDS[command][0].partition(".")
    return getattr(import_module(f"prompt_lab.commands.{module}"), name)


def _run(command: str, words: list[str]) -> int:
    """Run a function with the settings that the words give it."""
    plain_warnings()
    settings = vars(make_parser(command).parse_args(words))
    try:
        done = _function(command)(**settings)
        for path in done if isinstance(done, list) else [done]:
            if isinstance(path, Path):
                print(path)
        sys.stdout.flush()
        return done if isinstance(done, int) else 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 0
    except (ValueError, OSError) as error:
        if os.environ.get("PROMPT_LAB_TRACEBACK"):
            raise
        print(f"prompt-lab: {error}", file=sys.stderr)
        return 1


class _FunctionParser(PlainParser):
    """The flags of one function."""

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """As always but for null, which was checked when its flag was read."""
        for name, value in vars(namespace).items():  # the words of a list, which nobody read
            if value in [[word] for word in NULLS] and self.get_default(name) is None:
                namespace[name] = None
        given = {name: value for name, value in vars(namespace).items() if value is not None}
        super().validate(Namespace(given), *args, **kwargs)


def make_parser(command: str) -> ArgumentParser:
    """The parser of a command's words (without its name) but of those with a trainer."""
    function = _function(command)
    text = parse_docstring(function.__doc__ or "")
    helps = {param.arg_name: param.description for param in text.params}
    parser = _FunctionParser(
        prog=f"prompt-lab {command}",
        description="\n\n".join(filter(None, (text.short_description, text.long_description))),
        allow_abbrev=False,
    )
    parameters = inspect.signature(function, eval_str=True).parameters
    needed = []  # words that the usage shows
    for place, (name, parameter) in enumerate(parameters.items()):
        kind, flag = parameter.annotation, f"--{name}"
        settings: dict[str, Any] = {"type": kind, "help": helps[name]}
        for option in (kind, *get_args(kind)):
            if get_origin(option) is list:
                settings |= {"type": get_args(option)[0], "nargs": "+"}
            elif option is not kind and get_origin(option) is Literal:  # or null
                settings["metavar"] = f"{{{','.join(get_args(option))}}}"
        if kind is bool:
            settings |= {"nargs": "?", "const": True, "metavar": "true"}
        if parameter.default is not parameter.empty:
            settings["default"] = parameter.default
        elif place == 0 and parameter.kind is not parameter.KEYWORD_ONLY:
            flag = name
            settings["metavar"] = name.upper().removesuffix("S")
            needed.append(settings["metavar"] + " ..." * ("nargs" in settings))
        else:
            settings["required"] = True
            needed.append(f"{flag} {name.upper()}")
        parser.add_argument(flag, **settings)
    parser.usage = " ".join([parser.prog, *needed, "[--setting value ...]"])
    return parser


if __name__ == "__main__":
    sys.exit(main())
