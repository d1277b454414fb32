"""The frozen model under prompts, against the same model run row by row with prompts prepended.

The reference never pads and never shares keys and values: one row, its prompt in front of its
embeddings, one forward pass of the Hugging Face model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    BOS_ID,
    DECODER_ONLY,
    ENCODER_DECODER,
    EOS_ID,
    HIDDEN,
    KINDS,
    POSITIONS,
    make_backbone,
    make_model,
    make_tokenizer,
)
from torch import Tensor
from torch.nn import functional as F

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.batch import IGNORE, Batch

Factory = Callable[..., Backbone]

TEXTS = ["the small dog", "a cat ran over the red field and no sea", "no", "she likes long books"]
TARGETS = ["yes", "no way", "maybe positive yes", "no"]
INDEX = [0, 2, 1, 2]
CANDIDATES = ["yes", "maybe the dog", "no way"]
ROUNDED = (
    "bloom",
    "llama",
    "qwen2",
    "qwen2_window",
)  # transformers runs their norms or softmax in float32 always


WIDER = {"t5": 3, "mt5": 3}  # unscaled attention: rounding of some processors weighs more in T5


def bank(count: int = 5, prompts: int = 4, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random prompts (R, N, D) of the embeddings' scale, the same in every precision."""
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(prompts, count, HIDDEN, generator=generator)
    return (0.5 * noise).to(dtype).requires_grad_()


def naive_logits(model: Backbone, prompt: Tensor, ids: list[int], target: list[int]) -> Tensor:
    """Logits (T, V) at the targets of one row behind its prompt (N, D), in one plain pass."""
    behind = torch.tensor([ids if model.is_encoder_decoder else ids + target])
    embeddings = model.model.get_input_embeddings()(behind)
    embeddings = torch.cat([prompt[None].to(embeddings.dtype), embeddings], dim=1)
    if model.is_encoder_decoder:
        start = model.model.config.decoder_start_token_id
        known = torch.tensor([[start, *target[:-1]]])
        return model.model(inputs_embeds=embeddings, decoder_input_ids=known).logits[0]
    first = len(prompt) + len(ids) - 1
    return model.model(inputs_embeds=embeddings).logits[0, first : first + len(target)]


def naive_losses(model: Backbone, prompts: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood of each row of ``TEXTS``, in the batch's order: (B,)."""
    inputs, targets = model.encode_inputs(TEXTS), model.encode_targets(TARGETS)
    rows = []
    for i in batch.rows:
        logits = naive_logits(model, prompts[INDEX[i]], inputs[i], targets[i])
        chosen = logits.float() if logits.dtype == torch.bfloat16 else logits
        chosen = chosen.log_softmax(-1)[range(len(targets[i])), targets[i]]
        rows.append(-chosen.mean())
    return torch.stack(rows)


def relative(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


# ---- loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradient_equal_prepending_the_prompt_to_every_row(
    backbone: Factory, kind: str, dtype: torch.dtype
) -> None:
    """Equality 2: absolute, rotary, ALiBi and relative positions; rows of unequal lengths."""
    limit = 1e-5 if dtype == torch.float32 else 1e-6 if kind in ROUNDED else 1e-10
    model, prompts = backbone(kind, dtype), bank(dtype=dtype)
    batch = model.batch(TEXTS, TARGETS, INDEX)
    losses = model.loss(prompts, batch)
    expected = naive_losses(model, prompts, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), prompts)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), prompts)
    assert losses.dtype == dtype
    assert (losses - expected).abs().max() <= limit
    assert relative(gradient, expected_gradient) <= limit * WIDER.get(kind, 1)
    assert gradient[3].abs().max() == 0  # no row names the last prompt
    assert gradient[:3].norm() > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_changes_nothing(backbone: Factory, kind: str) -> None:
    """A row alone, and with padding added: left of a decoder's input, right of all else."""
    model, prompts = backbone(kind), bank(prompts=1)
    alone = model.batch(TEXTS[3:], TARGETS[3:])
    left = not model.is_encoder_decoder
    side = (5, 0) if left else (0, 5)
    padded = Batch(
        **{
            **vars(alone),
            "input_ids": F.pad(alone.input_ids, side, value=model.pad_id),
            "input_mask": F.pad(alone.input_mask, side, value=0),
            "target_ids": F.pad(alone.target_ids, (0, 3), value=IGNORE),
        }
    )
    gradients = []
    for batch in (alone, padded):
        losses = model.loss(prompts, batch)
        gradients.append((losses.detach(), torch.autograd.grad(losses.sum(), prompts)[0]))
    assert (gradients[0][0] - gradients[1][0]).abs().max() <= 1e-5
    assert relative(gradients[1][1], gradients[0][1]) <= 1e-5 * WIDER.get(kind, 1)
    scores = [model.score(prompts, batch, CANDIDATES) for batch in (alone, padded)]
    assert (scores[0] - scores[1]).abs().max() <= 1e-4
    assert model.generate(prompts, alone, 6) == model.generate(prompts, padded, 6)


@pytest.mark.parametrize("kind", DECODER_ONLY)
def test_a_decoder_takes_inputs_padded_on_the_right_as_well(backbone: Factory, kind: str) -> None:
    model, prompts = backbone(kind), bank()
    left = model.batch(TEXTS, TARGETS, INDEX)
    ids = torch.full_like(left.input_ids, 7)  # padding is never looked at
    mask = torch.zeros_like(ids)
    for row, length in enumerate(left.input_lengths):
        ids[row, :length] = left.input_ids[row, ids.shape[1] - length :]
        mask[row, :length] = 1
    right = replace(left, input_ids=ids, input_mask=mask, left_padded=False)
    losses = [model.loss(prompts, batch) for batch in (left, right)]
    gradients = [torch.autograd.grad(loss.sum(), prompts)[0] for loss in losses]
    assert (losses[0] - losses[1]).abs().max() <= 1e-5
    assert relative(gradients[1], gradients[0]) <= 1e-5
    scores = [model.score(prompts, batch, CANDIDATES) for batch in (left, right)]
    assert (scores[0] - scores[1]).abs().max() <= 1e-4
    assert model.generate(prompts, right, 6) == model.generate(prompts, left, 6)


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_recomputed_layers_leave_loss_and_gradient_and_keep_less(kind: str) -> None:
    """Gradient checkpointing: the same numbers bit for bit, from fewer saved bytes."""
    plain, recomputing, prompts = make_backbone(kind), make_backbone(kind), bank(8)
    recomputing.recompute_layers()
    found = []
    for model in (plain, recomputing):
        kept: dict[int, int] = {}

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        batch = model.batch(TEXTS * 4, TARGETS * 4, INDEX * 4)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = model.loss(prompts, batch)
        gradient = torch.autograd.grad(losses.sum(), prompts)[0]
        found.append((losses.detach(), gradient, sum(kept.values())))
        assert model.generate(prompts, batch, 3) == plain.generate(prompts, batch, 3)
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[1][2] < 0.7 * found[0][2]


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_label_smoothing_equals_its_formula(backbone: Factory, kind: str) -> None:
    """NumPy: (1 - e) x loss of the target + e x mean over the vocabulary of all tokens' losses."""
    model, prompts, share = backbone(kind, torch.float64), bank(dtype=torch.float64), 0.2
    batch = model.batch(TEXTS, TARGETS, INDEX)
    found = model.loss(prompts, batch, label_smoothing=share).detach().numpy()
    inputs, targets = model.encode_inputs(TEXTS), model.encode_targets(TARGETS)
    for at, i in enumerate(batch.rows):
        logits = naive_logits(model, prompts[INDEX[i]], inputs[i], targets[i]).detach().numpy()
        top = logits.max(1, keepdims=True)
        losses = np.log(np.exp(logits - top).sum(1, keepdims=True)) + top - logits  # (T, V)
        of_target = losses[range(len(targets[i])), targets[i]]
        expected = ((1 - share) * of_target + share * losses.mean(1)).mean()
        assert found[at] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_of_no_tokens_leave_the_plain_model(backbone: Factory, kind: str) -> None:
    """Reference: the Hugging Face model on token ids alone, with its own loss."""
    model, prompts = backbone(kind), bank(count=0)
    batch = model.batch(TEXTS, TARGETS, INDEX)
    losses = model.loss(prompts, batch)
    inputs, targets = model.encode_inputs(TEXTS), model.encode_targets(TARGETS)
    for at, i in enumerate(batch.rows):
        ids, target = torch.tensor([inputs[i]]), torch.tensor([targets[i]])
        if not model.is_encoder_decoder:
            skipped = torch.full_like(ids, IGNORE)
            ids, target = torch.cat([ids, target], 1), torch.cat([skipped, target], 1)
        expected = model.model(ids, labels=target).loss
        assert (losses[at] - expected).abs() <= 1e-5
    assert model.score(prompts, batch, CANDIDATES).shape == (4, 3)
    assert len(model.generate(prompts, batch, 3)) == 4


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "bloom", "llama"])
def test_bf16_weights_leave_loss_and_gradient_in_float32(backbone: Factory, kind: str) -> None:
    """Reference: the same rounded weights in float32."""
    half, full = backbone(kind, torch.bfloat16), make_backbone(kind, torch.bfloat16)
    full.model.float()
    prompts = bank()
    batch = half.batch(TEXTS, TARGETS, INDEX)
    found, expected = half.loss(prompts, batch), full.loss(prompts, batch)
    (gradient,) = torch.autograd.grad(found.sum(), prompts)
    (reference,) = torch.autograd.grad(expected.sum(), prompts)
    assert found.dtype == gradient.dtype == torch.float32
    assert relative(found, expected) <= 0.03
    assert F.cosine_similarity(gradient.flatten(), reference.flatten(), dim=0) >= 0.95
    assert half.score(prompts, batch, CANDIDATES).dtype == torch.float32


# ---- answers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_scores_equal_exhaustive_teacher_forcing(backbone: Factory, kind: str) -> None:
    """Equality 4: every (row, candidate) run alone; candidates of 2 to 4 tokens."""
    model, prompts = backbone(kind), bank()
    batch = model.batch(TEXTS, None, INDEX)
    inputs, answers = model.encode_inputs(TEXTS), model.encode_targets(CANDIDATES)
    expected = torch.zeros(4, 3)
    for at, i in enumerate(batch.rows):
        for c, answer in enumerate(answers):
            logits = naive_logits(model, prompts[INDEX[i]], inputs[i], answer)
            expected[at, c] = logits.log_softmax(-1)[range(len(answer)), answer].sum()
    found = model.score(prompts, batch, CANDIDATES)
    assert len(set(map(len, answers))) == 3
    assert (found - expected).abs().max() <= 1e-4  # sums of up to 50 nats
    assert found.argmax(1).tolist() == expected.argmax(1).tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_is_that_of_exhaustive_scoring(backbone: Factory, kind: str) -> None:
    """Equality 4: ten candidates that share beginnings, one the start of another, 48 rows."""
    model, prompts = backbone(kind), bank()
    labels = ["yes", "yes yes", "yes no", "yes no yes", "no", "no way"]
    labels += ["the dog", "the dog ran", "a cat", "a"]
    texts = [f"{text} {i}" for i in range(12) for text in TEXTS]
    batch = model.batch(texts, None, INDEX * 12)
    scores = model.score(prompts, batch, labels)
    assert model.choose(prompts, batch, labels) == scores.argmax(1).tolist()
    assert len(set(scores.argmax(1).tolist())) > 1


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "bloom", "llama"])
def test_answers_behind_a_cached_prefix_equal_answers_behind_the_bank(
    backbone: Factory, kind: str
) -> None:
    """Equality 4: one prefix, several batches, nothing of it changed; also in beams."""
    model, prompts = backbone(kind), bank()
    prefix = model.prefix(prompts.detach())
    before = [part.clone() for part in prefix]
    for texts, index in ((TEXTS, INDEX), (TEXTS[:2], [3, 0])):
        batch = model.batch(texts, None, index)
        assert torch.equal(
            model.score(prefix, batch, CANDIDATES), model.score(prompts, batch, CANDIDATES)
        )
        for beams in (1, 3):
            cached = model.generate(prefix, batch, 6, beams)
            assert cached == model.generate(prompts, batch, 6, beams)
    assert all(map(torch.equal, prefix, before))


@torch.no_grad()
def greedy(model: Backbone, prompt: Tensor, text: str, length: int, end: int) -> str:
    """The likeliest next token, again and again, each time with the whole row run anew."""
    (ids,), made = model.encode_inputs([text]), []
    while len(made) < length and made[-1:] != [end]:
        logits = naive_logits(model, prompt, ids, [*made, 0])  # the last target is not read
        made.append(int(logits[-1].argmax()))
    kept = made[:-1] if made[-1:] == [end] else made
    return model.tokenizer.decode(kept, skip_special_tokens=True).strip()


@pytest.mark.parametrize("kind", KINDS)
def test_generated_answers_equal_a_greedy_loop(kind: str) -> None:
    """References: a hand-written loop, and each row generated alone; one row ends before others."""
    model, prompts = make_backbone(kind), bank()
    batch = model.batch(TEXTS, None, INDEX)
    free = greedy(model, prompts[INDEX[0]], TEXTS[0], 8, EOS_ID)
    end = model.tokenizer.encode(free, add_special_tokens=False)[2]
    model.frame().ends = [end]
    found = model.generate(prompts, batch, 8)
    expected = [greedy(model, prompts[INDEX[i]], TEXTS[i], 8, end) for i in batch.rows]
    alone = [
        model.generate(prompts[INDEX[i]][None], model.batch([TEXTS[i]]), 8)[0] for i in batch.rows
    ]
    assert found == expected
    assert found == alone
    assert len(set(map(len, found))) > 1


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_beams_of_a_batch_equal_beams_of_its_rows(backbone: Factory, kind: str) -> None:
    model, prompts = backbone(kind), bank()
    batch = model.batch(TEXTS, None, INDEX)
    alone = [
        model.generate(prompts[INDEX[i]][None], model.batch([TEXTS[i]]), 6, num_beams=3)[0]
        for i in batch.rows
    ]
    assert model.generate(prompts, batch, 6, num_beams=3) == alone


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_greedy_answers_ignore_the_generation_settings_of_a_model(kind: str) -> None:
    """Published models carry repetition penalties, minimal lengths and the like."""
    plain, strange = make_backbone(kind), make_model(kind)
    strange.generation_config.repetition_penalty = 5.0
    other = Backbone(strange, plain.tokenizer, kind)
    batch, prompts = plain.batch(TEXTS, None, INDEX), bank()
    assert other.generate(prompts, batch, 10) == plain.generate(prompts, batch, 10)


# ---- frozen -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_the_model_is_frozen_and_stays_in_evaluation_mode(kind: str) -> None:
    model = make_backbone(kind)
    parent = torch.nn.ModuleList([model])
    parent.train()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not any(module.training for module in model.modules())
    batch, prompts = model.batch(TEXTS, TARGETS, INDEX), bank()
    assert torch.equal(model.loss(prompts, batch), model.loss(prompts, batch))
    model.loss(prompts, batch).sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_digest_belongs_to_the_weights(model_folder: Callable[[str], Path]) -> None:
    """The same for equal weights and for every dtype of loading; another for one other number."""
    folder = str(model_folder("t5"))
    loaded = Backbone.load(folder)
    assert loaded.digest == make_backbone("t5").digest
    assert loaded.digest == Backbone.load(folder, "bfloat16").digest
    changed = make_backbone("t5")
    next(changed.model.parameters()).data[3, 4] += 1e-3
    assert changed.digest != loaded.digest
    assert make_backbone("t5", seed=1).digest != loaded.digest


# ---- text to tokens -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODER_DECODER)
def test_encoder_decoder_rows_get_their_tokenizers_special_tokens(
    backbone: Factory, kind: str
) -> None:
    model = backbone(kind)
    plain = model.tokenizer("the dog", add_special_tokens=False)["input_ids"]
    start = [BOS_ID] if kind == "bart" else []
    assert model.encode_inputs(["the dog"]) == [[*start, *plain, EOS_ID]]
    assert model.encode_targets(["the dog"]) == [[*start, *plain, EOS_ID]]
    (whole,) = model.encode_inputs(["the dog and the cat"])
    text = whole[len(start) : -1]
    room = 4 - len(start)
    assert model.cut_input(whole, 4) == [*start, *text[: room - 1], EOS_ID]
    assert model.cut_input(whole, 4, "left") == [*start, *text[len(text) - room + 1 :], EOS_ID]
    assert model.cut_input(whole, len(whole)) == whole
    for side, truncated in (("right", "right"), ("left", "left")):  # as transformers cuts
        model.tokenizer.truncation_side = truncated
        plain = model.tokenizer("the dog and the cat", truncation=True, max_length=5)["input_ids"]
        assert model.cut_input(whole, 5, side) == plain
    model.tokenizer.truncation_side = "right"


@pytest.mark.parametrize("kind", DECODER_ONLY)
def test_decoder_only_rows_are_start_input_space_target_end(backbone: Factory, kind: str) -> None:
    """Decision 8: tokenised apart; only the input is cut; a start where the tokenizer adds one."""
    model = backbone(kind)
    start = [BOS_ID] if kind == "llama" else []
    assert model.tokenizer.bos_token_id is not None or kind.startswith("qwen2")
    plain = model.tokenizer("the dog", add_special_tokens=False)["input_ids"]
    answer = model.tokenizer(" yes", add_special_tokens=False)["input_ids"]
    (whole,) = model.encode_inputs(["the dog"])
    assert whole == start + plain
    assert model.cut_input(whole, 2) == (start + plain)[:2]
    assert model.cut_input(whole, 2, "left") == start + plain[len(start) - 2 :]
    assert model.encode_targets(["yes"]) == [[*answer, EOS_ID]]


def test_sentencepiece_answers_get_no_second_space() -> None:
    """Such tokenizers put a space in front of a text by themselves."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "</s>", "▁a", "▁yes", "▁", "▁no"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    model = Backbone(make_model("llama"), tokenizer)
    assert model.encode_targets(["yes", "no"]) == [[3, 1], [5, 1]]


def test_a_real_decoder_continues_a_story(test_data: Path) -> None:
    """A small pretrained Llama with a SentencePiece tokenizer and weights published in float16."""
    model = Backbone.load(str(test_data / "models" / "stories260K"))
    batch = model.batch(["Once upon a time, there was"])
    (made,) = model.generate(torch.zeros(1, 0, model.hidden_size), batch, 8)
    assert made.startswith("a little")
    scores = model.score(torch.zeros(1, 0, model.hidden_size), batch, ["a little", "the of"])
    assert scores[0, 0] > scores[0, 1]


# ---- loading and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "bart", "gpt2", "llama"])
def test_a_folder_loads_as_what_was_saved(model_folder: Callable[[str], Path], kind: str) -> None:
    model, loaded = make_backbone(kind), Backbone.load(str(model_folder(kind)))
    prompts = bank()
    batches = [side.batch(TEXTS, TARGETS, INDEX) for side in (model, loaded)]
    assert torch.equal(*[b.input_ids for b in batches])
    assert torch.allclose(model.loss(prompts, batches[0]), loaded.loss(prompts, batches[1]))
    assert loaded.pad_id == model.pad_id


def test_a_t5_published_in_float16_loads_in_other_dtypes(tmp_path: Path) -> None:
    make_model("t5", torch.float16).save_pretrained(tmp_path)
    make_tokenizer("t5").save_pretrained(tmp_path)
    assert Backbone.load(str(tmp_path), "bfloat16").model.dtype == torch.bfloat16
    assert Backbone.load(str(tmp_path)).digest == Backbone.load(str(tmp_path), "bfloat16").digest


def test_t5_in_float16_is_refused(model_folder: Callable[[str], Path]) -> None:
    with pytest.raises(ValueError, match="overflow in float16: use dtype bfloat16"):
        Backbone(make_model("t5", torch.float16), make_tokenizer("t5"))
    with pytest.raises(ValueError, match="overflow in float16"):
        Backbone.load(str(model_folder("mt5")), "float16")


def test_other_architectures_are_refused(tmp_path: Path) -> None:
    """Before the weights of a folder are read; models in hand are in test_architectures.py."""
    from transformers import ViTConfig

    ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'vit', which transformers has no language m"):
        Backbone.load(str(tmp_path))


def test_a_missing_model_says_what_an_offline_machine_needs() -> None:
    with pytest.raises(ValueError, match="no backbone 'nobody/nothing'") as caught:
        Backbone.load("nobody/nothing")
    for word in ("hf download nobody/nothing", "HF_HOME", "path of a local copy", "sandbox"):
        assert word in str(caught.value)


def test_an_incomplete_folder_is_refused(tmp_path: Path) -> None:
    """Without tokenizer; then without weights."""
    make_model("gpt2").config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds no tokenizer"):
        Backbone.load(str(tmp_path))
    make_tokenizer("gpt2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no backbone in folder"):
        Backbone.load(str(tmp_path))


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype is 'float8'; allowed: float32, bfloat16, float16"):
        Backbone.load("sandbox", "float8")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["bart", "gpt2", "llama", "qwen2"])
def test_rows_longer_than_the_positions_are_refused(backbone: Factory, kind: str) -> None:
    """The prompt counts: the same rows fit behind a shorter one."""
    model = backbone(kind)
    batch = model.batch(["a b " * 20], ["yes"])
    fits = POSITIONS - batch.input_lengths[0] - 8
    model.loss(bank(fits, 1), batch)
    model.score(bank(fits, 1), batch, CANDIDATES)
    too_long = bank(POSITIONS - 10, 1)
    for call in (
        lambda: model.loss(too_long, batch),
        lambda: model.score(too_long, batch, CANDIDATES),
        lambda: model.generate(too_long, batch, 4),
        lambda: model.generate(bank(2, 1), batch, POSITIONS + 1),
    ):
        with pytest.raises(ValueError, match=f"do not fit backbone 'tiny-{kind}', which has 128"):
            call()


@pytest.mark.parametrize("kind", ["t5", "gpt2"])
def test_prompts_of_another_width_are_refused(backbone: Factory, kind: str) -> None:
    model = backbone(kind)
    batch = model.batch(TEXTS, TARGETS)
    for wrong in (torch.zeros(1, 4, HIDDEN + 1), torch.zeros(4, HIDDEN)):
        for call in (
            lambda p: model.loss(p, batch),
            lambda p: model.score(p, batch, CANDIDATES),
            lambda p: model.generate(p, batch, 2),
        ):
            with pytest.raises(ValueError, match=r"takes \(R, N, 32\)"):
                call(wrong)


def test_scoring_needs_candidates(backbone: Factory) -> None:
    model = backbone("t5")
    with pytest.raises(ValueError, match="at least one candidate"):
        model.score(bank(), model.batch(TEXTS), [])
