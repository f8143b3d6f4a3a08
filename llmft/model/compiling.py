"""Decoder layers compiled one by one: identical layers share one compilation, which takes seconds instead of minutes.

For CUDA; on a CPU it has nothing to gain. PEFT's own LoRA forwards are compiled, not the fused ones: a compiler fuses
them by itself, and both together are no faster than either.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llmft.model import fused
from llmft.model.families import layers_of


def compile_layers(model: Any, warn: Callable[[str], None], backend: str = "inductor") -> int:
    """Compiles the decoder layers of an adapted model, of any number of tokens; returns how many.

    What cannot be compiled, when its first batch comes, is computed as before, and `warn` is told once.
    """
    fused.uninstall(model)
    layers = layers_of(model)
    for layer in layers:
        compiled = torch.compile(layer._call_impl, dynamic=True, fullgraph=True, backend=backend)
        layer._compiled_call_impl = _with_fallback(model, layer, compiled, warn)
    return len(layers)


def release_layers(model: Any) -> None:
    """The layers as they were, for whoever takes over the base."""
    for layer in layers_of(model):
        layer._compiled_call_impl = None


def _with_fallback(model: Any, layer: Any, compiled: Callable[..., Any], warn: Callable[[str], None]) -> Any:
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return compiled(*args, **kwargs)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            told = str(error).strip().splitlines()
            release_layers(model)
            fused.install(model)
            warn(
                f"trainer.compile: the layers cannot be compiled here ({told[0] if told else type(error).__name__}); "
                "they are computed as without it."
            )
            return layer._call_impl(*args, **kwargs)

    return call
