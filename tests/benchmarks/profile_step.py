"""Where the time of one training step goes, and how near it is to what the machine can do.

    python tests/benchmarks/profile_step.py [--device cpu] [--threads 2] [--quick]
                                            [--models T5-like] [--methods Attempt]
    python tests/benchmarks/profile_step.py --model FOLDER [--threads 1]

First one table with a line for every method (``method_steps.py``), with the three operators that
take most time by themselves, and a floor. Then, for prompt tuning of the GPT-2-like model of G1 and
the T5-like model of G3, forward and backward alone, a dozen operators. With ``--model`` that alone,
for a real language model on the rows of G23.

The floor is the larger of two times: the operations (counted by PyTorch, attention written out) at
the rate of a large matrix product, and the bytes that must move at the rate of a large copy. Both
rates are measured first. Bytes are the backbone's weights, read in the forward and in the backward
of every pass over rows; what autograd keeps, written once and read once; maps and other trained
weights, read twice; and for every number that AdamW moves eight more (gradient, weight and two
moments, each read and written). An evaluation reads the weights once. Operations that are no matrix
products are not counted, so no step reaches its floor.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from method_steps import METHODS, Bench, with_step
from models import DECODER, T5, Row, make_backbone, make_model, make_prompts, our_batch
from pairs import WARM_UP, Settings, machine, seconds
from real_model import load, read
from steps import make_groups, our_side, virtual_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from prompt_lab.core.backbone import Backbone
from prompt_lab.methods.look import saved_bytes
from prompt_lab.methods.method import PromptMethod

ROWS, LENGTHS = 8, (15, 40)
TOP = 12
MODELS = {"GPT-2-like": ("gpt2", DECODER), "T5-like": ("t5", T5)}
HEAD = "| model | method | step | floor | ratio | GFLOP | MB | passes | most time in |"


@dataclass(frozen=True)
class Rates:
    """What the machine can do: operations per second and bytes per second."""

    peak: float
    bandwidth: float

    def floor(self, operations: float, moved: float) -> float:
        """Seconds below which no step can be."""
        return max(operations / self.peak, moved / self.bandwidth)


def main() -> None:
    """Print the table of all methods, then the operators of prompt tuning."""
    options = parse()
    settings = Settings(options.device, options.threads, 3, options.quick, options.model)
    torch.set_num_threads(settings.threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    rates = Rates(matmul_peak(settings), copy_bandwidth(settings))
    print(
        f"{machine(settings)}, {settings.threads} threads: matrix products "
        f"{rates.peak / 1e9:.0f} GFLOP/s in {settings.dtype}, copies "
        f"{rates.bandwidth / 1e9:.1f} GB/s\n",
        flush=True,
    )
    if options.model:
        backbone = load(settings, "float32")
        groups = [read(backbone, "glue-sst2", ROWS, settings)]
        describe(f"{backbone.name}, B {ROWS}, glue-sst2", backbone, groups, 20, rates, settings)
        return
    print(f"{HEAD}\n{'|---' * HEAD.count(' | ')}|---|", flush=True)
    for name in options.models:
        for method in options.methods:
            print(line_of(name, method, rates, settings), flush=True)
    for name in options.models:
        kind, sizes = MODELS[name]
        model = make_model(kind, sizes[settings.size], settings.device, settings.dtype)
        backbone = make_backbone(model)
        groups = make_groups(backbone, 1, ROWS, LENGTHS)
        what = f"{name}, B {ROWS}, S {LENGTHS[1]}"
        describe(what, backbone, groups, virtual_tokens(settings), rates, settings)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", help="folder of a language model")
    parser.add_argument("--quick", action="store_true", help="tiny models, to check the script")
    return parser.parse_args()


# ---- every method --------------------------------------------------------------------------------


def line_of(name: str, method: str, rates: Rates, settings: Settings) -> str:
    """The line of one method on one model."""
    kind, sizes = MODELS[name]
    dtype = torch.float32 if method == "FineTuning" else settings.dtype  # weights that are trained
    backbone = make_backbone(make_model(kind, sizes[settings.size], "cpu", dtype))
    lines: list[str] = []

    def look(made: PromptMethod, step: Callable[[], Any]) -> None:
        """Measure the step."""
        time = typical(step, settings, warm_up=1, count=3)
        operations = matrix_operations(step)
        moved, passes = moved_bytes(made, step)
        floor = rates.floor(operations, moved)
        first = [f"{short(key)} {share:.0%}" for key, share, _ in operators(step, settings)[:3]]
        lines.append(
            f"| {name} | {method} | {time * 1e3:.1f} ms | {floor * 1e3:.1f} ms | "
            f"{time / floor:.2f} | {operations / 1e9:.1f} | {moved / 1e6:.0f} | {passes} | "
            f"{', '.join(first)} |"
        )

    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(backbone, virtual_tokens(settings), Path(folder))
        with_step(method, bench, settings.device, look)
    return lines[0]


def moved_bytes(method: PromptMethod, step: Callable[[], Any]) -> tuple[int, int]:
    """Bytes that a step must move at least, and its passes over rows; an evaluation has one."""
    backbone = method.backbone
    assert backbone is not None
    known = {p.untyped_storage().data_ptr() for p in method.parameters()}
    seen: dict[int, int] = {}
    kept: list[int] = []
    row_losses = backbone.row_losses

    def counted(*args: Any, **kwargs: Any) -> Any:
        """A pass over rows; what was kept before may be freed from here on."""
        kept.append(sum(seen.values()))
        seen.clear()
        return row_losses(*args, **kwargs)

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        """Count a tensor's storage, once a pass, unless it is a weight's."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    backbone.row_losses = counted
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            step()
    finally:
        del backbone.row_losses
    weights = {id(p): p.nbytes for p in backbone.parameters()}
    if not kept:
        return sum(weights.values()), 1
    moved = 2 * len(kept) * sum(weights.values()) + 2 * (sum(kept) + sum(seen.values()))
    optimizer: Any = method.optimizers(use_pl_optimizer=False)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    moved += sum(2 * p.nbytes for p in trained if id(p) not in weights)
    return moved + sum(8 * p.nbytes for p in trained), len(kept)


# ---- prompt tuning in detail ---------------------------------------------------------------------


def describe(
    what: str,
    backbone: Backbone,
    groups: list[list[Row]],
    count: int,
    rates: Rates,
    settings: Settings,
) -> None:
    """Print time, floor and operators of one step with N virtual tokens."""
    prompts = make_prompts(backbone, 1, count)
    step = our_side(backbone, prompts, groups)
    time = typical(step, settings)
    operations = matrix_operations(step)
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    bank = prompts.clone().requires_grad_()
    saved = saved_bytes(backbone, bank, our_batch(backbone, groups))
    moved = 2 * weights + 2 * saved
    floor = rates.floor(operations, moved)
    print(
        f"\n## {what}\n\n"
        f"step {time * 1e3:.1f} ms, floor {floor * 1e3:.1f} ms, ratio {time / floor:.2f}\n"
        f"- {operations / 1e9:.1f} GFLOP: {operations / rates.peak * 1e3:.1f} ms\n"
        f"- {moved / 1e6:.0f} MB (weights {weights / 1e6:.0f} MB and kept {saved / 1e6:.0f} MB, "
        f"each twice): {moved / rates.bandwidth * 1e3:.1f} ms\n"
    )
    print(f"| operator | calls | own {settings.device} time | share |\n|---|---|---|---|")
    for key, share, event in operators(step, settings)[:TOP]:
        own = own_time(event, settings)
        print(f"| `{key}` | {event.count} | {own / 1e3:.2f} ms | {share:.1%} |")


def matrix_operations(step: Callable[[], Any]) -> int:
    """Operations of the matrix products of a step, attention written out."""
    with sdpa_kernel(SDPBackend.MATH), profile(with_flops=True) as found:
        step()
    products = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm")
    return sum(event.flops for event in found.key_averages() if event.key in products)


def operators(step: Callable[[], Any], settings: Settings) -> list[tuple[str, float, Any]]:
    """The operators of a step, their share of the time, and the event; most time first."""
    cuda = settings.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as found:
        seconds(step, settings.device)
    events = sorted(found.key_averages(), key=lambda event: -own_time(event, settings))
    total = sum(own_time(event, settings) for event in events)
    return [(event.key[:60], own_time(event, settings) / total, event) for event in events]


def short(key: str) -> str:
    """An operator's name without what all have, and without the words of attention kernels."""
    for part in ("aten::", "_scaled_dot_product_", "_for_cpu", "Optimizer.step#"):
        key = key.replace(part, "")
    return f"`{key}`"


def own_time(event: Any, settings: Settings) -> float:
    """Microseconds that an operator takes by itself."""
    return event.self_device_time_total if settings.device == "cuda" else event.self_cpu_time_total


def typical(
    call: Callable[[], Any], settings: Settings, warm_up: int = WARM_UP, count: int = 7
) -> float:
    """Median seconds of a call, warm."""
    times = [seconds(call, settings.device) for _ in range(warm_up + count)]
    return statistics.median(times[warm_up:])


def matmul_peak(settings: Settings) -> float:
    """Operations per second of a large matrix product, the best of some."""
    count = 512 if settings.quick else 4096 if settings.device == "cpu" else 16384
    left, right = (
        torch.randn(count, count, device=settings.device, dtype=settings.dtype) for _ in range(2)
    )
    best = min(seconds(lambda: left @ right, settings.device) for _ in range(5))
    return 2 * count**3 / best


def copy_bandwidth(settings: Settings) -> float:
    """Bytes per second of a large copy, read and written, the best of some."""
    source = torch.ones(2**22 if settings.quick else 2**27, device=settings.device)
    target = torch.empty_like(source)
    best = min(seconds(lambda: target.copy_(source), settings.device) for _ in range(5))
    return 2 * source.numel() * source.element_size() / best


if __name__ == "__main__":
    main()
