"""New inputs, answered under one or many prompts: ``predict``, and the command of that name.

``predict`` and ``label_scores`` take texts and prompts in memory. The command reads inputs line by
line and writes answers in the same order, a chunk of lines at a time, so neither has to fit in
memory. Inputs are taken as they are: the wording, and a task prefix where the prompt was trained
with one, are the caller's. References and metrics are left to ``prompt-lab test``.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

if TYPE_CHECKING:
    from torch import Tensor

    from prompt_lab.backbone import Backbone
    from prompt_lab.batch import Batch

FIRST_CHUNK, LARGEST_CHUNK = 64, 4096
"""Lines that the command answers at a time, doubling; within them rows are sorted by length."""

OUTPUT_FIELDS = ("prompt", "prediction", "scores")
"""What the command adds to the fields of a jsonl input."""

Answer = tuple[str, dict[str, float] | None]
"""The text, and the log-likelihood of every label where labels were scored and are asked for."""


def predict(
    backbone: Backbone,
    prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[str],
    labels: Sequence[str] | None = None,
    *,
    max_new_tokens: int = 64,
    num_beams: int = 1,
    tokens_per_forward: int = 16384,
    max_input_length: int = 512,
) -> list[list[str]]:
    """Answer B inputs under R prompts: B lists of R texts.

    Args:
        backbone: the frozen model that the prompts were made for.
        prompts: (R, N, D), or R prompts (N, D) whose N may differ.
        inputs: B texts.
        labels: C answers to choose from by log-likelihood; without them answers are generated.
        max_new_tokens: longest generated answer.
        num_beams: beams of generated answers; 1 is greedy.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results.
        max_input_length: longer inputs are cut to so many tokens, and to what the positions of the
            backbone leave beside prompt and answer.

    Raises:
        ValueError: prompts of another shape or width, one text instead of several, labels that
            occur twice, a number below 1, or no positions left for the input.
    """
    _check_at_least_one(max_new_tokens=max_new_tokens, num_beams=num_beams)
    if labels is not None:
        _check_labels(labels)
    longest = max_new_tokens if labels is None else _longest(backbone, labels)
    pairs = _batches(
        *(backbone, prompts, inputs, longest),
        beams=num_beams if labels is None else 1,
        tokens_per_forward=tokens_per_forward,
        max_input_length=max_input_length,
    )
    answers = [[""] * len(prompts) for _ in inputs]
    for prefix, batch, places in pairs:
        if labels is None:
            texts = backbone.generate(prefix, batch, max_new_tokens, num_beams)
        else:
            texts = [labels[choice] for choice in backbone.choose(prefix, batch, labels)]
        for row, at, text in zip(batch.rows, batch.prompts, texts, strict=True):
            answers[row][places[at]] = text
    return answers


def label_scores(
    backbone: Backbone,
    prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[str],
    labels: Sequence[str],
    *,
    tokens_per_forward: int = 16384,
    max_input_length: int = 512,
) -> Tensor:
    """Log-likelihoods of C labels for B inputs under R prompts: (B, R, C) float32, on the CPU.

    The largest along C is the answer of :func:`predict`; arguments and errors are as there.
    """
    import torch

    _check_labels(labels)
    scores = torch.empty(len(inputs), len(prompts), len(labels))
    for prefix, batch, places in _batches(
        *(backbone, prompts, inputs, _longest(backbone, labels)),
        tokens_per_forward=tokens_per_forward,
        max_input_length=max_input_length,
    ):
        columns = [places[at] for at in batch.prompts]
        scores[batch.rows, columns] = backbone.score(prefix, batch, labels).cpu()
    return scores


def _batches(
    backbone: Backbone,
    prompts: Tensor | Sequence[Tensor],
    inputs: Sequence[str],
    longest: int,
    *,
    beams: int = 1,
    tokens_per_forward: int,
    max_input_length: int,
) -> Iterator[tuple[tuple[Tensor, ...], Batch, list[int]]]:
    """Every input under every prompt, longest first: the prompts' prefix, rows, prompt numbers.

    ``batch.rows`` are places in ``inputs``, and ``batch.prompts`` places among the prompt numbers.
    """
    import torch

    from prompt_lab.batch import make_batch
    from prompt_lab.data.batches import cut

    _check_at_least_one(tokens_per_forward=tokens_per_forward, max_input_length=max_input_length)
    if isinstance(inputs, str):
        raise ValueError(f"inputs is one text, {inputs[:40]!r}: give a list of texts")
    for places in _groups(prompts, tokens_per_forward):
        bank = torch.stack([prompts[place] for place in places]).to(backbone.device)
        with torch.no_grad():
            prefix = backbone.prefix(bank)
        room = _input_room(backbone, bank.shape[1], longest, max_input_length)
        ids = backbone.encode_inputs(inputs, room)
        pairs = [(at, row) for row in range(len(ids)) for at in range(len(places))]
        pairs.sort(key=lambda pair: -len(ids[pair[1]]))
        extra = bank.shape[1] + beams * longest
        for start, stop in cut([len(ids[row]) for _, row in pairs], tokens_per_forward, extra):
            part = pairs[start:stop]
            batch = make_batch(
                [ids[row] for _, row in part],
                None,
                [at for at, _ in part],
                pad_id=backbone.pad_id,
                left_padded=not backbone.is_encoder_decoder,
                rows=[row for _, row in part],
            )
            yield prefix, batch.to(backbone.device), places


def _groups(prompts: Tensor | Sequence[Tensor], tokens_per_forward: int) -> list[list[int]]:
    """Numbers of prompts of equal N, so many together as one pass over themselves allows."""
    wrong = next((prompt.shape for prompt in prompts if prompt.dim() != 2), None)
    if wrong is not None or len(prompts) == 0:
        given = "there are none" if wrong is None else f"one has shape {tuple(wrong)}"
        raise ValueError(f"prompts are (R, N, D), or a list of (N, D), at least one; {given}")
    by_length: dict[int, list[int]] = {}
    for place, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(place)
    groups = []
    for count, places in by_length.items():
        size = max(1, tokens_per_forward // max(1, count))
        groups += [places[at : at + size] for at in range(0, len(places), size)]
    return groups


def _input_room(backbone: Backbone, virtual_tokens: int, longest: int, wanted: int) -> int:
    """How many tokens of an input are kept."""
    positions = backbone.max_positions
    if positions is None:
        return wanted
    room = positions - virtual_tokens - (0 if backbone.is_encoder_decoder else longest)
    if room < 1 or longest > positions:
        raise ValueError(
            f"{virtual_tokens} virtual tokens and answers of up to {longest} tokens leave no room "
            f"for an input in the {positions} positions of backbone {backbone.name!r}: lower "
            "max_new_tokens"
        )
    return min(wanted, room)


def _longest(backbone: Backbone, labels: Sequence[str]) -> int:
    """Tokens of the longest label."""
    return max(map(len, backbone.encode_targets(labels)))


def _check_labels(labels: Sequence[str]) -> None:
    """Refuse a single text, no labels, empty labels, and labels that occur twice."""
    if isinstance(labels, str) or not labels or not all(label.strip() for label in labels):
        raise ValueError(f"labels are {labels!r}: give a list of answers to choose from")
    if len(set(labels)) < len(labels):
        raise ValueError(f"a label occurs twice in {list(labels)}: give each once")


def _check_at_least_one(**numbers: int) -> None:
    """Refuse numbers below 1."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}: give at least 1")


# ---- the command ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Line:
    """One line of input.

    Attributes:
        text: what is answered, without spaces around it; lines without text are not answered.
        fields: what a jsonl output line repeats, ``input`` among them.
    """

    text: str
    fields: dict[str, Any]


def predict_command(
    prompts: list[str],
    input: str | None = None,
    out: str | None = None,
    format: Literal["auto", "text", "jsonl"] = "auto",
    backbone: str | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    labels: list[str] | None = None,
    decoding: Literal["score", "generate"] = "score",
    max_new_tokens: int = 64,
    num_beams: int = 1,
    tokens_per_forward: int = 16384,
    max_input_length: int = 512,
    device: Literal["auto", "cpu", "cuda"] = "auto",
) -> None:
    """Answer new inputs under one or many prompts, in the order of the input.

    Spaces around an input are dropped, as in few-shot files; a line without text gets an empty
    answer (null in jsonl), so that lines stay aligned. Text output has one line per input, one
    column per prompt with tabs between them; white space within an answer becomes one space. jsonl
    output has one line per input and prompt: input, prompt, prediction, for labels their
    log-likelihoods as scores, and the other fields of a jsonl input.

    Args:
        prompts: prompt files, or folders of prompt stores for all prompts in them.
        input: file with one input per line, or .jsonl file of objects with a field "input"; - or
            nothing for lines from standard input.
        out: file to write, whole or not at all; standard output by default.
        format: text, jsonl, or auto for jsonl where out ends with .jsonl and text elsewhere.
        backbone: hub id or folder; by default the one that the prompts were made for.
        dtype: dtype of the backbone's weights.
        labels: answers to choose from; by default those of each prompt's task, where the package
            knows the task.
        decoding: score chooses among labels where there are any and generates other answers,
            generate generates all answers.
        max_new_tokens: longest generated answer.
        num_beams: beams of generated answers; 1 is greedy.
        tokens_per_forward: most padded tokens of one forward pass; bounds memory, not results.
        max_input_length: longer inputs are cut to so many tokens, and to what the backbone's
            positions leave.
        device: auto takes a GPU where there is one.

    Raises:
        FileNotFoundError: a prompt or input file that is not there.
        ValueError: prompts for different backbones, bad settings, or a line that cannot be read.
    """
    _check_at_least_one(max_new_tokens=max_new_tokens, num_beams=num_beams)
    _check_at_least_one(tokens_per_forward=tokens_per_forward, max_input_length=max_input_length)
    if labels is not None:
        _check_labels(labels)
        if decoding == "generate":
            raise ValueError("labels are scored and decoding is generate: leave one of them out")
    source = _check_input(input)
    if out is not None and Path(out).is_dir():
        raise ValueError(f"out is the folder {out}: give a file")
    names, paths, metadata = _find_prompts(prompts)
    allowed = _labels_of(metadata, labels, decoding)
    model = _load(backbone or _common_backbone(names, metadata), dtype, device)
    bank = _load_bank(paths, model)
    as_json = format == "jsonl" or (format == "auto" and (out or "").endswith(".jsonl"))
    limits = {"tokens_per_forward": tokens_per_forward, "max_input_length": max_input_length}
    answer = partial(predict, model, max_new_tokens=max_new_tokens, num_beams=num_beams, **limits)
    score = partial(label_scores, model, **limits) if as_json else None
    write = partial(_json_lines, names) if as_json else _text_lines
    with _opened(source) as raw, _output(out) as file:
        lines, size = read_lines(raw, source), FIRST_CHUNK
        while chunk := list(islice(lines, size)):
            file.writelines(write(chunk, _answer(chunk, bank, allowed, answer, score)))
            file.flush()
            size = min(2 * size, LARGEST_CHUNK)


def read_lines(raw: Iterable[bytes], path: Path | None = None) -> Iterator[Line]:
    r"""The inputs of a file or stream whose lines end in ``\n`` or ``\r\n``.

    Args:
        raw: the lines as bytes.
        path: where they come from, None for standard input; JSON objects if it ends with .jsonl.

    Raises:
        ValueError: a line that is not UTF-8, has a tab (text) or is not an object with the text
            "input" (jsonl); naming file, line and reason.
    """
    parse = _parse_json if path is not None and path.suffix == ".jsonl" else _parse_text
    for number, data in enumerate(raw, 1):
        try:
            text = data.decode("utf-8").removesuffix("\n").removesuffix("\r")
            line = parse(text.removeprefix("\ufeff") if number == 1 else text)
            line.text.encode()  # JSON can hold half a character
        except ValueError as error:
            reason = "not valid UTF-8" if isinstance(error, UnicodeError) else error
            raise ValueError(f"{path or 'standard input'}, line {number}: {reason}") from None
        yield line


def _parse_text(text: str) -> Line:
    """A line of a text file."""
    if "\t" in text:
        raise ValueError(
            "the line holds a tab, so it may be a row with answers: give inputs only (cut -f1), or "
            "a .jsonl file"
        )
    return Line(text.strip(), {"input": text})


def _parse_json(text: str) -> Line:
    """A line of a jsonl file."""
    if not text.strip():
        return Line("", {"input": ""})
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("input"), str):
        raise ValueError('not an object with a text "input", such as {"input": "some text"}')
    taken = [name for name in OUTPUT_FIELDS if name in fields]
    if taken:
        raise ValueError(f"the field {taken[0]!r} would be overwritten by the answer: rename it")
    return Line(fields["input"].strip(), fields)


def _check_input(given: str | None) -> Path | None:
    """The input file, None for standard input."""
    if given is None and sys.stdin.isatty():
        raise ValueError("no input: name a file with --input, or pipe lines in")
    if given in (None, "-"):
        return None
    path = Path(given or "")
    if path.is_dir():
        raise ValueError(f"input is the folder {path}: give a file")
    if not path.exists():
        raise FileNotFoundError(f"no input file {path}")
    return path


def _find_prompts(given: Sequence[str]) -> tuple[list[str], list[Path], list[dict[str, Any]]]:
    """Names, files and metadata; where names repeat, prompts are named by their files."""
    from prompt_lab.prompt_file import read_metadata

    paths = [path for text in given for path in _prompt_files(Path(text))]
    metadata = [read_metadata(path) for path in paths]
    names = [str(row["name"]) for row in metadata]
    unique = len(set(names)) == len(names)
    return names if unique else [str(path) for path in paths], paths, metadata


def _prompt_files(path: Path) -> list[Path]:
    """A prompt file, or the files of a store."""
    if not path.is_dir():
        return [path]
    if (path / "adapter_config.json").is_file():
        raise ValueError(f"{path} is a PEFT folder: turn it into a prompt with prompt-lab import")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        inner = path / "prompts"
        hint = f"; did you mean {inner}?" if inner.is_dir() else ""
        raise ValueError(f"no prompt files in folder {path}{hint}")
    return files


def _labels_of(
    metadata: Sequence[dict[str, Any]], labels: Sequence[str] | None, decoding: str
) -> list[tuple[str, ...] | None]:
    """What each prompt's answers are chosen from; None where they are generated."""
    from prompt_lab.data.tasks import load_tasks

    if labels is not None or decoding == "generate":
        return [None if labels is None else tuple(labels)] * len(metadata)
    tasks = load_tasks()
    names = [str(row.get("task", "")) for row in metadata]
    unknown = sorted({name for name in names if name and name not in tasks})
    if unknown:
        print(
            f"task {', '.join(unknown)} is not in the package's table, so answers are generated: "
            "give --labels to choose among them, or --decoding generate",
            file=sys.stderr,
        )
    return [tasks[name].labels if name in tasks else None for name in names]


def _common_backbone(names: Sequence[str], metadata: Sequence[dict[str, Any]]) -> str:
    """The one backbone that all prompts name."""
    first = {str(row["backbone"]): name for name, row in zip(names, metadata, strict=True)}
    if len(first) > 1:
        found = ", ".join(f"{backbone} ({name})" for backbone, name in first.items())
        raise ValueError(
            f"the prompts are for different backbones, {found}: predict with the prompts of one, "
            "or give --backbone where these are one model under several names"
        )
    return next(iter(first))


def _load(name: str, dtype: Literal["float32", "bfloat16"], device: str) -> Backbone:
    """The backbone on its device."""
    import torch

    from prompt_lab.backbone import Backbone

    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is cuda, but there is no GPU that torch can use: use cpu or auto")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return Backbone.load(name, dtype).to(device)


def _load_bank(paths: Sequence[Path], backbone: Backbone) -> list[Tensor]:
    """The prompts (N, D), each checked against the backbone."""
    from prompt_lab.prompt_file import load_prompt

    return [load_prompt(path, backbone).prompt for path in paths]


def _answer(
    chunk: Sequence[Line],
    bank: Sequence[Tensor],
    allowed: Sequence[tuple[str, ...] | None],
    answer: Callable[..., list[list[str]]],
    score: Callable[..., Tensor] | None,
) -> list[list[Answer | None]]:
    """For every line its R answers; None for lines without text."""
    answers: list[list[Answer | None]] = [[None] * len(bank) for _ in chunk]
    asked = [at for at, line in enumerate(chunk) if line.text]
    texts = [chunk[at].text for at in asked]
    for labels in dict.fromkeys(allowed) if asked else ():
        places = [place for place, own in enumerate(allowed) if own == labels]
        prompts = [bank[place] for place in places]
        if labels is not None and score is not None:
            found = [
                [_best(labels, row) for row in of] for of in score(prompts, texts, labels).tolist()
            ]
        else:
            found = [[(text, None) for text in of] for of in answer(prompts, texts, labels)]
        for at, of_line in zip(asked, found, strict=True):
            for place, one in zip(places, of_line, strict=True):
                answers[at][place] = one
    return answers


def _best(labels: Sequence[str], scores: Sequence[float]) -> Answer:
    """The label of highest score, with all scores."""
    return labels[max(range(len(labels)), key=scores.__getitem__)], dict(
        zip(labels, scores, strict=True)
    )


def _text_lines(chunk: Sequence[Line], answers: Iterable[Sequence[Answer | None]]) -> Iterator[str]:
    """A line per input, a column per prompt."""
    for of_line in answers:
        columns = ("" if one is None else " ".join(one[0].split()) for one in of_line)
        yield "\t".join(columns) + "\n"


def _json_lines(
    names: Sequence[str], chunk: Sequence[Line], answers: Iterable[Sequence[Answer | None]]
) -> Iterator[str]:
    """A JSON object per input and prompt."""
    for line, of_line in zip(chunk, answers, strict=True):
        for name, one in zip(names, of_line, strict=True):
            text, scores = one or (None, None)
            row = {**line.fields, "prompt": name, "prediction": text}
            if scores is not None:
                row["scores"] = {
                    label: round(value, 6) if math.isfinite(value) else None
                    for label, value in scores.items()
                }
            yield json.dumps(row, ensure_ascii=False) + "\n"


def _opened(path: Path | None) -> AbstractContextManager[Iterable[bytes]]:
    """The lines of a file or of standard input, as bytes."""
    return nullcontext(sys.stdin.buffer) if path is None else path.open("rb")


@contextmanager
def _output(out: str | None) -> Iterator[TextIO]:
    """Standard output, or a draft that becomes the file ``out`` once all is written."""
    if out is None:
        yield sys.stdout
        return
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with draft.open("w", encoding="utf-8", newline="") as file:
            yield file
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)
