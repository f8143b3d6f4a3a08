"""What a forward leaves for its backward: all of it, the dear part of it, layers' inputs alone; here or in the CPU.

None of these changes a number: what is computed again is computed by the same operations, dropout with the same draws.
"""

from __future__ import annotations

import weakref
from collections import defaultdict, deque
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from llmft.config import Checkpointing
from llmft.errors import ConfigError

_PRODUCTS = {
    "aten::mm": 0,
    "aten::linear": 0,
    "aten::addmm": 1,
    "aten::_grouped_mm": 0,
    "bitsandbytes::gemm_4bit": 0,
    "bitsandbytes::int8_mixed_scaled_mm": 0,
}
"""Products with weights, by the place of the input among their arguments. A 4-bit product is one operation to PyTorch,
its dequantisation inside: its output is kept and no weight is dequantised again."""
_ATTENTION = ("scaled_dot_product", "flash_attn", "_flash_attention", "_efficient_attention", "varlen_attn")


def set_checkpointing(base: Any, level: Checkpointing, *, lora_rank: int = 0) -> None:
    """Sets what the layers of `base` keep; `lora_rank` says which products are cheap enough to be computed again.

    Raises ConfigError for a model whose code cannot compute its layers again.
    """
    if level in (Checkpointing.auto, Checkpointing.none):
        base.gradient_checkpointing_disable()
        return
    if not base.supports_gradient_checkpointing:
        raise ConfigError(
            f"trainer.gradient_checkpointing={level.value}: {type(base).__name__} cannot compute its layers again; "
            "set it to none."
        )
    arguments: dict[str, Any] = {"use_reentrant": False}
    if level is Checkpointing.selective:
        arguments["context_fn"] = partial(_contexts, lora_rank)
    base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)


def _contexts(lora_rank: int) -> tuple[Any, Any]:
    """For `torch.utils.checkpoint`: what surrounds the forward of a layer, and its second forward.

    Those of PyTorch, `create_selective_checkpoint_contexts`, refuse what is changed in place after it was kept, as
    LoRA's fused layers do (they add the low-rank product to the base's), and count every operation, also those that
    FSDP adds to one of the two forwards alone.
    """
    kept: dict[Any, deque[_Kept]] = defaultdict(deque)
    return _Keep(kept, lora_rank), _TakeBack(kept, lora_rank)


@dataclass
class _Kept:
    """What an operation made, and how often it was changed in place since."""

    made: Any
    versions: list[int]


def _tensors(made: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]


def _detached(tensor: torch.Tensor) -> torch.Tensor:
    """Detached, since what is kept must not keep the graph that keeps it; changes in place are counted for both."""
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


class _Keep(TorchDispatchMode):
    """Keeps what `is_kept` names, in the order of the operations."""

    def __init__(self, kept: dict[Any, deque[_Kept]], lora_rank: int) -> None:
        super().__init__()
        self.kept, self.lora_rank = kept, lora_rank
        self.by_storage: dict[int, _Kept] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if is_kept(func, args, kwargs or {}, self.lora_rank):
            alias = tree_map_only(torch.Tensor, _detached, made)
            entry = _Kept(alias, [tensor._version for tensor in _tensors(alias)])
            self.kept[func].append(entry)
            for tensor in _tensors(alias):
                self.by_storage[tensor.untyped_storage()._cdata] = entry
        elif func is torch.ops.aten.addmm_.default:
            finished = self.by_storage.get(args[0].untyped_storage()._cdata)
            if finished is not None:
                # PyTorch counts the change when this returns.
                finished.versions = [version + 1 for version in finished.versions]
        return made

    def __exit__(self, *error: Any) -> None:
        self.by_storage.clear()
        super().__exit__(*error)


class _TakeBack(TorchDispatchMode):
    """Computes again what was not kept; the low-rank product is in what was."""

    def __init__(self, kept: dict[Any, deque[_Kept]], lora_rank: int) -> None:
        super().__init__()
        self.kept, self.lora_rank = kept, lora_rank
        self.taken: dict[int, weakref.ref[torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_kept(func, args, kwargs or {}, self.lora_rank):
            if not self.kept[func]:
                raise RuntimeError(f"{func}: the second forward of a layer computes more than the first did")
            entry = self.kept[func].popleft()
            tensors = _tensors(entry.made)
            if [tensor._version for tensor in tensors] != entry.versions:
                raise ConfigError(
                    f"trainer.gradient_checkpointing=selective: this model changes what {func} made in place; set "
                    "trainer.gradient_checkpointing=full."
                )
            for tensor in tensors:
                self.taken[tensor.untyped_storage()._cdata] = weakref.ref(tensor)
            return entry.made
        if func is torch.ops.aten.addmm_.default:
            whole = self.taken.get(args[0].untyped_storage()._cdata)
            if whole is not None and whole() is not None:
                return args[0]
        return func(*args, **(kwargs or {}))


def is_kept(operation: Any, args: Any, kwargs: Any, lora_rank: int) -> bool:
    """Whether selective checkpointing keeps what this operation makes.

    Products with weights and attention; not the second half of a LoRA, whose output is as large as its layer's and
    costs only `lora_rank` operations a number; not attention with dropout, whose draws a second forward must make too.
    """
    name = operation.name().partition(".")[0]
    if name in _PRODUCTS:
        return bool(args[_PRODUCTS[name]].shape[-1] > lora_rank)
    if any(part in name for part in _ATTENTION):
        return not _argument(operation, args, kwargs, "dropout_p", 0.0)
    return False


def _argument(operation: Any, args: Any, kwargs: Any, wanted: str, default: Any) -> Any:
    for place, argument in enumerate(operation._schema.arguments):
        if argument.name == wanted:
            given = args[place] if place < len(args) else argument.default_value
            return kwargs.get(wanted, given)
    return default


LEAST_OFFLOADED = 2**16
"""Bytes of a tensor below which its way to the CPU and back takes longer than its memory is worth."""


class Offloaded(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what autograd saves in the CPU's memory until the backward; weights stay where they are.

    PyTorch's own `save_on_cpu` takes frozen weights along, in every micro-batch. The copies run in the order of the
    device's stream, out of and into pinned memory, so that the CPU does not wait for them.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}

        def pack(tensor: torch.Tensor) -> tuple[torch.device, torch.Tensor]:
            storage = tensor.untyped_storage()
            if storage.data_ptr() in weights or tensor.nbytes < LEAST_OFFLOADED:
                return tensor.device, tensor
            held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            return tensor.device, held.copy_(tensor, non_blocking=tensor.is_cuda)

        def unpack(packed: tuple[torch.device, torch.Tensor]) -> torch.Tensor:
            device, held = packed
            return held.to(device, non_blocking=True)

        super().__init__(pack, unpack)
