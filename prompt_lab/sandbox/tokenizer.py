"""The sandbox tokenizer: one token per word, split at white space, `</s>` appended as T5 does.

It is saved as an ordinary fast tokenizer of Hugging Face. Left out: sub-words and normalisation;
a word outside the vocabulary is `<unk>`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from prompt_lab.sandbox.lexicon import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS: tuple[str, ...] = ("<pad>", "</s>", "<unk>")


def token_ids() -> dict[str, int]:
    """Returns the id of every token: the special tokens first, then `lexicon.vocabulary()`."""
    return {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Builds the tokenizer; decoding without special tokens gives a text of known words back."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = token_ids()
    pad, end, unknown = SPECIAL_TOKENS
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end}", pair=f"$A {end} $B {end}", special_tokens=[(end, ids[end])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
