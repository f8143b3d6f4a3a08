"""Activation checkpointing, and offload of saved activations to the CPU's memory.

Neither changes a number: what is computed again is computed by the same operations, dropout with the same draws.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from llmft.config.trainer import Checkpointing
from llmft.core.errors import ConfigError


def set_checkpointing(base: Any, level: Checkpointing) -> None:
    """Lets the layers of `base` keep all, or their inputs alone.

    Raises ConfigError for a model whose code cannot compute its layers again.
    """
    if level is not Checkpointing.full:
        base.gradient_checkpointing_disable()
        return
    if not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing=full: {type(base).__name__} cannot compute its layers again; "
            "set it to none."
        )
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


LEAST_OFFLOADED = 2**16
"""Bytes of a tensor below which its way to the CPU and back takes longer than its memory is worth."""


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what autograd saves in the CPU's memory until the backward; weights stay where they are.

    PyTorch's own `save_on_cpu` takes frozen weights along, in every micro-batch. The copies run in the order of the
    device's stream, out of and into pinned memory, so that the CPU does not wait for them. What several operations
    save alike, as the projections of one input do, is kept once.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        copies: dict[Any, tuple[StorageWeakRef, weakref.ref[torch.Tensor]]] = {}

        def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in weights or tensor.nbytes < LEAST_OFFLOADED:
                return tensor.device, tensor
            alive = StorageWeakRef(storage)  # as long as it is held, no other storage takes its number
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
