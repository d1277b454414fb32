"""Adapters instead of prompts: a frozen backbone whose rows each run under their own adapters.

An adapter (Houlsby et al. 2019, arXiv 1902.00751) is a bottleneck with a residual connection,

    h <- h + W_up swish(W_down h),

on the output of the self-attention and of the feed-forward network of every layer, before that
output joins the layer's own residual stream; cross-attention has none. There are no biases. These
are the formula of Qin et al. 2021 (arXiv 2110.07867, appendix D.2) and the places, activation and
bottleneck of their code. All adapters of a model are one flat vector of P numbers, so a bank of R
sets is (R, P), and a row gathers its own set once.

:class:`AdaptedBackbone` is a backbone for which an entry of a bank is a set of adapters, (R, 1, P),
instead of a prompt, (R, N, D). Whatever trains, evaluates or stores a bank of prompts does so with
adapters through it, unchanged. Left out: adapters and prompts at once, recomputed layers, compiled
passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prompt_lab.core.backbone import Backbone, Prefix
from prompt_lab.core.batch import Batch
from prompt_lab.core.candidates import Follow

_T5 = ("SelfAttention.o", "DenseReluDense.wo")
_LLAMA = ("self_attn.o_proj", "mlp.down_proj")
_OUTPUTS = {
    "t5": _T5,
    "mt5": _T5,
    "bart": ("self_attn.out_proj", "fc2"),
    "gpt2": ("attn.c_proj", "mlp.c_proj"),
    "bloom": ("self_attention.dense", "mlp.dense_4h_to_h"),
    "llama": _LLAMA,
    "qwen2": _LLAMA,
}
"""How the names of the modules end whose outputs are those of self-attention and feed-forward."""


@dataclass(frozen=True)
class AdapterLayout:
    """Where the adapters of a model are, and how a flat vector of P numbers holds them.

    Attributes:
        names: the modules whose outputs are adapted, A of them in the model's order.
        width: D, size of those outputs.
        bottleneck: r, size between down- and up-projection.
    """

    names: tuple[str, ...]
    width: int
    bottleneck: int

    @classmethod
    def of(cls, backbone: Backbone, bottleneck: int = 16) -> AdapterLayout:
        """The layout of a backbone.

        Args:
            backbone: the model.
            bottleneck: r, 16 in the authors' code.

        Raises:
            ValueError: a bottleneck below 1.
        """
        if bottleneck < 1:
            raise ValueError(f"bottleneck is {bottleneck}: give at least 1")
        kind = backbone.model.config.model_type
        if kind not in _OUTPUTS:
            raise ValueError(
                f"backbone {backbone.name!r} is of type {kind!r}, where adapters have no known "
                f"place; they have in {', '.join(_OUTPUTS)}: take one of these, or train prompts"
            )
        ends = tuple(f".{end}" for end in _OUTPUTS[kind])
        names = [name for name, _ in backbone.model.named_modules() if name.endswith(ends)]
        width: int = backbone.model.get_input_embeddings().weight.shape[1]
        return cls(tuple(names), width, bottleneck)

    @property
    def size(self) -> int:
        """P = A * 2 * D * r."""
        return len(self.names) * 2 * self.width * self.bottleneck

    def split(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The projections of every adapter.

        Args:
            flat: (B, P) sets of adapters; each is, adapter by adapter, W_down transposed (D, r) and
                W_up (D, r).

        Returns:
            For every name W_down transposed (B, D, r) and W_up transposed (B, r, D); views.
        """
        shape = (len(flat), 2 * len(self.names), self.width, self.bottleneck)
        parts = flat.view(shape).unbind(1)
        return [(down, up.mT) for down, up in zip(parts[::2], parts[1::2], strict=True)]


class RowAdapters:
    """The adapters of the rows of a batch, while they run.

    Args:
        layout: where the adapters are.
        bank: (R, P) sets of adapters.
        prompt_index: (B,) the set of each row.
    """

    def __init__(self, layout: AdapterLayout, bank: Tensor, prompt_index: Tensor) -> None:
        self.layout, self.bank = layout, bank
        self.shared = len(bank) == 1  # then all rows are as one long row
        self.index = prompt_index[:1] if self.shared else prompt_index
        self._gather()

    def _gather(self) -> None:
        """Take each row's projections from the bank."""
        self.projections = self.layout.split(self.bank.index_select(0, self.index))

    def keep(self, places: Tensor) -> None:
        """From here on only some of the rows run: those at ``places`` (b,) among the present."""
        if not self.shared:
            self.index = self.index.index_select(0, places)
            self._gather()

    def hook(self, at: int) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        """A forward hook that puts adapter ``at`` on a module's output.

        The output has as many rows as the batch, or a multiple where beams are searched: then those
        of one row stand together.
        """

        def adapt(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            """The output with the change of each row's own adapter."""
            down, up = self.projections[at]
            if len(output) % len(down):
                raise RuntimeError(f"{len(output)} rows for the adapters of {len(down)}")
            rows = output.reshape(len(down), -1, output.shape[-1])
            change = torch.bmm(F.silu(torch.bmm(rows, down)), up)
            return output + change.view_as(output)

        return adapt


@contextmanager
def adapters(
    backbone: Backbone, layout: AdapterLayout, bank: Tensor, prompt_index: Tensor
) -> Iterator[RowAdapters]:
    """Inside it the backbone's forward passes adapt each row by its own entry of a bank.

    Exact, and differentiable with respect to the bank as long as layers are not recomputed. The
    rows' sets are copied out of the bank: B * P numbers, about what the activations of r / 4 tokens
    per row take.

    Args:
        backbone: the model; it is left as it was.
        layout: where the adapters are.
        bank: (R, P) sets of adapters in the dtype of the model's weights.
        prompt_index: (B,) the entry of each row, in the order of the rows.

    Yields:
        The rows' adapters, which must be told when rows are dropped.

    Raises:
        ValueError: a bank of another width.
    """
    if bank.dim() != 2 or bank.shape[1] != layout.size:
        raise ValueError(
            f"adapters have shape {tuple(bank.shape)}; backbone {backbone.name!r} with bottleneck "
            f"{layout.bottleneck} takes (R, {layout.size})"
        )
    rows = RowAdapters(layout, bank, prompt_index)
    handles = []
    try:
        for at, name in enumerate(layout.names):
            module = backbone.model.get_submodule(name)
            handles.append(module.register_forward_hook(rows.hook(at)))
        yield rows
    finally:
        for handle in handles:
            handle.remove()


class AdaptedBackbone(Backbone):
    """A frozen model whose bank holds sets of adapters, (R, 1, P), in place of prompts (R, N, D).

    The verbs are those of :class:`Backbone`; a bank (R, 0, P) means no adapters. No token stands in
    front of the rows, so decoder-only models share nothing between rows.

    Args:
        backbone: the model; its weights are shared, not copied.
        bottleneck: r of the adapters.

    Attributes:
        layout: where the adapters are.
        hidden_size: P, the width of an entry of the bank.

    Raises:
        ValueError: a bottleneck below 1.
    """

    def __init__(self, backbone: Backbone, bottleneck: int = 16) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(backbone.__dict__)  # its model, tokens and way, found once
        self.runner = copy(backbone.runner)
        self.runner.packs = False  # each row has adapters of its own
        self.layout = AdapterLayout.of(backbone, bottleneck)
        self.hidden_size = self.layout.size
        self._running: RowAdapters | None = None

    def prefix(self, prompts: Tensor, front: Sequence[int] = ()) -> Prefix:
        """The bank (R, 1, P), or (R, 0, P), in the weights' dtype.

        Raises:
            ValueError: a bank of another shape.
        """
        if prompts.dim() != 3 or prompts.shape[1] > 1 or prompts.shape[2] != self.layout.size:
            raise ValueError(
                f"adapters have shape {tuple(prompts.shape)}; backbone {self.name!r} with "
                f"bottleneck {self.layout.bottleneck} takes (R, 1, {self.layout.size})"
            )
        return (prompts.to(self.model.dtype),)

    def _virtual_tokens(self, prefix: Prefix) -> int:
        return 0

    def _row_losses(self, prefix: Prefix, batch: Batch, label_smoothing: float) -> Tensor:
        with self._adapted(prefix, batch) as none:
            return super()._row_losses(none, batch, label_smoothing)

    def _generate(self, prefix: Prefix, batch: Batch, settings: dict[str, Any]) -> list[list[int]]:
        with self._adapted(prefix, batch) as none:
            return super()._generate(none, batch, settings)

    def _scores_of(
        self, prefix: Prefix, batch: Batch, answers: Tensor, exhaustive: bool, mean: bool
    ) -> Tensor:
        with self._adapted(prefix, batch) as none:
            return super()._scores_of(none, batch, answers, exhaustive, mean)

    def _start(self, prefix: Prefix, batch: Batch) -> tuple[Tensor, Follow]:
        """As the backbone's; rows that are dropped on the way lose their adapters, too."""
        first, follow = super()._start(prefix, batch)
        running = self._running

        def follow_adapted(keep: Tensor | None, ids: Tensor) -> Tensor:
            if keep is not None and running is not None:
                running.keep(keep)
            return follow(keep, ids)

        return first, follow_adapted

    @contextmanager
    def _adapted(self, prefix: Prefix, batch: Batch) -> Iterator[Prefix]:
        """Inside it the rows of a batch run adapted; gives the prefix of prompts of no tokens."""
        (bank,) = prefix
        none = bank.new_zeros(len(bank), 0, self.layout.width)
        if bank.shape[1] == 0:
            yield (none,)
            return
        with adapters(self, self.layout, bank.flatten(1), batch.prompt_index) as self._running:
            try:
                yield (none,)
            finally:
                self._running = None
