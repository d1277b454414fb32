"""Subspaces, maps to adapters and attentions as tensor files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from prompt_lab import __version__
from prompt_lab.core.attention_mixture import PromptAttention
from prompt_lab.core.subspace import AdapterMap, Subspace
from prompt_lab.files.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from prompt_lab.core.backbone import Backbone

Network = TypeVar("Network", Subspace, AdapterMap, PromptAttention)


def save_network(path: str | Path, network: Network, metadata: Mapping[str, Any]) -> None:
    """Write a subspace, a map to adapters or an attention, its weights as float32.

    Args:
        path: the file.
        network: its class names the kind; its sizes go into the metadata.
        metadata: the other fields of the kind and more: source tasks, seeds, steps.
    """
    tensors = {name: tensor.float() for name, tensor in network.state_dict().items()}
    sizes = {name: getattr(network, name) for name in network.SIZES}
    save_tensors(path, network.KIND, tensors, {"version": __version__, **metadata, **sizes})


def load_network(
    path: str | Path, kind: type[Network], backbone: Backbone | None = None
) -> Network:
    """Read what :func:`save_network` wrote, on the CPU; no weight requires a gradient.

    Args:
        path: the file.
        kind: ``Subspace``, ``AdapterMap`` or ``PromptAttention``.
        backbone: the model it is meant for; its weights and width are compared with the file's.

    Returns:
        The network; its ``metadata`` are those of the file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as :func:`load_tensors`, or tensors that are not as the metadata says.
    """
    tensors, metadata = load_tensors(path, kind.KIND, backbone)
    try:
        network = kind(**{name: metadata[name] for name in kind.SIZES}, seed=None)
    except ValueError as error:
        raise ValueError(f"{path}: damaged, {error}") from None
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    expected = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    if found != expected:
        raise ValueError(
            f"{path}: damaged: tensors {found}, but the metadata's sizes mean {expected}"
        )
    floats = {name: tensor.float() for name, tensor in tensors.items()}
    network.load_state_dict(floats, assign=True)
    network.metadata = metadata
    return network.requires_grad_(False)
