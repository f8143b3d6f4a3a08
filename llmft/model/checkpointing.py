"""Activation checkpointing, and offload of saved activations to the CPU's memory.

Neither changes a result: recomputation uses the same operations and the same dropout masks.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from llmft.config.trainer import Checkpointing
from llmft.core.errors import ConfigError


def set_checkpointing(base: Any, level: Checkpointing) -> None:
    """Makes the layers of `base` keep all activations, or only their inputs.

    Raises ConfigError for a model whose code cannot recompute its layers.
    """
    if level is not Checkpointing.full:
        base.gradient_checkpointing_disable()
        return
    if not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing=full: {type(base).__name__} cannot recompute its layers; set it to none."
        )
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


LEAST_OFFLOADED = 2**16
"""Size in bytes below which a tensor is not worth the way to the CPU and back."""


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Moves what autograd saves to the CPU's memory until the backward pass; weights stay on the device.

    PyTorch's own `save_on_cpu` takes frozen weights along, in every micro-batch. The copies run in the order of the
    device's stream, out of and into pinned memory, so that the CPU does not wait for them. A tensor
    that several operations save, such as the input of several projections, is kept once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        copies: dict[Any, tuple[StorageWeakRef, weakref.ref[torch.Tensor]]] = {}

        def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in weights or tensor.nbytes < LEAST_OFFLOADED:
                return tensor.device, tensor
            alive = StorageWeakRef(storage)  # kept alive, so that no other storage gets its address
            view = (tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            key = (alive.cdata, *view, tensor._version)
            if key in copies and not copies[key][0].expired() and (copy := copies[key][1]()) is not None:
                return tensor.device, copy
            copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            copies[key] = alive, weakref.ref(copy)
            return tensor.device, copy.copy_(tensor, non_blocking=tensor.is_cuda)

        def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
            device, copy = packed
            return copy.to(device, non_blocking=True)

        super().__init__(pack, unpack)
