"""``prompt-lab tasks``: what is listed and shown, and one fault at a time in a data folder."""

from __future__ import annotations

import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import TASKS

from prompt_lab.__main__ import main
from prompt_lab.commands.tasks import HEAD, TAIL, Finding, check_folder
from prompt_lab.data.files import SPLITS, DataError, read_task
from prompt_lab.data.partitions import partition
from prompt_lab.data.tasks import load_tasks

TABLE = """
mine: {metric: ACC, shots: 2, labels: [good, bad]}
free: {metric: EM, shots: 3}
loose: {metric: EM}
"""
ANSWERS = {"mine": ("good", "bad", "bad", "good"), "free": ("a", "b", "c"), "loose": ("a", "b")}
DEV, TEST = "mine/mine_2_13_dev.tsv", "mine/mine_2_13_test.tsv"
SHARED = ": the same row stands in"
FILES = {"mine": "mine_2", "free": "free_3", "loose": "loose_2"}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder without a fault, beside its task file; tests run in the folder of both."""
    monkeypatch.chdir(tmp_path)
    Path("tasks.yaml").write_text(TABLE)
    for task, answers in ANSWERS.items():
        Path("data", task).mkdir(parents=True)
        for sample in (13, 42):
            for split in SPLITS:
                name = split if split == "test" else f"{split} of {sample}"
                lines = [f"{name}, row {n}\t{answer}\n" for n, answer in enumerate(answers)]
                Path(f"data/{task}/{FILES[task]}_{sample}_{split}.tsv").write_text("".join(lines))
    return Path("data")


def command(*words: str) -> int:
    """Exit status of ``prompt-lab tasks``."""
    return main(["tasks", *words])


def findings(root: Path, *names: str) -> list[Finding]:
    """What is found of the tasks of the table, by default of all three."""
    tasks = load_tasks("tasks.yaml")
    return list(check_folder(root, [tasks[name] for name in names or ANSWERS], []))


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Function that replaces a text, which must be there, in a file of the folder."""

    def change(root: Path) -> None:
        before = (root / name).read_bytes()
        assert old.encode() in before
        (root / name).write_bytes(before.replace(old.encode(), new.encode("latin-1")))

    return change


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


# ---- check ---------------------------------------------------------------------------------------


def test_a_folder_without_fault_has_no_finding(root, capsys):
    (root / "mine" / ".hidden").touch()
    (root / ".cache").mkdir()
    (root / "README.md").touch()
    assert command("check", "data", "--task_file", "tasks.yaml") == 0
    assert capsys.readouterr().out == "3 tasks checked; errors: 0, notes: 0\n"


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (edit(DEV, "row 1\t", "row 1 "), "dev, line 2: the target column is missing"),
        (edit(DEV, "row 1\tbad", "row 1\t"), "dev, line 2: the target (column 2) is empty"),
        (edit(DEV, "dev of 13, row 1", ""), "dev, line 2: the input (column 1) is empty"),
        (edit(DEV, "1\tbad", "1\tbad\t\tbad"), "dev, line 2: column 3 is empty"),
        (edit(DEV, "1\tbad\n", "1\tbad\n\n"), "dev, line 3: the line is empty"),
        (edit(DEV, "row 1", "r\0w"), "dev, line 2: the line holds a NUL character"),
        (edit(DEV, "row 1", "r\rw"), "dev, line 2: a carriage return"),
        (edit(DEV, "row 1", "\xe9"), "dev, line 2: byte 0xe9 is not UTF-8"),
        (lambda root: (root / TEST).write_bytes(b""), "test, line 1: the file is empty"),
        (edit(TEST, "2\tbad", "2\tBad"), "test, line 3: not a label of mine: 'Bad'; allowed"),
        (edit(DEV, "dev of 13, row 0", "train of 13, row 3"), f"dev, line 1{SHARED} train, line 4"),
        (edit(TEST, "test, row 2", "dev of 13, row 1"), f"test, line 3{SHARED} dev, line 2"),
        (remove(DEV), "dev: no file mine_2_13_dev.tsv"),
    ],
)  # fmt: skip
def test_what_a_fit_refuses_is_an_error(root, change, finding):
    """Reference: ``read_task``, which also names file and line."""
    change(root)
    errors = [str(found) for found in findings(root) if found.is_error]
    assert len(errors) == 1
    assert errors[0].startswith(f"error: mine, K 2, sample 13, split {finding}")
    mine = load_tasks("tasks.yaml")["mine"]
    read_task(root, mine, 42)
    with pytest.raises(DataError) as refused:
        read_task(root, mine, 13)
    split, line = re.findall(r"split (\w+)(, line \d+:)?", errors[0])[0]
    assert f"mine_2_13_{split}.tsv{line}" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (edit(DEV, "dev of 13, row 3\tgood\n", ""),
         "mine, K 2, sample 13, split dev: 3 rows, not 2 of each label: good 1"),
        (edit("mine/mine_2_13_train.tsv", "3\tgood", "3\tbad"),
         "mine, K 2, sample 13, split train: 4 rows, not 2 of each label: good 1, bad 3"),
        (edit(DEV, "dev of 13, row 1\tbad\ndev of 13, row 2\tbad\n", ""),
         "mine, K 2, sample 13, split dev: 2 rows, none with the label bad"),
        (edit("free/free_3_42_dev.tsv", "c\n", "c\nmore\td\n"),
         "free, K 3, sample 42, split dev: 4 rows, not 3"),
        (edit(DEV, "1\tbad", "1\tbad\tgood"),
         "mine, K 2, sample 13, split dev, line 2: more than one answer, which a task with labels "
         "rarely has"),
        (edit("mine/mine_2_42_test.tsv", "row 1", "row 9"),
         "mine, K 2, split test: rows differ from those of sample 13 in samples 42"),
        (lambda root: (root / "free/free_3_13_dev.tsv.bak").touch(),
         "free: not of the form free_3_<sample>_<split>.tsv, not read: free_3_13_dev.tsv.bak"),
        (lambda root: (root / "loose/data").mkdir(),
         "loose: not of the form loose_<K>_<sample>_<split>.tsv, not read: data"),
        (lambda root: (root / "free/free_9_13_dev.tsv").touch(),
         "free, K 9: not checked, but K = 3 is; data.shots 9 reads these"),
    ],
)  # fmt: skip
def test_what_a_fit_accepts_is_a_note(root, change, finding):
    """Reference: ``read_task``."""
    change(root)
    assert [str(found) for found in findings(root)] == [f"note: {finding}"]
    for task in ANSWERS:
        for sample in (13, 42):
            read_task(root, load_tasks("tasks.yaml")[task], sample)


def test_faults_of_a_kind_are_counted_once_per_file(root):
    for name in (DEV, DEV.replace("13", "42")):
        edit(name, "\tbad", "\tBAD")(root)
    edit("mine/mine_2_13_train.tsv", "\tbad", "")(root)
    shutil.copy("data/free/free_3_42_test.tsv", "data/free/free_3_42_train.tsv")
    lines = [str(found) for found in findings(root) if found.is_error]
    label = "not a label of mine: 'BAD'; allowed: 'good', 'bad' (2 lines)"
    column = "the target column is missing; write the input, a tab, the target (2 lines)"
    shared = "the same row stands in train, line 1; remove it from one of the files, or set "
    assert lines == [
        f"error: mine, K 2, sample 13, split train, line 2: {column}",
        f"error: mine, K 2, sample 13, split dev, line 2: {label}",
        f"error: mine, K 2, sample 42, split dev, line 2: {label}",
        f"error: free, K 3, sample 42, split test, line 1: {shared}data.allow_overlap (3 lines)",
    ]


def test_where_k_is_all_any_number_of_rows_will_do(root, capsys):
    """Everything else is checked as ever; labels may have unequal numbers of rows, but not none."""
    Path("tasks.yaml").write_text(TABLE.replace("shots: 2", "shots: all"))
    for task, files in FILES.items():
        for path in list((root / task).iterdir()):
            path.rename(str(path).replace(files, f"{task}_all"))
    with Path("data/loose/loose_all_13_train.tsv").open("a") as file:
        file.write("one more\tc\n")
    with Path("data/mine/mine_all_13_train.tsv").open("a") as file:
        file.write("one more\tbad\n")
    assert findings(root, "mine", "loose") == []
    assert command("list", "--root", "data", "--task_file", "tasks.yaml") == 0
    assert capsys.readouterr().out.splitlines() == [
        "mine   custom  ACC  K all  2 labels  samples 13, 42",
        "loose  custom  EM   any K  open      samples 13, 42",
    ]
    edit("mine/mine_all_13_dev.tsv", "\tgood", "\tbad")(root)
    edit("mine/mine_all_13_test.tsv", "2\tbad", "2\tBad")(root)
    shutil.copy("data/loose/loose_all_13_dev.tsv", "data/loose/loose_2_13_dev.tsv")
    lines = [str(found) for found in findings(root)]
    assert lines[0] == ("note: mine, K all, sample 13, split dev: 4 rows, none with the label good")
    assert lines[1].startswith("error: mine, K all, sample 13, split test, line 3: not a label")
    assert "error: free: no file free_3_<sample>_<split>.tsv" in lines
    assert "note: free, K all: not checked, but K = 3 is; data.shots all reads these" in lines
    assert any("loose: files for K = 2, all: say which" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("nowhere",), "no folder nowhere: give the folder that holds one per task"),
        (("data",), "data has no folder of a known task: give the folder that holds them"),
        (("data", "--tasks", "glue-sst"), "unknown task 'glue-sst': did you mean glue-sst2"),
        (("data", "--task_file", "none"), "no task file none"),
    ],
)
def test_a_check_of_nothing_is_refused(root, words, sentence, capsys):
    assert command("check", *words) == 1
    assert capsys.readouterr().err.startswith(f"prompt-lab: {sentence}")


def test_real_files_depart_from_k_only_where_their_table_of_sources_says_so(test_data):
    """Reference: the column of sizes and classes in SOURCES.md; no real file has an error."""
    root = test_data / "crossfit"
    expected = set()
    for line in (root / "SOURCES.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) > 9 and (sizes := re.match(r"train (\d+), dev (\d+)", cells[7])):
            classes = re.match(r"(\d+) classes", cells[9])
            wanted = 16 * int(classes[1]) if classes else 32
            for split, number in zip(("train", "dev"), map(int, sizes.groups()), strict=True):
                expected |= {(cells[1], split)} if number != wanted else set()
    known = load_tasks()
    tasks = [known[path.name] for path in sorted(root.iterdir()) if path.name in known]
    found = list(check_folder(root, tasks, []))
    assert len(tasks) == 95
    assert not [finding for finding in found if finding.is_error]
    counts = Counter((f.task, f.split) for f in found if f.sample is not None and f.line is None)
    assert counts == dict.fromkeys(expected, 5)
    assert len(found) == counts.total()


# ---- list ----------------------------------------------------------------------------------------


def test_the_list_has_a_line_for_every_task_of_the_table(capsys):
    assert command("list") == 0
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    table = load_tasks()
    assert [line[0] for line in lines] == list(table)
    assert ["glue-sst2", "cls/sentiment analysis", "ACC", "K 16", "2 labels"] in lines
    assert ["e2e_nlg_cleaned", "other/other", "Rouge-L", "K 32", "open"] in lines


def test_the_list_is_limited_by_kind_metric_and_files(root, fewshot_root, capsys):
    def names(*words: str) -> list[str]:
        assert command("list", *words) == 0
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()]

    table = load_tasks().values()
    assert names("--ontology", "cls") == [t.name for t in table if t.ontology.startswith("cls/")]
    assert names("--ontology", "cls/nli") == [t.name for t in table if t.ontology == "cls/nli"]
    assert names("--metric", "EM") == [t.name for t in table if t.metric == "EM"]
    assert names("--root", str(fewshot_root)) == sorted(TASKS)
    assert names("--root", str(fewshot_root), "--metric", "ACC") == ["glue-sst2"]
    sandbox = names("--root", "sandbox")
    assert sandbox == names("--ontology", "sandbox")
    assert names("--task_file", "tasks.yaml", "--ontology", "custom") == list(ANSWERS)


def test_the_list_of_a_partition_names_the_set_of_each_task(capsys):
    """Reference: the partition itself."""
    found = partition("crossfit/random")
    sets = {"source": found.source, "dev": found.dev, "target": found.target}
    assert command("list", "--partition", "crossfit/random") == 0
    lines = [re.split("  +", line) for line in capsys.readouterr().out.splitlines()]
    wanted = {name: which for which, names in sets.items() for name in names}
    assert {line[0]: line[5] for line in lines} == wanted
    assert command("list", "--partition", "crossfit/random/target", "--metric", "EM") == 0
    names = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert names == {name for name in found.target if load_tasks()[name].metric == "EM"}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--metric", "acc"), "--metric is 'acc'; allowed: ACC, Classification-F1, EM, "),
        (("--ontology", "cl"), "--ontology is 'cl'; allowed: cg, cg/dialogue, "),
        (("--root", "nowhere"), "no folder nowhere: give"),
        (("--partition", "crossfit/randum"), "unknown partition 'crossfit/randum': did you mean"),
        (("--root", "data"), "no task fits all that was asked for: leave a setting out"),
    ],
)
def test_a_list_of_nothing_is_refused(root, words, sentence, capsys):
    assert command("list", *words) == 1
    assert capsys.readouterr().err.startswith(f"prompt-lab: {sentence}")


# ---- show ----------------------------------------------------------------------------------------


def test_a_task_is_shown_with_rows_from_all_of_its_file(root, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    long = f"{'begin ' * 50}{'x' * 100}{'end ' * 30}".strip()
    path = Path("data/mine/mine_2_42_train.tsv")
    path.write_text(path.read_text().replace("train of 42, row 2", long))
    words = ("show", "mine", "--root", "data", "--sample", "42", "--task_file", "tasks.yaml")
    assert command(*words, "--count", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:12] == [
        "mine",
        "  ontology  custom",
        "  metric    ACC",
        "  K         2",
        "  drawn     K of each label",
        "  labels    good, bad",
        "  licence   not known here",
        "",
        "2 of the 4 rows of train, sample 42",
        "",
        "line 1",
        "  input     train of 42, row 0",
    ]
    assert max(map(len, lines)) <= 40
    text = " ".join(line.strip() for line in lines[lines.index("line 3") :])
    assert f"[... {len(long) - HEAD - TAIL} characters left out ...]" in text
    assert lines[-1] == "  answer    bad"


def test_a_sandbox_task_is_shown_without_files(capsys):
    from prompt_lab.sandbox import rows

    assert command("show", "sandbox-review", "--root", "sandbox", "--count", "1") == 0
    text, answer = rows("sandbox-review", 100, "train")[0]
    out = capsys.readouterr().out
    assert out.endswith(f"\nline 1\n  input     {text}\n  answer    {answer}\n")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("glue-sst", "--root", "data"), "unknown task 'glue-sst': did you mean glue-sst2"),
        (("glue-sst2", "--root", "nowhere"), "no folder nowhere"),
        (("glue-sst2", "--root", "sandbox"), "glue-sst2 is not in the sandbox"),
        (("glue-sst2", "--root", "data", "--count", "0"), "count is 0: give at least 1"),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_sentence(root, words, sentence, capsys):
    assert command("show", *words) == 1
    assert capsys.readouterr().err.startswith(f"prompt-lab: {sentence}")


# ---- the group -----------------------------------------------------------------------------------
