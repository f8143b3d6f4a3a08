"""4-bit and 8-bit bases, fused experts too, by bitsandbytes.

`BitsAndBytesConfig` quantises while transformers loads. Random models have no files and are quantised in place.
Mixtures of experts have fused three-dimensional weights, which are no `Linear` modules: transformers alone would leave
them unquantised (96% of Mixtral's weights) without a word; `llmft.model.experts` quantises them both ways.
"""

from __future__ import annotations

from typing import Any

import torch

from llmft.config import QuantizationConfig, QuantizationFormat
from llmft.model.experts import fused_shapes, put_fused, quantize_4bit


def bitsandbytes_config(quantization: QuantizationConfig, dtype: torch.dtype, skip: list[str]) -> Any:
    """transformers' config for `quantization`, or None for none. `skip` are modules that stay as they are."""
    from transformers import BitsAndBytesConfig

    if quantization.format is QuantizationFormat.none:
        return None
    if quantization.format is QuantizationFormat.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.format.value,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )


def unquantized_modules(model: torch.nn.Module, skip: list[str]) -> list[str]:
    """The model's head (transformers' own rule) and the modules that its configuration names."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted({*get_keys_to_not_convert(model), *skip})


def quantize_in_place(
    model: torch.nn.Module, quantization: QuantizationConfig, dtype: torch.dtype, skip: list[str], device: torch.device
) -> None:
    """Quantises the linear layers and fused experts of a loaded model, one by one, and moves it to `device`."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear
    from transformers.pytorch_utils import Conv1D

    config = bitsandbytes_config(quantization, dtype, skip)
    if config is None:
        model.to(device)
        return
    keep = unquantized_modules(model, skip)
    dense = {name: module for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    replace_with_bnb_linear(model, modules_to_not_convert=keep, quantization_config=config)
    for name, old in dense.items():
        new = model.get_submodule(name)
        if new is old:
            continue
        value = old.weight.data.T.contiguous() if isinstance(old, Conv1D) else old.weight.data
        arguments = dict(new.weight.__dict__)
        arguments.pop("SCB", None)
        if quantization.format is QuantizationFormat.int8:
            new.weight = bnb.nn.Int8Params(value.cpu(), requires_grad=False, **arguments).to(device)  # type: ignore[misc]
        else:
            new.weight = bnb.nn.Params4bit(value, requires_grad=False, **arguments).to(device)  # type: ignore[misc]
        if old.bias is not None:
            new.bias = torch.nn.Parameter(old.bias.data.to(device), requires_grad=False)
        old.weight.data = torch.empty(0)
    if quantization.format is not QuantizationFormat.int8:
        for name in fused_shapes(model):
            weight = model.get_parameter(name).data.to(device)
            packed, state = quantize_4bit(weight, quantization.format.value, quantization.double_quant)
            put_fused(model, name, packed, state.as_dict(packed=True))
    model.to(device)
    model.config.quantization_config = config  # type: ignore[union-attr]
    flag = "is_loaded_in_8bit" if quantization.format is QuantizationFormat.int8 else "is_loaded_in_4bit"
    setattr(model, flag, True)


def keep_packing(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with bf16 units.

    There the first forward in evaluation mode rounds the scales to bf16, for good, and packs the weights in a layout
    that training cannot read and that only widths of multiples of 32 have (bitsandbytes 0.50,
    `_convert_weight_packed_for_cpu`): a validation would change the base that it measures.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def unsettle_8_bit(model: torch.nn.Module) -> None:
    """Undoes what an 8-bit layer's first forward did: scales go back to the weight, where savers and shards look."""
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear8bitLt) and module.state.SCB is not None:
            weight: Any = module.weight
            weight.CB, weight.SCB = module.state.CB, module.state.SCB
            module.state.CB = module.state.SCB = None


def weight_counts(model: torch.nn.Module) -> dict[str, int]:
    """Number of weights by how they are held: 4-bit, 8-bit and full precision; trainable ones apart."""
    counts = {"4-bit": 0, "8-bit": 0, "full": 0, "trainable": 0}
    for parameter in model.parameters():
        if parameter.requires_grad:
            counts["trainable"] += parameter.numel()
        elif parameter.dtype == torch.uint8:
            counts["4-bit"] += 2 * parameter.numel()
        elif parameter.dtype == torch.int8:
            counts["8-bit"] += parameter.numel()
        else:
            counts["full"] += parameter.numel()
    return counts
