"""Weights sharded over processes (FSDP2), for bases that fit on no single device.

Every process maps the file of the quantised base and copies its shard of each layer, which is all that it reads.
Checkpoints and adapters are written unsharded, so a run may be resumed with another number of processes.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from llmft.model.families import base_of, layers_of

_divided: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()


def is_sharded(model: torch.nn.Module) -> bool:
    return model in _divided


def shard(model: Any, mesh: Any) -> None:
    """Shards each decoder layer, then the rest, over `mesh`."""
    from torch.distributed.fsdp import fully_shard

    from llmft.model.kernels import lora

    lora.uninstall(model)  # its backward reads weights that FSDP has already freed
    root = base_of(model)  # which `generate` calls, below PEFT's wrapper
    for layer in layers_of(model):
        fully_shard(layer, mesh=mesh)
    # By default the root keeps its weights gathered after a forward, and a head among them could not be saved.
    fully_shard(root, mesh=mesh, reshard_after_forward=True)
    _divided.update(model.modules())


def full_tensor(value: Any) -> Any:
    """The full tensor of one that may be sharded, any other value unchanged; a collective call."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def sharded_like(value: Any, parameter: torch.Tensor) -> Any:
    """`value`, sharded like `parameter` if it is a tensor of its shape."""
    if not hasattr(parameter, "full_tensor") or getattr(value, "shape", None) != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)  # type: ignore[attr-defined]
