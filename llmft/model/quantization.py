"""4-bit and 8-bit bases, fused experts too, by bitsandbytes.

transformers quantises while it loads. Random models have no files and are quantised in place. Mixtures of experts have
fused three-dimensional weights, not `Linear` modules: transformers alone would silently leave them unquantised (96% of
Mixtral's weights, bitsandbytes issue 1849); `llmft.model.experts_quantizer` handles them too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llmft.config.model import QuantizationConfig, QuantizationFormat
from llmft.core.errors import ConfigError
from llmft.model.experts import fused_shapes


def stored_quantization(hf_config: Any) -> dict[str, Any]:
    """The quantisation config of a model's files in its config.json; empty if they are not quantised."""
    stored = getattr(hf_config, "quantization_config", None)
    return dict(stored if isinstance(stored, dict) else stored.to_dict()) if stored else {}


def _stored_as(stored: dict[str, Any]) -> QuantizationConfig:
    """The same as a QuantizationConfig; `checkpoint` for formats other than bitsandbytes'."""
    four_bit = stored.get("load_in_4bit") or stored.get("_load_in_4bit")
    eight_bit = stored.get("load_in_8bit") or stored.get("_load_in_8bit")
    form = str(stored.get("bnb_4bit_quant_type", "fp4")) if four_bit else "int8" if eight_bit else "checkpoint"
    return QuantizationConfig(QuantizationFormat(form), double_quant=bool(stored.get("bnb_4bit_use_double_quant")))


def effective_quantization(quantization: QuantizationConfig, hf_config: Any, label: str) -> QuantizationConfig:
    """The quantisation that the model of `hf_config` will have, given the configured one.

    Files that are quantised already stay as they are; raises ConfigError if the config asks for another format.
    """
    stored, wanted = stored_quantization(hf_config), quantization.format
    if not stored:
        if wanted is QuantizationFormat.checkpoint:
            raise ConfigError(f"quantization=checkpoint: the files of {label} are not quantised; choose nf4 or none.")
        return quantization
    current = _stored_as(stored)
    four_bit = current.format in (QuantizationFormat.nf4, QuantizationFormat.fp4)
    same = wanted is current.format and (not four_bit or quantization.double_quant == current.double_quant)
    if wanted is not QuantizationFormat.checkpoint and not same:
        ours = current.format is not QuantizationFormat.checkpoint
        name = current.format.value if ours else stored.get("quant_method")
        double = f" with quantization.double_quant={str(current.double_quant).lower()}" if four_bit else ""
        raise ConfigError(
            f"quantization={wanted.value}: the files of {label} are {name}{double} already, and stay so: "
            "set quantization=checkpoint, or model.path to files that are not quantised."
        )
    return replace(current, cache=False)


def stored_format(model: torch.nn.Module) -> str:
    """The number format of a model's quantised weights, as its modules are; "none" without any."""
    parameters: list[Any] = list(model.parameters())
    kinds = {str(p.quant_type) for p in parameters if getattr(p, "quant_state", None) is not None}
    kinds |= {"int8" for p in parameters if p.dtype == torch.int8}
    stored = stored_quantization(getattr(model, "config", None))
    if not kinds and stored and stored.get("quant_method") != "bitsandbytes":
        kinds = {str(stored.get("quant_method"))}
    return "+".join(sorted(kinds)) or "none"


def bitsandbytes_config(model: Any, quantization: QuantizationConfig, dtype: torch.dtype, skip: list[str]) -> Any:
    """transformers' config to quantise `model` except for the modules `skip`; None for quantization=none."""
    from transformers import BitsAndBytesConfig

    if quantization.format in (QuantizationFormat.none, QuantizationFormat.checkpoint):
        return None
    skip = unquantized_modules(model, skip)
    if quantization.format is QuantizationFormat.int8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    config: Any = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.format.value,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=skip,
    )
    if fused_shapes(model):
        from llmft.model.experts_quantizer import QUANTIZER

        config.quant_method = QUANTIZER
    return config


def unquantized_modules(model: torch.nn.Module, skip: list[str]) -> list[str]:
    """The model's head (transformers' own rule) and the modules that its configuration names."""
    from transformers.quantizers.base import get_keys_to_not_convert

    return sorted({*get_keys_to_not_convert(model), *skip})


def quantize_in_place(
    model: Any,
    quantization: QuantizationConfig,
    dtype: torch.dtype,
    skip: list[str],
    device: torch.device,
    fill: Callable[[torch.nn.Module], None] = lambda module: None,
) -> None:
    """Quantises the linear layers and fused experts of a model, one by one, and moves it to `device`.

    Uses transformers' quantizer, as when it reads files. `fill` creates a module's own tensors just before they are
    needed, if the model has none yet.
    """
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    config = bitsandbytes_config(model, quantization, dtype, skip)
    if config is None:
        model.to(device)
        return
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=False)
    dense = {name: module for name, module in model.named_modules() if isinstance(module, (torch.nn.Linear, Conv1D))}
    quantizer.preprocess_model(model, device_map={"": device})
    operation = quantizer.get_quantize_ops()

    def quantize(name: str, module: torch.nn.Module) -> None:
        """Makes the model's weight `name` by quantising that of `module`."""
        fill(module)
        path, _, attribute = name.rpartition(".")
        value = module.get_parameter(attribute).data.to(device)
        packed = operation.convert({name: [value]}, model=model, full_layer_name=name)[name]
        if not isinstance(packed, torch.nn.Parameter):
            packed = torch.nn.Parameter(packed, requires_grad=False)
        model.get_submodule(path).register_parameter(attribute, packed)

    for name in list(dense):
        old, new = dense.pop(name), model.get_submodule(name)
        if new is not old:
            quantize(f"{name}.weight", old)
            if old.bias is not None:
                new.register_parameter("bias", torch.nn.Parameter(old.bias.data.to(device), requires_grad=False))
    for name in getattr(quantizer, "shapes", ()):
        quantize(name, model.get_submodule(name.rpartition(".")[0]))
    for module in model.modules():
        fill(module)
    model.to(device)
    quantizer.postprocess_model(model)


def keep_packing(model: torch.nn.Module) -> None:
    """Keeps bitsandbytes from repacking 4-bit weights on CPUs with bf16 units.

    There the first forward in evaluation mode rounds the scales to bf16, for good, and packs the weights in a layout
    that training cannot read and that only widths of multiples of 32 have (bitsandbytes 0.50, pull 1804, issue 2078,
    `_convert_weight_packed_for_cpu`): a validation would change the base that it measures.
    """
    import bitsandbytes as bnb

    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def weight_counts(model: torch.nn.Module) -> dict[str, int]:
    """Number of weights by storage: 4-bit, 8-bit and full precision; trainable ones are counted separately."""
    counts = {"4-bit": 0, "8-bit": 0, "full": 0, "trainable": 0}
    parameter: Any
    for parameter in model.parameters():
        if parameter.requires_grad:
            counts["trainable"] += parameter.numel()
        elif getattr(parameter, "quant_state", None) is not None:  # in storage of any type
            counts["4-bit"] += math.prod(parameter.quant_state.shape)
        elif parameter.dtype == torch.uint8:
            counts["4-bit"] += 2 * parameter.numel()
        elif parameter.dtype.itemsize == 1:  # int8, and the floats of 8 bits
            counts["8-bit"] += parameter.numel()
        else:
            counts["full"] += parameter.numel()
    bits = int(stored_quantization(getattr(model, "config", None)).get("bits") or 4)
    for name, buffer in model.named_buffers():
        if name.endswith(".qweight"):  # of GPTQ and AWQ: several weights in one integer
            counts["4-bit" if bits <= 4 else "8-bit"] += buffer.numel() * buffer.dtype.itemsize * 8 // bits
    return counts
