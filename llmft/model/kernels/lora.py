"""LoRA's linear layers as one step of autograd each: the same maths as PEFT's, with fewer passes over memory.

y = x W' + b + s (d(x) A') B', with W dequantised only for the product, and again for the backward. Kept for the
backward are x (or the `Recipe` to recompute it), the narrow x A', and a mask where there is dropout.

PEFT's own forward keeps and copies the wide result two times more, and takes a dozen small operations.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch


@dataclass(frozen=True)
class Recipe:
    """How to recompute a layer's input for the backward, from two tensors that are kept anyway."""

    of: tuple[torch.Tensor, torch.Tensor]
    again: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def install(model: torch.nn.Module) -> None:
    """Replaces the forward of every plain LoRA layer of a PeftModel, DoRA and 8-bit ones left as they are."""
    for layer in lora_layers(model).values():
        if is_plain(layer):
            layer.forward = MethodType(_forward, layer)


def uninstall(model: torch.nn.Module) -> bool:
    """Restores PEFT's own forwards; returns whether any had been replaced."""
    replaced = [vars(layer).pop("forward", None) for layer in lora_layers(model).values()]
    return any(replaced)


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    """PEFT's linear LoRA layers by name."""
    from peft.tuners.lora.layer import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def is_plain(layer: Any) -> bool:
    """Whether `lora_linear` computes this layer of PEFT's: ordinary LoRA on a dense or 4-bit linear layer."""
    import bitsandbytes as bnb

    return (
        list(layer.lora_A) == ["default"]
        and not layer.lora_variant
        and not layer.lora_bias.get("default", False)
        and type(layer.lora_A["default"]) is torch.nn.Linear
        and (type(layer.base_layer) is torch.nn.Linear or isinstance(layer.base_layer, bnb.nn.Linear4bit))
    )


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) weight of a dense or 4-bit linear layer in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = layer.weight
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    return (weight if state is None else dequantize_4bit(weight.view(-1, 1), state)).to(dtype)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled() or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    dropout = layer.lora_dropout["default"]
    rate = dropout.p if isinstance(dropout, torch.nn.Dropout) and layer.training else 0.0
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return lora_linear(x, layer.base_layer, a, b, layer.scaling["default"], rate)


def lora_linear(
    x: torch.Tensor, layer: torch.nn.Module, a: torch.Tensor, b: torch.Tensor, scale: float, dropout: float = 0.0
) -> torch.Tensor:
    """(…, out) of `x`, (…, in), through a frozen linear layer and its adapter.

    Under autocast everything is computed in its dtype, and the gradients of A and B are accumulated in their own.

    Args:
        a, b: (rank, in) and (out, rank) weights of the adapter.
        scale: what the adapter's product is multiplied by.
        dropout: share of the adapter's input that is dropped.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with _as_given(kind):
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        recipe = getattr(x, "llmft_recipe", None) if x.dtype is dtype else None
        y: torch.Tensor = _LoraLinear.apply(flat, layer, recipe, scale, dropout, a, b)
    return y.view(*x.shape[:-1], -1)


def _as_given(kind: str) -> AbstractContextManager[Any]:
    """Products in their operands' dtype. Entering autocast takes 16 us, a tenth of a small layer's step."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def draw_mask(x: torch.Tensor, dropout: float) -> torch.Tensor:
    """Mask of the elements of `x` that dropout keeps."""
    return torch.rand(x.shape, device=x.device) >= dropout


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: Any,
        recipe: Recipe | None,
        scale: float,
        dropout: float,
        a: torch.Tensor,
        b: torch.Tensor,
    ) -> torch.Tensor:
        weight = weight_of(layer, x.dtype).t()
        y = x @ weight if layer.bias is None else torch.addmm(layer.bias.to(x.dtype), x, weight)
        saved, dropped, mask = [x] if recipe is None else [*recipe.of], x, None
        if dropout:
            mask = draw_mask(x, dropout)
            dropped = x * mask * (1 / (1 - dropout))
        narrow = dropped @ a.to(x.dtype).t()
        y.addmm_(narrow, b.to(x.dtype).t(), alpha=scale)
        ctx.layer, ctx.again, ctx.scale, ctx.factor = layer, recipe and recipe.again, scale, 1 / (1 - dropout)
        ctx.save_for_backward(a, b, narrow, mask, *saved)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        a, b, narrow, mask, x, *more = ctx.saved_tensors
        if ctx.again is not None:
            x = ctx.again(x, *more).flatten(0, -2)
        gradient = gradient.contiguous()
        with _as_given(x.device.type):
            dropped = x if mask is None else x * mask * ctx.factor
            gradient_b = (gradient.t() @ narrow).mul_(ctx.scale)
            gradient_narrow = (gradient @ b.to(x.dtype)).mul_(ctx.scale)
            gradient_a = gradient_narrow.t() @ dropped
            gradient_x = None
            if ctx.needs_input_grad[0]:
                gradient_x = gradient @ weight_of(ctx.layer, x.dtype)
                if mask is None:
                    gradient_x.addmm_(gradient_narrow, a.to(x.dtype))
                else:
                    gradient_x.add_((gradient_narrow @ a.to(x.dtype)).mul_(mask).mul_(ctx.factor))
        return gradient_x, None, None, None, None, gradient_a.to(a.dtype), gradient_b.to(b.dtype)
