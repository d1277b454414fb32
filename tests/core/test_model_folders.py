"""Folders of models whose files disagree, or lack something: the right behaviour, or one sentence.

Tokenizer, config, generation config and weights are four files that people edit. Each folder here
is that of a tiny model with one thing changed; what is run is compared with plain transformers.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    BOS,
    BOS_ID,
    DECODER_ONLY,
    EOS,
    EOS_ID,
    HIDDEN,
    PAD_ID,
    UNK,
    make_model,
    make_tokenizer,
)
from safetensors.torch import load_file, save_file

from prompt_lab.core.backbone import Backbone

TEXTS = ["the small dog", "a cat ran over the red field and no sea", "no"]
Folder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    """Factory ``folder(kind, tokenizer=None, **config)`` of a saved tiny model."""

    def make(kind: str, tokenizer: Any = None, **changes: Any) -> Path:
        model = make_model(kind)
        model.generation_config.update(**{k: v for k, v in changes.items() if k == "eos_token_id"})
        model.save_pretrained(tmp_path)
        (tokenizer or make_tokenizer(kind)).save_pretrained(tmp_path)
        change(tmp_path / "config.json", **changes)
        return tmp_path

    return make


def change(path: Path, **settings: Any) -> None:
    """Set keys of a JSON file; those that are None are taken out."""
    content = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


def change_weights(path: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Edit the tensors of a folder's weights."""
    file = path / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def load(path: Path) -> Backbone:
    """The backbone of a folder, which loads without a word."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*eager is taken")  # bloom
        return Backbone.load(str(path))


@torch.no_grad()
def greedy_ids(model: Backbone, text: str, ends: set[int], length: int) -> list[int]:
    """The likeliest next token, again and again, by the plain model, up to one that ends it."""
    (ids,), made = model.encode_inputs([text]), list[int]()
    start = [model.model.config.decoder_start_token_id] if model.is_encoder_decoder else []
    while len(made) < length:
        if start:
            given = {"input_ids": torch.tensor([ids])}
            given["decoder_input_ids"] = torch.tensor([[*start, *made]])
        else:
            given = {"input_ids": torch.tensor([[*ids, *made]])}
        token = int(model.model(**given).logits[0, -1].argmax())
        if token in ends:
            break
        made.append(token)
    return made


def greedy(model: Backbone, text: str, ends: set[int], length: int) -> str:
    """The text of the same."""
    ids = greedy_ids(model, text, ends, length)
    return model.tokenizer.decode(ids, skip_special_tokens=True).strip()


def answers(model: Backbone, length: int = 8) -> list[str]:
    """Generated answers without a prompt, in the order of the texts."""
    batch = model.batch(TEXTS)
    made = model.generate(torch.zeros(1, 0, model.hidden_size), batch, length)
    return [made[batch.rows.index(row)] for row in range(len(TEXTS))]


# ---- end and start tokens -----------------------------------------------------------------------


@pytest.mark.parametrize("where", ["config", "generation", "list"])
@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "bloom", "llama", "qwen2"])
def test_answers_end_at_any_end_that_a_file_names(folder: Folder, kind: str, where: str) -> None:
    """QwenLM/Qwen3 927: the config's end is not the tokenizer's; answers must not run on."""
    path = folder(kind)
    plain = load(path)
    free = answers(plain)
    longest = max((greedy_ids(plain, text, {EOS_ID}, 8) for text in TEXTS), key=len)
    other = longest[len(longest) // 2]  # comes up by itself
    named = [other, EOS_ID] if where == "list" else other
    if where == "config":
        change(path / "config.json", eos_token_id=named)
    change(path / "generation_config.json", eos_token_id=named)
    with pytest.warns(UserWarning, match="no special token of its tokenizer: answers stop there"):
        model = Backbone.load(str(path))
    assert set(model.specials.ends) == {EOS_ID, other}
    assert model.specials.end == EOS_ID  # what answers are trained to end with
    found = answers(model)
    assert found == [greedy(model, text, {EOS_ID, other}, 8) for text in TEXTS]
    assert found != free


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
def test_a_tokenizer_without_an_end_takes_the_configs(folder: Folder, kind: str) -> None:
    tokenizer = make_tokenizer(kind)
    tokenizer.eos_token = None
    path = folder(kind, tokenizer, eos_token_id=EOS_ID)
    model = Backbone.load(str(path))
    assert model.specials.end == EOS_ID
    assert model.encode_targets(["yes"])[0][-1] == EOS_ID


def test_a_model_without_any_end_is_refused(folder: Folder) -> None:
    tokenizer = make_tokenizer("gpt2")
    tokenizer.eos_token = None
    path = folder("gpt2", tokenizer)
    for name in ("config.json", "generation_config.json"):  # GPT-2's own is beyond the table
        change(path / name, eos_token_id=50256)
    with pytest.raises(ValueError, match="has no end token: neither tokenizer nor config"):
        Backbone.load(str(path))


def template(kind: str, single: str) -> Any:
    """A tokenizer that adds special tokens of its own choice."""
    from tokenizers import processors

    tokenizer = make_tokenizer(kind)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    return tokenizer


@pytest.mark.parametrize("single", ["$A", f"{BOS} $A", f"{BOS} {BOS} $A", f"{BOS} $A {EOS}"])
@pytest.mark.parametrize("kind", DECODER_ONLY)
def test_a_decoders_rows_start_as_their_tokenizer_starts_them(
    folder: Folder, kind: str, single: str
) -> None:
    """Not with a beginning token wherever there is one; an end behind the input is left out."""
    model = load(folder(kind, template(kind, single)))
    for text, ids in zip(TEXTS, model.encode_inputs(TEXTS), strict=True):
        plain = model.tokenizer(text)["input_ids"]
        assert ids == (plain[:-1] if single.endswith(EOS) else plain)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_a_decoder_starts_where_the_config_says_or_else_the_generation_config(
    folder: Folder, kind: str
) -> None:
    path = folder(kind)
    start = json.loads((path / "config.json").read_text())["decoder_start_token_id"]
    expected = answers(load(path))
    change(path / "config.json", decoder_start_token_id=None)
    change(path / "generation_config.json", decoder_start_token_id=start)
    assert answers(load(path)) == expected
    change(path / "config.json", decoder_start_token_id=start)
    change(path / "generation_config.json", decoder_start_token_id=BOS_ID)
    with pytest.warns(UserWarning, match=f"{start} is taken everywhere"):
        model = Backbone.load(str(path))
    assert answers(model) == expected == [greedy(model, text, {EOS_ID}, 8) for text in TEXTS]
    if kind == "bart":  # whose config has a start of its own, where none is given
        return
    for name in ("config.json", "generation_config.json"):
        change(path / name, decoder_start_token_id=None)
    with pytest.raises(ValueError, match="does not say what its decoder starts from"):
        Backbone.load(str(path))


# ---- tokenizer and tables -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_tables_larger_than_the_vocabulary_are_normal(folder: Folder, kind: str) -> None:
    path = folder(kind)
    model = make_model(kind)
    model.resize_token_embeddings(256)
    model.save_pretrained(path)
    loaded = load(path)
    assert loaded.embedding_table().shape == (256, HIDDEN)
    assert answers(loaded) == [greedy(loaded, text, {EOS_ID}, 8) for text in TEXTS]


def test_tokens_that_the_tables_lack_are_refused(folder: Folder) -> None:
    tokenizer = make_tokenizer("llama")
    tokenizer.add_tokens(["zebra"])
    with pytest.raises(ValueError, match=r"tables of \d+ rows have no place for: 'zebra'"):
        Backbone.load(str(folder("llama", tokenizer)))


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_a_padding_token_beyond_the_tables_is_replaced(folder: Folder, kind: str) -> None:
    """As people add one to a tokenizer that has none, and forget to resize the model."""
    path = folder(kind)
    expected = answers(load(path))
    tokenizer = make_tokenizer(kind)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(path)
    model = load(path)
    assert model.pad_id < len(model.embedding_table())
    assert answers(model) == expected


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_padding_and_truncation_saved_with_a_tokenizer_do_not_touch_rows(
    folder: Folder, kind: str
) -> None:
    path = folder(kind)
    expected = load(path).encode_inputs(TEXTS)
    change(
        path / "tokenizer.json",
        truncation={"direction": "Left", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        padding={
            **{"strategy": {"Fixed": 20}, "direction": "Left", "pad_to_multiple_of": None},
            **{"pad_id": PAD_ID, "pad_type_id": 0, "pad_token": "<pad>"},
        },
    )
    change(path / "tokenizer_config.json", model_max_length=4, truncation_side="left")
    assert load(path).encode_inputs(TEXTS) == expected


def test_a_tokenizer_that_makes_no_tokens_is_refused(folder: Folder) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE({EOS: 0}, []))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=EOS)
    with pytest.raises(ValueError, match="makes no tokens of plain text"):
        Backbone.load(str(folder("gpt2", tokenizer)))


def test_a_folder_with_sentencepiece_alone_loads(folder: Folder, tmp_path: Path) -> None:
    """transformers 36291: mT5 and T5 come with ``spiece.model`` and no ``tokenizer.json``."""
    import sentencepiece

    path = folder("t5")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / name).unlink()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{text} yes no maybe {i}" for i in range(30) for text in TEXTS]),
        model_prefix=str(path / "spiece"),
        vocab_size=40,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    (path / "spiece.vocab").unlink()
    change(path / "config.json", eos_token_id=1)
    change(path / "generation_config.json", eos_token_id=1)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(path / "spiece.model"))
    model = Backbone.load(str(path))
    assert model.specials.ends == [1]
    assert model.encode_inputs(TEXTS) == [[*plain.encode(text), 1] for text in TEXTS]


# ---- weights ------------------------------------------------------------------------------------


UP = "model.layers.1.mlp.up_proj.weight"
NORM = "model.norm.weight"
MT5 = {"model_type": "t5", "feed_forward_proj": "relu", "is_gated_act": False}  # multilingual-t5 83


@pytest.mark.parametrize(
    ("kind", "config", "weights", "message"),
    [
        ("llama", {}, lambda own: own.pop(UP), rf"lacks weights .*: {UP}"),
        ("mt5", MT5, None, r"lacks weights .*wi.weight"),
        ("gpt2", {"n_positions": 64}, None, r"another shape .*: transformer.wpe.weight"),
        ("llama", {}, lambda own: own[NORM].__setitem__(3, torch.nan), f"not finite: {NORM}"),
    ],
)
def test_weights_that_are_not_the_models_are_named(
    folder: Folder,
    capfd: pytest.CaptureFixture[str],
    kind: str,
    config: dict[str, Any],
    weights: Any,
    message: str,
) -> None:
    """A fit on random frozen weights ends well, and its prompt can never be used."""
    path = folder(kind, **config)
    if weights is not None:
        change_weights(path, weights)
    with pytest.raises(ValueError, match=message):
        Backbone.load(str(path))
    assert "LOAD REPORT" not in "".join(capfd.readouterr())  # transformers' table


def test_a_folder_that_is_odd_is_told(folder: Folder) -> None:
    """A config of fewer layers makes another model of the same file."""
    path = folder("llama", num_hidden_layers=1)
    with pytest.warns(UserWarning, match=r"does not use: model.layers.1.* and 6 more; is config"):
        Backbone.load(str(path))
    model = make_model("llama")
    model.resize_token_embeddings(1000)
    model.save_pretrained(path)
    with pytest.warns(UserWarning, match="193 tokens, the model's tables 1000 rows"):
        Backbone.load(str(path))
    (path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config.json is damaged, not JSON"):
        Backbone.load(str(path))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_head_that_is_not_there_is_named_unless_it_is_tied(folder: Folder, kind: str) -> None:
    path = folder(kind)
    change_weights(path, lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks weights .*: lm_head.weight"):
        Backbone.load(str(path))
    change(path / "config.json", tie_word_embeddings=True)
    model = load(path)
    head, table = model.model.get_output_embeddings(), model.model.get_input_embeddings()
    assert torch.equal(head.weight, table.weight)


def test_a_head_of_its_own_is_used_though_the_config_ties_it(folder: Folder) -> None:
    """As plain transformers does."""
    path = folder("llama")
    expected = answers(load(path))
    change(path / "config.json", tie_word_embeddings=True)
    assert answers(Backbone.load(str(path))) == expected


# ---- in a fit -----------------------------------------------------------------------------------


def test_an_unknown_word_is_not_an_end(folder: Folder) -> None:
    """The unknown token is special, but answers do not end with it."""
    model = load(folder("llama"))
    assert model.tokenizer.convert_tokens_to_ids(UNK) not in model.specials.ends


def test_weights_too_large_for_the_dtype_are_named(folder: Folder) -> None:
    path = folder("llama")
    change_weights(path, lambda tensors: tensors["model.norm.weight"].fill_(7e4))
    assert load(path).model.dtype == torch.float32
    with pytest.raises(ValueError, match=r"not finite: model.norm.weight; .* another dtype"):
        Backbone.load(str(path), "float16")


@pytest.mark.parametrize("change_of", ["post_processor", "normalizer", "merges"])
def test_the_digest_of_a_tokenizer_follows_its_rules(folder: Folder, change_of: str) -> None:
    path = folder("llama")
    before = load(path).tokenizer_digest
    file = path / "tokenizer.json"
    content = json.loads(file.read_text())
    if change_of == "merges":
        content["model"]["merges"] = content["model"]["merges"][:20]
    else:
        content[change_of] = {"type": "Lowercase"} if change_of == "normalizer" else None
    file.write_text(json.dumps(content))
    assert load(path).tokenizer_digest != before


@pytest.mark.parametrize("field", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
def test_the_id_of_a_token_is_a_number(folder: Folder, name: str, field: str) -> None:
    path = folder("gpt2")
    change(path / name, **{field: "x"})
    with pytest.raises(ValueError, match=f"{field}|cannot be loaded"):  # transformers' own check
        load(path)


def test_a_start_token_that_the_model_has_no_row_for_is_told(folder: Folder) -> None:
    path = folder("bart")
    start = json.loads((path / "config.json").read_text())["decoder_start_token_id"]
    change(path / "config.json", decoder_start_token_id=5000)
    change(path / "generation_config.json", decoder_start_token_id=start)
    with pytest.warns(UserWarning, match="names token 5000, which the model has no row for"):
        assert Backbone.load(str(path)).specials.start == start


def test_answers_end_before_the_language_that_a_tokenizer_names_behind_the_end() -> None:
    """As mBART's: text, end, language."""
    from tokenizers import processors

    tokenizer = make_tokenizer("bart")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {EOS} {BOS}", special_tokens=[(BOS, BOS_ID), (EOS, EOS_ID)]
    )
    model = Backbone(make_model("bart"), tokenizer, "tiny")
    (answer,) = model.encode_targets(["yes"])
    assert answer == [*tokenizer("yes", add_special_tokens=False)["input_ids"], EOS_ID]
    assert model.encode_inputs(["yes"]) == [[*answer, BOS_ID]]
