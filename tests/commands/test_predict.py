"""New inputs, answered: against the naive loop, and against what ``prompt-lab test`` writes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, POSITIONS, make_backbone, word_backbone

import prompt_lab
from prompt_lab.__main__ import main
from prompt_lab.commands import fit as cli
from prompt_lab.commands import predict as predict_command
from prompt_lab.commands.predict import read_lines
from prompt_lab.core.prediction import label_scores, predict
from prompt_lab.files.prompts import Prompt, PromptStore, save_prompt

pytestmark = pytest.mark.usefixtures("own_folder")

TEXTS = ["a dog", "the small red house stands on the hill", "she likes", "yes", "no maybe yes no"]
LABELS = ["negative", "positive", "maybe", "no way"]


def bank(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, HIDDEN, generator=generator) for count in lengths]


# ---- the function --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
@pytest.mark.parametrize("tokens", [1, 60, 16384])
def test_answers_are_those_of_one_prompt_and_one_input_at_a_time(backbone, kind, tokens):
    """Reference: a batch of one row, for every input and prompt; prompts of two lengths, mixed."""
    model, prompts = backbone(kind), bank(3, 5, 3)
    limits = {"tokens_per_forward": tokens}
    generated = predict(model, prompts, TEXTS, max_new_tokens=6, **limits)
    chosen = predict(model, prompts, TEXTS, LABELS, **limits)
    scores = label_scores(model, prompts, TEXTS, LABELS, **limits)
    assert scores.shape == (len(TEXTS), 3, len(LABELS))
    for row, text in enumerate(TEXTS):
        for place, prompt in enumerate(prompts):
            batch = model.batch([text])
            assert [generated[row][place]] == model.generate(prompt[None], batch, 6)
            expected = model.score(prompt[None], batch, LABELS)[0]
            torch.testing.assert_close(scores[row, place], expected, rtol=1e-4, atol=1e-4)
            assert chosen[row][place] == LABELS[int(expected.argmax())]
    assert len({text for row in generated for text in row}) > 3  # there is something to compare


@pytest.mark.parametrize("kind", ["gpt2", "bart"])
def test_an_input_is_cut_to_what_the_positions_leave(backbone, kind):
    """Reference: the same input cut by its number of tokens."""
    model, prompts = backbone(kind), bank(8)
    room = POSITIONS - 8 - (0 if model.is_encoder_decoder else 5)
    long = " ".join(["maybe"] * 300)
    asked = {"max_new_tokens": 5}
    cut = predict(model, prompts, [long], max_input_length=room, **asked)
    assert predict(model, prompts, [long], **asked) == cut
    with pytest.raises(ValueError, match=r"8 virtual tokens .* no room .* 128 positions"):
        predict(model, prompts, ["a"], max_new_tokens=POSITIONS + 1)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"inputs": "one text"}, "inputs is one text, 'one text': give a list"),
        ({"prompts": torch.zeros(3, HIDDEN)}, r"one has shape \(32,\)"),
        ({"prompts": []}, "at least one; there are none"),
        ({"prompts": torch.zeros(1, 3, 7)}, r"takes \(R, N, 32\)"),
        ({"inputs": ["a", " \n", "b"]}, r"inputs\[1\] is empty, or spaces alone: give it text"),
        ({"labels": ["a", " "]}, "give two answers or more"),
        ({"labels": ["a", "a"]}, "a label occurs twice"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0: give at least 1"),
        ({"max_input_length": 0}, "max_input_length is 0"),
    ],
)
def test_wrong_arguments_are_named(backbone, wrong, sentence):
    given = {"prompts": torch.zeros(1, 3, HIDDEN), "inputs": ["a"], **wrong}
    with pytest.raises(ValueError, match=sentence):
        predict(backbone("t5"), **given)
    if "labels" in wrong or "inputs" in wrong:
        with pytest.raises(ValueError, match=sentence):
            label_scores(backbone("t5"), **({"labels": LABELS} | given))


# ---- reading -------------------------------------------------------------------------------------


def test_lines_keep_their_number_and_what_belongs_to_the_text():
    raw = ["\ufeff one \r\n", "\n", " \u2028 \n", "zwei\u2028drei\n", "last"]
    lines = list(read_lines(text.encode() for text in raw))
    assert [text for text, _ in lines] == ["one", "", "", "zwei\u2028drei", "last"]
    raw = [b'{"id": 1, "input": " a\\tb "}\n', b"\n"]
    first, second = read_lines(raw, Path("x.jsonl"))
    assert first == ("a\tb", {"id": 1, "input": " a\tb "})
    assert second[0] == ""


@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        (None, b"a\tb\n", "standard input, line 2: the line holds a tab"),
        ("x.txt", b"\xff\n", "x.txt, line 2: not valid UTF-8"),
        ("x.jsonl", b"{\n", "x.jsonl, line 2: not valid JSON"),
        ("x.jsonl", b'"text"\n', "line 2: not an object with a text"),
        ("x.jsonl", b'{"input": 3}\n', "line 2: not an object with a text"),
        ("x.jsonl", b'{"input": "\\ud800"}\n', "line 2: not valid UTF-8"),
        ("x.jsonl", b'{"input": "a", "prompt": "b"}\n', "the field 'prompt' would be overwritten"),
    ],
)
def test_a_line_that_cannot_be_read_is_named(name, line, reason):
    good = b'{"input": "good"}\n' if name == "x.jsonl" else b"good\n"
    with pytest.raises(ValueError, match=reason):
        list(read_lines([good, line], name and Path(name)))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(model_folder, tmp_path_factory):
    """Three prompts for the tiny T5: sst2 (labels), an open task, and a user's own task."""
    folder, model = tmp_path_factory.mktemp("store"), make_backbone("t5")
    facts = (str(model_folder("t5")), model.digest, model.tokenizer_digest)
    tasks = ("glue-sst2", "e2e_nlg_cleaned", "mine")
    made = zip(bank(3, 4, 3), tasks, strict=True)
    PromptStore(folder).save(Prompt(own, own, task, *facts, task) for own, task in made)
    return folder


def run(*words: object) -> int:
    return main(["predict", *map(str, words), "--device=cpu"])


def give(monkeypatch, data: bytes) -> None:
    """Standard input."""
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))


def fit(folder: Path, root: Path) -> Path:
    """Train a scored and a generated task for two steps and test them."""
    status = cli.run(
        [
            *("fit", "--run_dir=r", f"--data.root={root}", "--data.samples=[13]"),
            "--data.tasks=[glue-cola, e2e_nlg_cleaned]",
            *("--model=PromptTuning", f"--model.backbone.name={folder}"),
            *("--model.num_virtual_tokens=4", "--model.num_beams=2", "--test_after_fit"),
            *("--data.task_prefix=true", "--data.max_input_length=40"),
            *("--model.init.name=normal", "--model.init.std=0.01", "--model.learning_rate=0.001"),
            *("--trainer.max_steps=2", "--trainer.val_check_interval=2", "--trainer.logger=false"),
            "--trainer.accelerator=cpu",
        ]
    )
    assert status == 0
    return Path("r")


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_answers_are_those_of_the_command_test(kind, model_folder, fewshot_root, monkeypatch):
    """Reference: ``predictions.jsonl`` of a fit, for the same rows; in Python likewise.

    Without a word about labels, length, beams and prefix: the prompt files know. All three are
    given spaces around the inputs, which a decoder-only model would see.
    """
    shutil.copytree(fewshot_root, "spaced")
    for path in Path("spaced").glob("*/*_test.tsv"):
        lines = path.read_text().splitlines()
        path.write_text("".join(f" {line} \n".replace("\t", "  \t ") for line in lines))
    made = fit(model_folder(kind), Path("spaced"))
    backbone = make_backbone(kind)
    tested = [json.loads(line) for line in (made / "predictions.jsonl").read_text().splitlines()]
    for task, shots in (("glue-cola", 16), ("e2e_nlg_cleaned", 32)):
        rows = Path(f"spaced/{task}/{task}_{shots}_13_test.tsv").read_text().splitlines()
        inputs = [row.split("\t")[0] for row in rows]
        assert all(text.startswith(" ") and text.endswith("  ") for text in inputs)
        give(monkeypatch, "".join(text + "\n" for text in inputs).encode())
        assert run(made / "prompts", "--out=answers.jsonl") == 0
        answers = [json.loads(line) for line in Path("answers.jsonl").read_text().splitlines()]
        assert len(answers) == 2 * len(rows)
        of_task = [row for row in tested if row["task"] == task and row["variant"] == "tuned"]
        of_task.sort(key=lambda row: row["row"])
        mine = [row for row in answers if row["prompt"] == of_task[0]["run"]]
        assert [row["prediction"] for row in mine] == [row["prediction"] for row in of_task]
        assert len({row["prediction"] for row in mine}) > 1

        prompt = prompt_lab.load_prompt(made / "prompts" / f"{mine[0]['prompt']}.safetensors")
        found = predict(
            *(backbone, [prompt.prompt], inputs, prompt.labels),
            max_new_tokens=prompt.max_new_tokens,
            num_beams=prompt.num_beams,
            max_input_length=prompt.max_input_length,
            input_prefix=f" [{task}] ",
        )
        assert [text for (text,) in found] == [row["prediction"] for row in of_task]
        if task == "glue-cola":
            best = [max(row["scores"], key=row["scores"].get) for row in mine]
            assert best == [row["prediction"] for row in mine]


def test_text_has_a_line_per_input_and_a_column_per_prompt(store, capsys, monkeypatch):
    """Reference: :func:`predict`; a line without text gets empty answers."""
    give(monkeypatch, b"a dog\n\n she likes")
    names = ("e2e_nlg_cleaned", "glue-sst2")  # not the order of the folder
    paths = [store / f"{name}.safetensors" for name in names]
    assert run(*paths, "--max_new_tokens=5") == 0
    lines = capsys.readouterr().out.split("\n")
    asked = ["a dog", "she likes"]
    short, longer, _ = bank(3, 4, 3)
    texts = predict(make_backbone("t5"), [longer], asked, max_new_tokens=5)
    labels = predict(make_backbone("t5"), [short], asked, ["negative", "positive"])
    columns = [
        f"{' '.join(text.split())}\t{label}"
        for (text,), (label,) in zip(texts, labels, strict=True)
    ]
    assert lines == [columns[0], "\t", columns[1], ""]


def test_jsonl_has_a_line_per_input_and_prompt(store, capsys):
    Path("in.jsonl").write_text('{"input": "a dog", "id": 7}\n{"input": " ", "id": 8}\n')
    assert run(store, "--input=in.jsonl", "--format=jsonl", "--max_new_tokens=4") == 0
    printed = capsys.readouterr()
    rows = [json.loads(line) for line in printed.out.splitlines()]
    assert [(row["id"], row["prompt"]) for row in rows] == [
        (number, name) for number in (7, 8) for name in ("e2e_nlg_cleaned", "glue-sst2", "mine")
    ]
    assert set(rows[1]["scores"]) == {"negative", "positive"}
    assert "scores" not in rows[0]
    assert [row["prediction"] for row in rows[3:]] == [None] * 3
    assert printed.err.startswith("task mine is not in the package's table, so answers are generat")


def test_labels_and_decoding_decide_how_answers_are_made(store, capsys, monkeypatch):
    path = store / "glue-sst2.safetensors"
    for words, expected in (
        (("--labels", "no", "maybe"), {"no", "maybe"}),
        (("--decoding=generate", "--max_new_tokens=3"), None),
        ((), {"negative", "positive"}),
    ):
        give(monkeypatch, b"a dog\n")
        assert run(path, "--format=jsonl", *words) == 0
        row = json.loads(capsys.readouterr().out)
        assert (set(row["scores"]) if "scores" in row else None) == expected


def test_answers_do_not_depend_on_the_chunks(store, monkeypatch, capsys):
    """Reference: the same lines in one chunk."""
    Path("in.txt").write_text("".join(f"{'very ' * (at % 5)}long line {at}\n" for at in range(20)))
    words = (store / "glue-sst2.safetensors", "--decoding=generate", "--max_new_tokens=4")
    assert run(*words, "--input=in.txt", "--out=whole.txt") == 0
    monkeypatch.setattr(predict_command, "CHUNK", 3)
    assert run(*words, "--input=in.txt") == 0
    assert run(*words, "--input=in.txt", "--out=deep/chunks.txt") == 0
    assert capsys.readouterr().out == Path("whole.txt").read_text()
    assert Path("deep/chunks.txt").read_text() == Path("whole.txt").read_text()


def test_out_is_written_whole_or_not_at_all(store, capsys):
    Path("out.txt").write_text("old")
    Path("in.txt").write_bytes(b"a\nb\nc\td\n")
    words = (store / "glue-sst2.safetensors", "--input=in.txt", "--out=out.txt")
    assert run(*words) == 1
    assert "in.txt, line 3: the line holds a tab" in capsys.readouterr().err
    assert Path("out.txt").read_text() == "old"
    Path("in.txt").write_bytes(b"")
    assert run(*words) == 0
    assert Path("out.txt").read_text() == ""
    assert sorted(path.name for path in Path().iterdir()) == ["in.txt", "out.txt"]


def test_prompts_of_several_backbones_are_refused_unless_they_are_one(
    store, model_folder, capsys, monkeypatch
):
    given = prompt_lab.load_prompt(store / "glue-sst2.safetensors")
    given.backbone, given.name = "another", "other"
    save_prompt("other.safetensors", given)
    words = (store / "glue-sst2.safetensors", "other.safetensors")
    give(monkeypatch, b"a dog\n")
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert "different backbones" in error
    assert "another (other)" in error
    assert run(*words, f"--backbone={model_folder('t5')}") == 0
    assert len(set(capsys.readouterr().out.strip().split("\t"))) == 1
    assert run(*words, f"--backbone={model_folder('bart')}") == 1
    assert "with weights" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("x", "--input=none.txt"), "no input file none.txt"),
        (("x", "--input=empty"), "input is the folder empty: give a file"),
        (("x", "--out=empty"), "out is the folder empty: give a file"),
        (("x", "--max_input_length=0"), "max_input_length is 0: give at least 1"),
        (("x", "--tokens_per_forward=0"), "tokens_per_forward is 0: give at least 1"),
        (("x", "--labels", "a", "b", "--decoding=generate"), "labels are scored and decoding is"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(words, sentence, capsys, monkeypatch):
    give(monkeypatch, b"a\n")
    Path("empty").mkdir()
    assert run(*words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"prompt-lab: {sentence}")
    assert error.count("\n") == 1


def test_labels_that_are_one_to_the_backbone_are_told_or_refused() -> None:

    model = word_backbone()
    prompt = torch.zeros(1, 2, model.hidden_size)
    with pytest.raises(
        ValueError, match="'house', 'sea' are the same tokens to the backbone: give"
    ):
        predict(model, prompt, ["the dog"], ["house", "sea"])
    with pytest.warns(UserWarning, match="'house', 'sea' are the same tokens .*; the first is"):
        predict(model, prompt, ["the dog"], ["yes", "house", "sea"])
