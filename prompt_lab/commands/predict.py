"""The command ``prompt-lab predict``: files or standard input in, text or JSON lines out.

All lines are read before the first is answered, and answers come in the same order. Each prompt
answers as it did in ``prompt-lab test``: its file says how (labels or generation, length, beams,
task prefix), and flags say otherwise.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prompt_lab.core.prediction import check_at_least_one, label_scores, predict, tidy_labels
from prompt_lab.core.text import check_template
from prompt_lab.data.files import BREAK
from prompt_lab.files.prompts import FoundPrompt, find_prompts
from prompt_lab.files.tensors import write_atomically

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.core.backbone import Backbone

CHUNK = 1024
"""Lines that are answered at a time; within them rows are sorted by length."""

OUTPUT_FIELDS = ("prompt", "prediction", "scores")
"""What is added to the fields of a jsonl input."""

DEFAULTS = {
    **{"max_new_tokens": 64, "num_beams": 1, "label_score": "sum"},
    **{"max_input_length": 512, "truncation_side": "right", "template": "plain"},
}
"""Of prompts whose files do not say, such as imported ones."""

Line = tuple[str, dict[str, Any]]
"""An input without spaces around it, and the fields that a jsonl output repeats."""

Way = tuple[list[str] | None, dict[str, Any]]
"""How a prompt answers: labels, None for generation, and the other arguments of predict."""

Answer = tuple[str | None, dict[str, float | None] | None]
"""The text, and the log-likelihood of every label where labels were scored and are asked for."""


def predict_command(
    prompts: list[str],
    input: str | None = None,
    out: str | None = None,
    format: Literal["auto", "text", "jsonl"] = "auto",
    backbone: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    labels: list[str] | None = None,
    decoding: Literal["score", "generate"] | None = None,
    max_new_tokens: int | None = None,
    num_beams: int | None = None,
    max_input_length: int | None = None,
    truncation_side: Literal["right", "left"] | None = None,
    template: Literal["plain", "chat"] | None = None,
    system: str | None = None,
    label_score: Literal["sum", "mean"] | None = None,
    tokens_per_forward: int | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Answer new inputs under one or many prompts, in the order of the input.

    Each prompt answers as in the test of its fit, unless a setting here says otherwise. As in
    few-shot files, spaces around an input are dropped, and the mark ␤ in a line of text is a line
    break. A line without text gets an empty answer (null in jsonl), so that lines stay aligned.
    Text output has one line per input, one column per prompt with tabs between them; white space
    within an answer becomes one space. jsonl output has one line per input and prompt: input,
    prompt, prediction, for labels their log-likelihoods as scores, and the other fields of a jsonl
    input.

    Args:
        prompts: prompt files, prompt stores, folders of fits, PEFT folders or checkpoints, for all
            prompts in them.
        input: file with one input per line, or .jsonl file of objects with a field "input"; - or
            nothing for lines from standard input.
        out: file to write, whole or not at all; standard output by default.
        format: text, jsonl, or auto for jsonl where out ends with .jsonl and text elsewhere.
        backbone: hub id or folder; by default the one that the prompts were made for.
        dtype: dtype of the backbone's weights.
        labels: answers to choose from; by default those of the test, or of a task that is known.
        decoding: score chooses among labels where there are any and generates other answers,
            generate generates all answers; by default as the prompt was tested, or else score.
        max_new_tokens: longest generated answer; by default as tested, or else 64.
        num_beams: beams of generated answers; by default as tested, or else 1.
        max_input_length: longer inputs are cut to so many tokens, and to what the backbone's
            positions leave; by default as the prompt was trained, or else 512.
        truncation_side: where they are cut, right (the end) or left; by default as trained.
        template: chat puts inputs into the chat template of the backbone's tokenizer, plain does
            not; by default as the prompt was trained, or else plain.
        system: system text of the chat; by default as trained.
        label_score: score of a label, the sum of its tokens' log-likelihoods or their mean; by
            default as tested, or else sum.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results; by
            default 2048 on a CPU and 16384 on a GPU.
        device: where it runs; auto takes a GPU where there is one.

    Raises:
        FileNotFoundError, ValueError: what lacks, does not fit or cannot be read, in a sentence.
    """
    import torch

    from prompt_lab.core.backbone import Backbone

    numbers = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    numbers |= {"max_input_length": max_input_length, "tokens_per_forward": tokens_per_forward}
    words = {"truncation_side": truncation_side, "template": template, "system": system}
    words |= {"label_score": label_score}
    given: dict[str, Any] = {k: v for k, v in (numbers | words).items() if v is not None}
    check_at_least_one(**{name: given[name] for name in numbers if name in given})
    if labels is not None:
        labels = tidy_labels(labels)
        if decoding == "generate":
            raise ValueError("labels are scored and decoding is generate: leave one of them out")
    if template == "plain":
        check_template(template, system)
    source = _check_input(input)
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out is the folder {out}: give a file")
    found = find_prompts(*prompts)
    for one in found:
        one.check_answers_alone()
    names = [str(one.metadata["name"]) for one in found]
    if len({*names}) < len(names):  # then they are told apart by their places
        names = [one.where for one in found]
    ways = _ways(found, labels, decoding, given)
    best = "cuda" if torch.cuda.is_available() else "cpu"
    if (device, best) == ("cuda", "cpu"):
        raise ValueError("device is cuda, but there is no GPU that torch can use: use cpu or auto")
    device = best if device == "auto" else device
    model = Backbone.load(backbone or _common_backbone(names, found), dtype).to(device)
    bank = [one.load(model).prompt for one in found]
    as_json = format == "jsonl" or (format == "auto" and (out or "").endswith(".jsonl"))
    with nullcontext(sys.stdin.buffer) if source is None else source.open("rb") as raw:
        lines, written = list(read_lines(raw, source)), []
    for at in range(0, len(lines), CHUNK):
        chunk = lines[at : at + CHUNK]
        texts = [text for text, _ in chunk if text]
        answers = _answers(model, bank, ways, texts, with_scores=as_json)
        written += _written(names, chunk, answers, as_json)
        if out is None:
            print("".join(written), end="", flush=True)
            written.clear()
    if out is not None:
        write_atomically(out, "".join(written).encode())


# ---- input ---------------------------------------------------------------------------------------


def _check_input(given: str | None) -> Path | None:
    if given is None and sys.stdin.isatty():
        raise ValueError("no input: name a file with --input, or pipe lines in")
    if given is None or given == "-":
        return None
    path = Path(given)
    if path.is_dir():
        raise ValueError(f"input is the folder {path}: give a file")
    if not path.exists():
        raise FileNotFoundError(f"no input file {path}")
    return path


def read_lines(raw: Iterable[bytes], path: Path | None = None) -> Iterator[Line]:
    r"""The inputs of a file or stream whose lines end in ``\n`` or ``\r\n``.

    They are bytes, JSON objects if ``path`` ends with .jsonl; without it from standard input. A
    ``ValueError`` for a line that is not UTF-8, has a tab (text) or is no object with the text
    "input" (jsonl).
    """
    is_json = path is not None and path.suffix == ".jsonl"
    for number, data in enumerate(raw, 1):
        try:
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
            text = text.removeprefix("\ufeff") if number == 1 else text
            fields = _fields(text) if is_json else {"input": text.replace(BREAK, "\n")}
            if not is_json and "\t" in text:
                raise ValueError(
                    "the line holds a tab, so it may be a row with answers: give inputs only (cut "
                    "-f1), or a .jsonl file"
                )
            fields["input"].encode()  # JSON can hold half a character
        except ValueError as error:
            reason = "not valid UTF-8" if isinstance(error, UnicodeError) else error
            raise ValueError(f"{path or 'standard input'}, line {number}: {reason}") from None
        yield fields["input"].strip(), fields if is_json else {"input": text}


def _fields(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text) if text.strip() else {"input": ""}
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("input"), str):
        raise ValueError('not an object with a text "input", such as {"input": "some text"}')
    if taken := [name for name in OUTPUT_FIELDS if name in fields]:
        raise ValueError(f"the field {taken[0]!r} would be overwritten by the answer: rename it")
    return fields


# ---- answers -------------------------------------------------------------------------------------


def _ways(
    found: Sequence[FoundPrompt],
    labels: list[str] | None,
    decoding: str | None,
    given: dict[str, Any],
) -> list[Way]:
    """How each prompt answers: as the settings say, else as its file does."""
    from prompt_lab.core.candidates import check_label_score
    from prompt_lab.data.tasks import load_tasks

    tasks, ways, unknown = load_tasks(), [], set()
    for row in (one.metadata for one in found):
        task = str(row.get("task") or "")
        known = tasks.get(task)
        own = {name: row.get(name) or default for name, default in DEFAULTS.items()} | given
        own["input_prefix"] = f" [{task}] " if row.get("task_prefix") else ""
        kept = row.get("system") if own["template"] == "chat" else None
        own["system"] = given.get("system", kept)
        scored = (decoding or row.get("decoding") or "score") == "score"
        choice = labels or ((row.get("labels") or (known and known.labels)) if scored else None)
        check_label_score(own["label_score"], not choice and "label_score" in given)
        own |= {} if choice else {"label_score": "sum"}
        ways.append((list(choice) if choice else None, own))
        if task and known is None and not row.get("decoding"):
            unknown.add(task)
    if len({(own["template"], own["system"]) for _, own in ways}) > 1:
        print(
            "the prompts were trained with different templates or system texts, and each answers "
            "with its own: give --template, and --system for a chat, to answer with one",
            file=sys.stderr,
        )
    if unknown and labels is None and decoding is None:
        print(
            f"task {', '.join(sorted(unknown))} is not in the package's table, so answers are "
            "generated: give --labels to choose among them, or --decoding generate",
            file=sys.stderr,
        )
    return ways


def _common_backbone(names: Sequence[str], found: Sequence[FoundPrompt]) -> str:
    first = {str(one.metadata["backbone"]): name for name, one in zip(names, found, strict=True)}
    if len(first) > 1:
        several = ", ".join(f"{backbone} ({name})" for backbone, name in first.items())
        raise ValueError(
            f"the prompts are for different backbones, {several}: predict with the prompts of one, "
            "or give --backbone where these are one model under several names"
        )
    (name,) = first
    if not name:
        raise ValueError(f"{first[name]} does not name its model: give it with --backbone")
    return name


def _answers(
    model: Backbone,
    bank: Sequence[Tensor],
    ways: Sequence[Way],
    texts: Sequence[str],
    with_scores: bool,
) -> list[list[Answer]]:
    """For every text its R answers; prompts that answer in one way do so together."""
    answers: list[list[Answer]] = [[(None, None)] * len(bank) for _ in texts]
    for at, way in enumerate(ways if texts else ()):
        if way in ways[:at]:
            continue
        labels, own = way
        places = [place for place, other in enumerate(ways) if other == way]
        prompts = [bank[place] for place in places]
        if labels is not None and with_scores:
            own = {k: v for k, v in own.items() if k not in ("max_new_tokens", "num_beams")}
            scores = label_scores(model, prompts, texts, labels, **own).tolist()
            found = [[_best(labels, row) for row in of_text] for of_text in scores]
        else:
            plain = predict(model, prompts, texts, labels, **own)
            found = [[(text, None) for text in of_text] for of_text in plain]
        for whole, part in zip(answers, found, strict=True):
            for place, answer in zip(places, part, strict=True):
                whole[place] = answer
    return answers


def _best(labels: Sequence[str], scores: Sequence[float]) -> Answer:
    told = [round(score, 6) if math.isfinite(score) else None for score in scores]
    return labels[scores.index(max(scores))], dict(zip(labels, told, strict=True))


def _written(
    names: Sequence[str], chunk: Sequence[Line], found: Iterable[list[Answer]], as_json: bool
) -> Iterator[str]:
    """A line per input, a column per prompt; or a JSON object per input and prompt."""
    found = iter(found)
    for line, fields in chunk:
        answers = next(found) if line else [(None, None)] * len(names)
        if not as_json:
            yield "\t".join(" ".join((text or "").split()) for text, _ in answers) + "\n"
            continue
        for name, (text, scores) in zip(names, answers, strict=True):
            row = {**fields, "prompt": name, "prediction": text}
            if scores:
                row["scores"] = scores
            yield json.dumps(row, ensure_ascii=False) + "\n"
