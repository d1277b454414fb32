"""``predict``, ``export``, ``import``, ``tasks``, ``vectors`` and others: commands without trainer.

Each is one function. Its flags are made from its signature and its docstring: a first parameter
without default is positional (unless it is keyword-only), a list takes several words, and what has
no default is required.
Paths that a function returns are printed; a number is the exit status. The modules of the functions
load torch only when they run, so that ``--help`` is fast.

How ``null`` is read, here and by the commands with a trainer: by flag, in a file or in a sweep,
``null``, ``~`` and ``None`` are null, also where a setting may be any text; what cannot be null
refuses it. jsonargparse alone passes the value of a nested flag on as Python's ``str`` of it, as a
wandb agent does with all values: null as the text ``None``.
"""

from __future__ import annotations

import difflib
import inspect
import os
import re
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn, get_args

import yaml
from docstring_parser import parse as parse_docstring
from jsonargparse import ArgumentParser, Namespace, get_loader, set_loader

FUNCTIONS = {
    "predict": ("prompt_lab.commands.predict", "predict_command"),
    "export": ("prompt_lab.commands.prompts", "export_prompts"),
    "import": ("prompt_lab.commands.prompts", "import_prompts"),
    "tasks list": ("prompt_lab.commands.tasks", "list_tasks"),
    "tasks show": ("prompt_lab.commands.tasks", "show_task"),
    "tasks check": ("prompt_lab.commands.tasks", "check_tasks"),
    "tasks build": ("prompt_lab.commands.build", "build_tasks"),
    "vectors apply": ("prompt_lab.commands.prompts", "apply_vectors"),
    "vectors show": ("prompt_lab.commands.prompts", "show_vectors"),
    "vectors compare": ("prompt_lab.commands.prompts", "compare_vectors"),
    "vectors mix": ("prompt_lab.commands.prompts", "mix_prompts"),
    "sweep": ("prompt_lab.commands.sweep", "sweep_command"),
    "report": ("prompt_lab.commands.report", "report_command"),
    "select": ("prompt_lab.commands.select", "select_command"),
    "select evaluate": ("prompt_lab.commands.select", "evaluate_command"),
    "interpret": ("prompt_lab.commands.interpret", "interpret_command"),
}

NULLS = ("null", "Null", "NULL", "~", "None")
"""The words for null."""

_load_yaml = get_loader("yaml")


def _load_with_null(text: str) -> Any:
    """YAML, in which a ``None`` without quotes is null too."""
    if "None" in text:
        for token in reversed(list(yaml.scan(text))):
            if isinstance(token, yaml.ScalarToken) and token.plain and token.value == "None":
                text = f"{text[: token.start_mark.index]}null{text[token.end_mark.index :]}"
    return _load_yaml(text)


set_loader("yaml", _load_with_null, (yaml.YAMLError,))


def refuse_null(parser: ArgumentParser, settings: Namespace) -> None:
    """Refuse null where the parser lets it through.

    It gives the word to settings of any text, and does not check a group of settings.

    Raises:
        TypeError: naming the setting.
    """
    groups = [name for name in parser.groups or () if settings.get(name, "") is None]
    texts = [name for name, value in settings.items() if isinstance(value, str) and value in NULLS]
    for name in groups + texts:
        raise TypeError(null_refused(name))


def plain_warnings() -> None:
    """Let a warning be its sentence alone, without the place in the code."""
    warnings.formatwarning = lambda message, *_, **__: f"prompt-lab: {message}\n"


def null_refused(name: str) -> str:
    """What is said of a setting that cannot be null."""
    return f"{name} is null, or holds null, which is not allowed: give a value or leave it out"


class OfflineParser(ArgumentParser):
    """The flags of one command; says what is wrong in one sentence instead of the whole usage.

    Attributes:
        types: the type of each setting.
    """

    types: dict[str, Any]

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """As always but for null, which was checked when its flag was read; refuse it as text."""
        given = {name: value for name, value in vars(namespace).items() if value is not None}
        super().validate(Namespace(given), *args, **kwargs)
        refuse_null(self, namespace)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with status 2."""
        print(f"prompt-lab: {self._plain(message)}", file=sys.stderr)
        sys.exit(2)

    def _plain(self, message: str) -> str:
        """A message without the parser's account of types, with the nearest known flag."""
        bad = re.search(r'Parser key "(\w+)".*value: (.*)', message, re.DOTALL)
        if bad and bad[2] == "None":
            return f"--{bad[1]} cannot be null; allowed: {_allowed(self.types[bad[1]])}"
        if bad:
            return f"--{bad[1]} is {bad[2]!r}; allowed: {_allowed(self.types[bad[1]])}"
        lacking = re.fullmatch(r"the following arguments are required: (.*)", message)
        if lacking:
            wanted = [a for a in self._actions if a.dest in lacking[1].split(", ")]
            words = [word for a in wanted for word in (a.option_strings or [str(a.metavar)])]
            return f"give {', '.join(words)}; {self.prog} --help says more"
        unknown = re.search(r"unrecognized arguments: (--[^\s=]+)", message)
        if unknown:
            flags = [flag for action in self._actions for flag in action.option_strings]
            near = difflib.get_close_matches(unknown[1], flags, n=1)
            hint = f"did you mean {near[0]}?" if near else f"{self.prog} --help lists all"
            return f"no setting {unknown[1]}; {hint}"
        return " ".join(message.split())


def run(words: list[str] | None = None) -> int:
    """Run a command; its name, of one or two words, stands first.

    Errors of the user are one sentence and status 1. A reader that closes the pipe early, as
    ``head`` does, ends the command quietly.
    """
    words = sys.argv[1:] if words is None else words
    plain_warnings()
    length = 2 if " ".join(words[:2]) in FUNCTIONS else 1
    command = " ".join(words[:length])
    function = _function(command)
    parser = make_parser(command)
    settings = vars(parser.parse_args(words[length:]))
    for name, value in settings.items():  # a list takes any words, which the parser does not read
        if type(None) in get_args(parser.types[name]) and value in [[word] for word in NULLS]:
            settings[name] = None
    status = 0
    try:
        done = function(**settings)
        status = done if isinstance(done, int) else 0
        for path in done if isinstance(done, list) else [done]:
            if isinstance(path, Path):
                print(path)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
    except (ValueError, OSError) as error:
        if os.environ.get("PROMPT_LAB_TRACEBACK"):
            raise
        print(f"prompt-lab: {error}", file=sys.stderr)
        return 1
    return status


def make_parser(command: str) -> OfflineParser:
    """The parser of a command's words (without its name, which may be of two words)."""
    function = _function(command)
    text = parse_docstring(function.__doc__ or "")
    helps = {param.arg_name: param.description for param in text.params}
    parser = OfflineParser(
        prog=f"prompt-lab {command}",
        description="\n\n".join(filter(None, (text.short_description, text.long_description))),
        allow_abbrev=False,
    )
    parameters = inspect.signature(function, eval_str=True).parameters
    parser.types = {name: parameter.annotation for name, parameter in parameters.items()}
    for place, (name, parameter) in enumerate(parameters.items()):
        settings: dict[str, Any] = {"type": parameter.annotation, "help": helps[name]}
        if list[str] in (parameter.annotation, *get_args(parameter.annotation)):
            settings |= {"type": str, "nargs": "+"}
        elif parameters[name].annotation is bool:
            settings |= {"nargs": "?", "const": True}
        required = parameter.default is inspect.Parameter.empty
        by_place = parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY
        if required and place == 0 and by_place:
            parser.add_argument(name, metavar=name.upper().removesuffix("S"), **settings)
        elif required:
            parser.add_argument(f"--{name}", required=True, **settings)
        else:
            parser.add_argument(f"--{name}", default=parameter.default, **settings)
    return parser


def _function(command: str) -> Callable[..., Any]:
    """The function behind a command."""
    module, name = FUNCTIONS[command]
    return getattr(import_module(module), name)


def _allowed(kind: Any) -> str:
    """What a setting of a type may be, in words."""
    kinds = (kind, *get_args(kind))
    choices = [value for own in kinds for value in get_args(own) if isinstance(value, str)]
    if choices:
        return ", ".join(choices)
    return "a whole number" if int in kinds else "a number" if float in kinds else "a text"
