"""What a user of the package can name: commands, flags, files, columns, fields, public names.

    HF_HUB_OFFLINE=1 python tests/data/surface.py > tests/data/surface.txt

One item a line, sorted, its kind in front. The list beside this file is that of version 0.1.0, to
be ticked: kept, renamed or dropped. File names are written down by hand, all else is asked for.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import prompt_lab
from prompt_lab.__main__ import COMMANDS, make_parser
from prompt_lab.commands.fit import METHODS, PromptLabCLI
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.prompts import METADATA_FIELDS, TENSORS
from prompt_lab.files.results import CURVE_COLUMNS, RESULT_COLUMNS

FILES = {
    "fit": ".lock config-fit.yaml checkpoints/last.ckpt curves.csv logs/version_<n>/metrics.csv "
    "prompts/<name>.safetensors prompts/index.csv previous-<n>/ steps/<step>/<name>.safetensors "
    "steps/<step>/index.csv target_prompts/<name>.safetensors target_prompts/index.csv "
    "prompt.safetensors subspace_<I>.safetensors best.safetensors adapters_<I>.safetensors "
    "attention.safetensors <cache>/<key>.arrow",
    "validate": ".lock config-validate.yaml",
    "test": ".lock config-test.yaml results.csv predictions.jsonl digests.json attention.csv "
    "scales.csv prompts/<name>.safetensors prompts/index.csv target_prompts/<name>.safetensors "
    "target_prompts/index.csv attention.safetensors previous-<n>/",
    "predict": "<out>",
    "export": "adapter_config.json adapter_model.safetensors README.md <name>.safetensors",
    "import": "<name>.safetensors index.csv",
    "tasks build": "<task>/<task>_<K>_<sample>_<split>.tsv <task>/<task>_<K>_build.json",
    "vectors apply": "<name>.safetensors index.csv",
    "vectors mix": "<name>.safetensors index.csv",
    "vectors compare": "similarities.csv norms.csv prompts-different.* prompts-equal.* "
    "vectors-different.* vectors-equal.*",
    "sweep": ".lock sweep.csv results.csv log.txt trial.json bank.json",
    "report": "table.md table.csv tasks.csv gains.csv adaptation.csv starts.csv significance.csv "
    "vectors-cross.csv vectors-pairs.csv vectors-expressions.csv scores.* codes-<line>.* "
    "score-by-dimension.* e_rel-<reference>-by-dimension.* gains-<setting>.* "
    "adaptation-<setting>.* starts-<panel>.* vectors-cross.* vectors-pairs.*",
    "select": "<out>",
    "select evaluate": "methods.csv targets.csv transfer.csv relative_transfer.csv top_k.csv "
    "steps.csv steps_targets.csv transfer.* transfer-by-<by>.* transfer-means-by-<by>.* "
    "similarity-<method>.* top-k.* steps-ndcg.* tokens-<target>.*",
    "interpret": "report.html report.md prompts.csv tokens.csv spread.csv distances.csv "
    "transfer.csv drift.* norms.* distances.* task-distances.* map-pca.* map-tsne.* transfer.*",
}
"""What each command writes; ``.*`` stands for the two endings of a picture, PNG and SVG."""
FURTHER_FIELDS = ("format", "format_version", "num_virtual_tokens", "hidden_size")


class _Found(Exception):
    """Carries the parsers of fit, validate and test."""


class _ParsersOnly(PromptLabCLI):
    """Makes the parsers and runs nothing."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        """Leave before anything is parsed."""
        raise _Found(self._subcommand_parsers)


def flags() -> Iterator[str]:
    """Flags of every command; not Lightning's trainer's, and not the model's and data's."""
    try:
        _ParsersOnly([])
    except _Found as found:
        parsers = dict(found.args[0])
    parsers |= {name: make_parser(name) for name in COMMANDS if name not in parsers}
    for command, parser in parsers.items():
        for action in parser._actions:
            for flag in action.option_strings or [action.dest]:
                if not flag.startswith(("--trainer", "--model", "--data", "--help", "-h")):
                    yield f"flag {command} {flag}"


def arguments(function: Any, name: str) -> Iterator[str]:
    """Arguments of a constructor, and the fields of those that are dataclasses."""
    for argument, kind in get_type_hints(function).items():
        if argument != "return":
            yield f"argument {name}.{argument}"
            for config in filter(is_dataclass, (kind, *get_args(kind))):
                yield from arguments(config.__init__, f"{name}.{argument}")


def public_names() -> Iterator[str]:
    """Functions, classes and constants that each module defines without a leading underscore."""
    for path in (root := Path(prompt_lab.__file__).parent).rglob("*.py"):
        parts = path.relative_to(root.parent).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        yield f"module {module}"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            places = getattr(node, "targets", [getattr(node, "target", node)])
            for part in (part for place in places for part in getattr(place, "elts", [place])):
                name = getattr(part, "id", getattr(part, "name", "_"))
                if not name.startswith("_"):
                    yield f"name {module}.{name}"


if __name__ == "__main__":
    lines = {f"command {command}" for command in COMMANDS} | {*flags(), *public_names()}
    lines |= {f"export prompt_lab.{name}" for name in prompt_lab.__all__}
    lines |= {f"file {command}: {name}" for command, text in FILES.items() for name in text.split()}
    lines |= set(arguments(CrossFitDataModule.__init__, "data"))
    for name, method in METHODS.items():
        lines |= set(arguments(method.__init__, f"model.{name}"))
    lines |= {f"column results.csv {name}" for name in RESULT_COLUMNS}
    lines |= {f"column curves.csv {name}" for name in CURVE_COLUMNS}
    lines |= {f"field prompt-file {name}" for name in (*METADATA_FIELDS, *FURTHER_FIELDS)}
    lines |= {f"tensor prompt-file {name}" for name in TENSORS}
    print("\n".join(sorted(lines)))
