"""G9 and G11: MAML's gradient by a walk back, against one graph over the whole inner loop.

    python tests/benchmarks/meta.py [--out FOLDER] [--models T5-like] [--device cpu] [--threads 2]
                                    [--quick]

prints peak memory over inner steps and, with ``--out``, draws it; ``run.py --goals G9 G11``
measures the goals. One episode of 4 support and 4 query rows, all inner steps on the same support
rows, plain SGD. The unrolled graph is PyTorch's own: every inner gradient with ``create_graph``,
one backward pass through all of them. It runs on our backbone and so has its savings. Both sides
are float32 on every device.

Memory is what a step needs beside the weights, each in a process of its own. Counted are the bytes
that live at once in PyTorch's allocator, by the allocations and frees that its profiler records
(within operators, too); this is the number of G9. Resident is what a step without the profiler
raises the process's peak of resident memory by, on Linux: it also has libraries' own buffers and
the gaps that the C library keeps between blocks (with MALLOC_MMAP_THRESHOLD_=4096 there are few,
and the two numbers agree to 4 %). On CUDA the allocator gives its peak.

The inner learning rates are so large that the second-order part of the gradient can be seen in
float32. The T5-like model has GELU (T5 1.1: gated GELU): ReLU's derivative jumps, and a hidden
unit that rounding takes over the kink would make both sides differ. Left out: learned learning
rates and Adam, banks of episodes, and bfloat16.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes two lines each time

import pandas as pd
import torch
import transformers
from models import DECODER, T5, TINY, Size, make_backbone, make_model, make_prompts, our_batch
from pairs import Settings, Step, check_steps, in_own_process, machine, measure
from steps import Result, make_groups, virtual_tokens
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from prompt_lab.analysis.plots import lines, looks, save_figure
from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import BankObjective
from prompt_lab.core.batch import Batch
from prompt_lab.core.forward import twice_differentiable
from prompt_lab.core.meta_gradient import InnerConfig, MetaGradient, maml

MODELS = {"T5-like": ("t5", T5, 1.0), "GPT-2-like": ("gpt2", DECODER, 0.01)}
"""Kind, sizes, and inner learning rate."""

UNROLLED, OURS = "unrolled graph", "ours"
SIDES: dict[str, tuple[int, int | None]] = {
    OURS: (4, None),
    "ours, 2 rows at a time": (2, None),
    "ours, 1 row at a time": (1, None),
    "FoMAML": (4, 0),
}
"""Rows of a forward pass, and how many inner steps are differentiated through (None: all)."""

ROWS, LENGTHS = 4, (15, 40)
GRADIENT_LIMIT = 1e-5  # above it nothing is timed; the goal is 1e-6
MB = 1e6


@dataclass(frozen=True)
class Episode:
    """What both sides are given.

    Attributes:
        backbone: the frozen model.
        start: (1, N, D) the prompt.
        support: the rows of every inner step.
        query: the rows that judge the adapted prompt.
        rate: () inner learning rate.
    """

    backbone: Backbone
    start: Tensor
    support: Batch
    query: Batch
    rate: Tensor


def memory(settings: Settings) -> Iterator[Result]:
    """G9: peak memory of the unrolled graph / ours, of most inner steps; and their difference."""
    steps = inner_steps(settings)[-1]
    for name in MODELS:
        baseline, ours = (
            in_own_process(settings.device, peak_bytes, name, side, steps, settings)
            for side in (UNROLLED, OURS)
        )
        case = _case(name, steps, settings)
        yield (
            f"peak memory of unrolled graph / ours, {case}",
            {
                "value": baseline["counted"] / ours["counted"],
                "threshold": settings.goal(7.0, 7.0),
                "bytes": {"baseline": baseline, "ours": ours},
            },
        )
        agreed = in_own_process(settings.device, agreement, name, steps, settings)
        yield (
            f"relative difference of the two gradients, {case}",
            {
                "value": agreed["gradient"],
                "threshold": settings.goal(1e-6, 1e-6),
                "sense": "<=",
                "agreement": agreed,
            },
        )


def time(settings: Settings) -> Iterator[Result]:
    """G11: time of ours / the unrolled graph, by inner steps."""
    for name in MODELS:
        episode = make_episode(name, settings)
        for steps in (1, 2) if settings.quick else (1, 5, 10):
            agreed = agreement_of(episode, steps)
            theirs, own = unrolled_side(episode, steps), our_side(episode, steps, OURS)
            found = measure(own, theirs, settings)
            seconds = {"baseline": found["seconds"]["ours"], "ours": found["seconds"]["baseline"]}
            found |= {"seconds": seconds, "agreement": agreed, "sense": "<="}
            what = f"time of ours / unrolled graph, {_case(name, steps, settings)}"
            yield what, {**found, "threshold": settings.goal(1.5, 1.5)}


def _case(name: str, steps: int, settings: Settings) -> str:
    """The sizes."""
    return f"{name}, K {steps}, N {virtual_tokens(settings)}, {ROWS} + {ROWS} rows, S {LENGTHS[1]}"


def inner_steps(settings: Settings) -> tuple[int, ...]:
    """The numbers of inner steps, K, that memory is measured of."""
    return (2,) if settings.quick else (1, 2, 4, 7, 10)


# ---- the two sides -------------------------------------------------------------------------------


def make_episode(name: str, settings: Settings, size: Size | None = None) -> Episode:
    """A random model of the size that the settings choose, or of another, and its rows."""
    kind, sizes, rate = MODELS[name]
    model = make_model(kind, size or sizes[settings.size], settings.device)
    for layer in model.modules():
        if isinstance(getattr(layer, "act", None), nn.ReLU):
            layer.act = nn.GELU(approximate="tanh")
    backbone = make_backbone(model)
    support, query = (
        our_batch(backbone, [group]) for group in make_groups(backbone, 2, ROWS, LENGTHS)
    )
    start = make_prompts(backbone, 1, virtual_tokens(settings))
    return Episode(backbone, start, support, query, torch.tensor(rate, device=settings.device))


def make_side(episode: Episode, steps: int, side: str) -> Step:
    """A side by its name."""
    if side == UNROLLED:
        return unrolled_side(episode, steps)
    return our_side(episode, steps, side)


def unrolled_side(episode: Episode, steps: int) -> Step:
    """Query loss (1,) and gradient (1, N, D) by one graph over all inner steps."""

    def loss(prompts: Tensor, batch: Batch) -> Tensor:
        return (episode.backbone.loss(prompts, batch) * batch.weight).sum()

    def step() -> tuple[Tensor, Tensor]:
        start = episode.start.clone().requires_grad_()
        adapted = start
        with twice_differentiable():
            for _ in range(steps):
                (gradient,) = torch.autograd.grad(
                    loss(adapted, episode.support), adapted, create_graph=True
                )
                adapted = adapted - episode.rate * gradient
            value = loss(adapted, episode.query)
            (gradient,) = torch.autograd.grad(value, start)
        return value.detach()[None], gradient

    return step


def our_side(episode: Episode, steps: int, side: str) -> Step:
    """Query loss (1,) and gradient (1, N, D) as ``MetaPrompt`` takes them."""

    def step() -> tuple[Tensor, Tensor]:
        made = our_gradient(episode, steps, side)
        return made.losses, made.gradient

    return step


def our_gradient(episode: Episode, steps: int, side: str) -> MetaGradient:
    """What the package makes of an episode."""
    rows, depth = SIDES[side]
    batches = (episode.support, episode.query)
    widest = max(max(batch.input_lengths) + max(batch.target_lengths) for batch in batches)
    extra = episode.start.shape[1] if episode.backbone.is_encoder_decoder else 0
    support, query = (
        BankObjective(episode.backbone, batch, rows * (widest + extra)) for batch in batches
    )
    inner = InnerConfig(steps=steps, learning_rate=episode.rate.item())
    return maml(episode.start, [support] * steps, query, inner, episode.rate, depth)


def agreement(name: str, steps: int, settings: Settings) -> dict[str, float]:
    """As :func:`agreement_of`, in a process that has made nothing yet."""
    torch.set_num_threads(settings.threads)
    return agreement_of(make_episode(name, settings), steps)


def agreement_of(episode: Episode, steps: int) -> dict[str, float]:
    """How far the sides differ, and the second-order part's share of the gradient.

    Raises:
        RuntimeError: they differ by more than the limits.
    """
    theirs, ours = unrolled_side(episode, steps), our_side(episode, steps, OURS)
    found = check_steps(theirs, ours, gradient_limit=GRADIENT_LIMIT)
    return {**found, "second_order": our_gradient(episode, steps, OURS).second_order.item()}


# ---- memory --------------------------------------------------------------------------------------


def peak_bytes(name: str, side: str, steps: int, settings: Settings) -> dict[str, int]:
    """Most bytes that a side needs at once beside weights and rows, in a new process."""
    torch.set_num_threads(settings.threads)
    make_side(make_episode(name, settings, TINY), 1, side)()  # libraries load when first used
    step = make_side(make_episode(name, settings), steps, side)
    if settings.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return {"counted": torch.cuda.max_memory_allocated() - before}
    resident = resident_bytes(step)
    found = {} if resident is None else {"resident": resident}
    return {"counted": counted_bytes(step), **found}


def resident_bytes(step: Step) -> int | None:
    """By how much a call raises the peak of resident memory; None where Linux does not tell it."""
    peak = Path("/proc/self/clear_refs")
    if not peak.exists():
        return None
    peak.write_text("5")  # the peak begins anew: making the model had one of its own
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    """A size from this process's ``/proc/self/status``."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def counted_bytes(step: Step) -> int:
    """Peak of the bytes that a call has in the CPU's allocator, by the profiler's record."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        step()
    results: Any = record.profiler
    changes = [
        (event.start_ns(), event.nbytes())
        for event in results.kineto_results.events()
        if event.name() == "[memory]"
    ]
    now = most = 0
    for _, size in sorted(changes, key=lambda change: change[0]):
        now += size
        most = max(most, now)
    return most


# ---- memory over inner steps ---------------------------------------------------------------------


def main() -> None:
    """Print the table, a line as soon as it is known, and draw a figure for each model."""
    parser = argparse.ArgumentParser(description="Peak memory of a meta-gradient by inner steps.")
    parser.add_argument("--out", type=Path, help="folder for the figures, PNG and SVG")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch on the CPU")
    parser.add_argument("--quick", action="store_true", help="tiny models, to check the script")
    options = parser.parse_args()
    settings = Settings(options.device, options.threads, quick=options.quick)
    transformers.logging.set_verbosity_error()
    sides = (UNROLLED, *SIDES)
    print(
        f"Peak memory of a meta-gradient beside the weights in MB; N {virtual_tokens(settings)}, "
        f"{ROWS} + {ROWS} rows, S {LENGTHS[1]}; {machine(settings)}; on a CPU counted and, in "
        "brackets, resident\n"
    )
    print("| model | K |", " | ".join(sides), "|")
    print("|---|---|" + "---|" * len(sides))
    for name in options.models:
        counted: dict[str, list[float]] = {side: [] for side in sides}
        for steps in inner_steps(settings):
            cells = []
            for side in sides:
                found = in_own_process(settings.device, peak_bytes, name, side, steps, settings)
                counted[side].append(found["counted"] / MB)
                cells.append(" ".join(_show(what, size) for what, size in found.items()))
            print(f"| {name} | {steps} |", " | ".join(cells), "|", flush=True)
        if options.out:
            draw(name, counted, settings, options.out)


def _show(what: str, size: int) -> str:
    """Bytes in MB, in brackets if resident."""
    return f"({size / MB:.0f})" if what == "resident" else f"{size / MB:.3g}"


def draw(name: str, counted: dict[str, list[float]], settings: Settings, folder: Path) -> None:
    """Write a figure of the MB of each side over inner steps, as PNG and SVG."""
    from matplotlib.ticker import LogLocator

    folder.mkdir(parents=True, exist_ok=True)
    steps = inner_steps(settings)
    table = pd.DataFrame(
        [
            {"line": side, "label": side, "step": step, "memory": size}
            for side, sizes in counted.items()
            for step, size in zip(steps, sizes, strict=True)
        ]
    )
    note = f"{name} model, N {virtual_tokens(settings)}, {ROWS} support and {ROWS} query rows, "
    note += f"float32; {machine(settings)}"
    label = "peak memory beside the weights (MB)"
    figure = lines(table, "step", "memory", "label", looks(table), "inner steps", label, steps=True)
    figure.supxlabel(note, fontsize=6)
    (axes,) = figure.axes
    axes.set_xticks(steps)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    for path in save_figure(figure, folder / f"meta_memory_{name}"):
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
