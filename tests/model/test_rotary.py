"""Rotary positions in one step have transformers' numbers, where a family's function is the common one."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch

from llmft.model import rotary

ALIKE = ("llama", "mistral", "qwen2", "gemma3", "gpt_neox", "phi")
OTHERS = ("glm4", "cohere2", "ernie4_5")
"""Families that turn pairs of neighbours, or in fp32."""


def module_of(family: str) -> Any:
    """A fresh module with the family's own function."""
    own = importlib.import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    return types.SimpleNamespace(apply_rotary_pos_emb=getattr(own, "__wrapped__", own))


def test_only_the_common_function_is_replaced_and_only_once() -> None:
    for family in (*ALIKE, *OTHERS):
        module = module_of(family)
        assert rotary.install(module) == (family in ALIKE), family
        assert not rotary.install(module)
    assert not rotary.install(types.SimpleNamespace())


@pytest.mark.parametrize(
    ("dtype", "angles"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
@pytest.mark.parametrize("dim", [6, 18, 64])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_values_and_gradients_are_transformers_own(
    family: str, dim: int, dtype: torch.dtype, angles: torch.dtype
) -> None:
    module = module_of(family)
    own = module.apply_rotary_pos_emb
    assert rotary.install(module)
    draw = torch.Generator().manual_seed(1)
    q, k = (torch.randn(1, 37, heads, dim, generator=draw).to(dtype).transpose(1, 2) for heads in (4, 2))
    cos, sin = (torch.randn(1, 37, width, generator=draw).to(angles) for width in (dim, dim))
    weight = torch.randn(37, dim, generator=draw)

    def run(function: Any) -> list[torch.Tensor]:
        leaves = [part.detach().clone().requires_grad_() for part in (q, k)]
        values = function(*leaves, cos, sin)
        sum((value * weight).sum() for value in values).backward()
        return [*values, *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]

    eps = 8 * torch.finfo(dtype).eps
    for ours, theirs in zip(run(module.apply_rotary_pos_emb), run(own), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.allclose(ours, theirs, eps, eps)


def test_dimensions_that_stay_as_they_are_do_so() -> None:
    module = module_of("gpt_neox")
    own = module.apply_rotary_pos_emb
    assert rotary.install(module)
    q = torch.randn(1, 2, 5, 16)
    cos, sin = torch.randn(1, 5, 4), torch.randn(1, 5, 4)
    assert all(
        torch.equal(a, b) for a, b in zip(module.apply_rotary_pos_emb(q, q, cos, sin), own(q, q, cos, sin), strict=True)
    )
