"""Every row of the task table makes its lines, and those of real rows are CrossFit's own files."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from prompt_lab.data import prepare
from prompt_lab.data.build import SAMPLES, build_task, published_digests
from prompt_lab.data.tasks import find_tasks, load_tasks
from prompt_lab.data.templates import make_lines

MADE_UP = json.loads((Path(__file__).parents[1] / "hub_rows.json").read_text(encoding="utf-8"))
"""By task: rows in the schema of its data set, with ``{column}`` as texts, and the lines."""

BUILT = [name for name, task in load_tasks().items() if task.source is not None]

RAW = [
    "blimp-anaphor_gender_agreement",
    "blimp-ellipsis_n_bar_1",
    "blimp-sentential_negation_npi_scope",
    "commonsense_qa",
    "crows_pairs",
    "emotion",
    "ethos-disability",
    "ethos-gender",
    "ethos-religion",
    "glue-cola",
    "glue-wnli",
    "google_wellformed_query",
    "hate_speech18",
    "liar",
    "poem_sentiment",
    "superglue-cb",
    "superglue-copa",
    "superglue-rte",
    "tweet_eval-irony",
    "tweet_eval-stance_abortion",
    "tweet_eval-stance_climate",
]


def test_there_are_made_up_rows_for_every_task_that_can_be_built():
    assert sorted(MADE_UP) == sorted(BUILT)
    assert len(BUILT) == 160 + 2 + 4 + 23


@pytest.mark.parametrize("name", BUILT)
def test_made_up_rows_give_the_lines_that_the_templates_say(name: str):
    rows = copy.deepcopy(MADE_UP[name]["rows"])
    lines = [list(line) for line in make_lines(rows, find_tasks([name])[0])]
    assert lines == MADE_UP[name]["lines"]
    assert rows == MADE_UP[name]["rows"], "rows were changed"


def test_made_up_lines_are_the_gyms_templates(test_data: Path):
    path = test_data / "reference" / "crossfit_tasks.json"
    if not path.is_file():
        pytest.skip(f"no {path}")
    for name, known in json.loads(path.read_text(encoding="utf-8")).items():
        text, *references = MADE_UP[name]["lines"][0]
        assert "\t".join(references) == known["target_template"], name
        if name != "scicite":  # its template shows a part of a text beside the whole
            assert text == known["input_template"], name


def test_every_function_is_of_use():
    used = {task.source.prepare for task in load_tasks().values() if task.source}
    public = {
        name
        for name, value in vars(prepare).items()
        if getattr(value, "__module__", "") == prepare.__name__ and not name.startswith("_")
    }
    assert public == used - {None}


def test_the_order_of_two_sentences_is_that_of_numpys_seed_42():
    rows = [{"sentence_good": "good", "sentence_bad": "bad"}] * 50
    np.random.seed(42)
    drawn = [np.random.random() > 0.5 for _ in rows]
    made = list(prepare.draw_order(rows))
    task = find_tasks(["blimp-ellipsis_n_bar_1"])[0]
    assert [line[1] for line in make_lines(rows, task)] == [
        "sentence 1" if is_first else "sentence 2" for is_first in drawn
    ]
    assert len(made) == 50


@pytest.mark.parametrize("name", RAW)
def test_files_from_the_hubs_rows_have_the_published_digests(
    name: str, test_data: Path, tmp_path: Path
):
    raw = test_data / "crossfit" / "raw"
    if not (raw / name).is_dir():
        pytest.skip(f"no {raw / name}")
    built = build_task(find_tasks([name])[0], tmp_path, str(raw))
    other = {file for file, is_same in built.published.items() if not is_same}
    assert len(built.published) == 3 * len(SAMPLES)
    # These rows of glue-cola are not those that CrossFit had: see configs/prompt_tuning/README.md.
    expected = {f"{name}_16_{sample}_test.tsv" for sample in SAMPLES}
    assert other == (expected if name == "glue-cola" else set())
    for file, digest in built.files.items():
        content = (tmp_path / name / file).read_bytes()
        assert hashlib.md5(content).hexdigest() == digest
        assert file in published_digests()
