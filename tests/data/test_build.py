"""Building few-shot files: from own rows, from Parquet files, and from a stand-in for the hub."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from prompt_lab.commands.build import build_tasks
from prompt_lab.data.build import build_task
from prompt_lab.data.files import DataError, read_task
from prompt_lab.data.tasks import Task, find_tasks

COLORS = {"sky": "blue", "rose": "red", "grass": "green"}
ROWS = """
colors:
  {metric: ACC, ontology: cls/other, shots: 2, labels: [blue, red, green], hub: owner/paint,
   config: plain, train: train, test: validation, input: "what is {{thing|clean}}?", label: color}
things:
  {metric: EM, shots: 3, kind: text_to_text, hub: owner/paint, config: plain, train: train,
   input: "{{color}}", target: "{{thing}}"}
bare: {metric: ACC, shots: 2}
"""


def rows_of(count: int) -> list[dict[str, object]]:
    """Rows of the made-up data set."""
    things = list(COLORS)
    return [
        {"thing": f"{things[i % 3]} {i}", "color": list(COLORS).index(things[i % 3])}
        for i in range(count)
    ]


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    """A user's task file."""
    path = tmp_path / "tasks.yaml"
    path.write_text(ROWS, encoding="utf-8")
    return path


@pytest.fixture
def colors(task_file: Path) -> Task:
    """A task with three labels."""
    return find_tasks(["colors"], task_file)[0]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with a user's own rows, as JSON lines."""
    for task in ("colors", "things"):
        for split, count in (("train", 30), ("validation", 9)):
            write_json_lines(tmp_path / "own" / task / f"{split}.jsonl", rows_of(count))
    return tmp_path / "own"


def write_json_lines(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows, one a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_parquet(path: Path, rows: list[dict[str, object]]) -> None:
    """Write rows as the hub has them, in two files, with label names in the schema."""
    from datasets import ClassLabel, Dataset, Features, Value

    names = list(COLORS.values())
    schema = Features({"thing": Value("string"), "color": ClassLabel(names=names)})
    path.mkdir(parents=True)
    half = len(rows) // 2
    for number, part in enumerate((rows[:half], rows[half:])):
        Dataset.from_list(part, features=schema).to_parquet(path / f"000{number}.parquet")


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the hub's Parquet files."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for split, count in (("train", 30), ("validation", 9)):
        write_parquet(tmp_path / "copy" / "owner" / "paint" / "plain" / split, rows_of(count))
    return tmp_path / "copy"


def contents(root: Path) -> dict[str, bytes]:
    """The few-shot files below a folder."""
    return {path.name: path.read_bytes() for path in sorted(root.rglob("*.tsv"))}


def build(out: Path, source: Path, task_file: Path, *, tasks: list[str], **settings: object) -> int:
    """Run the command's function."""
    return build_tasks(
        tasks=tasks, out=str(out), source=str(source), task_file=str(task_file), **settings
    )


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "parquet", "hub copy"])
def test_every_format_gives_the_same_files(tmp_path, colors, own, ending, copy):
    folder = tmp_path / ending / "colors"
    for split, count in (("train", 30), ("validation", 9)):
        path, rows = folder / f"{split}.{ending}", rows_of(count)
        if ending == "hub copy":
            continue
        folder.mkdir(parents=True, exist_ok=True)
        if ending == "json":
            path.write_text(json.dumps(rows), encoding="utf-8")
        elif ending == "parquet":
            from datasets import Dataset

            Dataset.from_list(rows).to_parquet(path)
        else:
            mark = "," if ending == "csv" else "\t"
            lines = [mark.join(map(str, values)) for values in (rows[0], *map(dict.values, rows))]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    build_task(colors, tmp_path / "a", str(own))
    build_task(colors, tmp_path / "b", str(copy if ending == "hub copy" else tmp_path / ending))
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_files_hold_k_rows_of_each_label_or_set_and_can_be_read(tmp_path, task_file, colors, own):
    built = build_task(colors, tmp_path / "out", str(own))
    assert built.is_new
    assert len(built.files) == 15
    splits = read_task(tmp_path / "out", colors, 13, allow_overlap=True)
    held = Counter(answers[0] for answers in splits["dev"].references)
    assert held == dict.fromkeys(["blue", "red", "green"], 2)
    assert splits["test"].inputs[:2] == ["what is sky 0?", "what is rose 1?"]
    things = find_tasks(["things"], task_file)[0]  # its only split is parted 80 to 20
    build_task(things, tmp_path / "out", str(own), samples=[100])
    splits = read_task(tmp_path / "out", things, 100, allow_overlap=True)
    assert {name: len(split) for name, split in splits.items()} == {"train": 3, "dev": 3, "test": 6}


def test_a_second_run_builds_nothing_and_a_missing_file_is_made_again(tmp_path, colors, own):
    out = tmp_path / "out"
    build_task(colors, out, str(own))
    first = contents(out)
    assert not build_task(colors, out, str(own)).is_new
    next(out.rglob("*_13_dev.tsv")).unlink()
    assert build_task(colors, out, str(own)).is_new
    assert contents(out) == first


def test_further_samples_and_k_join_those_that_are_there(tmp_path, colors, own):
    out = tmp_path / "out"
    build_task(colors, out, str(own), samples=[100])
    built = build_task(colors, out, str(own), samples=[7])
    assert len(built.files) == 6
    build_task(colors, out, str(own), samples=[7], shots=4)
    build_task(colors, out, str(own), samples=[7], shots="all")
    rows = {name: content.count(b"\n") for name, content in contents(out).items()}
    assert rows["colors_4_7_train.tsv"] == 12
    assert (rows["colors_all_7_train.tsv"], rows["colors_all_7_dev.tsv"]) == (27, 3)


def write_lines(folder: Path, **splits: list[str]) -> None:
    """Write whole sets in the gym's form."""
    folder.mkdir(parents=True)
    for split, lines in splits.items():
        (folder / f"{split}.tsv").write_text("".join(line + "\n" for line in lines))


def test_finished_lines_give_the_files_that_their_rows_give(tmp_path, colors, own):
    """Reference: the same data set as rows of the hub, with templates; dev joins the pool."""
    lines = [f"what is {r['thing']}?\t{list(COLORS.values())[r['color']]}" for r in rows_of(30)]
    tests = [f"what is {r['thing']}?\t{list(COLORS.values())[r['color']]}" for r in rows_of(9)]
    write_lines(tmp_path / "lines" / "colors", train=lines[:25], dev=lines[25:], test=tests)
    for shots in (2, "all"):
        build_task(colors, tmp_path / "a", str(own), shots)
        build_task(colors, tmp_path / "b", str(tmp_path / "lines"), shots, has_lines=True)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize(
    ("splits", "reason"),
    [
        ({"train": ["a\tblue"]}, r"no file .*test.tsv: finished lines stand in"),
        ({"test": ["a\tblue"]}, r"no file .*train.tsv"),
        ({"train": ["a"], "test": ["a\tblue"]}, r"train.tsv, line 1: the target column is missing"),
        ({"train": ["a\tblue"], "test": ["a\tblue"]}, "no row to draw from has the label red"),
    ],
)
def test_lines_that_are_not_there_or_broken_are_said(tmp_path, colors, splits, reason):
    write_lines(tmp_path / "lines" / "colors", **splits)
    with pytest.raises(DataError, match=reason):
        build_task(colors, tmp_path / "out", str(tmp_path / "lines"), has_lines=True)
    assert not (tmp_path / "out").exists()


def test_samples_apart_from_another_share_none_of_its_rows(tmp_path, colors, own):
    build_task(colors, tmp_path / "a", str(own), samples=[100])
    build_task(colors, tmp_path / "b", str(own), samples=[100])
    for is_new in (True, False):
        built = build_task(colors, tmp_path / "b", str(own), samples=[21, 42], apart_from=[100])
        assert built.is_new == is_new
    with pytest.raises(DataError, match="has other rows than would be built now"):
        build_task(colors, tmp_path / "b", str(own), samples=[21])
    seen, new = contents(tmp_path / "a"), contents(tmp_path / "b")
    drawn = {line for name in seen if "test" not in name for line in seen[name].split(b"\n")[:-1]}
    assert len(drawn) == 12
    for name, content in new.items():
        if "test" not in name and "_100_" not in name:
            assert not drawn & set(content.split(b"\n"))
    assert new["colors_2_21_test.tsv"] == seen["colors_2_100_test.tsv"]


def test_files_of_other_settings_are_kept_unless_overwritten(tmp_path, colors, own):
    out = tmp_path / "out"
    build_task(colors, out, str(own))
    with pytest.raises(DataError, match="with crossfit sampling: give another out, or overwrite"):
        build_task(colors, out, str(own), sampling_law="stratified")
    (out / "colors" / "colors_2_build.json").unlink()
    (out / "colors" / "colors_2_13_dev.tsv").write_text("x\tblue\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"colors_2_13_dev.tsv has other rows than would be built"):
        build_task(colors, out, str(own))
    assert build_task(colors, out, str(own), overwrite=True).is_new


def test_files_of_a_row_that_was_changed_are_not_taken_for_those_of_the_new_one(
    tmp_path, task_file, colors, own
):
    out, changed = tmp_path / "out", ROWS.replace("what is", "name the colour of")
    build_task(colors, out, str(own))
    task_file.write_text(changed, encoding="utf-8")
    new = find_tasks(["colors"], task_file)[0]
    with pytest.raises(DataError, match=r"_train.tsv has other rows .* another out, or overwrite"):
        build_task(new, out, str(own))
    assert build_task(new, out, str(own), samples=[100], overwrite=True).is_new
    assert not build_task(new, out, str(own), samples=[100]).is_new
    with pytest.raises(DataError, match=r"_13_train.tsv has other rows"):
        build_task(new, out, str(own))


def test_rows_with_empty_fields_are_left_out_and_line_breaks_are_marked(tmp_path, task_file, own):
    texts = ("a\nb", " ", "c\td", "d", "e", "f", "g\r\nh\n", "h")
    rows = [{"thing": text, "color": 0} for text in texts]
    write_json_lines(own / "things" / "train.jsonl", rows)
    things = find_tasks(["things"], task_file)[0]
    built = build_task(things, tmp_path / "out", str(own), samples=[100])
    text = b"".join(contents(tmp_path / "out").values()).decode()
    assert {"0\ta␤b", "0\tc d", "0\tg␤h"} <= {*text.split("\n")}
    assert "\t \n" not in text
    assert [note.split(": ")[1] for note in built.notes] == [
        "tabs or line breaks in 1 rows became spaces",
        "1 rows with an empty input or answer were left out",
    ] or len(built.notes) == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda text: text.replace('"color"', '"colour"'),
            "row 1: .*'color' is undefined; the row",
        ),
        (lambda text: text.replace('"thing"', '"name"'), "row 1: .*'thing' is undefined; the row"),
        (lambda text: "".join(text.splitlines(keepends=True)[:2]), "label green; the 2 rows have"),
        (lambda text: "", "colors: split train has no rows"),
        (lambda text: text[:-9], "train.jsonl, row 30: .*; mend or replace the file"),
        (None, "no file .*train.{jsonl,"),
    ],
)
def test_rows_that_do_not_fit_give_one_line_and_no_file(tmp_path, colors, own, change, reason):
    path = own / "colors" / "train.jsonl"
    if change is None:
        path.unlink()
    else:
        path.write_text(change(path.read_text()))
    with pytest.raises(DataError, match=reason) as caught:
        build_task(colors, tmp_path / "out", str(own))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_missing_or_broken_parts_of_a_data_set_are_said(tmp_path, task_file, colors, copy):
    path = copy / "owner/paint/plain/train/0001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[:50])
    with pytest.raises(DataError, match=r"0000.parquet cannot be read: .*") as caught:
        build_task(colors, tmp_path / "out", str(copy))
    assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    (copy / "owner/paint/plain/validation").rename(copy / "owner/paint/plain/partial-validation")
    with pytest.raises(DataError, match="the hub has only a part of validation"):
        build_task(colors, tmp_path / "out", str(copy))
    (copy / "owner/paint/plain/partial-validation").rename(copy / "owner/paint/plain/dev")
    with pytest.raises(DataError, match="has no split 'validation'; it has dev, train"):
        build_task(colors, tmp_path / "out", str(copy))
    (copy / "owner/paint/plain").rename(copy / "owner/paint/fancy")
    with pytest.raises(DataError, match="should have a configuration 'plain'; it has fancy"):
        build_task(colors, tmp_path / "out", str(copy))
    with pytest.raises(DataError, match=r"no folder .*colors and none .*paint with the rows"):
        build_task(colors, tmp_path / "out", str(tmp_path / "cache"))
    with pytest.raises(DataError, match="bare: its row does not say what it is made from"):
        build_task(find_tasks(["bare"], task_file)[0], tmp_path / "out", str(copy))


def test_a_rare_label_without_a_training_row_is_told(tmp_path, colors):
    lines = [f"{n}\t{'red' if n else 'blue'}" for n in range(20)] + ["x\tgreen"]
    write_lines(tmp_path / "lines" / "colors", train=lines, test=lines)
    settings = {"shots": 3, "samples": [100], "sampling_law": "stratified", "has_lines": True}
    built = build_task(colors, tmp_path / "out", str(tmp_path / "lines"), **settings)
    assert built.notes == ["100 train: no row has the label blue, green"]


def test_a_k_that_fails_does_not_lose_the_others(tmp_path, task_file, own, capsys):
    settings = {"sampling": "stratified", "shots": ["2", "6"], "samples": [100]}
    assert build(tmp_path / "out", own, task_file, tasks=["colors"], **settings) == 1
    assert {name.split("_")[1] for name in contents(tmp_path / "out")} == {"6"}
    assert "colors: 2 rows cannot hold all 3 labels" in capsys.readouterr().err


def test_a_task_that_fails_does_not_lose_the_others(tmp_path, task_file, own, capsys):
    (own / "things" / "train.jsonl").unlink()
    status = build(tmp_path / "out", own, task_file, tasks=["things", "colors"])
    said = capsys.readouterr()
    assert status == 1
    assert "1 tasks, 15 files" in said.out
    assert "1 tasks failed" in said.out
    assert said.err.count("failed: things: no file") == 1
    assert len(contents(tmp_path / "out")) == 15
    write_json_lines(own / "things" / "train.jsonl", rows_of(20))
    assert build(tmp_path / "out", own, task_file, tasks=["things", "colors"]) == 0
    assert "1 sets built now, 1 there before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"tasks": ["colrs"]}, "unknown task 'colrs': did you mean colors"),
        ({"tasks": ["colors"], "shots": ["0"]}, "shots has '0'; allowed: a whole number above 0"),
        ({"tasks": ["colors"], "shots": ["few"]}, "shots has 'few'"),
        ({"tasks": ["colors"], "samples": [-1]}, "samples or apart_from is below 0: give whole"),
        ({"tasks": ["colors"], "samples": [1], "apart_from": [1]}, "both name 1"),
        ({"tasks": ["colors"], "workers": 0}, "workers is 0: give at least 1"),
        ({"tasks": ["colors"], "source": "hub", "lines": True}, "lines are read from a folder"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_made(
    tmp_path, task_file, own, settings, reason
):
    with pytest.raises(ValueError, match=reason):
        build(tmp_path / "out", task_file=task_file, **{"source": own, **settings})
    assert not (tmp_path / "out").exists()


def test_a_read_only_folder_is_said_at_the_start(tmp_path, task_file, own, monkeypatch):
    def refuse(path: Path, content: bytes) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("prompt_lab.files.tensors.write_atomically", refuse)
    with pytest.raises(OSError, match=r"cannot write to .*: Permission denied; give another out"):
        build(tmp_path / "out", own, task_file, tasks=["colors"])
    assert not contents(tmp_path / "out")


@pytest.fixture
def hub(copy: Path) -> Iterator[str]:
    """Address of the stand-in for the hub, which has the data set."""
    words = [sys.executable, str(Path(__file__).with_name("hub_server.py")), str(copy)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        yield server.stdout.readline().strip()
        server.kill()


def command(hub: str, tmp_path: Path, task_file: Path) -> tuple[list[str], dict[str, str]]:
    """Words and environment that build the two tasks with the real command from the stand-in.

    One of them names its data set by a short name, as old ones have.
    """
    task_file.write_text(ROWS.replace("owner/paint", "paint", 1), encoding="utf-8")
    words = ["tasks", "build", "--tasks", "colors", "things", "--out", str(tmp_path / "out")]
    environment = {**os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    words = [sys.executable, "-m", "prompt_lab", *words, "--task_file", str(task_file)]
    return words, environment


def test_an_interrupted_download_is_one_line_and_can_be_done_again(
    tmp_path, task_file, own, copy, hub
):
    """Then the hub gives what own rows give."""
    words, environment = command(hub, tmp_path, task_file)

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(words, env=environment, capture_output=True, text=True, timeout=120)

    cut = copy / "owner/paint/plain/validation/0001.cut"
    cut.touch()
    done = run()
    assert done.returncode == 1
    failed = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 1
    assert "failed: colors: " in failed[0]
    assert "1 tasks, 15 files" in done.stdout
    assert not (tmp_path / "out" / "colors").exists()
    cut.unlink()
    again = run()
    assert again.returncode == 0, again.stderr
    assert "1 sets built now, 1 there before" in again.stdout
    build(tmp_path / "own_out", own, task_file, tasks=["colors", "things"])
    assert contents(tmp_path / "out") == contents(tmp_path / "own_out")


def test_an_interrupt_keeps_what_is_finished(tmp_path, task_file, copy, hub):
    (copy / "owner/paint/plain/validation/0001.slow").touch()  # colors waits, things does not
    words, environment = command(hub, tmp_path, task_file)
    with subprocess.Popen(
        words,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # "pytest &" ignores it
    ) as running:
        finished = tmp_path / "out" / "things" / "things_3_build.json"
        for _ in range(600):
            if finished.exists():
                break
            time.sleep(0.1)
        time.sleep(1)  # the command notices a little after the file is there
        running.send_signal(signal.SIGINT)
        _, said = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; 1 of 2 tasks are finished, run the command again for the rest" in said
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["things"]
