"""The intrinsic subspace of soft prompts: an auto-encoder of whole prompts, and its file.

Intrinsic prompt tuning (Qin et al. 2021, arXiv 2110.07867, section 3.2) flattens a prompt (N, D),
projects it linearly to I numbers and maps these back through one hidden layer. Subspace finding
trains both maps on the prompts of many tasks; tuning in the subspace then keeps the way back and
trains I numbers per run. A subspace file is one ``.safetensors`` with the float32 weights and
string metadata that says which backbone, tasks, seeds and settings it came from; it is written
whole or not at all, and nothing is ever unpickled. The language model loss, and what is trained
when, belong to the method and are not here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from prompt_lab import __version__
from prompt_lab.core.atomic_file import write_atomically

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone

FORMAT = "prompt_lab.core.subspace"
FORMAT_VERSION = 1
SIZES = ("num_virtual_tokens", "hidden_size", "intrinsic_dim", "inner_size")
REQUIRED = ("backbone", "backbone_digest")


class Subspace(nn.Module):
    """Prompts (R, N, D) to codes (R, I) and back.

    ``Proj`` is linear, N·D -> I; ``Back`` is linear, tanh, linear, I -> H -> N·D. Both have biases.
    A random subspace (baseline of the paper's section 4.3) is this module untrained.

    Args:
        num_virtual_tokens: N.
        hidden_size: D, width of the backbone.
        intrinsic_dim: I.
        inner_size: H; None makes the way back one linear layer, I -> N·D.
        seed: of the initial weights, drawn as ``torch.nn.Linear`` draws them but without touching
            torch's global generator; None leaves them without storage, to be assigned.

    Attributes:
        metadata: what a subspace file says about it; empty for a new one.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        num_virtual_tokens: int,
        hidden_size: int,
        intrinsic_dim: int,
        inner_size: int | None = 768,
        seed: int | None = 0,
    ) -> None:
        super().__init__()
        self.num_virtual_tokens, self.hidden_size = num_virtual_tokens, hidden_size
        self.intrinsic_dim, self.inner_size = intrinsic_dim, inner_size
        self.metadata: dict[str, Any] = {}
        for name, size in self.sizes().items():
            if size is not None and size < 1:
                raise ValueError(f"{name} is {size}: give a positive number")
        full = num_virtual_tokens * hidden_size
        with torch.device("meta"):
            self.proj = nn.Linear(full, intrinsic_dim)
            if inner_size is None:
                self.back = nn.Sequential(nn.Linear(intrinsic_dim, full))
            else:
                first, last = nn.Linear(intrinsic_dim, inner_size), nn.Linear(inner_size, full)
                self.back = nn.Sequential(first, nn.Tanh(), last)
        if seed is not None:
            self.to_empty(device="cpu")
            self._draw(seed)

    def sizes(self) -> dict[str, int | None]:
        """N, D, I and H by their names."""
        return {name: getattr(self, name) for name in SIZES}

    def project(self, prompts: Tensor) -> Tensor:
        """Codes of prompts, the paper's Proj, in the weights' precision also under autocast.

        Args:
            prompts: (R, N, D).

        Returns:
            (R, I).

        Raises:
            ValueError: prompts of another shape.
        """
        shape = (self.num_virtual_tokens, self.hidden_size)
        if prompts.dim() != 3 or prompts.shape[1:] != shape:
            raise ValueError(
                f"prompts {tuple(prompts.shape)}; this subspace takes (R, {shape[0]}, {shape[1]})"
            )
        with torch.autocast(prompts.device.type, enabled=False):
            return self.proj(prompts.flatten(1))

    def back_project(self, codes: Tensor) -> Tensor:
        """Prompts of codes, the paper's Proj_b, in the weights' precision also under autocast.

        Args:
            codes: (R, I).

        Returns:
            (R, N, D).

        Raises:
            ValueError: codes of another shape.
        """
        if codes.dim() != 2 or codes.shape[1] != self.intrinsic_dim:
            raise ValueError(
                f"codes {tuple(codes.shape)}; this subspace takes (R, {self.intrinsic_dim})"
            )
        with torch.autocast(codes.device.type, enabled=False):
            flat = self.back(codes)
        return flat.view(len(codes), self.num_virtual_tokens, self.hidden_size)

    def forward(self, prompts: Tensor) -> Tensor:
        """Reconstruction P* = Back(Proj(P)).

        Args:
            prompts: (R, N, D).

        Returns:
            (R, N, D).

        Raises:
            ValueError: prompts of another shape.
        """
        return self.back_project(self.project(prompts))

    @torch.no_grad()
    def _draw(self, seed: int) -> None:
        """Weights and biases of every layer uniform within 1 / sqrt(inputs), as nn.Linear's."""
        generator = torch.Generator("cpu").manual_seed(seed)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                limit = layer.in_features**-0.5
                layer.weight.uniform_(-limit, limit, generator=generator)
                layer.bias.uniform_(-limit, limit, generator=generator)


def reconstruction_loss(
    reconstructed: Tensor, prompts: Tensor, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    """Squared error of every reconstructed prompt.

    Args:
        reconstructed: (R, N, D), P*.
        prompts: (R, N, D), P.
        reduction: over the N·D numbers of a prompt: ``sum`` is the squared norm of the
            paper (L_AE), ``mean`` the mean squared error of the authors' code.

    Returns:
        (R,) one loss per prompt.

    Raises:
        ValueError: shapes that differ, or another reduction.
    """
    if reconstructed.shape != prompts.shape or prompts.dim() != 3:
        raise ValueError(
            f"reconstructed {tuple(reconstructed.shape)} and prompts {tuple(prompts.shape)} must "
            "both be (R, N, D)"
        )
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}; allowed: 'sum', 'mean'")
    square = (reconstructed - prompts).square().flatten(1)
    return square.sum(1) if reduction == "sum" else square.mean(1)


def save_subspace(path: str | Path, subspace: Subspace, metadata: Mapping[str, Any]) -> None:
    """Write a subspace file, whole or not at all.

    Args:
        path: the file.
        subspace: its weights are written as float32.
        metadata: what the file says beside N, D, I, H and the package's version: values that JSON
            can hold; ``backbone`` (hub id or folder) and ``backbone_digest`` (SHA-256 of its
            weights) are required; source tasks, seeds, steps, alpha and reductions belong here.

    Raises:
        ValueError: metadata without the required fields, or with those that are written anyway.
    """
    from safetensors.torch import save

    lacking = [name for name in REQUIRED if name not in metadata]
    if lacking:
        raise ValueError(f"the metadata of a subspace lacks {', '.join(lacking)}")
    own = {"format", "format_version", *SIZES} & metadata.keys()
    if own:
        raise ValueError(f"leave {', '.join(sorted(own))} out of the metadata: the file adds it")
    tensors = {
        name: tensor.detach().to("cpu", torch.float32).contiguous()
        for name, tensor in subspace.state_dict().items()
    }
    fields = {**subspace.sizes(), "version": __version__, **metadata}
    text = {name: json.dumps(value) for name, value in fields.items()}
    text |= {"format": FORMAT, "format_version": str(FORMAT_VERSION)}
    write_atomically(path, save(tensors, text))


def load_subspace(
    path: str | Path, backbone: Backbone | None = None, num_virtual_tokens: int | None = None
) -> Subspace:
    """Read a subspace file, ready for tuning in it: no weight requires a gradient.

    Args:
        path: the file.
        backbone: the model it is meant for; its weights and width are compared with the file's.
        num_virtual_tokens: the N it is meant for, compared with the file's.

    Returns:
        The subspace, on the CPU, with ``metadata`` as it was given to :func:`save_subspace` and
        the ``version`` of the package that wrote it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a subspace file, damaged, a newer format, or made for another backbone or
            another number of virtual tokens.
    """
    metadata = _read_metadata(path)
    from safetensors.torch import load

    subspace = Subspace(**{name: metadata.pop(name) for name in SIZES}, seed=None)
    subspace.metadata = metadata
    _check_use(subspace, backbone, num_virtual_tokens, path)
    tensors = load(Path(path).read_bytes())
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in subspace.state_dict().items()}
    if found != expected:
        raise ValueError(
            f"{path}: damaged: tensors {found}, but the metadata's sizes mean {expected}"
        )
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    subspace.load_state_dict(tensors, assign=True)
    return subspace.requires_grad_(False)


def _read_metadata(path: str | Path) -> dict[str, Any]:
    """Sizes and metadata of a subspace file, without reading its tensors.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not a subspace file, damaged, or of a newer format.
    """
    from safetensors import SafetensorError, safe_open

    if not Path(path).is_file():
        raise FileNotFoundError(f"no subspace file {path}")
    try:
        with safe_open(str(path), "pt") as file:
            raw = file.metadata() or {}
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged or not a safetensors file ({error})") from error
    kind = raw.pop("format", None)
    if kind != FORMAT:
        found = "a prompt file" if kind == "prompt_lab" else "no such metadata"
        raise ValueError(f"{path}: not a subspace file of prompt_lab ({found})")
    try:
        version = int(raw.pop("format_version"))
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged, no version of the format ({error!r})") from None
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path}: subspace file format {version}; this version of prompt_lab reads up to "
            f"{FORMAT_VERSION}: upgrade prompt_lab"
        )
    lacking = [name for name in (*SIZES, *REQUIRED) if name not in raw]
    if lacking:
        raise ValueError(f"{path}: the subspace file's metadata lacks {', '.join(lacking)}")
    try:
        return {name: json.loads(value) for name, value in raw.items()}
    except ValueError as error:
        raise ValueError(f"{path}: damaged, its metadata is not JSON ({error})") from None


def _check_use(
    subspace: Subspace,
    backbone: Backbone | None,
    num_virtual_tokens: int | None,
    where: str | Path,
) -> None:
    """Refuse a subspace of prompts for another backbone or of another number of tokens.

    Raises:
        ValueError: naming both sides.
    """
    count, width = subspace.num_virtual_tokens, subspace.hidden_size
    if num_virtual_tokens is not None and num_virtual_tokens != count:
        raise ValueError(
            f"{where}: a subspace of prompts of {count} virtual tokens, but num_virtual_tokens is "
            f"{num_virtual_tokens}"
        )
    if backbone is None:
        return
    name, digest = subspace.metadata["backbone"], subspace.metadata["backbone_digest"]
    if width != backbone.hidden_size:
        raise ValueError(
            f"{where}: a subspace of prompts of width {width} made for {name!r}, but backbone "
            f"{backbone.name!r} has hidden size {backbone.hidden_size}"
        )
    if digest != backbone.digest:
        raise ValueError(
            f"{where}: made for backbone {name!r} with weights {digest[:12]}, but "
            f"{backbone.name!r} has weights {backbone.digest[:12]}"
        )
