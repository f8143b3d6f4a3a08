"""Decoder layers compiled one by one: identical layers share one compilation, which takes seconds instead of minutes.

For CUDA; on a CPU it has nothing to gain. PEFT's own LoRA forwards are compiled, not the kernel: a compiler fuses them
by itself, and both together are no faster than either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmft.core.errors import first_line
from llmft.model.families import base_of, body_of, layers_of
from llmft.model.kernels import lora
from llmft.model.kernels.packing import takes_varlen, uses_packing

FIRST_TOKENS = 16


def compile_layers(model: Any, warn: Callable[[str], None], backend: Any = "inductor") -> int:
    """Compiles the decoder layers of an adapted model, of any number of tokens; returns how many.

    The first layer is tried before: where it cannot be compiled, none is, and `warn` is told. A layer stays compiled:
    the base is for this run alone.
    """
    base = base_of(model)
    if base.device.type == "cuda" and uses_packing(base) and not takes_varlen(base):
        # Where rows end is a constant of the graph: one for each number of blocks, and after eight none.
        warn("trainer.compile: this GPU attends block by block, which does not compile; computed as without it.")
        return 0
    layers = layers_of(model)
    replaced = lora.uninstall(model)
    try:
        _try(model, layers[0], backend)
    except Exception as error:  # whatever compilers say
        if replaced:
            lora.install(model)
        reason = f"the layers cannot be compiled here ({first_line(error)})"
        warn(f"trainer.compile: {reason}; they are computed as without it.")
        return 0
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return len(layers)


def _try(model: Any, layer: Any, backend: Any) -> None:
    """Computes the compiled form of `layer` once, on what the model hands to it."""
    compiled: Any = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)

    def compare(module: Any, args: Any, kwargs: Any) -> None:
        handle.remove()
        compiled(*args, **kwargs)

    handle = layer.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        body_of(model)(input_ids=torch.zeros(1, FIRST_TOKENS, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
