"""What the README says is done here: its commands, its Python, the quickstart's claim."""

from __future__ import annotations

import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from functools import cache
from pathlib import Path

import pandas as pd
import pytest

from prompt_lab.__main__ import main
from prompt_lab.analysis.report import make_report
from prompt_lab.analysis.tables import read_lines

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [ROOT / "README.md", *sorted(ROOT.glob("[!.]*/**/README.md"))]
HEADS = sorted((ROOT / "configs").rglob("*.yaml"))
STUDIES = sorted((ROOT / "configs").rglob("Makefile"))
SHELL = r"""
set -e
told() { printf '%q ' "$@"; echo; }
for name in prompt-lab python wandb docker; do eval "$name() { told $name \"\$@\"; }"; done
for name in pip pytest ruff pyright mkdir cp make; do eval "$name() { :; }"; done
srun() { "$@"; }
torchrun() { while [ "$1" != prompt_lab ]; do shift; done; prompt-lab "${@:2}"; }
PATH=
"""
"""What stands for each program: it tells its words, and nothing runs."""


def run(folder, *command):
    """What a command prints that a user of the README types in a folder."""
    made = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert made.returncode == 0, made.stderr
    return made.stdout.strip()


def scripts(path: Path) -> list[str]:
    """The shell blocks of a document and the commands in its text, or those of a config's head.

    Of a study they are what make would run, on the sandbox and on another model.
    """
    if path.name == "Makefile":
        settings = ([], ["BACKBONE=MODEL", "ROOT=DATA"])
        made = [run(path.parent, "make", "-n", "RUNS=runs", *more) for more in settings]
        lines = "\n".join(made).replace("\\\n", " ").splitlines()
        here = path.parent.relative_to(ROOT)
        lines = [re.sub(r"--config ([\w.])", rf"--config {here}/\1", line) for line in lines]
        return ["\n".join(line for line in lines if line.startswith("prompt-lab "))]
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".yaml":
        blocks = re.findall(r"(?:^#   .*\n)+", text, re.MULTILINE)
        said = [re.sub("^# ", "", block, flags=re.MULTILINE) for block in blocks]
        return [block for block in said if re.match(r"\s+(prompt-lab|for|wandb|WANDB)", block)]
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    return [*blocks, *re.findall(r"`(prompt-lab [^`\n]* --[^`\n]*)`", text)]


@cache
def commands(*paths: Path) -> list[list[str]]:
    """The commands of documents as a shell reads them; one of those unlike in numbers alone."""
    blocks = [block for path in paths for block in scripts(path)]
    with tempfile.TemporaryDirectory() as folder:
        script = [shutil.which("bash") or "bash", "-c", SHELL + "\n".join(blocks)]
        made = subprocess.run(script, cwd=folder, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    unlike = {re.sub(r"\d+", "", line): line for line in reversed(made.stdout.splitlines())}
    return [shlex.split(line) for line in reversed(unlike.values())]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory):
    """The folder of a quickstart as a user runs it, and what it printed."""
    folder = tmp_path_factory.mktemp("quickstart")
    command = [sys.executable, "-m", "prompt_lab", *commands(ROOT / "README.md")[0][1:]]
    # One thread: other tests run beside it, and threads that wait for a busy core take minutes.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [*command, "--run_dir", str(folder / "quickstart")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert made.returncode == 0, made.stderr
    return folder, made.stdout + made.stderr


def test_set_up_takes_exactly_two_commands():
    assert len(re.findall(r"^pip install", README, re.MULTILINE)) == 2


def test_quickstart_tunes_two_held_out_tasks_above_080_for_every_seed(quickstart):
    folder, printed = quickstart
    with (folder / "quickstart" / "results.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    tuned = defaultdict(list)
    for row in rows:
        if row["variant"] == "tuned":
            tuned[row["task"]].append(float(row["test"]))
    assert len(tuned) >= 3
    assert all(len(scores) == 3 for scores in tuned.values())
    assert sum(min(scores) > 0.8 for scores in tuned.values()) >= 2, dict(tuned)
    assert {row["variant"] for row in rows} >= {"no_prompt", "initial_prompt", "chance", "tuned"}
    assert "no prompt" in printed
    assert "tuned" in printed


def example(words: str) -> str:
    """The example of Python that has these words, in the README or beside what it describes."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in DOCS)
    (code,) = (x for x in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if words in x)
    return code


def test_a_table_of_ones_own_is_that_of_the_report(capsys):
    folder = ROOT / "tests" / "analysis" / "report" / "pins" / "prompts"
    code = example("read_csv")
    exec(code.replace("runs/quickstart", str(folder)), {})
    printed = capsys.readouterr().out.split()
    runs = pd.read_csv(folder / "results.csv")
    (section,) = [s for s in make_report(read_lines({"x": folder})) if s.name == "tasks"]
    scores = section.table[section.table["variant"] == "tuned"]
    assert len(scores) == runs[runs["variant"] == "tuned"]["task"].nunique()
    for score in scores["score"]:
        assert f"{score:.3f}" in printed


def test_python_example_reaches_a_good_accuracy(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(example("vocabulary_prompt"), {})
    accuracy, *_ = capsys.readouterr().out.splitlines()
    assert float(accuracy) > 0.8


def test_the_example_of_a_plain_trainer_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {}
    exec(example("lightning as L"), found)
    assert (found["method"].run_dir / "results.csv").is_file()
    assert len(found["answers"][0]) == 8
    assert found["again"].runs == found["method"].runs


def test_commands_on_the_prompts_of_the_quickstart_run(quickstart, monkeypatch, capsys):
    """Answers for a file, for all prompts, a PEFT folder of each, and one of them back again."""
    folder, _ = quickstart
    (folder / "runs").mkdir()
    (folder / "runs" / "quickstart").symlink_to(folder / "quickstart")
    (folder / "texts.txt").write_text("the cold soup was awful\nthe play was lovely\n")
    (folder / "texts.jsonl").write_text('{"input": "the cold soup was awful"}\n')
    page = commands(ROOT / "configs" / "prompt_tuning" / "README.md")
    used = [words for words in page if words[1] in ("predict", "export", "import")]
    monkeypatch.chdir(folder)
    printed = []
    for words in (words for words in used if "last.ckpt" not in " ".join(words)):
        assert main(words[1:]) == 0
        printed.append(capsys.readouterr().out.strip().splitlines())
    assert len(printed) == 4
    assert all(printed[0])
    assert len(printed[0]) == 2
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 9
    assert len(list((folder / "exported").glob("*/adapter_model.safetensors"))) == 9
    assert len(list((folder / "mine").glob("*.safetensors"))) == 1


@pytest.mark.parametrize("words", commands(*DOCS, *HEADS, *STUDIES), ids=" ".join)
def test_commands_parse(words, tmp_path, monkeypatch):
    """Every command is understood by the real command line, up to running it."""
    from prompt_lab.__main__ import COMMANDS, TRAINER_COMMANDS, make_parser
    from prompt_lab.commands.fit import ParseOnly

    program, *words = words
    if program != "prompt-lab":  # its files are there
        assert all((ROOT / word).is_file() for word in words if re.search(r"/.*\.\w+$", word))
        return
    chosen = tmp_path / "chosen.yaml"  # what the command before it writes
    chosen.write_text("data: {tasks: [sandbox-size]}\n")
    words = [str(chosen) if word == chosen.name else word for word in words]
    for count in (2, 1):  # words of a command's name
        if " ".join(words[:count]) in COMMANDS.keys() - TRAINER_COMMANDS.keys():
            parser = make_parser(" ".join(words[:count]))
            assert vars(parser.parse_args(words[count:]))
            return
    monkeypatch.chdir(ROOT)
    words = ["configs/quickstart.yaml" if "config-fit.yaml" in word else word for word in words]
    assert ParseOnly(words).config.subcommand == words[0]


@pytest.mark.parametrize("path", DOCS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        name, _, heading = link.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), link
        text = target.read_text(encoding="utf-8") if heading else ""
        heads = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", head).strip().lower().replace(" ", "-") for head in heads}
        assert not heading or heading in anchors, link


def test_files_that_are_named_exist():
    """Configs, scripts and documents, wherever documents, configs or code name them."""
    code = [*ROOT.glob("prompt_lab/**/*.py"), *ROOT.glob("docker/*"), *ROOT.glob("tests/**/*.py")]
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in [*DOCS, *HEADS, *code]
        for name in re.findall(
            r"(?<![\w/.])((?:configs|docker|prompt_lab|tests)/[\w/.-]+\.(?:ya?ml|py|md))\b",
            path.read_text(encoding="utf-8"),
        )
        if not (ROOT / name).is_file()
    ]
    assert not missing


def test_layout_names_files_that_exist():
    tree = README.split("## Layout")[1].split("```")[1]
    names = re.findall(r"(?<![\w.])[\w/]+(?:\.py|/)", tree)
    package = ROOT / "prompt_lab"
    assert len(names) > 10
    missing = [n for n in names if not ((package / n).exists() or (ROOT / n).exists())]
    assert not missing
