"""RMSNorm (arXiv:1910.07467) and SwiGLU (arXiv:2002.05202) that keep less for the backward.

The forward is bit-identical to transformers'. For the backward it keeps what others keep anyway, a norm's input and the
two products of an MLP, and recomputes the rest, where transformers' code also keeps a copy of the input in fp32 and
silu(gate); LoRA on the MLP's last layer does not keep silu(gate) x up either. By the estimate of
`llmft.model.memory` a Mistral-7B with LoRA on all layers then keeps 3.5 MB a token in place of 5.8.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from types import MethodType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers.activations import SiLUActivation

from llmft.core.errors import first_line
from llmft.model.kernels.lora import Recipe

NORM = ("weight", "variance_epsilon")
NETWORK = ("gate_proj", "up_proj", "down_proj", "act_fn")
"""Names of an MLP's parts in most families."""


def install(model: torch.nn.Module) -> None:
    """Replaces the forward of `model`'s modules that compute RMSNorm or SwiGLU as most families do."""
    for module in model.modules():
        if "forward" in vars(module):
            continue
        kind: Any = type(module)
        if all(hasattr(module, name) for name in NORM) and _is_norm(kind.forward):
            module.forward = MethodType(_norm_forward, module)
        elif all(hasattr(module, name) for name in NETWORK) and _is_network(kind.forward):
            module.forward = MethodType(_network_forward, module)


def _norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_plain(args, kwargs) or self.weight.requires_grad:
        return type(self).forward(self, *args, **kwargs)
    return _norm_of(self, *args)


def _network_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _is_plain(args, kwargs) or type(self.act_fn) not in (torch.nn.SiLU, SiLUActivation):
        return type(self).forward(self, *args, **kwargs)
    gate, up = self.gate_proj(*args), self.up_proj(*args)
    if gate.dtype is not up.dtype:
        return self.down_proj(self.act_fn(gate) * up)
    product = _SwiGlu.apply(gate, up)
    product.llmft_recipe = Recipe((gate.detach(), up.detach()), swiglu)
    return self.down_proj(product)


def _is_plain(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether to use the original forward: without a backward, under a compiler, or for more than one tensor."""
    if torch.compiler.is_compiling() or kwargs or len(args) != 1:
        return True
    return not (torch.is_grad_enabled() and args[0].requires_grad)


class _RmsNorm(torch.autograd.Function):
    """(…, hidden) x / sqrt(mean(x^2) + epsilon) in fp32, times a frozen (hidden,) weight."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        output, root = fused(rms_norm, x.device)(x, weight, epsilon)
        ctx.save_for_backward(x, weight, root)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return fused(rms_norm_backward, gradient.device)(gradient, *ctx.saved_tensors), None, None


class _SwiGlu(torch.autograd.Function):
    """silu(gate) x up of two (…, tokens, intermediate) tensors of one dtype."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return swiglu(gate, up)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return fused(swiglu_backward, gradient.device)(gradient, *ctx.saved_tensors)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(…, hidden) as in `_RmsNorm`, and (…, 1) the reciprocal of the root."""
    wide = x.float()
    root = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    normed = (wide * root).to(x.dtype)
    return normed.mul_(weight) if weight.dtype is normed.dtype else weight * normed, root


def rms_norm_backward(
    gradient: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, root: torch.Tensor
) -> torch.Tensor:
    """The gradient of x."""
    wide = x.float()
    scaled = (gradient * weight).to(x.dtype).float()
    share = (scaled * wide).sum(-1, keepdim=True) * root.pow(3) / x.shape[-1]
    return scaled.mul_(root).addcmul_(wide, share, value=-1).to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) x up."""
    return fused(_swiglu, gate.device)(gate, up)


def _swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return F.silu(gate).mul_(up)


def swiglu_backward(gradient: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of gate and up."""
    return torch.ops.aten.silu_backward(gradient * up, gate), F.silu(gate).mul_(gradient)


# ------------------------------------------------------------------------------------------------- one kernel on CUDA


def fused(function: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`function` as one kernel that reads and writes each tensor once, on a GPU if torch's compiler works.

    Step by step a norm goes through the memory eight times, in fp32. Elsewhere `function` itself.
    """
    return compiled(function) if device.type == "cuda" and can_fuse(device) else function


@lru_cache(maxsize=8)
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled for any number of tokens, at the first call."""
    return torch.compile(function, dynamic=True)


@lru_cache(maxsize=8)
def can_fuse(device: torch.device) -> bool:
    """Whether the compiler works for `device` and agrees with torch's own operations; warns once if not."""
    x, other, gradient = torch.randn(3, 64, 256, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    root = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-5)
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
        (rms_norm, (x, other[0], 1e-5)),
        (rms_norm_backward, (gradient, x, other[0], root)),
        (_swiglu, (x, other)),
        (swiglu_backward, (gradient, x, other)),
    ]
    try:
        for function, arguments in calls:
            torch.testing.assert_close(compiled(function)(*arguments), function(*arguments), rtol=2e-2, atol=2e-2)
    except Exception as error:  # compilers and drivers raise many kinds
        reason = f"no kernel could be compiled ({first_line(error)})"
        warnings.warn(f"RMSNorm and SwiGLU are computed step by step: {reason}", stacklevel=2)
        return False
    return True


@lru_cache(maxsize=64)
def _is_norm(forward: Callable[..., Any]) -> bool:
    x, weight = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))
    dtypes = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32))
    for dtype, weight_dtype in dtypes:
        norm = SimpleNamespace(weight=weight[0].to(weight_dtype), variance_epsilon=0.5)
        if not _is_same(partial(forward, norm), partial(_norm_of, norm), x.to(dtype)):
            return False
    return True


def _norm_of(norm: Any, x: torch.Tensor) -> Any:
    return _RmsNorm.apply(x, norm.weight, norm.variance_epsilon)


@lru_cache(maxsize=64)
def _is_network(forward: Callable[..., Any]) -> bool:
    for dtype in (torch.float32, torch.bfloat16):
        x, up, down = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0)).to(dtype)
        network = SimpleNamespace(gate_proj=up.mul, up_proj=up.add, down_proj=down.mul, act_fn=F.silu)
        if not _is_same(partial(forward, network), partial(_network_of, network), x):
            return False
    return True


def _network_of(network: Any, x: torch.Tensor) -> Any:
    return network.down_proj(_SwiGlu.apply(network.gate_proj(x), network.up_proj(x)))


def _is_same(forward: Callable[..., Any], other: Callable[..., Any], x: torch.Tensor) -> bool:
    """Whether a family's forward is bit-identical to another function."""
    try:
        result = forward(x)
    except Exception:  # a forward may fail in any way on other arguments or missing parts
        return False
    expected = other(x)
    return isinstance(result, torch.Tensor) and result.dtype is expected.dtype and torch.equal(result, expected)
