"""Replacements for code of transformers and PEFT on a model's own modules; `model.kernels=none` turns all off.

README.md in this folder says what each one gains.
"""

from __future__ import annotations

from typing import Any


def install(model: Any) -> None:
    """Packed rows, RMSNorm and SwiGLU on a loaded model's own modules; LoRA's kernel comes with the adapter."""
    from llmft.model.kernels import packing, rmsnorm_swiglu

    packing.enable(model)
    rmsnorm_swiglu.install(model)
