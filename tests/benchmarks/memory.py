"""Memory of a training step by model and prompt length, counted and measured, as a table.

    python tests/benchmarks/memory.py [--models t5-small gpt2] [--threads 2] [--most 6] [--quick]

Counted are weights, the bank (prompt, initial and best prompt, AdamW's two moments), and what
autograd keeps for one micro-batch, all as ``prompt-lab fit --dry_run`` counts them. What autograd
keeps is counted on models of one and of two layers of the same width and continued linearly, to
about 1 %. Measured is the peak of resident memory of two steps on the CPU above that of the
imports, in a process of its own, where the count is below ``--most`` GB. It holds temporary tensors
too, such as the gradients that backward is at work on.
"""

from __future__ import annotations

import argparse
import resource
import sys

import torch
from models import (
    TINY,
    Size,
    make_backbone,
    make_config,
    make_model,
    make_prompts,
    make_rows,
    our_batch,
)
from pairs import Settings, in_own_process, machine
from steps import our_side

from prompt_lab.core.optim import OptimConfig
from prompt_lab.methods.look import saved_bytes

MODELS = {
    "t5-small": ("t5", Size(6, 512, 8)),
    "t5-base": ("t5", Size(12, 768, 12)),
    "t5-large": ("t5", Size(24, 1024, 16)),
    "gpt2": ("gpt2", Size(12, 768, 12)),
    "gpt2-medium": ("gpt2", Size(24, 1024, 16)),
    "gpt2-large": ("gpt2", Size(36, 1280, 20)),
    "bloomz-560m": ("bloom", Size(24, 1024, 16, 250_880)),
}
QUICK = {"tiny T5": ("t5", TINY), "tiny GPT-2": ("gpt2", TINY)}
VIRTUAL_TOKENS = (20, 100)
DTYPES = (torch.float32, torch.bfloat16)
ROWS, LENGTH = 8, 128
GB = 1e9


def main() -> None:
    """Print the table, a line as soon as it is known."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--most", type=float, default=6.0, help="largest count to measure, in GB")
    parser.add_argument("--quick", action="store_true", help="tiny models, to check the script")
    options = parser.parse_args()
    models = QUICK if options.quick else {name: MODELS[name] for name in options.models}
    print(f"B {ROWS}, S {LENGTH}, one prompt, GB; measured on {machine(Settings())}\n")
    print("| model | N | weights in | weights | bank | activations | sum | measured |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (kind, size) in models.items():
        for dtype in DTYPES:
            for tokens in VIRTUAL_TOKENS:
                case = (kind, size, tokens, dtype, options.threads)
                parts = in_own_process("cpu", count, *case)
                total, measured = sum(parts), "-"
                if total < options.most * GB:
                    measured = show(in_own_process("cpu", measure, *case))
                cells = [name, tokens, str(dtype).removeprefix("torch."), *map(show, parts)]
                print("|", " | ".join(map(str, [*cells, show(total), measured])), "|", flush=True)


def count(
    kind: str, size: Size, tokens: int, dtype: torch.dtype, threads: int
) -> tuple[int, int, int]:
    """Bytes of weights, bank and saved activations."""
    torch.set_num_threads(threads)
    bank = 5 * tokens * size.width * 4
    one, two = (kept(kind, layers, size, tokens, dtype) for layers in (1, 2))
    return weight_bytes(kind, size, dtype), bank, one + (size.layers - 1) * (two - one)


def weight_bytes(kind: str, size: Size, dtype: torch.dtype) -> int:
    """Bytes of the weights, of a model without memory."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    maker = AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM
    with torch.device("meta"):
        model = maker.from_config(make_config(kind, size), dtype=dtype)
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def kept(kind: str, layers: int, size: Size, tokens: int, dtype: torch.dtype) -> int:
    """Bytes that autograd keeps for a step of so many layers."""
    fewer = Size(layers, size.width, size.heads, size.vocabulary, size.feed_forward)
    backbone = make_backbone(make_model(kind, fewer, dtype=dtype))
    prompt = make_prompts(backbone, 1, tokens).requires_grad_()
    batch = our_batch(backbone, [make_rows(backbone, [LENGTH] * ROWS)])
    return saved_bytes(backbone, prompt, batch)


def measure(kind: str, size: Size, tokens: int, dtype: torch.dtype, threads: int) -> int:
    """Peak of resident bytes above the imports, over two steps with AdamW."""
    torch.set_num_threads(threads)
    two_steps(kind, TINY, 2, dtype)  # libraries import the rest when first used
    before = peak()
    two_steps(kind, size, tokens, dtype)
    return peak() - before


def two_steps(kind: str, size: Size, tokens: int, dtype: torch.dtype) -> None:
    """Train one prompt on one batch for two steps."""
    backbone = make_backbone(make_model(kind, size, dtype=dtype))
    prompts = make_prompts(backbone, 1, tokens)
    step = our_side(backbone, prompts, [make_rows(backbone, [LENGTH] * ROWS)])
    optimizer = OptimConfig().build([prompts], [0.3], torch.ones(1, dtype=torch.bool), 2)
    for _ in range(2):
        _, prompts.grad = step()
        optimizer.step()


def peak() -> int:
    """Largest resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def show(size: int) -> str:
    """Bytes in GB."""
    return f"{size / GB:.3g}"


if __name__ == "__main__":
    main()
