"""LoRA's linear layers as one step of autograd each: the same maths as PEFT's, with fewer passes over memory.

y = x W' + b + s (d(x) A') B', with W dequantised for the product alone and again for the backward. Kept for the
backward are x (or the `Recipe` to make it again), the narrow x A', and a mask where there is dropout.

PEFT's own forward keeps and copies the wide result two times more, and takes a dozen small operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

ALIGNED_BYTES = 64
"""Where torch's own allocations on the CPU begin."""


@dataclass(frozen=True)
class Share:
    """The part of a flat sequence that one adapter sees.

    Attributes:
        start, end: its tokens.
        scale: what the adapter's product is multiplied by.
        dropout: share of its input that is dropped.
        draw: makes the mask of what stays, None for torch's own generator.
    """

    start: int
    end: int
    scale: float
    dropout: float = 0.0
    draw: Any = None


@dataclass(frozen=True)
class Recipe:
    """How to make a layer's input again for the backward, from two tensors that are kept anyway."""

    of: tuple[torch.Tensor, torch.Tensor]
    again: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def install(model: torch.nn.Module) -> None:
    """Replaces the forward of every plain LoRA layer of a PeftModel, DoRA and 8-bit ones left as they are."""
    for layer in lora_layers(model).values():
        if is_plain(layer):
            layer.forward = MethodType(_forward, layer)


def uninstall(model: torch.nn.Module) -> bool:
    """PEFT's own forwards again; whether any was replaced."""
    own = [vars(layer).pop("forward", None) for layer in lora_layers(model).values()]
    return any(own)


def lora_layers(model: torch.nn.Module) -> dict[str, Any]:
    """PEFT's linear LoRA layers by name."""
    from peft.tuners.lora.layer import LoraLayer

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def is_plain(layer: Any) -> bool:
    """Whether `lora_linear` computes this layer of PEFT's: ordinary LoRA on a dense or 4-bit linear layer."""
    adapters = list(layer.lora_A)
    return (
        adapters == ["default"]
        and not layer.lora_variant
        and not layer.lora_bias.get("default", False)
        and type(layer.lora_A["default"]) is torch.nn.Linear
        and is_dense(layer.base_layer)
    )


def is_dense(layer: torch.nn.Module) -> bool:
    """Whether `weight_of` gives the layer's weight: an ordinary linear layer, or a 4-bit one."""
    import bitsandbytes as bnb

    return type(layer) is torch.nn.Linear or isinstance(layer, bnb.nn.Linear4bit)


def weight_of(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """(out, in) weight of a dense or 4-bit linear layer in `dtype`."""
    from bitsandbytes.functional import dequantize_4bit

    weight: torch.Tensor = layer.weight
    state = getattr(weight, "quant_state", None) or getattr(layer, "quant_state", None)
    return (weight if state is None else dequantize_4bit(weight.view(-1, 1), state)).to(dtype)


def _forward(layer: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if layer.disable_adapters or layer.merged or not torch.is_grad_enabled() or args or kwargs:
        return type(layer).forward(layer, x, *args, **kwargs)
    share, weights = share_of(layer, 0, x.shape[:-1].numel())
    return lora_linear(x, layer.base_layer, [share], weights)


def share_of(layer: Any, start: int, end: int, draw: Any = None) -> tuple[Share, list[torch.Tensor]]:
    """What `lora_linear` takes of one of PEFT's layers: its share and [A, B]."""
    dropout = layer.lora_dropout["default"]
    rate = dropout.p if isinstance(dropout, torch.nn.Dropout) and layer.training else 0.0
    share = Share(start, end, layer.scaling["default"], rate, draw)
    return share, [layer.lora_A["default"].weight, layer.lora_B["default"].weight]


def lora_linear(
    x: torch.Tensor,
    layer: torch.nn.Module,
    shares: Sequence[Share],
    weights: Sequence[torch.Tensor],
    spans: Sequence[tuple[int, int]] | None = None,
) -> torch.Tensor:
    """(…, out) of `x`, (…, in), through a frozen linear layer and the adapters of its shares.

    `weights` are A, (rank, in), and B, (out, rank), of each share in turn. Under autocast everything is computed in its
    dtype, and the gradients of A and B are added up in their own. With `spans` the layer's product is taken span by
    span, since how a matrix product rounds depends on the number of its rows.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    with _as_given(kind):
        flat = x.to(dtype).reshape(-1, x.shape[-1])
        made = getattr(x, "llmft_recipe", None) if x.dtype is dtype else None
        found: torch.Tensor = _LoraLinear.apply(flat, layer, tuple(shares), spans, made, *weights)
    return found.view(*x.shape[:-1], -1)


def _as_given(kind: str) -> AbstractContextManager[Any]:
    """Products in their operands' own dtype; entering autocast takes 16 us, a tenth of a small layer's step."""
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layer: Any,
        shares: tuple[Share, ...],
        spans: Any,
        made: Recipe | None,
        *weights: torch.Tensor,
    ) -> Any:
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        weight = weight_of(layer, x.dtype)
        y = _by_span(x, weight.t(), spans, bias)
        kept = [x] if made is None else [*made.of]
        for share, a, b in zip(shares, weights[::2], weights[1::2], strict=True):
            own = x[share.start : share.end]
            if share.dropout:
                mask = _mask(own, share)
                kept.append(mask)
                own = own * mask * (1 / (1 - share.dropout))
            narrow = own @ a.to(x.dtype).t()
            kept.append(narrow)
            y[share.start : share.end].addmm_(narrow, b.to(x.dtype).t(), alpha=share.scale)
        ctx.layer, ctx.shares, ctx.spans, ctx.again = layer, shares, spans, made and made.again
        ctx.save_for_backward(*kept, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        saved = list(ctx.saved_tensors)
        shares = ctx.shares
        weights = saved[len(saved) - 2 * len(shares) :]
        x = saved.pop(0)
        if ctx.again is not None:
            x = ctx.again(x, saved.pop(0)).flatten(0, -2)
        gradient = gradient.contiguous()
        with _as_given(x.device.type):
            wanted = ctx.needs_input_grad[0]
            weight = weight_of(ctx.layer, x.dtype) if wanted else None
            gx = None if weight is None else _by_span(gradient, weight, ctx.spans)
            found: list[torch.Tensor] = []
            for share, a, b in zip(shares, weights[::2], weights[1::2], strict=True):
                mask = saved.pop(0) if share.dropout else None
                narrow = saved.pop(0)
                own, part = x[share.start : share.end], gradient[share.start : share.end]
                factor = 1 / (1 - share.dropout)
                if mask is not None:
                    own = own * mask * factor
                gb = (part.t() @ narrow).mul_(share.scale)
                gn = (part @ b.to(x.dtype)).mul_(share.scale)
                found += [(gn.t() @ own).to(a.dtype), gb.to(b.dtype)]
                if gx is not None and mask is None:
                    gx[share.start : share.end].addmm_(gn, a.to(x.dtype))
                elif gx is not None:
                    gx[share.start : share.end].add_((gn @ a.to(x.dtype)).mul_(mask).mul_(factor))
        return (gx, None, None, None, None, *found)


def _by_span(x: torch.Tensor, weight: torch.Tensor, spans: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W + b of all rows of `x`, or of each span of them by itself, which is for CPUs alone."""

    def product(rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        return torch.mm(rows, weight, out=out) if bias is None else torch.addmm(bias, rows, weight, out=out)

    if spans is None or len(spans) == 1:
        return product(x)
    y = x.new_empty(len(x), weight.shape[1])
    for start, end in spans:
        own, rows = y[start:end], x[start:end]
        # Both as tensors of their own begin: a product's rounding may depend on that too.
        rows = rows if _is_aligned(rows) else rows.clone()
        if _is_aligned(own):
            product(rows, own)
        else:
            own.copy_(product(rows))
    return y


def _is_aligned(rows: torch.Tensor) -> bool:
    return rows.data_ptr() % ALIGNED_BYTES == 0


def _mask(own: torch.Tensor, share: Share) -> torch.Tensor:
    """Which inputs stay."""
    draw = share.draw or torch.rand
    kept: torch.Tensor = draw(own.shape, device=own.device) >= share.dropout
    return kept
