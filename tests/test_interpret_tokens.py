"""How tokens look to a reader, and which tokens of a backbone may be found."""

from __future__ import annotations

import pytest
import torch

from prompt_lab.analysis.interpret_tokens import (
    byte_letters,
    is_byte_level,
    read_vocabulary,
    readable,
)
from prompt_lab.analysis.interpretation import initial_tokens


def test_bytes_are_those_of_the_tokenizers_library():
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(byte_letters()) == set(ByteLevel.alphabet())
    splitter = ByteLevel(add_prefix_space=False, use_regex=False)
    for text in ("the", "准确", "तुम", "تناقض", "é", "ÿ\u0100", "😀"):
        ((token, _),) = splitter.pre_tokenize_str(text)
        assert readable(token, True).removeprefix("◌") == text


@pytest.mark.parametrize(
    ("token", "is_bytes", "shown"),
    [
        ("Ġthe", True, "␣the"),
        ("Ċ", True, r"\n"),
        ("▁the", False, "␣the"),
        ("Ġthe", False, "Ġthe"),  # a Maltese letter elsewhere
        ("åĩ", True, r"\xe5\x87"),  # two of the three bytes of a character
        ("aåĩĨ", True, "a准"),
        ("a\u202eb", False, r"a\u202eb"),
        ("a\\n", False, r"a\\n"),
        ("\u093f", False, "◌\u093f"),
        ("\u00a0", False, r"\xa0"),
        ("<0xE4>", False, "<0xE4>"),
        ("", False, "(empty)"),
    ],
)
def test_tokens_are_readable(token, is_bytes, shown):
    assert readable(token, is_bytes) == shown


def test_only_vocabularies_of_bytes_are_read_as_bytes():
    assert is_byte_level(["a", "Ġthe"])
    assert not is_byte_level(["a", "▁the", "Ġ"])  # SentencePiece with a Maltese letter
    assert not is_byte_level(["a", "the"])


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_initial_rows_are_found_in_the_table_as_the_model_sees_it(kind, backbone):
    """BART scales its embeddings."""
    model = backbone(kind)
    vocabulary = read_vocabulary(model)
    ids = torch.tensor([20, 9, 31])
    init = model.embedding_table()[ids]
    assert initial_tokens(init, vocabulary.table, ids=vocabulary.ids).equal(ids)
    assert not set(vocabulary.ids.tolist()) & set(model.tokenizer.all_special_ids)


def test_rows_that_no_token_has_are_left_out_unless_all_are_asked_for():
    from conftest import make_backbone

    model = make_backbone("gpt2")
    size = len(model.embedding_table())
    model.model.resize_token_embeddings(size + 5, mean_resizing=False)
    some, every = read_vocabulary(model), read_vocabulary(model, all_rows=True)
    assert int(some.ids.max()) < size
    assert "5 rows that no token has" in some.note
    assert every.ids.tolist() == list(range(size + 5))
    assert every.names[size + 1] == f"(row {size + 1})"
