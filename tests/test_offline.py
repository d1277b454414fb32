"""The commands without trainer: flags from functions, short errors, quiet ends, fast help."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import HIDDEN, make_backbone

from prompt_lab import __main__ as entry
from prompt_lab.__main__ import COMMANDS, TRAINER_COMMANDS, main, make_parser
from prompt_lab.files.prompts import Prompt, load_prompt, save_prompt

pytestmark = pytest.mark.usefixtures("own_folder")


def status(*words: str) -> int:
    """Exit status of a command, also where the parser exits."""
    try:
        return main(list(words))
    except SystemExit as leaving:
        return int(leaving.code or 0)


@pytest.mark.parametrize("words", [("tasks", "list"), ("tasks", "show", "trec")])
def test_nothing_that_is_deprecated_is_called(words, monkeypatch):
    monkeypatch.setenv("JSONARGPARSE_DEPRECATION_WARNINGS", "all")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert status(*words) == 0


def test_help_tells_every_setting_without_torch():
    code = (
        "import contextlib, io, json, sys\n"
        "from prompt_lab.__main__ import main\n"
        "heavy, said = {'torch', 'transformers', 'lightning', 'numpy'}, {}\n"
        "for name in sys.argv[1:]:\n"
        "    out = io.StringIO()\n"
        "    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):\n"
        "        main([*name.split(), '--help'])\n"
        "    said[name] = [out.getvalue(), sorted(heavy & set(sys.modules))]\n"
        "print(json.dumps(said))"
    )
    names = [name for name in COMMANDS if name not in TRAINER_COMMANDS]
    done = subprocess.run([sys.executable, "-c", code, *names], capture_output=True, text=True)
    said = json.loads(done.stdout)
    for name in names:
        text, heavy = said[name]
        assert heavy == [], name
        assert text.startswith(f"usage: prompt-lab {name}")
        settings = [action.dest for action in make_parser(name)._actions]
        assert all(x.upper().removesuffix("S") in text or f"--{x}" in text for x in settings), name


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), "the following arguments are required: prompts"),
        (("x", "--format", "xml"), "'auto', 'text', 'jsonl'"),
        (("x", "--num_beams", "two"), "Expected a <class 'int'>"),
        (("x", "--num_beams", "1.5"), "Given value: 1.5"),
        (("x", "--inputs", "f"), "unrecognized arguments: --inputs f; did you mean --input?"),
        (("x", "--zz=f"), "unrecognized arguments: --zz=f; --help lists all flags"),
        (("x", "--labels"), "argument --labels: expected at least one argument"),
    ],
)
def test_wrong_usage_is_one_sentence_and_status_2(words, sentence, capsys):
    assert status("predict", *words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("prompt-lab: ")
    assert sentence in line


def test_what_is_required_is_named_as_a_flag(capsys):
    assert status("export", "x") == 2
    assert capsys.readouterr().err == "prompt-lab: the following arguments are required: out\n"


def test_words_reach_the_function_as_they_are(monkeypatch):
    def function(prompts: list[str], labels: list[str] | None = None, count: int | None = 3):
        """Do.

        Args:
            prompts: some.
            labels: some.
            count: a number.
        """
        taken.append((prompts, labels, count))

    taken: list[object] = []
    monkeypatch.setattr(entry, "_function", lambda command: function)
    assert status("predict", "a", "b", "--labels", "yes", "1", "null", "[x]") == 0
    assert status("predict", "--count=null", "--", "c", "-d") == 0
    assert taken == [(["a", "b"], ["yes", "1", "null", "[x]"], 3), (["c", "-d"], None, None)]


@pytest.mark.parametrize("word", ["null", "None", "~"])
def test_null_is_null_and_refused_where_it_cannot_be(word, monkeypatch, capsys):
    def function(
        *,
        name: str = "x",
        text: str | None = "x",
        share: float | None = 1.0,
        labels: list[str] | None = None,
        seed: int = 0,
    ):
        """Do.

        Args:
            name: a text.
            text: a text or null.
            share: a number or null.
            labels: some or null.
            seed: a number.
        """
        taken.append((text, share, labels))

    taken: list[object] = []
    monkeypatch.setattr(entry, "_function", lambda command: function)
    assert status("predict", "--text", word, f"--share={word}", "--labels", word) == 0
    assert taken == [(None, None, None)]
    assert status("predict", f"--seed={word}") == 2
    assert status("predict", "--name", word) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith('prompt-lab: Parser key "seed": Expected a')
    assert "None" in said[0]
    assert said[1].startswith("prompt-lab: name is null, or holds null, which is not allowed")
    assert len(said) == 2


def test_bad_input_is_status_1_and_a_traceback_only_on_request(capsys, monkeypatch):
    assert status("export", "nothing", "--out", "x") == 1
    said = capsys.readouterr().err
    assert said.startswith("prompt-lab: no prompt file or folder nothing: give")
    assert said.count("\n") == 1
    monkeypatch.setenv("PROMPT_LAB_TRACEBACK", "1")
    with pytest.raises(FileNotFoundError):
        status("export", "nothing", "--out", "x")


def test_a_reader_that_leaves_early_ends_the_command_quietly():
    code = (
        "import sys\n"
        "from prompt_lab import __main__ as entry\n"
        "def flood(word: str):\n"
        "    '''Write.\n\n    Args:\n        word: a word.\n    '''\n"
        "    for _ in range(100000): print(word)\n"
        "entry._function = lambda command: flood\n"
        "sys.exit(entry.main(['predict', 'word']))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "word\n"
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == ("", 0)


def test_a_prompt_goes_out_and_comes_back(model_folder, capsys):
    """Export for PEFT, import into a store: the same numbers; both print what they wrote."""
    backbone = make_backbone("gpt2")
    given = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    made_for = (str(model_folder("gpt2")), backbone.digest, backbone.tokenizer_digest)
    save_prompt("p.safetensors", Prompt(given, given, "p", *made_for))
    assert status("export", "p.safetensors", "--out", "peft", "--format", "peft") == 0
    assert status("import", "peft", "--out", "store", "--name", "q", "--task", "mine") == 0
    out = capsys.readouterr().out.splitlines()
    assert out == ["peft", str(Path("store/q.safetensors"))]
    back = load_prompt(out[1], backbone)
    assert torch.equal(back.prompt, given)
    assert (back.name, back.task) == ("q", "mine")
