"""Partitions by name: the papers' counts and sets, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from prompt_lab.data.partitions import Partition, expand_sets, load_partitions, partition
from prompt_lab.data.tasks import load_tasks

# Source, dev and target. The numbers are those of the papers, but where a comment says otherwise.
COUNTS = {
    # CrossFit: its eight partition files.
    "crossfit/random": (120, 20, 20),
    "crossfit/classification_to_classification": (45, 10, 10),
    "crossfit/halfhalf_to_classification": (45, 10, 10),
    "crossfit/nonclassification_to_classification": (45, 10, 10),
    "crossfit/nonparaphrase_classification_to_paraphrase": (61, 0, 4),
    "crossfit/non_nli_to_nli": (56, 0, 8),  # 57 in the file: sick is in both of its sets
    "crossfit/non_multiple_choice_qa_to_multiple_choice": (29, 0, 22),
    "crossfit/non_mrc_qa_to_mrc": (42, 0, 9),
    # MPT, Table 1; the subsets of Cls: Table 10.
    "mpt/random_to_random": (114, 0, 20),
    "mpt/cls_to_cls": (45, 0, 10),
    "mpt/both_to_cls": (45, 0, 10),
    "mpt/non_cls_to_cls": (45, 0, 10),
    "mpt/cls_to_non_cls": (45, 0, 12),
    "mpt/both_to_non_cls": (45, 0, 12),
    "mpt/non_cls_to_non_cls": (45, 0, 12),
    "mpt/qa_to_qa": (22, 0, 15),
    "mpt/non_qa_to_qa": (33, 0, 15),
    "mpt/non_paraphrase_to_paraphrase": (60, 0, 4),
    "mpt/cls_12_to_cls": (12, 0, 10),
    "mpt/cls_24_to_cls": (24, 0, 10),
    # IPT, Table 1; the subsets: Figure 6 (20 to 80 % of 100).
    "ipt/random": (100, 0, 20),
    "ipt/random_20": (20, 0, 20),
    "ipt/random_40": (40, 0, 20),
    "ipt/random_60": (60, 0, 20),
    "ipt/random_80": (80, 0, 20),
    "ipt/cls_to_cls": (35, 0, 8),
    "ipt/non_cls_to_non_cls": (35, 0, 41),  # 42 in Table 1, which counts discovery
    "ipt/cls_to_non_cls": (35, 0, 76),  # 77 in Table 1, which counts discovery
    "ipt/non_cls_to_cls": (35, 0, 43),
    # TPV, Tables 2 and 4.
    "tpv/nli": (2, 0, 2),
    "tpv/topic": (2, 0, 2),
    "tpv/sentiment": (2, 0, 2),
    "tpv/all": (6, 0, 6),
    # Task selection, Table 2.
    "selection/13_to_10": (13, 0, 10),
    # The package's own.
    "sandbox/12_to_4": (12, 0, 4),
    "sandbox/sorting": (2, 0, 2),
    "sandbox/counting": (2, 0, 2),
    "sandbox/finding": (2, 0, 2),
    "sandbox/6_to_6": (6, 0, 6),
}
NOT_IN_CROSSFIT = {"snli", "sst5"}
"""The names of TPV that CrossFit has not."""

OWN_ROWS = ("sandbox", "selection-", "interpretation-")
"""How the names of rows begin that are not CrossFit's either: ours, and two papers' own."""

CROSSFIT_FILES = {
    "crossfit/random": "random",
    "crossfit/classification_to_classification": "train_classification_test_classification",
    "crossfit/halfhalf_to_classification": "train_halfhalf_test_classification",
    "crossfit/nonclassification_to_classification": "train_nonclassification_test_classification",
    "crossfit/nonparaphrase_classification_to_paraphrase": (
        "train_nonparaphrase_classification_test_paraphrase"
    ),
    "crossfit/non_nli_to_nli": "train_non_nli_test_nli",
    "crossfit/non_multiple_choice_qa_to_multiple_choice": (
        "train_non_multiple_choice_qa_test_multiple_choice"
    ),
    "crossfit/non_mrc_qa_to_mrc": "train_non_mrc_qa_test_mrc",
}
MPT_SETTINGS = {
    "mpt/random_to_random": "R->R",
    "mpt/cls_to_cls": "Cls->Cls",
    "mpt/both_to_cls": "Both->Cls",
    "mpt/non_cls_to_cls": "NonCls->Cls",
    "mpt/cls_to_non_cls": "Cls->NonCls",
    "mpt/both_to_non_cls": "Both->NonCls",
    "mpt/non_cls_to_non_cls": "NonCls->NonCls",
    "mpt/qa_to_qa": "QA->QA",
    "mpt/non_qa_to_qa": "NonQA->QA",
    "mpt/non_paraphrase_to_paraphrase": "NP->P",
}
CODE_NAMES = {
    "mnli": "glue-mnli",
    "qnli": "glue-qnli",
    "sst2": "glue-sst2",
    "dbpedia": "dbpedia_14",
    "trec_coarse": "trec",
    "yahoo": "yahoo_answers_topics",
}
"""The names in the code of TPV where CrossFit has another."""


def gym() -> set[str]:
    """The names of CrossFit's tasks."""
    return {name for name in load_tasks() if not name.startswith(OWN_ROWS)} - NOT_IN_CROSSFIT


def everything(part: Partition) -> list[str]:
    """All names of a partition."""
    return [*part.source, *part.dev, *part.target]


def reference(test_data: Path, name: str) -> dict[str, Any]:
    """One of the files with the papers' own lists; skips where it is not there."""
    path = test_data / "reference" / name
    if not path.is_file():
        pytest.skip(f"no {path}: the papers' own lists")
    return json.loads(path.read_bytes())


def test_names_and_counts_are_the_papers_and_sets_are_disjoint() -> None:
    assert {name: part.name for name, part in load_partitions().items()} == {n: n for n in COUNTS}
    assert list(load_partitions()) == list(COUNTS)
    for name, counts in COUNTS.items():
        part = partition(name)
        assert (len(part.source), len(part.dev), len(part.target)) == counts, name
        assert len(set(everything(part))) == sum(counts), name
        assert bool(part.paper) == (not name.startswith("sandbox"))


@pytest.mark.parametrize("name", COUNTS)
def test_names_are_tasks_of_crossfit_but_those_listed(name: str) -> None:
    names = set(everything(partition(name)))
    assert names <= set(load_tasks())
    beyond = names - gym()
    if name.startswith("selection"):
        assert beyond == names == {t for t in load_tasks() if t.startswith("selection-")}
    elif name.startswith("sandbox"):
        assert all(task.startswith("sandbox-") for task in beyond)
    else:
        assert beyond <= (NOT_IN_CROSSFIT if name.startswith("tpv") else set())


def test_partitions_by_kind_of_task_hold_tasks_of_that_kind() -> None:
    """Reference: the ontology of the task table."""
    kinds = {name: task.ontology for name, task in load_tasks().items()}

    def share(names: tuple[str, ...], kind: str) -> int:
        return sum(kinds[name].startswith(kind) for name in names)

    every_cls = {name for name in gym() if kinds[name].startswith("cls/")}
    nli, paraphrase = (
        partition(f"crossfit/{name}")
        for name in ("non_nli_to_nli", "nonparaphrase_classification_to_paraphrase")
    )
    assert {*nli.source, *nli.target} == every_cls - {"superglue-rte"}
    assert (share(nli.source, "cls/nli"), share(nli.target, "cls/nli")) == (0, 8)
    assert {*paraphrase.source, *paraphrase.target} == every_cls
    assert share(paraphrase.target, "cls/paraphrase") == 4
    assert share(partition("mpt/both_to_cls").source, "cls/") == 23  # MPT, Table 1: 23 + 22
    assert share(partition("mpt/non_cls_to_non_cls").source, "cls/") == 0
    assert share(partition("mpt/qa_to_qa").source, "qa/") == 22
    assert share(partition("mpt/non_qa_to_qa").source, "qa/") == 0
    assert share(partition("ipt/cls_to_non_cls").source, "cls/") == 35
    assert share(partition("ipt/cls_to_non_cls").target, "cls/") == 0


def test_a_note_stands_where_a_paper_and_its_code_or_files_differ() -> None:
    assert "sick" in partition("crossfit/non_nli_to_nli").note
    for name in ("cls_to_non_cls", "non_cls_to_non_cls"):
        assert "discovery" in partition(f"ipt/{name}").note
        assert "discovery" not in everything(partition(f"ipt/{name}"))
    assert "discovery" in partition("ipt/random").source
    for name, part in load_partitions().items():
        if {"glue-rte"} & set(part.source) and {"superglue-rte"} & set(part.target):
            assert "glue-rte and superglue-rte" in part.note, name


@pytest.mark.parametrize("name", CROSSFIT_FILES)
def test_sets_equal_crossfits_files(test_data: Path, name: str) -> None:
    """Four files hold the targets under dev and nothing under test; sick is in both sets of one."""
    lists = reference(test_data, "crossfit_partitions.json")[CROSSFIT_FILES[name]]
    dev, target = (lists["dev"], lists["test"]) if lists["test"] else ([], lists["dev"])
    part = partition(name)
    assert set(part.source) == set(lists["train"]) - set(target)
    assert (set(part.dev), set(part.target)) == (set(dev), set(target))
    overlap = {"sick"} if name == "crossfit/non_nli_to_nli" else set()
    assert set(lists["train"]) & set(target) == overlap


@pytest.mark.parametrize("name", MPT_SETTINGS)
def test_sets_equal_mpts_table_9(test_data: Path, name: str) -> None:
    lists = reference(test_data, "mpt_partitions.json")["settings"][MPT_SETTINGS[name]]
    part = partition(name)
    assert (set(part.source), set(part.target)) == (set(lists["source"]), set(lists["target"]))


@pytest.mark.parametrize("size", [12, 24])
def test_subsets_equal_mpts_table_10(test_data: Path, size: int) -> None:
    lists = reference(test_data, "mpt_partitions.json")
    part = partition(f"mpt/cls_{size}_to_cls")
    assert (
        set(part.source) == set(lists[f"cls2cls_{size}"]) < set(partition("mpt/cls_to_cls").source)
    )
    assert part.target == partition("mpt/cls_to_cls").target


def test_sets_equal_ipts_files(test_data: Path) -> None:
    lists = reference(test_data, "ipt_partitions.json")
    derived = lists["_derived"]
    expected = {"ipt/random": (derived["random"]["train"], derived["random"]["test"])}
    for kind, other in (("cls", "non_cls"), ("non_cls", "cls")):
        sets = derived[kind]
        expected[f"ipt/{kind}_to_{kind}"] = (sets["train"], sets["test_in"])
        expected[f"ipt/{kind}_to_{other}"] = (sets["train"], sets["test_out"])
    for size in (20, 40, 60, 80):
        sets = lists[f"custom_tasks_splits_new/random_{size}"]
        expected[f"ipt/random_{size}"] = (sets["train"], sets["test"])
    for name, (source, target) in expected.items():
        part = partition(name)
        assert (set(part.source), set(part.target)) == (set(source), set(target)), name
        if name.startswith("ipt/random"):
            assert set(source) <= set(partition("ipt/random").source)


def test_sets_equal_the_tasks_of_tpv_and_of_task_selection(test_data: Path) -> None:
    lists = reference(test_data, "tpv_its_tasks.json")

    for side in ("source", "target"):
        code = [task["code_name"] for task in lists["its"][f"{side}s"].values()]
        names = [f"selection-{name.removeprefix('superglue-')}" for name in code]
        assert list(getattr(partition("selection/13_to_10"), side)) == names

    def ours(code_names: list[str]) -> list[str]:
        short = [name.removesuffix("_text") for name in code_names]
        return [CODE_NAMES.get(name, name) for name in short]

    tasks = lists["tpv"]["tasks"].values()
    for family in ("nli", "topic", "sentiment"):
        for role in ("source", "target"):
            code = [t["code_name"] for t in tasks if (t["family"], t["role"]) == (family, role)]
            assert set(getattr(partition(f"tpv/{family}"), role)) == set(ours(code))
        assert set(partition(f"tpv/{family}").source) == set(ours(lists["tpv"]["pairs"][family]))


def test_the_packages_partitions_are_read_without_torch() -> None:
    code = (
        "import sys; from prompt_lab.data.partitions import partition; partition('tpv/nli'); "
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_sets_stand_for_their_tasks_where_tasks_are_named() -> None:
    from prompt_lab.data.datamodule import CrossFitDataModule

    target = partition("mpt/cls_to_cls").target
    assert expand_sets(["sick", "mpt/cls_to_cls/target"]) == ["sick", *target]
    assert list(CrossFitDataModule(["mpt/cls_to_cls/target"]).tasks) == list(target)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mpt/cls_to_cl/target", "unknown partition 'mpt/cls_to_cl': did you mean mpt/cls_to_cls"),
        ("zzz/source", r"unknown partition 'zzz': there are crossfit/random, "),
        ("mpt/cls_to_cls", "neither a task nor a set of a partition"),
    ],
)
def test_names_of_no_set_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        expand_sets([name])
