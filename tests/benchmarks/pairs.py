"""How the benchmarks measure: pairs of timed calls, agreement before time, one JSON line a result.

The two sides of a pair run one after the other in one process, so that whatever else the machine
does meets both; a pair gives one ratio, and a result is the median, minimum and maximum of these.
Three rounds of warm-up are not counted. On CUDA each call is waited for.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
ENOUGH_PAIRS = 15  # fewer are not held against a goal
WITHIN = 0.95  # of a goal counts as met
Step = Callable[[], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What the command line chose."""

    device: str = "cpu"
    threads: int = 2
    pairs: int = 15
    quick: bool = False
    model: str | None = None

    @property
    def size(self) -> str:
        """Which of the sizes in ``models.py``."""
        return "quick" if self.quick else self.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights; prompts are always float32."""
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    def goal(self, cpu: float | None, cuda: float | None) -> float | None:
        """The threshold of a goal on this device; none for the tiny models of a quick run."""
        if self.quick:
            return None
        return cpu if self.device == "cpu" else cuda


def seconds(call: Callable[[], Any], device: str) -> float:
    """Wall-clock seconds of a call, the device's work included."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def measure(
    baseline: Callable[[], Any], ours: Callable[[], Any], settings: Settings
) -> dict[str, Any]:
    """Time two calls in interleaved pairs; the ratio is baseline / ours."""
    warm_up = 1 if settings.model else WARM_UP  # a real model warms up at once
    return pairs_of(baseline, ours, warm_up, settings)


def pairs_of(
    baseline: Callable[[], Any], ours: Callable[[], Any], warm_up: int, settings: Settings
) -> dict[str, Any]:
    """The same behind so many pairs that are not counted; none of them in a quick run."""
    warm_up = 0 if settings.quick else warm_up
    pairs = [
        (seconds(baseline, settings.device), seconds(ours, settings.device))
        for _ in range(warm_up + settings.pairs)
    ]
    return ratios(pairs[warm_up:])


def ratios(pairs: list[tuple[float, float]]) -> dict[str, Any]:
    """Median, minimum and maximum of first / second, and the medians of both in seconds."""
    found = [first / second for first, second in pairs]
    first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "value": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "pairs": len(found),
        "seconds": {"baseline": first, "ours": second},
    }


def check_steps(
    baseline: Step, ours: Step, loss_limit: float = 1e-4, gradient_limit: float = 1e-4
) -> dict[str, float]:
    """Compare losses (R,) and gradients (R, N, D) of two sides, before anything is timed.

    Raises:
        RuntimeError: they differ by more than the limits.
    """
    (losses, gradient), (our_losses, our_gradient) = baseline(), ours()
    loss = (losses - our_losses).abs().max().item()
    scale = gradient.float().flatten(1).norm(dim=1)
    difference = (gradient - our_gradient).float().flatten(1).norm(dim=1)
    relative = (difference / scale).max().item()
    if not (loss <= loss_limit and relative <= gradient_limit):  # not: NaN fails, too
        raise RuntimeError(
            f"the two sides disagree: losses by {loss:.2g} (allowed {loss_limit:g}), gradients by "
            f"{relative:.2g} of their norm (allowed {gradient_limit:g}); nothing was timed"
        )
    return {"loss": loss, "gradient": relative}


def in_own_process(device: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a new process and return its result.

    It starts as a copy of this one, where that is allowed, so as not to import everything again.
    """
    start = get_context("fork" if device == "cpu" else "spawn")
    with ProcessPoolExecutor(1, mp_context=start) as pool:
        return pool.submit(function, *arguments).result()


def _wait(device: str) -> None:
    """Wait for the device's work."""
    if device == "cuda":
        torch.cuda.synchronize()


# ---- results -------------------------------------------------------------------------------------


def line(goal: str, what: str, found: dict[str, Any], settings: Settings) -> dict[str, Any]:
    """One result with all that is needed to read it later.

    ``found`` has ``value`` and ``threshold``, and ``sense`` where the goal is an upper limit.
    """
    found = {"sense": ">=", "threshold": None, **found}
    return {
        "goal": goal,
        "what": f"{what} [quick]" if settings.quick else what,
        **found,
        "met": _met(found),
        "machine": machine(settings),
        "threads": settings.threads,
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("torch", "transformers", "peft", "lightning", "prompt-lab")
        },
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
    }


def _met(found: dict[str, Any]) -> bool | None:
    """Whether a goal is met; None without a goal, or with too few pairs to say."""
    threshold = found["threshold"]
    if threshold is None or found.get("pairs", ENOUGH_PAIRS) < ENOUGH_PAIRS:
        return None
    if found["sense"] == "<=":
        return found["value"] <= threshold
    return found["value"] >= WITHIN * threshold


def machine(settings: Settings) -> str:
    """The name of the device."""
    if settings.device == "cuda":
        return torch.cuda.get_device_name()
    name = cpu_field("model name") or platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def cpu_field(name: str) -> str:
    """A field of the first processor in ``/proc/cpuinfo``, or nothing where there is no such."""
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    found = re.search(rf"^{name}\s*:\s*(.*)$", text, re.MULTILINE)
    return found[1] if found else ""


def table(lines: Iterable[dict[str, Any]]) -> str:
    """The results as a Markdown table; of a result that was measured again, the last."""
    last = {(line["goal"], line["what"], line["machine"], line["threads"]): line for line in lines}
    rows = ["| goal | what | result (min to max) | wanted | met |", "|---|---|---|---|---|"]
    for found in sorted(last.values(), key=lambda found: int(found["goal"][1:])):
        value = f"**{found['value']:.3g}**"
        if "min" in found:
            value += f" ({found['min']:.3g} to {found['max']:.3g})"
        if found.get("pairs", ENOUGH_PAIRS) < ENOUGH_PAIRS:
            value += f", {found['pairs']} pairs"
        wanted = "-" if found["threshold"] is None else f"{found['sense']} {found['threshold']:.3g}"
        met = {True: "yes", False: "no", None: "-"}[found["met"]]
        rows.append(f"| {found['goal']} | {found['what']} | {value} | {wanted} | {met} |")
    machines = {
        f"{line['machine']}, {line['threads']} threads, {line['date'][:10]}; "
        + ", ".join(f"{name} {version}" for name, version in line["versions"].items())
        for line in last.values()
    }
    return "\n".join([*rows, "", *sorted(machines)])
