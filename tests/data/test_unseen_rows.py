"""Texts and labels that the model cannot tell apart, or does not see: told before training.

Inputs that are cut are counted, labels of equal tokens named, and rows that cannot be run refused
before the first step, whatever split they stand in.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import EOS, make_method, make_model, make_tokenizer, make_trainer, word_backbone
from lightning.pytorch import Callback

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.prediction import predict
from prompt_lab.data.datamodule import CrossFitDataModule
from prompt_lab.files.results import read_csv

Rows = list[tuple[str, str]]
ROWS: Rows = [("the small dog ran", "yes"), ("a cat on the hill", "no"), ("the sea", "yes")]
SPLITS = ("train", "dev", "test")


def write_task(root: Path, labels: list[str] | None, **splits: Rows) -> CrossFitDataModule:
    """A task ``mine`` of one sample, its rows those above unless others are given."""
    (root / "mine").mkdir(parents=True)
    for at, split in enumerate(SPLITS):
        rows = splits.get(split, [(f"{text} {at}", answer) for text, answer in ROWS])
        text = "".join(f"{source}\t{target}\n" for source, target in rows)
        (root / "mine" / f"mine_16_13_{split}.tsv").write_text(text, encoding="utf-8")
    row = {"metric": "EM", "shots": 16} | ({"labels": labels} if labels else {})
    (root / "tasks.yaml").write_text(f"mine: {row}")
    return CrossFitDataModule(["mine"], str(root), [13], str(root / "tasks.yaml"))


class Steps(Callback):
    """Counts the training steps that were begun."""

    begun = 0

    def on_train_batch_start(self, *args: Any) -> None:
        self.begun += 1


@pytest.fixture
def fit(backbone: Callable[..., Backbone], tmp_path: Path) -> Callable[..., Any]:
    """Function that fits and tests a run, and returns the warnings and the lines of results."""

    def run(data: CrossFitDataModule, kind: str = "gpt2", **settings: Any) -> Any:
        model = settings.pop("model", None) or backbone(kind)
        trainer = make_trainer(tmp_path / "run", 2, 2, callbacks=[run.steps])
        method = make_method(model, **settings)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            trainer.fit(method, datamodule=data)
            trainer.test(method, datamodule=data, verbose=False)
        return [str(w.message) for w in said], read_csv(tmp_path / "run" / "results.csv")

    run.steps = Steps()  # type: ignore[attr-defined]
    return run


# ---- labels -------------------------------------------------------------------------------------


def test_labels_of_equal_tokens_are_named_at_the_start(fit: Any, tmp_path: Path) -> None:
    """text-to-text-transfer-transformer 390: two unknown labels are one to the model."""
    labels = ["yes", "house", "sea"]
    rows = [("the small dog", "yes"), ("the cat", "house"), ("a cat", "sea")]
    splits = {split: [(f"{t} {i}", a) for t, a in rows] for i, split in enumerate(SPLITS)}
    data = write_task(tmp_path, labels, **splits)
    said, _ = fit(data, model=word_backbone(), num_virtual_tokens=2)
    (told,) = [text for text in said if "labels with the same tokens" in text]
    assert "task mine" in told
    assert told.endswith("'house', 'sea'")


@pytest.mark.parametrize("decoding", ["score", "generate"])
def test_a_task_whose_labels_are_all_one_is_refused(
    fit: Any, tmp_path: Path, decoding: str
) -> None:
    splits = {
        split: [(f"the dog {split}", "house"), (f"the cat {split}", "sea")] for split in SPLITS
    }
    data = write_task(tmp_path, ["house", "sea"], **splits)
    with pytest.raises(ValueError, match="task mine: all labels have the same tokens for backbone"):
        fit(data, model=word_backbone(), decoding=decoding)
    assert fit.steps.begun == 0


# ---- inputs that are cut ------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_inputs_that_are_cut_are_counted_and_cut_at_the_chosen_side(
    fit: Any, backbone: Callable[..., Backbone], tmp_path: Path, kind: str, side: str
) -> None:
    """trlx 177. One rule for both kinds of model; reference: the tokens of the whole texts."""
    long = [("the small red house stands on the hill by the sea", "yes"), ("no", "no")]
    data = write_task(tmp_path, ["yes", "no"], test=long)
    data.max_input_length, data.truncation_side = 6, side  # type: ignore[assignment]
    said, lines = fit(data, kind)
    (told,) = [text for text in said if "lose their" in text]
    end = "end" if side == "right" else "beginning"
    texts = {split: data.splits["mine", 13][split].inputs for split in SPLITS}
    model = backbone(kind)
    lengths = {split: [len(ids) for ids in model.encode_inputs(texts[split])] for split in SPLITS}
    counts = {split: sum(n > 6 for n in of_split) for split, of_split in lengths.items()}
    parts = [f"mine {s} {counts[s]} of {len(lengths[s])}" for s in SPLITS if counts[s]]
    assert told == (
        f"inputs of over 6 tokens lose their {end} (data.max_input_length, data.truncation_side): "
        + "; ".join(parts)
    )
    for line in lines:
        assert [line[f"cut_{split}"] for split in SPLITS] == [str(counts[s]) for s in SPLITS]
    specials = backbone(kind).specials
    front = len(specials.front)
    back = len(specials.back) if kind == "t5" else 0
    whole = backbone(kind).encode_inputs([long[0][0]])[0]
    text = whole[front : len(whole) - back]
    room = 6 - front - back
    kept = text[:room] if side == "right" else text[-room:]
    (found, _) = data.tokens("mine", 13, "test").inputs
    assert found == whole[:front] + kept + whole[len(whole) - back :]


def test_nothing_is_told_where_nothing_is_cut(fit: Any, tmp_path: Path) -> None:
    said, lines = fit(write_task(tmp_path, ["yes", "no"]))
    assert not [text for text in said if "lose their" in text or "references" in text]
    assert {line["cut_test"] for line in lines} == {"0"}


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_predict_cuts_as_asked_and_says_so(backbone: Callable[..., Backbone], kind: str) -> None:
    """Reference: the tokens that are kept, given by themselves."""
    model = backbone(kind)
    prompt = 0.5 * torch.randn(1, 3, model.hidden_size, generator=torch.Generator().manual_seed(1))
    long, room = "the small red house stands on the hill by the sea", 9
    asked: dict[str, Any] = {"labels": ["yes", "no", "maybe"], "max_input_length": room}
    found = []
    for side in ("right", "left"):
        with pytest.warns(UserWarning, match="inputs of over 9 tokens lose their"):
            made = predict(model, prompt, [long, "no"], truncation_side=side, **asked)
        ids = model.cut_input(model.encode_inputs([long])[0], room, side)  # type: ignore[arg-type]
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        assert model.encode_inputs([text]) == [ids]
        assert made == predict(model, prompt, [text, "no"], **asked)
        found.append(ids)
    assert found[0] != found[1]


# ---- rows that do not fit -----------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train", "dev"])
def test_rows_that_do_not_fit_are_refused_before_the_first_step(
    fit: Any, tmp_path: Path, split: str
) -> None:
    """The backbone has 128 positions; dev was looked at after the first steps."""
    data = write_task(tmp_path, ["yes", "no"], **{split: [("sea " * 130, "yes"), ("no", "no")]})
    with pytest.raises(ValueError, match="do not fit the 128 positions of backbone"):
        fit(data)
    assert fit.steps.begun == 0


def test_test_rows_that_do_not_fit_are_told_before_the_first_step(fit: Any, tmp_path: Path) -> None:
    """They are refused by the test alone, which some fits never have."""
    data = write_task(tmp_path, ["yes", "no"], test=[("sea " * 130, "yes"), ("no", "no")])
    trainer = make_trainer(tmp_path / "run", 2, 2)
    method = make_method(Backbone(make_model("gpt2"), make_tokenizer("gpt2")))
    with pytest.warns(UserWarning, match="test rows will be refused: task mine: .* do not fit"):
        trainer.fit(method, datamodule=data)
    with pytest.raises(ValueError, match="do not fit the 128 positions"):
        trainer.test(method, datamodule=data)


@pytest.mark.parametrize("split", SPLITS)
def test_inputs_without_tokens_are_refused_before_the_first_step(
    fit: Any, tmp_path: Path, split: str
) -> None:
    """A tokenizer without an unknown token drops what it does not know."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [EOS, *"the small dog ran a cat on hill sea yes no Ġ 0 1 2".split()]  # noqa: SIM905
    raw = Tokenizer(models.BPE({word[:1]: i for i, word in enumerate("0abcdefghilmnorstyw12")}, []))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=words[5])
    model = make_model("llama")
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    data = write_task(tmp_path, ["yes", "no"], **{split: [("♥", "yes"), ("no", "no")]})
    with pytest.raises(ValueError, match=f"mine_16_13_{split}.tsv: an input has no tokens .*'♥'"):
        fit(data, model=Backbone(model, tokenizer, "letters"))
    assert fit.steps.begun == 0


# ---- references that no answer can match --------------------------------------------------------


def test_references_longer_than_generated_answers_are_told(fit: Any, tmp_path: Path) -> None:
    """B14: the longest answer of train and dev caps what is generated of test."""
    long = [("the sea", "the small red house stands on the hill"), ("no sea", "no")]
    data = write_task(tmp_path, None, test=long)
    said, _ = fit(data)
    (told,) = [text for text in said if "references" in text]
    assert "longer than the 3 tokens that are generated" in told
    assert "the longest answer of train and dev" in told
    assert told.endswith(": test 1 of 2")
    said, _ = fit(data, max_new_tokens=30)
    assert not [text for text in said if "references" in text]
    said, _ = fit(data, max_new_tokens=1)
    (told,) = [text for text in said if "references" in text]
    assert told.endswith(": train 3 of 3, dev 3 of 3, test 2 of 2")


def test_lost_references_are_counted_over_all_samples(fit: Any, tmp_path: Path) -> None:
    write_task(tmp_path, None, test=[("the sea", "the small red house"), ("no sea", "no")])
    for split in SPLITS:
        file = tmp_path / "mine" / f"mine_16_13_{split}.tsv"
        (tmp_path / "mine" / f"mine_16_42_{split}.tsv").write_bytes(file.read_bytes())
    both = CrossFitDataModule(["mine"], str(tmp_path), [13, 42], str(tmp_path / "tasks.yaml"))
    said, _ = fit(both, max_new_tokens=2)
    (told,) = [text for text in said if "references" in text]
    assert told.endswith("in full: train 4 of 6, dev 4 of 6, test 2 of 4")


def test_labels_that_differ_by_case_alone_are_told(fit: Any, tmp_path: Path) -> None:
    """The metric takes them for one."""
    rows = [("the small dog", "Yes"), ("the cat", "yes")]
    splits = {split: [(f"{t} {i}", a) for t, a in rows] for i, split in enumerate(SPLITS)}
    said, _ = fit(write_task(tmp_path, ["Yes", "yes"], **splits))
    assert [text for text in said if text.endswith("differ by case alone: Yes, yes")]


@pytest.mark.parametrize(("kind", "special"), [("bart", 2), ("llama", 1)])
def test_a_length_without_room_for_text_is_refused(
    fit: Any, tmp_path: Path, kind: str, special: int
) -> None:
    data = write_task(tmp_path, ["yes", "no"])
    data.max_input_length = special
    with pytest.raises(ValueError, match=f"give at least {special + 1}"):
        fit(data, kind)
    assert fit.steps.begun == 0


def test_scored_answers_need_no_room_for_generated_ones(fit: Any, tmp_path: Path) -> None:
    """128 positions: prompt 5, input of 100 tokens or so, labels of two. None is the longest."""
    long = [("sea " * 50, "the small red house"), ("no", "no")]
    said, _ = fit(write_task(tmp_path, ["yes", "no", long[0][1]], test=long), max_new_tokens=64)
    assert not [text for text in said if "references" in text]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"inputs": ["a", None]}, "inputs hold None, which is no text"),
        ({"labels": ["yes"]}, "give two answers or more"),
        ({"labels": ["yes", " yes"]}, "a label occurs twice"),
        ({"truncation_side": "top", "max_input_length": 1}, "truncation_side is 'top'"),
        ({"scale": float("nan")}, "not finite"),
    ],
)
def test_predict_refuses_what_it_cannot_answer(
    backbone: Callable[..., Backbone], given: dict[str, Any], reason: str
) -> None:
    asked = {"inputs": ["the dog"], "labels": ["yes", "no"], **given}
    prompt = torch.ones(1, 2, 32) * asked.pop("scale", 1.0)
    with pytest.raises(ValueError, match=reason):
        predict(backbone("gpt2"), prompt, **asked)
