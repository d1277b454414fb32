"""Where the time of one training step goes, and how near it is to what the machine can do.

    python tests/benchmarks/profile_step.py [--device cpu] [--threads 2] [--quick]

For the GPT-2-like model of G1 and the T5-like model of G3: the dozen operators that take most time
by themselves, and a floor. The floor is the larger of two times: the operations of forward and
backward (counted by PyTorch, attention written out) at the rate of a large matrix product, and the
bytes that must move (weights read in forward and in backward, what autograd keeps written once and
read once; logits are among it) at the rate of a large copy. Both rates are measured first.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch
from models import DECODER, T5, make_backbone, make_model, make_prompts, our_batch
from pairs import WARM_UP, Settings, machine, seconds
from steps import make_groups, our_side, virtual_tokens
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from prompt_lab.methods.dry_run import saved_bytes

ROWS, LENGTHS = 8, (15, 40)
TOP = 12


def main() -> None:
    """Profile both models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="tiny models, to check the script")
    options = parser.parse_args()
    settings = Settings(options.device, options.threads, 3, options.quick)
    torch.set_num_threads(settings.threads)
    peak, bandwidth = matmul_peak(settings), copy_bandwidth(settings)
    print(
        f"{machine(settings)}, {settings.threads} threads: matrix products "
        f"{peak / 1e9:.0f} GFLOP/s in {settings.dtype}, copies {bandwidth / 1e9:.1f} GB/s"
    )
    for name, kind, sizes in (("GPT-2-like", "gpt2", DECODER), ("T5-like", "t5", T5)):
        describe(name, kind, sizes[settings.size], peak, bandwidth, settings)


def describe(
    name: str, kind: str, size: Any, peak: float, bandwidth: float, settings: Settings
) -> None:
    """Print time, floor and operators of one step."""
    backbone = make_backbone(make_model(kind, size, settings.device, settings.dtype))
    prompts = make_prompts(backbone, 1, virtual_tokens(settings))
    groups = make_groups(backbone, 1, ROWS, LENGTHS)
    step = our_side(backbone, prompts, groups)
    time = typical(step, settings)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step()
    operations = counter.get_total_flops()
    weights = sum(p.numel() * p.element_size() for p in backbone.parameters())
    bank = prompts.clone().requires_grad_()
    saved = saved_bytes(backbone, bank, our_batch(backbone, groups))
    moved = 2 * weights + 2 * saved
    floor = max(operations / peak, moved / bandwidth)
    print(
        f"\n## {name}, B {ROWS}, S {LENGTHS[1]}\n\n"
        f"step {time * 1e3:.1f} ms, floor {floor * 1e3:.1f} ms, ratio {time / floor:.2f}\n"
        f"- {operations / 1e9:.1f} GFLOP: {operations / peak * 1e3:.1f} ms\n"
        f"- {moved / 1e6:.0f} MB (weights {weights / 1e6:.0f} MB and kept {saved / 1e6:.0f} MB, "
        f"each twice): {moved / bandwidth * 1e3:.1f} ms\n"
    )
    print_operators(step, settings)


def print_operators(step: Callable[[], Any], settings: Settings) -> None:
    """A table of the operators with most time of their own."""
    cuda = settings.device == "cuda"
    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=kinds) as found:
        seconds(step, settings.device)
    field = "self_device_time_total" if cuda else "self_cpu_time_total"
    events = sorted(found.key_averages(), key=lambda event: -getattr(event, field))
    total = sum(getattr(event, field) for event in events)
    print(f"| operator | calls | own {settings.device} time | share |\n|---|---|---|---|")
    for event in events[:TOP]:
        own = getattr(event, field)
        print(f"| `{event.key[:60]}` | {event.count} | {own / 1e3:.2f} ms | {own / total:.1%} |")


def typical(call: Callable[[], Any], settings: Settings) -> float:
    """Median seconds of a call, warm."""
    times = [seconds(call, settings.device) for _ in range(WARM_UP + 7)]
    return statistics.median(times[WARM_UP:])


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
