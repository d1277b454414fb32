"""Which bound of a pack is fastest: steps of a model with packs of at most so many tokens.

    python tests/benchmarks/pack_bound.py FOLDER [--threads 1] [--pairs 9]

Attention grows with the length of a pack, padding between packs falls with it. Prints the median
time of a step, over that with no packs at all, for several tasks, bounds and prompts a step. The
constant is ``prompt_lab.core.packing.PACK_TOKENS``.
"""

from __future__ import annotations

import argparse
from itertools import product

import torch
from models import make_prompts
from pairs import Settings, measure
from real_model import load, read
from steps import our_side

from prompt_lab.core import packing

BOUNDS = (128, 256, 512, 1024)
CASES = (("glue-sst2", 1, 32), ("superglue-cb", 1, 8), ("glue-sst2", 8, 4), ("trec", 1, 32))


def main() -> None:
    """Time every case and bound."""
    parser = argparse.ArgumentParser(description="Time steps under bounds of packs.")
    parser.add_argument("model", help="folder of a decoder-only language model")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = Settings(threads=options.threads, pairs=options.pairs, model=options.model)
    backbone = load(settings, "float32")
    for (task, runs, rows), bound in product(CASES, BOUNDS):
        found = read(backbone, task, runs * rows, settings)
        groups = [found[at * rows : (at + 1) * rows] for at in range(runs)]
        step = our_side(backbone, make_prompts(backbone, runs, 20), groups)

        def packed(step=step, bound=bound):
            packing.PACK_TOKENS = bound
            return step()

        def alone(step=step):
            packing.PACK_TOKENS = 1
            return step()

        ratio = measure(alone, packed, settings)
        print(f"{task}, {runs} x {rows} rows, packs of {bound}: {ratio['value']:.2f}", flush=True)


if __name__ == "__main__":
    main()
