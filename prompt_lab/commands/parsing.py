"""What the parsers of all commands share: null in every spelling, short errors, plain help.

By flag, in a file or in a sweep, ``null``, ``~`` and ``None`` are null, also where a setting may be
any text; what cannot be null refuses it. jsonargparse alone passes the value of a nested flag on as
Python's ``str`` of it, as a wandb agent does with all values: null as the text ``None``.
"""

from __future__ import annotations

import difflib
import re
import sys
import warnings
from argparse import Action
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace, get_loader, set_loader

USAGE = "prompt-lab COMMAND [--setting value ...]"
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


class PlainHelp(DefaultHelpFormatter):
    """Paragraphs stay; types and defaults are told where they say something, classes by name."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join(super(PlainHelp, self)._fill_text(x, width, indent) for x in parts)

    def _get_help_string(self, action: Action) -> str:
        text, kind = super()._get_help_string(action), self._get_type_str(action) or ""
        if not text.endswith(")") or text == action.help:
            return text
        facts = ["required"] if action.required and action.option_strings else []
        plain = r"(Path|(str|int|float|bool)( \| null)?|Optional\[(str|int|float|bool)\]|Literal.*)"
        is_shown = kind.startswith("Optional[Literal") and str(action.metavar)[0] == "{"
        if kind and not is_shown and not re.fullmatch(plain, kind):
            facts.append("type: %(type)s")
        if str(action.default) not in ("None", "False", "", "[]", "Unset"):
            facts.append("default: %(default)s")
        classes = re.findall(r"[\w.]+\.\w+", text.partition("known subclasses: ")[2])
        known = [name.rpartition(".")[2] for name in classes if ".commands." not in name]
        facts += [f"known: {', '.join(known)}"] * bool(known)
        return f"{action.help} ({', '.join(facts)})" if facts else action.help or ""

    def _expand_help(self, action: Action) -> str:
        marks = r":\w+:`[~.]?(?:[\w.]+\.)?(\w+)`|``(.+?)``"  # of reStructuredText
        return re.sub(marks, lambda found: found[1] or found[2], super()._expand_help(action))


class PlainParser(ArgumentParser):
    """Says what is wrong in one sentence instead of the whole usage, with the nearest flag."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"formatter_class": PlainHelp, "usage": USAGE, **settings})

    def validate(self, namespace: Namespace, *args: Any, **kwargs: Any) -> None:
        """As always, and refuse null where the parser lets it through (``TypeError``).

        It gives the word to settings of any text, and does not check a group of settings.
        """
        super().validate(namespace, *args, **kwargs)
        groups = [name for name in self.groups or () if namespace.get(name, "") is None]
        items = namespace.items()
        for name in groups + [n for n, v in items if isinstance(v, str) and v in NULLS]:
            raise TypeError(
                f"{name} is null, or holds null, which is not allowed: give a value or leave it out"
            )

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print the sentence and exit with status 2."""
        known, hint = [*self._option_string_actions], ""
        words = [word.split("=")[0] for word in getattr(self, "args", []) if word[:2] == "--"]
        words += [f"--{quoted}" for quoted in message.split("'")[1::2]]
        for flag in words if "unrecognized" in message or "accept" in message else []:
            if flag not in known and flag.strip("-").rpartition(".")[2] in message:
                near = difflib.get_close_matches(flag, known, n=1)
                hint = f"; did you mean {near[0]}?" if near else "; --help lists all flags"
        print(f"prompt-lab: {' '.join(message.split())}{hint}", file=sys.stderr)
        sys.exit(2)


def plain_warnings() -> None:
    """Let a warning be its sentence alone, without the place in the code."""
    warnings.formatwarning = lambda message, *_, **__: f"prompt-lab: {message}\n"
