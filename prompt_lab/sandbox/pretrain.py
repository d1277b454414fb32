"""Pretrains the sandbox backbone: `python -m prompt_lab.sandbox.pretrain --out DIR`.

A small T5 learns to obey instructions in front of the input ("sort tense past alpha present beta"),
over many families, factors and label words, so that a soft prompt in the same place can steer it
later. The instruction is often repeated or surrounded by other words until it is as long as a soft
prompt, and noise is added to its embeddings. Validation and held-out tasks are never drawn: neither
their factors nor their labels. A word is a token; one thread needs ten to fifteen minutes.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from prompt_lab.sandbox.lexicon import (
    ATTRIBUTES,
    CUES,
    ENDS,
    LABEL_POOL,
    TOPICS,
    WORDS,
    vocabulary,
)
from prompt_lab.sandbox.tasks import (
    LIST_CLASSES,
    PHRASE_ATTRIBUTES,
    SLOTS,
    TASKS,
    draw_row,
    words_of,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

FAMILY_WEIGHTS = {"sort": 0.36, "find": 0.10, "list": 0.20, "has": 0.10, "count": 0.05}
FAMILY_WEIGHTS |= {"same": 0.12, "fill": 0.07}
CANONICAL_LABELS = 0.3  # share of sort, has and same whose answers are the classes' own names
CLASS_BY_EXAMPLE = 0.35  # share of instructions that name a class by one of its words
# Held out by their label words alone; the attribute is sorted in pretraining under other labels.
HELD_OUT_BY_LABELS: frozenset[str] = frozenset({"sandbox-sst", "sandbox-tense"})
RESERVED: frozenset[tuple[str, tuple[str, ...]]] = frozenset(
    (task.family, task.factors)
    for task in TASKS.values()
    if task.role != "pretraining" and task.name not in HELD_OUT_BY_LABELS
)
SPECIAL_TOKENS = ("<pad>", "</s>", "<unk>")
_CONTENT = [word for words in WORDS.values() for word in words]


def token_ids() -> dict[str, int]:
    """The id of every token: the special tokens first, then `lexicon.vocabulary()`."""
    return {token: index for index, token in enumerate((*SPECIAL_TOKENS, *vocabulary()))}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, split at white space; decoding without special tokens gives a text back."""
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


def members(family: str) -> list[tuple[str, ...]]:
    """Returns the factors of a family that pretraining may draw: all but the reserved ones."""
    every: dict[str, list[tuple[str, ...]]] = {
        "sort": [(name,) for name in ATTRIBUTES],
        "find": [(slot, "plain") for slot in SLOTS]
        + [("object", form) for form in ("plural", "foreign", "class")],
        "list": [(name, "plain", end) for name in LIST_CLASSES for end in ENDS]
        + [(n, form, end) for n in TOPICS for form in ("plural", "foreign") for end in ENDS]
        + [("any", "plain", end) for end in ENDS] * 3,
        "same": [(name,) for name in ("topic", "number", *PHRASE_ATTRIBUTES)],
        "fill": [(name,) for name in CUES],
    }
    known = every.get(family, [(name,) for name in LIST_CLASSES])
    return [factors for factors in known if (family, factors) not in RESERVED]


_MEMBERS = {family: members(family) for family in FAMILY_WEIGHTS}


def draw_task(rng: random.Random) -> tuple[str, tuple[str, ...], tuple[str, ...] | None]:
    """Draws family, factors and labels of one example; labels None means canonical answers."""
    family = rng.choices(list(FAMILY_WEIGHTS), list(FAMILY_WEIGHTS.values()))[0]
    factors = rng.choice(_MEMBERS[family])
    size = 2
    if family == "sort":
        values = ATTRIBUTES[factors[0]]
        size = rng.randint(2, min(3, len(values)))
        factors = (*factors, *rng.sample(values, size))
    elif family not in ("has", "same"):
        return family, factors, None
    canonical = rng.random() < CANONICAL_LABELS
    return family, factors, None if canonical else tuple(rng.sample(LABEL_POOL, size))


def instruction(
    family: str,
    factors: tuple[str, ...],
    labels: tuple[str, ...] | None,
    rng: random.Random,
    *,
    examples: bool,
) -> list[str]:
    """Writes a task as instruction words; with `examples` a class is named by one of its words."""

    def name(value: str) -> str:
        known = examples and (value in WORDS or value == "person")
        return rng.choice(words_of(value)) if known else value

    if family == "sort":
        attribute, *values = factors
        bound = list(zip(values, labels or values, strict=True))
        rng.shuffle(bound)
        if labels is None:
            words = [value for value, _ in bound] if rng.random() < 0.5 else []
            return [family, attribute, *words]
        head = [] if examples and rng.random() < 0.5 else [attribute]
        return [family, *head, *(word for value, label in bound for word in (name(value), label))]
    if family in ("has", "same"):
        head = [family, name(factors[0]) if family == "has" else factors[0]]
        return [*head, "yes", labels[0], "no", labels[1]] if labels else head
    if family in ("list", "count"):
        return [family, name(factors[0]), *factors[1:]]
    return [family, *factors]


def lengthen(words: list[str], rng: random.Random, *, fillers: bool) -> list[str]:
    """Makes an instruction up to 24 words long, by repetition or by other words in between."""
    length = rng.randint(len(words), 24)
    if not fillers:
        return [words[index % len(words)] for index in range(length)]
    places = set(rng.sample(range(length), len(words)))
    source = iter(words)
    return [next(source) if index in places else rng.choice(_CONTENT) for index in range(length)]


def draw_example(rng: random.Random) -> tuple[list[str], str, str]:
    """Draws one pretraining example: instruction words, input, target."""
    family, factors, labels = draw_task(rng)
    examples = rng.random() < CLASS_BY_EXAMPLE
    words = instruction(family, factors, labels, rng, examples=examples)
    shape = rng.random()
    if shape < 0.6:
        words = lengthen(words, rng, fillers=shape < 0.25 and not examples)
    return words, *draw_row(family, factors, labels, rng)


def config() -> T5Config:
    """Returns the shape of the backbone: 3 encoder and 2 decoder layers, hidden size 128."""
    from transformers import T5Config

    return T5Config(
        vocab_size=len(token_ids()),
        d_model=128,
        d_kv=32,
        num_heads=4,
        d_ff=384,
        num_layers=3,
        num_decoder_layers=2,
        dropout_rate=0.0,
        relative_attention_max_distance=64,
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,  # pyright: ignore[reportCallIssue]
        dtype="float32",
    )


def loss_of(
    model: T5ForConditionalGeneration,
    examples: list[tuple[list[str], str, str]],
    ids: dict[str, int],
    generator: torch.Generator,
    noise: float,
) -> torch.Tensor:
    """Returns the summed loss over target tokens, with noise on the instruction embeddings."""
    end = ids[SPECIAL_TOKENS[1]]
    sources = [[ids[w] for w in [*head, *text.split()]] + [end] for head, text, _ in examples]
    answers = [[ids[w] for w in target.split()] + [end] for _, _, target in examples]
    source, labels = _padded(sources, 0), _padded(answers, -100)
    heads = torch.tensor([len(head) for head, _, _ in examples])[:, None]
    inside = torch.arange(source.shape[1]) < heads
    scale = noise * torch.rand(len(examples), 1, generator=generator) * inside
    embeddings = model.shared(source)
    embeddings = embeddings + scale[..., None] * torch.randn(embeddings.shape, generator=generator)
    mask = (source != 0).long()
    logits = model(inputs_embeds=embeddings, attention_mask=mask, labels=labels).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
    )


def _padded(lists: list[list[int]], value: int) -> torch.Tensor:
    """Stacks lists of ids, padded on the right with `value`."""
    width = max(map(len, lists))
    return torch.tensor([row + [value] * (width - len(row)) for row in lists])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) for matrices: an orthogonalised step, as large as AdamW's.

    Computed in fp32 and stacked by shape; torch's own works in bf16, slow on older processors.
    """

    def __init__(self, params: Iterable[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(list(params), {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Takes one step with the gradients at hand."""
        for group in self.param_groups:
            stacks: dict[tuple[int, ...], list[torch.Tensor]] = {}
            for weight in group["params"]:
                stacks.setdefault(tuple(weight.shape), []).append(weight)
            for shape, weights in stacks.items():
                gradient = torch.stack([w.grad for w in weights if w.grad is not None])
                mean = self.state[weights[0]].setdefault("mean", torch.zeros_like(gradient))
                mean.lerp_(gradient, 1 - group["momentum"])
                update = orthogonalise(gradient.lerp(mean, group["momentum"]))
                rate = group["lr"] * 0.2 * max(shape) ** 0.5
                for weight, change in zip(weights, update, strict=True):
                    weight.add_(change, alpha=-rate)


def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Moves all singular values of matrices (n, rows, columns) near 1 by Newton-Schulz steps."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x.mT if tall else x


def optimizers(
    model: T5ForConditionalGeneration, steps: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Returns Muon for the matrices and AdamW for the rest, and their schedules."""
    names = dict(model.named_parameters())
    small = [w for name, w in names.items() if w.ndim < 2 or "bias" in name or "shared" in name]
    known = {id(weight) for weight in small}
    result = [
        torch.optim.AdamW(small, lr=2e-3, betas=(0.9, 0.98), weight_decay=0.0),
        Muon([w for w in model.parameters() if id(w) not in known], lr=4e-3),
    ]
    warm = max(1, min(200, steps // 10))

    def rate(step: int) -> float:  # a linear rise, then a linear fall to zero
        return min((step + 1) / warm, (steps - step) / max(1, steps - warm))

    return result, [torch.optim.lr_scheduler.LambdaLR(each, rate) for each in result]


def train(
    steps: int, seed: int, *, batch: int = 128, noise: float = 0.3, every: int = 50
) -> tuple[T5ForConditionalGeneration, float]:
    """Trains a backbone from scratch; returns it and the mean loss per token of the last steps.

    A step computes `batch` examples in three parts sorted by length. `noise` is the highest
    standard deviation on instruction embeddings; a line is printed `every` so many steps.
    """
    from transformers import T5ForConditionalGeneration

    torch.manual_seed(seed)
    rng, generator = random.Random(f"pretrain/{seed}"), torch.Generator().manual_seed(seed)
    ids, model = token_ids(), T5ForConditionalGeneration(config())
    model.set_attn_implementation("eager")
    both, schedules = optimizers(model, steps)
    total, tokens, final, start = 0.0, 0, 0.0, time.perf_counter()
    for step in range(1, steps + 1):
        examples = [draw_example(rng) for _ in range(batch)]
        examples.sort(key=lambda example: len(example[0]) + len(example[1].split()))
        count = sum(len(target.split()) + 1 for _, _, target in examples)
        for part in range(3):
            chosen = examples[part * batch // 3 : (part + 1) * batch // 3]
            loss = loss_of(model, chosen, ids, generator, noise)
            (loss / count).backward()
            total += loss.item()
        tokens += count
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in (*both, *schedules):
            each.step()
        model.zero_grad()
        if step % every == 0 or step == steps:
            final, total, tokens = total / tokens, 0.0, 0
            seconds = time.perf_counter() - start
            print(f"step {step}/{steps} loss {final:.4f} seconds {seconds:.0f}", flush=True)
    return model, final


def save(model: T5ForConditionalGeneration, out: Path, facts: dict[str, Any]) -> None:
    """Writes fp16 weights, configuration, tokenizer and `pretraining.json`."""
    model.half().save_pretrained(out)
    settings = json.loads((out / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    build_tokenizer().save_pretrained(out)
    (out / "pretraining.json").write_text(json.dumps(facts, indent=2) + "\n")


def main(arguments: list[str] | None = None) -> None:
    """Pretrains with the given arguments and writes the folder."""
    parser = argparse.ArgumentParser(description="Pretrain the sandbox backbone.")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--steps", type=int, default=1800, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and examples")
    given = parser.parse_args(arguments)
    if given.out.exists():
        parser.error(f"--out {given.out} is there already: give a new folder")
    start, cpu = time.perf_counter(), time.process_time()
    model, loss = train(given.steps, given.seed)
    command = f"python -m prompt_lab.sandbox.pretrain --steps {given.steps} --seed {given.seed}"
    facts = {
        "command": f"{command} --out DIR",
        "steps": given.steps,
        "seed": given.seed,
        "recipe": {
            "family_weights": FAMILY_WEIGHTS,
            "canonical_labels": CANONICAL_LABELS,
            "class_by_example": CLASS_BY_EXAMPLE,
        },
        "final_loss": round(loss, 4),
        "seconds": round(time.perf_counter() - start),
        "cpu_seconds": round(time.process_time() - cpu),
        "threads": torch.get_num_threads(),
        "parameters": model.num_parameters(),
        "torch": torch.__version__,
    }
    save(model, given.out, facts)


if __name__ == "__main__":
    main()
