"""Rows by chat templates: their tokens are those of ``apply_chat_template``, whole and cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import BOS, EOS, EOS_ID, PAD, UNK, make_model, make_tokenizer

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient, bank_product
from prompt_lab.core.batch import make_batch
from prompt_lab.core.text import ChatFrame

ROWS = [
    ("the small red house", "positive"),
    ("a dog and a cat ran", "no maybe"),
    ("two lines\n\nof text.", "yes"),
    ("1 + 1 = ?", "2"),
    ("She said: [INST] <b>hi</b> {{ x }}", "(no)"),
]

CHATML = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
LLAMA2 = """\
{{ bos_token }}{% set ns = namespace(s='') %}{% for m in messages %}
{%- if m['role'] == 'system' %}{% set ns.s = '<<SYS>>\\n' + m['content'] + '\\n<</SYS>>\\n\\n' %}
{%- elif m['role'] == 'user' %}{{ '[INST] ' + ns.s + m['content'] | trim + ' [/INST]' }}
{%- else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"""
GEMMA = """\
{{ bos_token }}{% if messages[0]['role'] == 'system' %}
{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}
{%- set role = 'model' if m['role'] == 'assistant' else m['role'] %}
{{- '<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"""
VICUNA = """\
{% for m in messages %}{% if m['role'] == 'user' %}USER: {{ m['content'] }}
{%- elif m['role'] == 'system' %}{{ m['content'] }} {% else %} ASSISTANT: {{ m['content'] }}

{% endif %}{% endfor %}"""  # which ends in a space and has no end token
THINKING = CHATML.replace(
    "{{ m['content'] }}",
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ m['content'] }}",
)  # what is in front of an answer is not what is in front of a generated one
ONLY_USER = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
NO_SYSTEM = "{{ messages[-2].content }} {{ messages[-1].content }}"

ADDED = {
    CHATML: ["<|im_start|>", "<|im_end|>"],
    THINKING: ["<|im_start|>", "<|im_end|>"],
    GEMMA: ["<start_of_turn>", "<end_of_turn>"],
}
ENDS = {CHATML: "<|im_end|>", THINKING: "<|im_end|>", LLAMA2: EOS, GEMMA: "<end_of_turn>"}
TEMPLATES = {"chatml": CHATML, "llama2": LLAMA2, "gemma": GEMMA, "thinking": THINKING}


def pieces() -> Any:
    """A tokenizer of SentencePiece's kind: words begin with a mark, the first one, too."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token=UNK))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    made.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = ["▁", "\n", *map(chr, range(33, 127))]
    specials = [PAD, BOS, EOS, UNK]
    trainer = trainers.BpeTrainer(
        vocab_size=180, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator([text for row in ROWS for text in row], trainer)
    made.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, 1)]
    )
    words = {"bos_token": BOS, "eos_token": EOS, "pad_token": PAD, "unk_token": UNK}
    return PreTrainedTokenizerFast(tokenizer_object=made, **words)


def instruct(template: str | None, kind: str = "llama", with_pieces: bool = False) -> Backbone:
    """A tiny model whose tokenizer has a chat template."""
    tokenizer = pieces() if with_pieces else make_tokenizer(kind)
    tokenizer.add_special_tokens({"additional_special_tokens": ADDED.get(template or "", [])})
    tokenizer.chat_template = template
    model = make_model(kind)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    return Backbone(model, tokenizer, "tiny")


def chat(text: str, answer: str, system: str | None = None) -> list[dict[str, str]]:
    first = [] if system is None else [{"role": "system", "content": system}]
    both = [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]
    return [*first, *both]


def whole(model: Backbone, text: str, answer: str, system: str | None) -> list[int]:
    """Reference: the tokenizer's own tokens of a chat."""
    return model.tokenizer.apply_chat_template(chat(text, answer, system), tokenize=True)[
        "input_ids"
    ]


@pytest.mark.parametrize("with_pieces", [False, True], ids=["bytes", "pieces"])
@pytest.mark.parametrize("system", [None, "Be brief."], ids=["", "system"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_tokens_are_those_of_the_tokenizers_template(
    name: str, system: str | None, with_pieces: bool
) -> None:
    template = TEMPLATES[name]
    if system and name == "gemma":
        pytest.skip("it takes no system text, as another test says")
    model = instruct(template, with_pieces=with_pieces)
    frame = model.frame("chat", system)
    texts, answers = zip(*ROWS, strict=True)
    inputs, targets = model.encode_inputs(texts, frame), model.encode_targets(answers, frame)
    end = model.tokenizer.convert_tokens_to_ids(ENDS[template])
    for (text, answer), x, y in zip(ROWS, inputs, targets, strict=True):
        expected = whole(model, text, answer, system)
        last = len(expected) - 1 - expected[::-1].index(end)
        assert x + y == expected[: last + 1]
        assert x[: len(frame.front)] == frame.front
        assert x[len(x) - len(frame.back) :] == frame.back
        assert x.count(1) == (BOS in model.tokenizer.decode(expected))  # never two starts
    assert frame.ends == list(dict.fromkeys([EOS_ID, end]))
    assert model.frame().ends == [EOS_ID]
    assert model.frame("chat", system) is frame  # made once


def test_a_template_that_ends_in_a_space_and_without_an_end_token() -> None:
    """The space belongs to the answer's first token; the model's own end token follows."""
    model = instruct(VICUNA)
    frame = model.frame("chat")
    for text, answer in ROWS[:2]:
        (x,), (y,) = model.encode_inputs([text], frame), model.encode_targets([answer], frame)
        expected = model.tokenizer(f"USER: {text} ASSISTANT: {answer}", add_special_tokens=False)[
            "input_ids"
        ]
        assert x + y == [*expected, EOS_ID]
        assert model.tokenizer.decode(y) == f" {answer}{EOS}"


def test_rows_of_the_template_are_the_same_on_every_day() -> None:
    dated = "Today: {{ strftime_now('%d %b %Y') }} " + CHATML
    frame = instruct(dated).frame("chat")
    assert frame.tokenizer.decode(frame.front).startswith("Today: 26 Jul 2024 ")


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_only_the_text_is_cut(name: str, side: Any) -> None:
    """Reference: the frame around the tokens of the text that are left."""
    model = instruct(TEMPLATES[name])
    frame = model.frame("chat")
    (ids,) = model.encode_inputs(["the small red house stands on the hill"], frame)
    front, back = frame.front, frame.back
    text = ids[len(front) : len(ids) - len(back)]
    room = len(front) + len(back) + 3
    kept = text[:3] if side == "right" else text[-3:]
    assert model.cut_input(ids, room, side, frame) == front + kept + back
    assert model.cut_input(ids, len(ids), side, frame) == ids
    with pytest.raises(ValueError, match=f"but {room - 3} tokens of the chat template stand ar"):
        model.cut_input(ids, room - 3, side, frame)


def test_the_plain_frame_is_what_no_frame_is() -> None:
    model = instruct(CHATML)
    plain = model.frame("plain")
    assert model.encode_inputs(["a dog"], plain) == model.encode_inputs(["a dog"])
    assert model.encode_inputs(["a dog"]) == [model.tokenizer("a dog")["input_ids"]]
    assert plain.digest == ""
    assert model.frame("chat").digest != model.frame("chat", "Be brief.").digest


@pytest.mark.parametrize(
    ("template", "system", "reason"),
    [
        (None, None, "has no chat template: use plain, or the instruct version"),
        (GEMMA, "Be brief.", r"cannot be used \(System role not supported\); leave out the system"),
        (ONLY_USER, None, "leaves out the assistant's turn: use template plain"),
        (THINKING.replace("m['content']", "'x'"), None, "leaves out the user's turn"),
        (NO_SYSTEM, "Be brief.", "leaves out the system's turn: leave out the system text"),
        ("{% for m in %}", None, r"cannot be used \("),
    ],
)
def test_templates_that_cannot_be_used_are_refused_in_a_sentence(
    template: str | None, system: str | None, reason: str
) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        instruct(template).frame("chat", system)
    assert "\n" not in str(caught.value)


def test_other_settings_are_refused() -> None:
    model = instruct(CHATML)
    with pytest.raises(ValueError, match="template is 'chatml'; allowed: plain, chat"):
        model.frame("chatml")
    with pytest.raises(ValueError, match="system is a part of a chat: give template chat"):
        model.frame("plain", "Be brief.")
    both = instruct(CHATML, "t5")
    with pytest.raises(ValueError, match="an encoder-decoder, whose answers stand apart"):
        both.frame("chat")


def test_scores_and_answers_are_of_chats() -> None:
    """References: plain transformers on the template's tokens, one row at a time."""
    model = instruct(CHATML)
    frame, prompt = model.frame("chat", "Be brief."), torch.zeros(1, 0, model.hidden_size)
    texts, labels = [row[0] for row in ROWS], ["yes", "no maybe", "positive"]
    batch = model.batch(texts, labels[:1] * len(texts), frame=frame)
    expected = []
    for row in batch.rows:
        for label in labels:
            ids = whole(model, texts[row], label, "Be brief.")[:-1]  # the line feed behind the end
            (target,) = model.encode_targets([label], frame)
            with torch.no_grad():
                logits = model.model(torch.tensor([ids])).logits[0].log_softmax(1)
            at = torch.arange(len(ids) - len(target), len(ids))
            expected.append(logits[at - 1, torch.tensor(target)])
    sums = torch.stack([one.sum() for one in expected]).view(len(texts), -1)
    means = torch.stack([one.mean() for one in expected]).view(len(texts), -1)
    for way, table in (("sum", sums), ("mean", means)):
        found = model.score(prompt, batch, labels, way, frame)
        torch.testing.assert_close(found, table, atol=1e-4, rtol=0)
        assert model.choose(prompt, batch, labels, way, frame) == table.argmax(1).tolist()
    torch.testing.assert_close(model.loss(prompt, batch), -means[:, 0], atol=1e-4, rtol=0)
    assert sums.argmax(1).tolist() != means.argmax(1).tolist()
    with pytest.raises(ValueError, match="label_score is 'max'; allowed: sum, mean"):
        model.score(prompt, batch, labels, "max", frame)  # type: ignore[arg-type]


def test_a_generated_answer_ends_with_the_assistants_turn() -> None:
    """Reference: a greedy loop by plain transformers, until the turn's end."""
    model = instruct(CHATML)
    frame = model.frame("chat")
    end = model.tokenizer.convert_tokens_to_ids("<|im_end|>")
    head = model.model.get_output_embeddings().weight

    @torch.no_grad()
    def greedy(text: str) -> list[int]:
        (ids,), made = model.encode_inputs([text], frame), list[int]()
        while len(made) < 12 and made[-1:] not in ([end], [EOS_ID]):
            made.append(int(model.model(torch.tensor([ids + made])).logits[0, -1].argmax()))
        return made

    head.data[end] = 1.01 * head.data[greedy(ROWS[0][0])[4]]  # where that one came, it ends
    none = torch.zeros(1, 0, model.hidden_size)
    for text, _ in ROWS:
        answer = model.tokenizer.decode(greedy(text), skip_special_tokens=True).strip()
        batch = model.batch([text], frame=frame)
        assert model.generate(none, batch, 12, frame=frame) == [answer]
    assert greedy(ROWS[0][0])[-1] == end


def test_labels_of_equal_tokens_are_found_in_chats_too() -> None:
    model = instruct(LLAMA2)  # which trims
    assert isinstance(model.frame("chat"), ChatFrame)
    assert model.look_alikes(["yes", "yes ", "no"], model.frame("chat")) == [["yes", "yes "]]


def test_real_rows_in_a_real_models_template(smollm2: str, test_data: Path) -> None:
    """Reference: ``apply_chat_template`` of SmolLM2's tokenizer, row by row."""
    model = Backbone.load(smollm2)
    for task, count in (("trec", 30), ("imdb", 6), ("emotion", 30), ("ag_news", 30)):
        file = test_data / "crossfit" / task / f"{task}_16_13_train.tsv"
        rows = [line.split("\t")[:2] for line in file.read_text().splitlines()[:count]]
        texts, answers = zip(*rows, strict=True)
        for system in (None, "Name the class of the text."):
            frame = model.frame("chat", system)
            inputs, targets = (
                model.encode_inputs(texts, frame),
                model.encode_targets(answers, frame),
            )
            for (text, answer), x, y in zip(rows, inputs, targets, strict=True):
                expected = whole(model, text, answer, system)
                assert x + y == expected[:-1]
                assert model.tokenizer.decode(expected[-1:]) == "\n"
                assert model.tokenizer.decode(y) == f"{answer}<|im_end|>"
                start = model.tokenizer.apply_chat_template(
                    chat(text, answer, system)[:-1], add_generation_prompt=True
                )
                assert x == start["input_ids"]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2_window", "bloom"])
def test_what_stands_in_front_of_every_row_runs_once_per_prompt(kind: str) -> None:
    model = instruct(CHATML, kind)
    frame = model.frame("chat", "Be brief.")
    front = tuple(frame.front) if model.packs else ()
    texts, answers = zip(*ROWS, strict=True)
    assert not model.packs or len(front) > 10
    rows = (model.encode_inputs(texts, frame), model.encode_targets(answers, frame))
    sides = {"pad_id": model.pad_id, "left_padded": True}
    shared = make_batch(*rows, [0, 1, 0, 1, 0], **sides, front=model.front(frame))
    whole = model.batch(texts, answers, [0, 1, 0, 1, 0], frame=frame)
    assert shared.rows == whole.rows
    assert (shared.front, whole.front) == (front, ())
    bank = torch.randn(2, 3, model.hidden_size, generator=torch.Generator().manual_seed(0))
    for tokens in (16, 4096):
        losses, gradient = bank_gradient(model, bank, shared, tokens)
        expected, of_whole = bank_gradient(model, bank, whole, tokens)
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(gradient, of_whole, rtol=1e-4, atol=1e-5)
    product, of_whole = (
        bank_product(model, bank, gradient, batch, 4096) for batch in (shared, whole)
    )
    torch.testing.assert_close(product, of_whole, rtol=1e-3, atol=1e-4)
    scores, of_whole = (model.score(bank, batch, answers, frame=frame) for batch in (shared, whole))
    torch.testing.assert_close(scores, of_whole, rtol=1e-5, atol=1e-4)
    made, of_whole = (model.generate(bank, batch, 6, frame=frame) for batch in (shared, whole))
    assert made == of_whole
    # A row that begins otherwise, or has no tokens of its own: all run whole.
    for odd in ([5, *rows[0][0]], list(front)):
        made = make_batch([*rows[0], odd], None, [0] * 6, **sides, front=front)
        assert made.front == ()
        assert sum(made.input_lengths) == sum(map(len, [*rows[0], odd]))
