"""G20: the nearest tokens of 100 rows in a vocabulary of 250,000 x 1,024, seconds and memory.

Memory is the peak of resident bytes above what was there before, table and rows; the kernel counts
it for the process of this goal alone. A small search before loads what libraries load when first
used. Seconds are the median of several searches.
"""

from __future__ import annotations

import resource
import statistics
import sys
from collections.abc import Iterator

import torch
from pairs import Settings, seconds
from steps import Result

from prompt_lab.analysis.interpretation import closeness

VOCABULARY, WIDTH, ROWS, NEAREST = 250_000, 1024, 100, 5
QUICK = 2_000
SEARCHES = 5
MOST_SECONDS, MOST_GB = 10.0, 1.0
GB = 1e9


def nearest(settings: Settings) -> Iterator[Result]:
    """G20: nearest tokens by cosine, with the places of given tokens."""
    size = QUICK if settings.quick else VOCABULARY
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(size, WIDTH, generator=generator)
    chosen = torch.randperm(size, generator=generator)[:ROWS]
    rows = table[chosen] + 0.5 * torch.randn(ROWS, WIDTH, generator=generator)
    table, rows, chosen = (tensor.to(settings.device) for tensor in (table, rows, chosen))
    ids = torch.arange(size, device=settings.device)
    closeness(rows[:2], table, ids[:100]).topk(NEAREST)
    before = _peak(settings.device)

    def search() -> None:
        near = closeness(rows, table, ids)
        assert near.topk(NEAREST).indices[:, 0].equal(chosen)
        assert ((near > near.gather(1, chosen[:, None])).sum(dim=1) == 0).all()

    times = [seconds(search, settings.device) for _ in range(1 if settings.quick else SEARCHES)]
    extra = max(_peak(settings.device) - before, 1)
    what = f"nearest {NEAREST} tokens of {ROWS} rows, vocabulary {size:,} x {WIDTH:,}"
    yield (
        f"seconds, {what}",
        {
            "value": statistics.median(times),
            "min": min(times),
            "max": max(times),
            "sense": "<=",
            "threshold": settings.goal(MOST_SECONDS, MOST_SECONDS),
        },
    )
    yield (
        f"GB beside table and rows, {what}",
        {
            "value": extra / GB,
            "sense": "<=",
            "threshold": settings.goal(MOST_GB, MOST_GB),
            "bytes": {"table": table.numel() * table.element_size()},
        },
    )


def _peak(device: str) -> int:
    """Largest memory so far, in bytes: of the allocator on CUDA, of the process elsewhere."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
