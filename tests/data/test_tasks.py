"""The task table: packaged rows, users' rows, look-up by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml

from prompt_lab.data import tasks as table
from prompt_lab.data.tasks import Task, find_tasks, load_tasks


def write(folder: Path, text: str) -> Path:
    """Write a task file and return its path."""
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def gym_rows() -> dict[str, Task]:
    """The packaged rows of the gym: all but the sandbox, snli and sst5."""
    names = yaml.safe_load(Path(table.__file__).with_name("tasks.yaml").read_bytes())
    return {name: task for name, task in load_tasks().items() if name in names}


def is_outside(name: str) -> bool:
    """Whether a task is none of CrossFit's."""
    return name in ("snli", "sst5") or name.startswith(("selection-", "interpretation-"))


def test_table_has_the_gym_and_the_papers_other_tasks() -> None:
    """Reference: the counts of metrics and of ontology groups over the 160 tasks of CrossFit."""
    rows = gym_rows()
    assert Counter(name.split("-")[0] for name in rows if is_outside(name)) == {
        "snli": 1,
        "sst5": 1,
        "selection": 23,
        "interpretation": 4,
    }
    gym = [task for name, task in rows.items() if not is_outside(name)]
    assert len(gym) == 160
    assert Counter(task.metric for task in gym) == {
        "Classification-F1": 51,
        "ACC": 51,
        "EM": 28,
        "Rouge-L": 17,
        "QA-F1": 9,
        "Pearson-Correlation": 3,
        "Matthew-Correlation": 1,
    }
    for task in rows.values():  # K is 16 for each label, 32 for each set; a few sets are closed
        closed = task.name in ("kilt_fever", "wiqa", "selection-stsb", "selection-cxc")
        assert (task.labels is not None) == (task.shots == 16 or closed), task
    sizes = [len(rows[name].labels or ()) for name in ("discovery", "trec-finegrained")]
    assert sizes == [174, 47]  # the classes of the data sets
    groups = Counter(task.ontology.split("/")[0] for task in gym)
    assert groups == {"cls": 65, "qa": 51, "cg": 13, "other": 31}
    assert Counter((task.shots, task.kind) for task in gym) == {
        (16, "classification"): 82,
        (32, "text_to_text"): 78,
    }


@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("glue-sst2", ("negative", "positive")),
        ("boolq", ("no", "yes")),
        ("superglue-wic", ("false", "true")),
        ("paws", ("0", "1")),
        ("piqa", ("0", "1")),
        ("yelp_review_full", ("1", "2", "3", "4", "5")),
        ("scitail", ("entailment", "neutral")),
        ("snli", ("entailment", "neutral", "contradiction")),
    ],
)
def test_labels_are_the_words_of_the_files_in_label_order(
    name: str, labels: tuple[str, ...]
) -> None:
    """Reference: the verbalisers of CrossFit; paws, piqa and the ratings have bare numbers."""
    assert load_tasks()[name].labels == labels


def test_user_rows_are_added_with_defaults(tmp_path: Path) -> None:
    """A row needs a metric only."""
    path = write(
        tmp_path, 'open: {metric: EM}\nclosed: {metric: ACC, shots: 8, labels: ["no", si]}'
    )
    rows = load_tasks(path)
    assert rows["open"] == Task("open", "custom", "EM", None, None, "text_to_text")
    assert rows["closed"] == Task("closed", "custom", "ACC", 8, ("no", "si"))
    assert "glue-sst2" in rows
    assert "open" not in load_tasks()


def test_only_the_rows_that_are_asked_for_are_typed(monkeypatch: pytest.MonkeyPatch) -> None:
    typed: list[str] = []
    monkeypatch.setattr(table, "_parse_row", lambda name, row: typed.append(name))
    table._packaged.cache_clear()
    try:
        find_tasks(["xsum", "sandbox-review"])
    finally:
        table._packaged.cache_clear()
    assert typed == ["xsum", "sandbox-review"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("mine: {metric: ACC, hubs: x}", r"row 'mine': unknown key hubs; allowed: ontology, kind"),
        ("mine: {metric: ACC, kind: x}", "kind is 'x'; allowed: classification, text_to_text"),
        ("mine: {metric: ACC, note: 3}", "note must be text, not 3; quote it"),
        ("mine: {metric: ACC, hub: x}", "cannot be built without train; add it, or leave all of"),
        ("mine: {metric: ACC, train: x}", "cannot be built without input"),
        ("mine: {metric: ACC, train: x, input: x}", "give label .* or target .*, and not both"),
        (
            "mine: {metric: ACC, train: x, input: x, label: y}",
            "label is the index of a label, but there are no labels; list them",
        ),
        (
            "mine: {metric: ACC, train: x, input: x, target: y, test_part: [0.0, 0.1]}",
            "with one split, give train_part and test_part, or neither",
        ),
        (
            "mine: {metric: ACC, train: x, test: y, input: x, target: y, test_part: [0.5, 3]}",
            r"test_part is \[0.5, 3\]; give two shares such as",
        ),
        (
            "mine: {metric: ACC, train: x, input: 'a {b}', target: y}",
            r"input is the same for all rows; put a column in it as {{column}}",
        ),
        ("mine: {metric: Accuracy}", "row 'mine': metric is 'Accuracy'; allowed: ACC, EM"),
        ("mine: {labels: [a, b]}", "row 'mine': metric is None; allowed: ACC"),
        ("mine: {metric: ACC, labels: [no, yes]}", "read a label as False .bool.*quote it"),
        ("mine: {metric: ACC, labels: [1, 2]}", "read a label as 1 .int.*quote it"),
        ("mine: {metric: ACC, labels: yes}", "labels must be a list of two or more, not True"),
        ("mine: {metric: ACC, labels: [a]}", "labels must be a list of two or more"),
        ("mine: {metric: ACC, labels: [a, '']}", "label '' is empty"),
        ("mine: {metric: ACC, labels: [a, ' b']}", "label ' b' .* spaces around it"),
        ("mine: {metric: ACC, labels: [a, b, a]}", "labels occur twice: a"),
        ("mine: {metric: ACC, shots: 0}", "shots must be a whole number above 0, or all, not 0"),
        (
            "mine: {metric: ACC, shots: true}",
            "shots must be a whole number above 0, or all, not True",
        ),
        ("mine: {metric: ACC, ontology: 3}", "ontology must be text, not 3"),
        ("mine: ACC", "row 'mine': must be a mapping"),
        ("yes: {metric: ACC}", "row True: the name is not text but bool; quote it"),
        ("a/b: {metric: ACC}", "row 'a/b': a name is also a folder name"),
        ("..: {metric: ACC}", "row '..': a name is also a folder name"),
        ("glue-sst2: {metric: ACC}", "row 'glue-sst2': the package already has a task"),
        ("mine: {metric: ACC}\nmine: {metric: EM}", "'mine' occurs twice; keep one.*line 2"),
        ("mine: {metric: ACC, metric: EM}", "'metric' occurs twice"),
        ("- mine", "must hold rows of the form"),
        ("", "must hold rows of the form"),
        ("mine: {metric: ACC", "not valid YAML: .*line 1"),
    ],
)
def test_bad_rows_are_refused_with_file_row_and_reason(
    tmp_path: Path, row: str, reason: str
) -> None:
    """Each fault gives one sentence that names the file."""
    path = write(tmp_path, row)
    with pytest.raises(ValueError, match=reason) as caught:
        load_tasks(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_tasks_are_found_in_the_order_given(tmp_path: Path) -> None:
    path = write(tmp_path, "mine: {metric: EM}")
    names = ["xsum", "mine", "anli"]
    assert [task.name for task in find_tasks(names, path)] == names


@pytest.mark.parametrize(
    ("names", "file", "message"),
    [
        (["glue-sst", "qqqqqq"], None, "task 'glue-sst'.*glue-sst2.*'qqqqqq'; tasks of your own"),
        (["anli", "xsum", "anli"], None, "more than once: anli"),
        ("anli", None, "must be a list"),
        (["anli"], "nowhere.yaml", r"no task file .*nowhere\.yaml"),
    ],
)
def test_names_that_are_no_list_of_tasks_are_refused(
    names: list[str], file: str | None, message: str
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        find_tasks(names, file)
