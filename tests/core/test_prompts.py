"""Initial prompts: rows of the embedding table, noise of the stated size, files, errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import HIDDEN
from torch import Tensor

from prompt_lab.core import prompts
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.run import Run
from prompt_lab.data.tasks import Task
from prompt_lab.files.prompts import Prompt, PromptStore, save_prompt
from prompt_lab.files.results import Start
from prompt_lab.methods.starts import InitConfig, initial_prompts, scale_ratio

Factory = Callable[..., Backbone]

TASKS = {
    "tone": Task("tone", "custom", "ACC", 16, ("negative", "positive", "maybe yes")),
    "other": Task("other", "custom", "ACC", 16, ("no", "yes")),
    "open": Task("open", "custom", "EM", 32, None),
}


def run(task: str = "tone", seed: int = 0, rate: float = 0.3, sample: int = 13) -> Run:
    return Run(task, sample, seed, rate, 8)


def one(
    config: InitConfig, model: Backbone, count: int, task: str = "tone", seed: int = 0
) -> Tensor:
    """The initial prompt (N, D) of a single run."""
    return initial_prompts(config, model, [run(task, seed)], TASKS, count)[0][0]


def ids_of(model: Backbone, rows: Tensor) -> list[int]:
    """The token whose embedding each row equals; fails where there is none."""
    equal = (rows[:, None] == model.embedding_table()[None]).all(-1)
    assert equal.any(1).all()
    return equal.int().argmax(1).tolist()


# ---- vocabulary ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_rows_equal_distinct_embeddings_of_ordinary_tokens(backbone: Factory, kind: str) -> None:
    """No special token, none twice; for BART the embeddings as the model scales them."""
    model = backbone(kind)
    ids = ids_of(model, one(InitConfig(), model, 100))
    assert len(set(ids)) == 100
    assert not set(ids) & set(model.tokenizer.all_special_ids)


def test_rows_of_the_table_that_no_token_has_are_not_drawn() -> None:
    """Published T5 models have embeddings beyond their tokenizer's vocabulary."""
    from conftest import make_model, make_tokenizer

    model = make_model("t5")
    model.resize_token_embeddings(400)
    frozen = Backbone(model, make_tokenizer("t5"))
    ids = ids_of(frozen, one(InitConfig(vocab_size=None), frozen, 100))
    assert max(ids) < len(frozen.tokenizer) < 400


@pytest.mark.parametrize(
    "config", [InitConfig(), InitConfig("normal"), InitConfig("uniform")], ids=lambda c: c.name
)
def test_a_prompt_depends_on_seed_and_length_but_not_on_the_task(
    backbone: Factory, config: InitConfig
) -> None:
    """Decision 6: nor on learning rate, sample, the other runs or the global generator."""
    model = backbone("gpt2")
    runs = [run("tone"), run("other"), run("open", rate=0.1, sample=42), run("tone", seed=1)]
    torch.manual_seed(1)
    made, _ = initial_prompts(config, model, runs, TASKS, 8)
    torch.manual_seed(2)
    assert made.shape == (4, 8, HIDDEN)
    assert made.dtype == torch.float32
    assert torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    assert (made[0] != made[3]).any()
    assert torch.equal(one(config, model, 8, "open"), made[0])
    assert torch.equal(one(config, model, 8, seed=1), made[3])


def test_a_vocabulary_too_small_is_refused(backbone: Factory) -> None:
    with pytest.raises(ValueError, match=r"20 virtual tokens cannot be drawn .* from 7 tok"):
        one(InitConfig(vocab_size=10), backbone("t5"), 20)


# ---- text, labels, noise ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_a_text_gives_its_tokens_cut_or_repeated(backbone: Factory, kind: str) -> None:
    """No special tokens, which would stand in the middle of the prompt."""
    model, text = backbone(kind), "the small dog likes"
    tokens = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(tokens)
    assert ids_of(model, one(InitConfig("text", text=text), model, count)) == tokens
    assert ids_of(model, one(InitConfig("text", text=text), model, count - 1)) == tokens[:-1]
    longer = ids_of(model, one(InitConfig("text", text=text), model, 2 * count + 1))
    assert longer == tokens + tokens + tokens[:1]


def test_labels_come_first_each_the_mean_of_its_tokens(backbone: Factory) -> None:
    """Reference: means over the embedding table; the rest is the vocabulary prompt's start."""
    model = backbone("t5")
    made = one(InitConfig("labels"), model, 8)
    table = model.embedding_table()
    for row, label in enumerate(TASKS["tone"].labels or ()):
        ids = model.tokenizer(label, add_special_tokens=False)["input_ids"]
        assert torch.allclose(made[row], table[ids].mean(0))
    assert torch.equal(made[3:], one(InitConfig(), model, 8)[:5])
    both, _ = initial_prompts(InitConfig("labels"), model, [run("tone"), run("other")], TASKS, 8)
    assert torch.equal(both[0], made)
    assert (both[1][:2] != made[:2]).any()


def test_noise_has_the_stated_size(backbone: Factory) -> None:
    """Of 2,000 x 32 numbers: mean and standard deviation within 2 %, limits exactly."""
    model = backbone("t5")
    normal = one(InitConfig("normal", std=0.7), model, 2000)
    uniform = one(InitConfig("uniform", limit=0.25), model, 2000)
    assert normal.std().item() == pytest.approx(0.7, rel=0.02)
    assert abs(normal.mean().item()) < 0.02
    assert uniform.abs().max().item() <= 0.25
    assert uniform.std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert abs(uniform.mean().item()) < 0.01


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_the_scale_ratio_is_that_of_standard_deviations(
    backbone: Factory, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reference: the whole table at once; for BART as the model scales it."""
    model = backbone(kind)
    monkeypatch.setattr("prompt_lab.methods.starts.ROWS_AT_ONCE", 7)
    assert scale_ratio(model, 3 * model.embedding_table()[None]) == pytest.approx(3)
    far = [part + 1000 for part in torch.randn(50, 8).split(7)]
    assert prompts.standard_deviation(far) == pytest.approx(torch.cat(far).std().item(), rel=1e-4)


@pytest.mark.parametrize("name", ["vocab", "text", "labels"])
def test_prompts_of_tokens_embed_no_more_than_these(
    backbone: Factory, name: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their rows are those of the whole table, bit for bit."""
    model, seen = backbone("bart"), []
    expected = one(InitConfig(name, text="the small dog"), model, 5)
    plain = Backbone.embed
    monkeypatch.setattr(Backbone, "embed", lambda self, i: seen.append(i.numel()) or plain(self, i))
    monkeypatch.setattr(Backbone, "embedding_table", None)
    assert one(InitConfig(name, text="the small dog"), model, 5).equal(expected)
    assert 5 <= sum(seen) < 40


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "text"}, "init.name is text: give the text with init.text"),
        ({"name": "file"}, "init.name is file: give a prompt file, a prompt store, "),
        ({"name": "vocabulary"}, r"init.name is 'vocabulary'; allowed: \('vocab', "),
    ],
)
def test_incomplete_settings_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InitConfig(**values)


def test_a_task_without_labels_is_refused(backbone: Factory) -> None:
    with pytest.raises(ValueError, match=r"init.name is labels, but task 'open' has no label set"):
        one(InitConfig("labels"), backbone("t5"), 8, "open")


def test_a_text_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match=r"init.text has no tokens"):
        prompts.text_ids([], 4)


# ---- files --------------------------------------------------------------------------------------


def stored(model: Backbone, name: str, value: float, count: int = 3, **meta: Any) -> Prompt:
    """A prompt file's content, made for a backbone, filled with one value."""
    return Prompt(
        prompt=torch.full((count, HIDDEN), value),
        init=torch.zeros(count, HIDDEN),
        name=name,
        backbone=model.name,
        backbone_digest=model.digest,
        tokenizer_digest=model.tokenizer_digest,
        **meta,
    )


def test_a_store_gives_each_run_the_prompt_of_its_task(backbone: Factory, tmp_path: Path) -> None:
    """Sample, then seed, choose among several of one task."""
    model = backbone("t5")
    PromptStore(tmp_path).save(
        [
            stored(model, "a", 1.0, task="tone", sample=13, init_seed=0),
            stored(model, "b", 2.0, task="tone", sample=42, init_seed=0),
            stored(model, "c", 3.0, task="tone", sample=42, init_seed=1),
            stored(model, "d", 4.0, task="other", sample=100, init_seed=7),
        ]
    )
    runs = [run("tone"), run("tone", sample=42), run("tone", 1, sample=42), run("other", seed=3)]
    made, _ = initial_prompts(InitConfig("file", path=str(tmp_path)), model, runs, TASKS, 3)
    assert made[:, 0, 0].tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_transferred_prompt_is_that_of_the_source_its_sample_and_seed_and_best_by_dev(
    backbone: Factory, tmp_path: Path
) -> None:
    """Seeds that the source lacks take the best of all seeds; a sum goes by its expression."""
    model = backbone("t5")
    given = {"task": "tone", "sample": 13}
    PromptStore(tmp_path).save(
        [
            stored(model, "a", 1.0, **given, init_seed=0, dev_score=0.5),
            stored(model, "b", 2.0, **given, init_seed=0, dev_score=0.6, learning_rate=0.1),
            stored(model, "c", 3.0, **given, init_seed=1, dev_score=0.9),
            stored(model, "d", 4.0, init_seed=0, made_from={"expression": "tone + other"}),
        ]
    )
    config = InitConfig("file", path=str(tmp_path), source_tasks=["tone", " tone  + other"])
    assert config.sources == ["tone", "tone + other"]
    seeds = [replace(run("other", seed, sample=42), source="tone") for seed in (0, 1, 7)]
    runs = [*seeds, replace(run("open"), source="tone + other")]
    made, starts = initial_prompts(config, model, runs, TASKS, 3)
    assert made[:, 0, 0].tolist() == [2.0, 3.0, 3.0, 4.0]
    assert [Path(start.start_file).stem for start in starts] == ["b", "c", "c", "d"]


def test_a_path_may_hold_the_seed_of_the_run(backbone: Factory, tmp_path: Path) -> None:
    model = backbone("t5")
    for seed in (0, 1):
        known = {"role": "multitask", "source_set": "some/set", "init_seed": seed}
        save_prompt(tmp_path / f"p{seed}.safetensors", stored(model, "p", seed + 1.0, **known))
    config = InitConfig("file", path=str(tmp_path / "p{init_seed}.safetensors"))
    runs = [run("tone", 1), run("tone", 0), run("open", 1)]
    made, starts = initial_prompts(config, model, runs, TASKS, 3)
    assert made[:, 0, 0].tolist() == [2.0, 1.0, 2.0]
    path = str(tmp_path / "p")
    assert starts == [
        Start("multitask", "some/set", seed, f"{path}{seed}.safetensors") for seed in (1, 0, 1)
    ]
    with pytest.raises(FileNotFoundError, match=r"p7.safetensors"):
        initial_prompts(config, model, [run("tone", 7)], TASKS, 3)


def test_a_sum_that_is_transferred_is_told_by_its_coefficients(
    backbone: Factory, tmp_path: Path
) -> None:
    model = backbone("t5")
    parts = [{"task": task, "coefficient": 1.0} for task in ("a", "b")]
    known = {"made_from": {"expression": "a + b", "vectors": parts}, "role": "sum"}
    PromptStore(tmp_path / "prompts").save([stored(model, "d", 4.0, **known)])
    config = InitConfig("file", path=str(tmp_path), source_tasks=["a + b"])
    _, (start,) = initial_prompts(config, model, [replace(run("open"), source="a + b")], TASKS, 3)
    assert (start.start, json.loads(start.start_of)) == ("sum", [[1.0, "a"], [1.0, "b"]])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source_tasks": []}, "init.source_tasks is empty"),
        ({"name": "vocab", "source_tasks": ["a"]}, "needs init.name file, with the source prompts"),
    ],
)
def test_a_transfer_without_a_store_or_sources_is_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        InitConfig(**{"name": "file", "path": str(tmp_path), **values})


def test_sources_that_a_store_lacks_are_named_with_what_it_has(
    backbone: Factory, tmp_path: Path
) -> None:
    model = backbone("t5")
    PromptStore(tmp_path).save([stored(model, "a", 1.0, task="tone")])
    config = InitConfig("file", path=str(tmp_path), source_tasks=["tone", "smell"])
    runs = [replace(run("open"), source=source) for source in config.sources]
    with pytest.raises(ValueError, match=r"no prompt for 1 runs: open.*_from_smell; it has: tone"):
        initial_prompts(config, model, runs, TASKS, 3)
    with pytest.raises(ValueError, match="only PromptTuning has it"):
        initial_prompts(config, model, [run("tone")], TASKS, 3)
    with pytest.raises(FileNotFoundError, match="no prompt file or folder nowhere"):
        initial_prompts(replace(config, path="nowhere"), model, runs, TASKS, 3)


def test_all_prompts_that_a_store_lacks_are_named(backbone: Factory, tmp_path: Path) -> None:
    model = backbone("t5")
    PromptStore(tmp_path).save([stored(model, "a", 1.0, task="tone")])
    runs = [run("tone"), run("other"), run("open")]
    with pytest.raises(ValueError, match=r"has no prompt for 2 runs: other_13.*, open_13"):
        initial_prompts(InitConfig("file", path=str(tmp_path)), model, runs, TASKS, 3)


def test_a_choice_among_several_prompts_is_refused(backbone: Factory, tmp_path: Path) -> None:
    model = backbone("t5")
    PromptStore(tmp_path).save(
        stored(model, name, 1.0, task="tone", sample=13, init_seed=0) for name in ("a", "b")
    )
    with pytest.raises(ValueError, match="has several prompts for tone_13_seed0"):
        one(InitConfig("file", path=str(tmp_path)), model, 3)


def test_files_of_another_shape_or_backbone_or_nowhere_are_refused(
    backbone: Factory, tmp_path: Path
) -> None:
    model, path = backbone("t5"), tmp_path / "p.safetensors"
    save_prompt(path, stored(model, "p", 2.0))
    config = InitConfig("file", path=str(path))
    with pytest.raises(ValueError, match=r"has 3 virtual tokens, model.num_virtual_tokens is 5"):
        one(config, model, 5)
    with pytest.raises(ValueError, match=r"made for backbone 'tiny-t5' .* but 'tiny-gpt2'"):
        one(config, backbone("gpt2"), 3)
    with pytest.raises(FileNotFoundError, match="no prompt file or folder"):
        one(InitConfig("file", path=str(tmp_path / "q.safetensors")), model, 3)
