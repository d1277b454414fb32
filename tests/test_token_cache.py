"""Kept token ids: equal to fresh ones, never out of date, and made again where they are damaged."""

from __future__ import annotations

import random
import shutil
import sys
from collections.abc import Callable
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import SAMPLES, TASKS, make_backbone
from tokenizers import Tokenizer, normalizers

from prompt_lab.backbone import Backbone
from prompt_lab.data import crossfit
from prompt_lab.data.batches import Rows
from prompt_lab.data.crossfit import CrossFitDataModule
from prompt_lab.data.tasks import Task
from prompt_lab.data.token_cache import cache_key, read_rows, rules_digest, write_rows

Factory = Callable[..., Backbone]

TASK = Task("a", "custom", "EM", 32, None)
KEY = "0123abcd"


def make_rows(size: int, seed: int, with_targets: bool = True) -> Rows:
    """Random rows: inputs of 0 to 9 ids, 1 to 3 answers of 1 to 4 ids."""
    rng = random.Random(seed)

    def ids(low: int, high: int) -> list[int]:
        return [rng.randrange(2**31) for _ in range(rng.randint(low, high))]

    inputs = [ids(0, 9) for _ in range(size)]
    targets = [[ids(1, 4) for _ in range(rng.randint(1, 3))] for _ in range(size)]
    longest = max(len(answer) for row in targets for answer in row)
    references = [[str(answer) for answer in row] for row in targets]
    return Rows(TASK, inputs, targets if with_targets else [], references, longest)


def load(model: Backbone, root: Path, cache: Path | None, **settings: Any) -> dict[Any, Rows]:
    """The rows of every task, sample and split of a folder."""
    kept = None if cache is None else str(cache)
    data = CrossFitDataModule(list(TASKS), str(root), list(SAMPLES), cache=kept, **settings)
    data.setup()
    data.connect(model)
    return {
        (task, sample, split): data.rows(task, sample, split)
        for (task, sample), splits in data.splits.items()
        for split in splits
    }


def refuse(*_: object) -> Any:
    raise AssertionError("rows were tokenised")


# ---- what is kept --------------------------------------------------------------------------------


@pytest.mark.parametrize("with_targets", [True, False])
@pytest.mark.parametrize("size", [1, 50])
def test_rows_come_back_as_they_were_written(tmp_path: Path, size: int, with_targets: bool) -> None:
    """Inputs of any length and several answers a row, ids up to the largest there can be."""
    for seed in range(10):
        rows = make_rows(size, seed, with_targets)
        write_rows(tmp_path / "new", f"{KEY}{seed}", rows)
        found = read_rows(tmp_path / "new", f"{KEY}{seed}", TASK, rows.references)
        assert found == rows
        assert found is not None
        assert {type(number) for row in found.inputs for number in row} <= {int}


@pytest.mark.parametrize("prefix", [False, True])
@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_kept_rows_equal_those_that_are_tokenised(
    backbone: Factory,
    fewshot_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    prefix: bool,
) -> None:
    """Reference: a data module without a folder. The second time nothing is tokenised."""
    settings = {"max_input_length": 9, "task_prefix": prefix}
    fresh = load(backbone(kind), fewshot_root, None, **settings)
    assert load(backbone(kind), fewshot_root, tmp_path, **settings) == fresh
    monkeypatch.setattr(crossfit, "tokenise", refuse)
    assert load(backbone(kind), fewshot_root, tmp_path, **settings) == fresh
    assert len(list(tmp_path.iterdir())) == len(fresh)


def test_backbones_and_settings_share_a_folder(
    backbone: Factory, fewshot_root: Path, tmp_path: Path
) -> None:
    """Each gets its own rows, in whatever order they come."""
    ways = [(kind, length) for kind in ("t5", "bart", "gpt2", "llama") for length in (5, 20)]
    for kind, length in ways * 2:
        fresh = load(backbone(kind), fewshot_root, None, max_input_length=length)
        kept = load(backbone(kind), fewshot_root, tmp_path, max_input_length=length)
        assert kept == fresh


def test_a_changed_file_is_tokenised_anew(
    backbone: Factory, fewshot_root: Path, tmp_path: Path
) -> None:
    """Reference: rows without a folder."""
    root = Path(shutil.copytree(fewshot_root, tmp_path / "data"))
    load(backbone("t5"), root, tmp_path / "kept")
    path = root / "glue-sst2" / "glue-sst2_16_13_dev.tsv"
    path.write_text(path.read_text().replace("13", "31", 1))
    fresh = load(backbone("t5"), root, None)
    assert load(backbone("t5"), root, tmp_path / "kept") == fresh


def test_sandbox_rows_are_kept_too(
    backbone: Factory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for _ in range(2):
        data = CrossFitDataModule(["sandbox-review"], cache=str(tmp_path))
        data.setup()
        data.connect(backbone("t5"))
        found.append(data.rows("sandbox-review", 100, "train"))
        monkeypatch.setattr(crossfit, "tokenise", refuse)
    assert found[0] == found[1]


# ---- the key -------------------------------------------------------------------------------------


def test_the_key_holds_file_rules_length_prefix_and_targets() -> None:
    """Another value of any of them is another key; equal ones are the same."""
    given = {"data_digest": "d", "rules": "r", "max_input_length": 512, "prefix": ""}
    key = cache_key(**given, with_targets=True)
    assert key == cache_key(**given, with_targets=True)
    others = [
        cache_key(**{**given, **change}, with_targets=True)
        for change in (
            {"data_digest": "e"},
            {"rules": "s"},
            {"max_input_length": 511},
            {"prefix": " [a] "},
        )
    ]
    others.append(cache_key(**given, with_targets=False))
    assert len({key, *others}) == 6


def test_the_rules_are_those_of_the_tokenizer_and_not_of_the_weights(backbone: Factory) -> None:
    """Kinds that differ in special tokens alone differ; use, and other weights, change nothing."""
    kinds = ("t5", "bart", "gpt2", "bloom", "llama", "qwen2")
    assert len({rules_digest(backbone(kind)) for kind in kinds}) == len(kinds)
    model = make_backbone("t5", seed=1)
    first = rules_digest(model)
    model.tokenizer(["a b", "c"], truncation=True, max_length=3, padding=True)
    model.encode_inputs(["the house"], 2)
    assert rules_digest(model) == first == rules_digest(backbone("t5"))


def _lower(model: Backbone) -> None:
    model.tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()


def _merge_less(model: Backbone) -> None:
    """Drop the last merge, and keep the vocabulary."""
    import json

    state = json.loads(model.tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"].pop()
    model.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


def _cut_left(model: Backbone) -> None:
    model.tokenizer.truncation_side = "left"


def _split_specials(model: Backbone) -> None:
    model.tokenizer.split_special_tokens = True


def _decoder_only(model: Backbone) -> None:
    model.is_encoder_decoder = False


@pytest.mark.parametrize("change", [_lower, _merge_less, _cut_left, _split_specials, _decoder_only])
def test_what_changes_the_ids_changes_the_rules(
    backbone: Factory, change: Callable[[Backbone], None]
) -> None:
    """None of these is in the digest of vocabulary and special tokens."""
    model = make_backbone("t5")
    change(model)
    assert model.tokenizer_digest == backbone("t5").tokenizer_digest
    assert rules_digest(model) != rules_digest(backbone("t5"))


@pytest.mark.parametrize("library", ["tokenizers", "transformers"])
def test_other_versions_of_the_libraries_tokenise_anew(
    backbone: Factory, monkeypatch: pytest.MonkeyPatch, library: str
) -> None:
    before = rules_digest(backbone("t5"))
    monkeypatch.setattr(sys.modules[library], "__version__", "0.0.1")
    assert rules_digest(backbone("t5")) != before


def test_a_tokenizer_that_is_written_in_python_will_do(
    fewshot_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ByT5's, whose tokens are bytes."""
    config = transformers.T5Config(
        vocab_size=384, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, eos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    network = transformers.T5ForConditionalGeneration(config)
    models = [Backbone(network, transformers.ByT5Tokenizer()) for _ in range(2)]
    assert rules_digest(models[0]) == rules_digest(models[1])
    fresh = load(models[0], fewshot_root, tmp_path)
    monkeypatch.setattr(crossfit, "tokenise", refuse)
    assert load(models[1], fewshot_root, tmp_path) == fresh
    more = Backbone(network, transformers.ByT5Tokenizer(extra_ids=100))
    assert rules_digest(more) != rules_digest(models[0])


# ---- damage --------------------------------------------------------------------------------------


def test_damaged_rows_are_never_taken_for_whole(tmp_path: Path) -> None:
    """Any byte changed, or the file cut anywhere: nothing is read, or the rows as they were."""
    rows = make_rows(3, 0)
    write_rows(tmp_path, KEY, rows)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    damaged = [
        whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :]
        for at, flip in zip(range(len(whole)), cycle((1, 255, 64)))
    ]
    damaged += [whole[:at] for at in range(0, len(whole), 7)] + [whole[9:], b"\0" * len(whole)]
    refused = 0
    for content in damaged:
        path.write_bytes(content)
        found = read_rows(tmp_path, KEY, TASK, rows.references)
        assert found in (None, rows)
        refused += found is None
    assert refused > len(damaged) / 2  # the rest is padding, or a name that is not looked at


def test_rows_of_another_key_or_number_are_not_taken(tmp_path: Path) -> None:
    rows = make_rows(3, 0)
    write_rows(tmp_path, KEY, rows)
    assert read_rows(tmp_path, "another", TASK, rows.references) is None
    assert read_rows(tmp_path, KEY, TASK, rows.references[:2]) is None
    (path,) = tmp_path.iterdir()
    path.rename(tmp_path / "another.arrow")
    assert read_rows(tmp_path, "another", TASK, rows.references) is None


@pytest.mark.parametrize("content", [b"", b"ARROW1\0\0", None], ids=["empty", "start", "cut"])
def test_damaged_files_are_made_again(
    backbone: Factory,
    fewshot_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    content: bytes | None,
) -> None:
    """Reference: what they held before."""
    model = backbone("gpt2")
    fresh = load(model, fewshot_root, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path, whole in before.items():
        path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    assert load(model, fewshot_root, tmp_path) == fresh
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    monkeypatch.setattr(crossfit, "tokenise", refuse)
    assert load(model, fewshot_root, tmp_path) == fresh


# ---- the folder ----------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_told_at_the_start(tmp_path: Path) -> None:
    """In one line, before any few-shot file is looked for."""
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        data = CrossFitDataModule(["glue-sst2"], "no such folder", cache=str(folder))
        with pytest.raises(ValueError, match=f"^data.cache is {folder}, where no file") as caught:
            data.setup()
        assert "\n" not in str(caught.value)


def test_a_full_disk_does_not_end_a_fit(
    backbone: Factory, fewshot_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are used as they are, with a warning."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(crossfit, "write_rows", full)
    with pytest.warns(UserWarning, match="could not be kept: .*No space left"):
        kept = load(backbone("t5"), fewshot_root, tmp_path)
    assert kept == load(backbone("t5"), fewshot_root, None)
