"""Whole runs of a bank shared among processes, and what they hold joined again.

Each process trains and scores the runs that it has as a bank of its own, and holds nothing of the
others: a bank may be larger than the memory of one device. What is told of all runs is joined in
the order of the grid, so it does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from prompt_lab.methods.method import PromptMethod

T = TypeVar("T")


def share_runs(costs: Sequence[float], processes: int) -> list[list[int]]:
    """Which runs each process has: the costliest first, each to the one with the least to do.

    The longest-processing-time rule (Graham 1969, doi 10.1137/0117039): at most 4/3 of the shortest
    time that any sharing takes.

    ``costs`` are those of a step of each run, in any unit. Each process gets its runs in ascending
    order; some have none where there are fewer runs.
    """
    load, shares = [0.0] * processes, [list[int]() for _ in range(processes)]
    for run in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        process = min(range(processes), key=lambda p: (load[p], len(shares[p]), p))
        load[process] += costs[run]
        shares[process].append(run)
    return [sorted(share) for share in shares]


def gather_values(values: Sequence[T]) -> list[T]:
    """The values of all processes, one process after another, on each of them."""
    if not (dist.is_available() and dist.is_initialized()):
        return list(values)
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, list(values))
    return [value for part in parts for value in part]


@dataclass(frozen=True)
class RunShares:
    """For each process its runs, by their places in the grid, ascending; and which this one is.

    One share is that of a process that has all runs, and then nothing is sent. All methods that
    join are called on all processes at the same time.
    """

    shares: list[list[int]]
    rank: int = 0

    @property
    def divided(self) -> bool:
        """Whether the runs are shared."""
        return len(self.shares) > 1

    @property
    def own(self) -> list[int]:
        """Places in the grid of this process's runs."""
        return self.shares[self.rank]

    def gather(self, values: Sequence[T]) -> list[T]:
        """Values of all processes, however many each has, one process after another."""
        return gather_values(values) if self.divided else list(values)

    def join(self, values: Sequence[T]) -> list[T]:
        """One value for each run, from those of this process's runs, in the order of the grid."""
        return self.join_some(dict(enumerate(values))) if self.divided else list(values)

    def join_some(self, values: Mapping[int, T]) -> list[T]:
        """Values of some runs, each process's by their places in its bank, as :meth:`join`."""
        pairs = self.gather([(self.own[place], value) for place, value in values.items()])
        return [value for _, value in sorted(pairs, key=lambda pair: pair[0])]

    def stream(self, values: Iterable[T]) -> Iterator[T]:
        """As :meth:`join`, one value at a time, to the first process alone; for large values."""
        if not self.divided:
            yield from values
            return
        owner = {run: rank for rank, share in enumerate(self.shares) for run in share}
        mine = iter(values)
        for run in sorted(owner):
            value: list[Any] = [next(mine) if owner[run] == self.rank else None]
            if owner[run] != 0 and self.rank == owner[run]:
                dist.send_object_list(value, dst=0)
            elif owner[run] != 0 and self.rank == 0:
                dist.recv_object_list(value, src=owner[run])
            if self.rank == 0:
                yield value[0]

    def join_tensor(self, own: Tensor) -> Tensor:
        """Own rows (R_own, ...) of all processes as (R, ...) on the host of the first process.

        The others get their own rows back. A device holds no more than one process's rows.
        """
        if self.rank != 0:
            dist.send(own.contiguous(), dst=0)
            return own
        whole = torch.empty(sum(map(len, self.shares)), *own.shape[1:], dtype=own.dtype)
        for rank, share in enumerate(self.shares):
            part = own
            if rank != 0:
                part = own.new_empty(len(share), *own.shape[1:])
                dist.recv(part, src=rank)
            whole[share] = part.cpu()
        return whole

    def take(self, whole: Tensor) -> Tensor:
        """Own rows (R_own, ...) of (R, ...)."""
        return whole[self.own]


def left_out_of_ddp(method: PromptMethod) -> list[str]:
    """Names of what is frozen, and of own runs, whose gradients no other process has.

    Buffers are not broadcast either: each process has its own sums, and the others are equal. Where
    whole runs are divided DDP is left with a number that nothing depends on, since it refuses to
    have nothing; it broadcasts by the first name and reduces by the second.
    """
    names = [name for name, _ in method.named_parameters(remove_duplicate=False)]  # tied ones too
    kept_out = [name for name in names if name.startswith(method.frozen)]
    buffers = [name for name, _ in method.named_buffers()]
    if method.shares.divided:
        own = [name for name in names if not name.startswith(method.frozen)]
        kept_out += [*own, *(f".{name}" for name in own)]
        method.anchor = torch.nn.Parameter(torch.zeros(()))
        method.frozen = (*method.frozen, "anchor")
    return kept_out + buffers
