"""Tuning inside a subspace: where its map comes from, and where its runs start.

Intrinsic subspace tuning (Qin et al. 2021, section 3.2) trains I numbers per run and keeps the map
from them to a prompt; `PromptTuning` does the training. A random subspace, the paper's baseline, is
the same map untrained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from prompt_lab.core.backbone import Backbone
from prompt_lab.core.run import Run
from prompt_lab.core.subspace import Subspace
from prompt_lab.files.results import Start
from prompt_lab.files.tensors import load_network

RANDOM = "random"
"""The path that stands for a random subspace."""


@dataclass
class SubspaceConfig:
    """The subspace that prompts are tuned in.

    Args:
        path: subspace file that IntrinsicSubspace wrote; or ``random`` for a random subspace.
        intrinsic_dim: I of a random subspace; a file has its own.
        seed: of the weights of a random subspace.
        std: standard deviation of the initial codes, 0.02 in the authors' code.
    """

    path: str
    intrinsic_dim: int | None = None
    seed: int = 0
    std: float = 0.02

    def check(self) -> None:
        """Check that a random subspace has a dimension, and a file none beside its own.

        Raises:
            ValueError: naming the setting and what is allowed.
        """
        if (self.path == RANDOM) != (self.intrinsic_dim is not None):
            raise ValueError(
                f"model.subspace.path is {self.path!r} and model.subspace.intrinsic_dim is "
                f"{self.intrinsic_dim}: give a dimension for a {RANDOM} subspace, and none for a "
                "file"
            )
        if self.intrinsic_dim is not None and self.intrinsic_dim < 1:
            raise ValueError(
                f"model.subspace.intrinsic_dim is {self.intrinsic_dim}: give 1 or more"
            )
        if self.std < 0:
            raise ValueError(f"model.subspace.std is {self.std}: give 0 or more")

    def load(self, backbone: Backbone, num_virtual_tokens: int) -> Subspace:
        """The map, frozen.

        Raises:
            FileNotFoundError: no such file.
            ValueError: as :func:`prompt_lab.files.tensors.load_network`, or another N.
        """
        if self.intrinsic_dim is None:
            found = load_network(self.path, Subspace, backbone)
            if found.num_virtual_tokens != num_virtual_tokens:
                raise ValueError(
                    f"{self.path}: a subspace of prompts of {found.num_virtual_tokens} virtual "
                    f"tokens, but num_virtual_tokens is {num_virtual_tokens}"
                )
            return found
        size = (num_virtual_tokens, backbone.hidden_size, self.intrinsic_dim)
        return Subspace(*size, seed=self.seed).requires_grad_(False)

    @property
    def variant(self) -> str:
        """Its name in the results."""
        return "random_subspace" if self.path == RANDOM else "subspace"

    @property
    def is_there(self) -> bool:
        """Whether the map can be made or read."""
        return self.path == RANDOM or Path(self.path).is_file()

    def start(self, seed: int) -> Start:
        """Where codes start that are drawn under a seed."""
        return Start("codes", "", seed, "" if self.path == RANDOM else self.path)


def initial_codes(runs: Sequence[Run], intrinsic_dim: int, std: float) -> Tensor:
    """Normal codes (R, I); those of a run are a function of its initialisation seed."""
    codes = []
    for run in runs:
        generator = torch.Generator().manual_seed(run.init_seed)
        codes.append(torch.randn(intrinsic_dim, generator=generator) * std)
    return torch.stack(codes)
