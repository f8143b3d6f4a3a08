"""What single families need, beyond what their YAML says."""

from __future__ import annotations

import re

import torch

NOT_ADAPTED = r".*\.(router|gate|experts)(\..*)?"
"""Modules of a mixture of experts that "all linear layers" leaves alone: the router, because which expert sees a token
is not a linear layer's work, and the fused experts, whose 4-bit weights take no low-rank factor of their own."""


def prepare(model_type: str) -> None:
    """Makes a family's classes fit for quantisation; call before a model of it is built.

    Falcon's linear layers are a subclass that only spells the product differently, and transformers quantises exact
    `torch.nn.Linear` alone: the whole model would stay unquantised without a word. The logits are the same to the bit.
    """
    if model_type == "falcon":
        from transformers.models.falcon import modeling_falcon

        modeling_falcon.FalconLinear = torch.nn.Linear  # type: ignore[misc, assignment]


def is_mixture(model: torch.nn.Module) -> bool:
    """Whether the model routes tokens to experts."""
    return any(re.fullmatch(r".*\.experts", name) for name, _ in model.named_modules())
