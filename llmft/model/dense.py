"""4-bit weights dequantised once for many small products: on a CPU, generation dequantises each for every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils import parametrize

MOST_BYTES = 4 * 2**30
"""Of dequantised weights; and never more than a quarter of the machine's memory."""


@contextlib.contextmanager
def dequantized(model: Any) -> Iterator[bool]:
    """Keeps the dequantised weights of a base on the CPU for the time of the block, where they fit; says whether.

    The products are the same to the bit. Only fp32 is kept: in bf16 bitsandbytes' own order of roundings would have to
    be followed. A GPU multiplies 4-bit weights in one kernel.
    """
    layers = _layers(model)
    if not layers:
        yield False
        return
    with contextlib.ExitStack() as stack:
        for layer in layers:
            weight: list[torch.Tensor] = []
            layer.forward = partial(_forward, layer, weight)
            stack.callback(layer.__dict__.pop, "forward")
        stack.enter_context(parametrize.cached())  # experts, whose weights are dequantised when they are asked for
        yield True


def _layers(model: Any) -> list[Any]:
    """All 4-bit layers, or none where a copy of their weights is no gain or does not fit."""
    import bitsandbytes as bnb

    from llmft.model.memory import device_memory
    from llmft.model.sharding import is_sharded

    device = next(model.parameters()).device
    if device.type != "cpu" or torch.is_autocast_enabled("cpu") or is_sharded(model):
        return []
    layers: list[Any] = [module for module in model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    states = [layer.weight.quant_state for layer in layers]
    experts: list[Any] = [module for module in model.modules() if type(module).__name__ == "Bnb4bitParametrization"]
    states += [module.quant_state for module in experts]
    plain = all(state.dtype is torch.float32 for state in states)
    plain = plain and all(layer.compute_dtype is torch.float32 and "forward" not in vars(layer) for layer in layers)
    needed = sum(4 * state.shape.numel() for state in states)
    total = device_memory(device) or 0
    return layers if plain and needed <= min(MOST_BYTES, total // 4) else []


def _forward(layer: Any, weight: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """What `Linear4bit.forward` computes; `weight` is empty until the first call."""
    from bitsandbytes.functional import dequantize_4bit

    if not weight:
        weight.append(dequantize_4bit(layer.weight.view(-1, 1), layer.weight.quant_state))
    return F.linear(x.float(), weight[0], layer.bias).to(x.dtype)
