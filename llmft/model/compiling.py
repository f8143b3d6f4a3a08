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
    """Compiles the decoder layers of an adapted model for any number of tokens; returns how many.

    The first layer is tried first: if it cannot be compiled, none is, and `warn` gets the reason. Layers stay compiled,
    so later runs cannot reuse the base.
    """
    base = base_of(model)
    if base.device.type == "cuda" and uses_packing(base) and not takes_varlen(base):
        # The ends of rows are constants of the graph: one graph per number of blocks, and at most eight graphs.
        warn("trainer.compile is ignored: on this GPU attention runs block by block, which cannot be compiled.")
        return 0
    layers = layers_of(model)
    replaced = lora.uninstall(model)
    try:
        _try(model, layers[0], backend)
    except Exception as error:  # compilers raise many kinds
        if replaced:
            lora.install(model)
        warn(f"trainer.compile is ignored: the layers cannot be compiled here ({first_line(error)}).")
        return 0
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    return len(layers)


def _try(model: Any, layer: Any, backend: Any) -> None:
    """Runs the compiled form of `layer` once, on the inputs that the model gives it."""
    compiled: Any = torch.compile(layer, dynamic=True, fullgraph=True, backend=backend)

    def compare(module: Any, args: Any, kwargs: Any) -> None:
        handle.remove()
        compiled(*args, **kwargs)

    handle = layer.register_forward_pre_hook(compare, with_kwargs=True)
    try:
        body_of(model)(input_ids=torch.zeros(1, FIRST_TOKENS, dtype=torch.long, device=model.device), use_cache=False)
    finally:
        handle.remove()
