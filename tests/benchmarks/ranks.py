"""G22: one step of a bank on two processes that share its rows, against two that share whole runs.

Shared rows: each process passes every second row through the backbone under the whole bank, and the
gradient (R, N, D) is summed over processes. Shared runs: each passes the rows of its own runs, and
only waits for the other, as DDP has it. Both sides run in the same two processes, in interleaved
pairs; a pair lasts until the slower process is done. Summed losses are compared before.
"""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from models import DECODER, T5, make_backbone, make_model, make_prompts, make_rows, uniform_lengths
from pairs import Settings, measure
from steps import virtual_tokens
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.bank import bank_gradient
from prompt_lab.core.batch import Batch, default_tokens_per_forward, make_batch
from prompt_lab.methods.sharing import share_runs

PROCESSES, ROWS = 2, 4

Result = tuple[str, dict[str, Any]]


def shared_banks(settings: Settings) -> Iterator[Result]:
    """Banks of 8 and of 3 prompts, the latter of which two processes cannot share evenly."""
    if settings.device == "cuda" and torch.cuda.device_count() < PROCESSES:
        print(f"G22 left out: it is for {PROCESSES} GPUs")
        return
    for kind, size in (("gpt2", DECODER), ("t5", T5)):
        for runs in (8, 3):
            name = {"gpt2": "GPT-2-like", "t5": "T5-like"}[kind]
            what = f"step on {PROCESSES} processes, rows shared / runs shared, {name}, R {runs}"
            found = _in_processes(kind, size[settings.size], runs, settings)
            wanted = settings.goal(1.0, 1.0) if runs == 8 else None
            yield f"{what}, B {ROWS}", {**found, "threshold": wanted}


def _in_processes(kind: str, size: Any, runs: int, settings: Settings) -> dict[str, Any]:
    """What the first of the processes measured."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    start = "fork" if settings.device == "cpu" else "spawn"
    results = multiprocessing.get_context(start).SimpleQueue()
    multiprocessing.start_processes(
        _process, (kind, size, runs, settings, address, results), PROCESSES, start_method=start
    )
    return results.get()


def _process(
    rank: int, kind: str, size: Any, runs: int, settings: Settings, address: str, results: Any
) -> None:
    """One process: measure, together with the others."""
    torch.set_num_threads(max(1, settings.threads // PROCESSES))
    device = settings.device if settings.device == "cpu" else f"cuda:{rank}"
    backend = "gloo" if settings.device == "cpu" else "nccl"
    dist.init_process_group(backend, address, rank=rank, world_size=PROCESSES)
    backbone = make_backbone(make_model(kind, size, device, settings.dtype))
    bank = make_prompts(backbone, runs, virtual_tokens(settings))
    groups = [make_rows(backbone, uniform_lengths(ROWS, 15, 40, seed=r), r) for r in range(runs)]
    every = [(row, prompt) for prompt, group in enumerate(groups) for row in group]
    every.sort(key=lambda pair: -sum(map(len, pair[0])))
    own = share_runs([1.0] * runs, PROCESSES)[rank]
    mine = [(row, own.index(prompt)) for row, prompt in every if prompt in own]
    by_rows, by_runs = _batch(every[rank::PROCESSES], backbone), _batch(mine, backbone)
    part, tokens = bank[own], default_tokens_per_forward(torch.device(device))

    def rows_shared() -> Tensor:
        """Losses of all runs."""
        losses, gradient = bank_gradient(backbone, bank, by_rows, tokens)
        dist.all_reduce(gradient)
        return losses

    def runs_shared() -> Tensor:
        """Losses of own runs."""
        losses, _ = bank_gradient(backbone, part, by_runs, tokens)
        dist.all_reduce(losses.new_zeros(()))
        return losses

    sums = torch.stack([rows_shared().sum(), runs_shared().sum()])
    dist.all_reduce(sums)
    if not torch.isclose(sums[0], sums[1], rtol=1e-3):
        raise RuntimeError(f"the two sides disagree: summed losses {sums.tolist()}")
    found = measure(rows_shared, runs_shared, settings)
    if rank == 0:
        results.put(found)
    dist.destroy_process_group()


def _batch(rows: list[Any], backbone: Backbone) -> Batch:
    """Rows and their prompts as a batch, each row counting alike."""
    made = make_batch(
        [inputs for (inputs, _), _ in rows],
        [targets for (_, targets), _ in rows],
        [prompt for _, prompt in rows],
        pad_id=0,
        left_padded=not backbone.is_encoder_decoder,
        weight=[1 / ROWS] * len(rows),
    )
    return made.to(backbone.device)
