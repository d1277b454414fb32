"""The sandbox: its tasks, words and backbone, and what its pretraining must never draw."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from prompt_lab import sandbox
from prompt_lab.sandbox import TASKS, lexicon, pretrain, rows
from prompt_lab.sandbox.pretrain import SPECIAL_TOKENS, build_tokenizer, token_ids
from prompt_lab.sandbox.tasks import SPLIT_ROWS, draw_row, words_of

ALL = sorted(TASKS)
RESERVED = [task for task in TASKS.values() if task.role != "pretraining"]


@pytest.fixture(scope="module")
def model() -> Any:
    from transformers import AutoModelForSeq2SeqLM

    return AutoModelForSeq2SeqLM.from_pretrained(sandbox.ASSETS).eval()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sandbox.ASSETS)


def test_words_are_distinct_tokens_without_white_space() -> None:
    words = lexicon.vocabulary()
    assert len(set(words)) == len(words)
    assert all(word.split() == [word] for word in words)
    assert not set(lexicon.LABEL_POOL) & set(lexicon.RESERVED_LABELS)
    assert sum(map(len, lexicon.WORDS.values())) == len(lexicon.VALUE_OF)  # classes are disjoint
    forms = {*lexicon.PLURAL.values(), *lexicon.FOREIGN.values()}
    assert len(forms) == 2 * len(lexicon.NOUNS)
    assert words_of("any") == words


@pytest.mark.parametrize("name", ALL)
def test_rows_are_distinct_in_vocabulary_and_of_the_stated_number(name: str) -> None:
    splits = {split: rows(name, 13, split) for split in SPLIT_ROWS}  # type: ignore[arg-type]
    assert {split: len(found) for split, found in splits.items()} == SPLIT_ROWS
    inputs = [text for found in splits.values() for text, _ in found]
    assert len(set(inputs)) == len(inputs)
    words = {word for found in splits.values() for row in found for word in " ".join(row).split()}
    assert words <= set(lexicon.vocabulary())
    labels = TASKS[name].labels
    if labels:
        targets = [target for _, target in splits["test"]]
        assert set(targets) == set(labels)
        most = max(targets.count(label) for label in labels)
        assert most / len(targets) < 1 / len(labels) + 0.12
    assert splits["test"] == rows(name, 21, "test")
    other = rows(name, 21, "train")
    assert splits["train"] != other
    assert not {text for text, _ in splits["test"]} & {text for text, _ in other}


def test_rows_do_not_depend_on_the_hash_seed() -> None:
    code = "from prompt_lab.sandbox import rows; print(rows('sandbox-sst', 42, 'train')[:20])"
    root = str(Path(sandbox.__file__).parents[2])
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{rows('sandbox-sst', 42, 'train')[:20]}\n"}


def _words(name: str) -> set[str]:
    """The words of a class, straight from the lexicon."""
    return set(lexicon.WORDS[name])


def test_targets_follow_from_the_inputs() -> None:
    """Reference: the rule of each held-out task, written out by hand."""
    pleasant, food, animals = _words("pleasant"), _words("food"), _words("animal")
    counts = ("zero", "one", "two", "three")
    plural = {noun: form for noun, form in lexicon.PLURAL.items() if noun in animals}
    rules = {
        "sst": lambda t: "great" if pleasant & set(t) else "terrible",
        "gender": lambda t: "male" if t[0] in _words("man") else "female",
        "daytime": lambda t: "bright" if _words("light") & set(t) else "gloomy",
        "what-foreign": lambda t: next(w for w in t if w in lexicon.NOUNS)[::-1] + "u",
        "has-food": lambda t: "contained" if food & set(t) else "absent",
        "count-food": lambda t: counts[sum(w in food for w in t)],
        "first-food-foreign": lambda t: next(w for w in t if w in food)[::-1] + "u",
        "last-animal-plural": lambda t: next(plural[w] for w in reversed(t) if w in animals),
        "same-colour": lambda t: (
            "matching" if sum(w in _words("warm") for w in t) != 1 else "differing"
        ),
    }
    assert {f"sandbox-{name}" for name in rules} == {
        name for name, task in TASKS.items() if task.role == "held_out"
    }
    for name, rule in rules.items():
        for text, target in rows(f"sandbox-{name}", 13, "dev"):
            assert rule(text.split()) == target, (name, text)


def test_pretraining_never_draws_a_reserved_task_and_can_draw_the_others() -> None:
    """Reference: factors and labels of the tasks against every drawable member."""
    space = {family: pretrain.members(family) for family in pretrain.FAMILY_WEIGHTS}
    for task in TASKS.values():
        if task.name in pretrain.HELD_OUT_BY_LABELS:
            assert not set(task.labels or ()) & set(lexicon.LABEL_POOL)
        else:
            assert (task.factors in space[task.family]) == (task.role == "pretraining"), task.name
    families = ("sort", "has", "same")
    closed = {label for t in RESERVED if t.family in families for label in t.labels or ()}
    assert closed == set(lexicon.RESERVED_LABELS)


def test_drawn_instructions_and_answers_hold_no_reserved_label_or_attribute() -> None:
    rng = random.Random(0)
    reserved_labels = set(lexicon.RESERVED_LABELS)
    forbidden = {"man", "woman", "light", "dark", "summer", "winter"} | reserved_labels
    pairs = {(task.family, task.factors) for task in RESERVED}
    pairs -= {("sort", ("sentiment",)), ("sort", ("tense",))}
    for _ in range(5000):
        family, factors, labels = pretrain.draw_task(rng)
        head = factors[:1] if family == "sort" else factors
        assert (family, head) not in pairs
        assert not reserved_labels & set(labels or ())
        words = pretrain.instruction(family, factors, labels, rng, examples=True)
        assert not forbidden & set(words)
        _, target = draw_row(family, factors, labels, rng)
        assert factors[0] == "any" or target not in forbidden


def test_lengthened_instruction_keeps_its_words_in_order() -> None:
    rng = random.Random(0)
    words = ["list", "food", "plain", "last"]
    for _ in range(50):
        repeated = pretrain.lengthen(words, rng, fillers=False)
        assert repeated == (words * 6)[: len(repeated)]
        mixed = iter(pretrain.lengthen(words, rng, fillers=True))
        assert all(word in mixed for word in words)


def test_orthogonalised_matrices_have_singular_values_near_one() -> None:
    """Reference: singular values by torch.linalg.svdvals."""
    torch.manual_seed(0)
    for shape in ((2, 8, 24), (2, 24, 8)):
        values = torch.linalg.svdvals(pretrain.orthogonalise(torch.randn(shape)))
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_pretraining_is_seeded_and_writes_a_loadable_folder(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM

    states = []
    for name in ("a", "b"):
        pretrain.main(["--out", str(tmp_path / name), "--steps", "2", "--seed", "7"])
        states.append(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name).state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    with pytest.raises(SystemExit):  # a folder that is there stays as it is
        pretrain.main(["--out", str(tmp_path / "a")])


def test_shipped_tokenizer_is_the_built_one_and_round_trips(tokenizer: Any) -> None:
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab() == token_ids()
    for name in ALL:
        for text, target in rows(name, 13, "dev")[:8]:
            for line in (text, target):
                ids = tokenizer(line).input_ids
                assert ids == [token_ids()[word] for word in line.split()] + [1]
                assert tokenizer.decode(ids, skip_special_tokens=True) == line
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token) == SPECIAL_TOKENS
    assert tokenizer("zzz").input_ids == [2, 1]


def test_shipped_weights_are_small_fp16_and_load_as_fp32(model: Any) -> None:
    from safetensors import safe_open

    path = sandbox.ASSETS / "model.safetensors"
    assert path.stat().st_size < 3_000_000
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
    assert model.dtype == torch.float32
    assert model.config.vocab_size == len(token_ids())
    facts = json.loads((sandbox.ASSETS / "pretraining.json").read_text())
    assert facts["recipe"]["family_weights"] == pretrain.FAMILY_WEIGHTS


def test_backbone_obeys_an_instruction_and_generates_what_it_ranks_first(
    model: Any, tokenizer: Any
) -> None:
    """Reference: exact match by the arg-max under the true target, against greedy `generate`."""
    texts, targets = zip(*rows("sandbox-where", 13, "dev"), strict=True)
    source = tokenizer(
        [f"find place plain {text}" for text in texts], return_tensors="pt", padding=True
    )
    labels = torch.tensor([[token_ids()[target], 1] for target in targets])
    with torch.no_grad():
        ranked = model(**source, labels=labels).logits.argmax(-1)
        written = model.generate(**source, max_new_tokens=4, do_sample=False)
    answers = tokenizer.batch_decode(written, skip_special_tokens=True)
    right = [answer == target for answer, target in zip(answers, targets, strict=True)]
    assert right == (ranked == labels).all(1).tolist()
    assert sum(right) / len(right) > 0.9


def test_a_tuned_prompt_steers_the_frozen_backbone_on_an_unseen_task(
    model: Any, tokenizer: Any
) -> None:
    """Without a prompt the score is near 0; a few steps of AdamW on 8 vectors pass label chance."""
    data = rows("sandbox-season", 13, "train")[:64]
    source = tokenizer([text for text, _ in data], return_tensors="pt", padding=True)
    labels = torch.tensor([[token_ids()[target], 1] for _, target in data])
    table = model.get_input_embeddings().weight.detach()
    torch.manual_seed(0)
    prompt = table[torch.randperm(len(table) - 3)[:8] + 3].clone().requires_grad_()
    optimizer = torch.optim.AdamW([prompt], lr=0.3, weight_decay=0.0)

    def run(prefix: torch.Tensor) -> Any:
        width = (len(data), *prefix.shape)
        embeddings = torch.cat([prefix.expand(width), table[source.input_ids]], dim=1)
        mask = torch.cat([torch.ones(width[:2], dtype=torch.long), source.attention_mask], dim=1)
        return model(inputs_embeds=embeddings, attention_mask=mask, labels=labels)

    def score(prefix: torch.Tensor) -> float:
        with torch.no_grad():
            return (run(prefix).logits.argmax(-1) == labels).all(1).float().mean().item()

    model.requires_grad_(False)
    assert score(table[:0]) < 0.1
    for _ in range(40):
        optimizer.zero_grad()
        run(prompt).loss.backward()
        optimizer.step()
    assert score(prompt.detach()) > 0.7
