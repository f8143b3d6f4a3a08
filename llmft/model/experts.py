"""Experts stacked in one three-dimensional weight, in 4 bits; `experts_quantizer` makes them while files are read."""

from __future__ import annotations

from typing import Any

import torch

PIECE_WEIGHTS = 2**20
"""Quantised at once on a CPU, where bitsandbytes makes five fp32 copies of what it is given."""
BLOCK = 64
SCALE_BLOCK = 256


def fused_shapes(model: torch.nn.Module) -> dict[str, torch.Size]:
    """Name and shape of every three-dimensional weight that is no convolution: experts stacked in one tensor."""
    return {
        f"{prefix}.{name}" if prefix else name: parameter.shape
        for prefix, module in model.named_modules()
        if not isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3 and parameter.numel() > 4096
    }


def quantize_4bit(weight: torch.Tensor, quant_type: str, double_quant: bool) -> tuple[torch.Tensor, Any]:
    """(packed, QuantState) of a tensor, to the bit those of bitsandbytes' `quantize_4bit`, in little memory."""
    from bitsandbytes import functional

    flat = weight.reshape(-1)
    pieces = flat.split(PIECE_WEIGHTS if weight.device.type == "cpu" else len(flat))
    parts = [functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=quant_type) for piece in pieces]
    absmax, offset, nested, first = torch.cat([part.absmax for _, part in parts]), None, None, parts[0][1]
    if double_quant:
        offset = absmax.mean()
        absmax, nested = functional.quantize_blockwise(absmax - offset, blocksize=SCALE_BLOCK)
    state = functional.QuantState(absmax, weight.shape, first.code, BLOCK, quant_type, first.dtype, offset, nested)
    return torch.cat([packed for packed, _ in parts]), state


def put_fused(model: torch.nn.Module, name: str, packed: torch.Tensor, parts: dict[str, Any]) -> None:
    """Makes `packed` the weight `name` of `model`, which dequantises it whenever it is used.

    `parts` are those of `QuantState.as_dict(packed=True)`.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    module.register_parameter(attribute, torch.nn.Parameter(packed, requires_grad=False))
    replace_parameter_4bit_prequantized(module, attribute, dict(parts), packed.device)
