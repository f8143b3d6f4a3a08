"""Experts stacked in one three-dimensional weight, in 4 bits: from a tensor, and while a model's files are read.

transformers reads a checkpoint that holds every expert apart, stacks them by its own table of conversions, and hands
the stack to its quantizer, which knows linear layers alone. The quantizer here takes stacks too, each as soon as it is
made: so no more than one layer's experts are ever held in full precision.
"""

from __future__ import annotations

from functools import cache
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
    packed, scales = [], []
    at_once = PIECE_WEIGHTS if weight.device.type == "cpu" else len(flat)
    for start in range(0, len(flat), at_once):
        piece = flat[start : start + at_once]
        data, state = functional.quantize_4bit(piece, blocksize=BLOCK, quant_type=quant_type)
        packed.append(data)
        scales.append(state.absmax)
    absmax = torch.cat(scales)
    made = functional.QuantState(
        absmax=absmax, shape=weight.shape, dtype=weight.dtype, blocksize=BLOCK, code=state.code, quant_type=quant_type
    )
    if double_quant:
        made.offset = absmax.mean()
        made.absmax, made.state2 = functional.quantize_blockwise(absmax - made.offset, blocksize=SCALE_BLOCK)
        made.nested = True
    return torch.cat(packed), made


def put_fused(model: torch.nn.Module, name: str, packed: torch.Tensor, parts: dict[str, Any]) -> None:
    """Makes `packed` the weight `name` of `model`, which dequantises it whenever it is used.

    `parts` are those of `QuantState.as_dict(packed=True)`.
    """
    from bitsandbytes.nn.parametrize import replace_parameter_4bit_prequantized

    path, _, attribute = name.rpartition(".")
    module = model.get_submodule(path)
    setattr(module, attribute, torch.nn.Parameter(packed, requires_grad=False))
    replace_parameter_4bit_prequantized(module, attribute, dict(parts), packed.device)


QUANTIZER, DESERIALIZER = "llmft_4bit", "llmft_4bit_stored"
STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__{}")
"""What bitsandbytes saves beside a 4-bit weight; the last has the format's name."""


@cache
def register() -> None:
    """Registers transformers' 4-bit quantizer for stacked experts too, as `QUANTIZER`.

    `DESERIALIZER` is the same for files that are quantised already.
    """
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class Quantize(ConversionOps):
        """One weight or stack, when it has been read."""

        def __init__(self, hf_quantizer: Any, linear: Any) -> None:
            self.hf_quantizer, self.linear = hf_quantizer, linear

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, Any], **kwargs: Any
        ) -> dict[str, Any]:
            converted: dict[str, Any] = {}
            for name in list(input_dict):
                value = input_dict.pop(name)
                value = value[0] if isinstance(value, list) else value
                if name in self.hf_quantizer.shapes:
                    converted[name] = self.hf_quantizer.pack(name, value)
                elif self.hf_quantizer.param_needs_quantization(kwargs["model"], name):
                    converted.update(self.linear.convert({name: value}, **kwargs))
                else:
                    converted[name] = value
            return converted

    class Deserialize(ConversionOps):
        """A stack that was quantised before, with its scales."""

        def __init__(self, hf_quantizer: Any) -> None:
            self.hf_quantizer = hf_quantizer

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, Any], full_layer_name: str = "", **kwargs: Any
        ) -> dict[str, Any]:
            attribute = full_layer_name.rpartition(".")[2]
            tensors = {name: value[0] if isinstance(value, list) else value for name, value in input_dict.items()}
            packed = tensors.pop(attribute)
            parts = {name.removeprefix(f"{attribute}."): value for name, value in tensors.items()}
            self.hf_quantizer.parts[full_layer_name] = parts
            return {attribute: packed}

    @register_quantizer(QUANTIZER)
    class ExpertsQuantizer(Bnb4BitHfQuantizer):
        """Attributes: shapes of all stacks; parts of the states of those that were read; names of misfits."""

        def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> Any:
            self.shapes = fused_shapes(model)
            self.parts: dict[str, dict[str, Any]] = {}
            self.misfits: list[str] = []
            return super()._process_model_before_weight_loading(model, *args, **kwargs)

        def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
            return param_name in self.shapes or super().param_needs_quantization(model, param_name, **kwargs)

        def get_quantize_ops(self) -> Any:
            return Quantize(self, super().get_quantize_ops())

        def get_weight_conversions(self) -> Any:
            if not self.pre_quantized:
                return super().get_weight_conversions()
            state = [part.format(self.quantization_config.bnb_4bit_quant_type) for part in STATE]
            stacks = {name.rpartition(".")[2] for name in self.shapes}
            return [
                WeightConverter([name, *(f"{name}.{part}" for part in state)], name, [Deserialize(self)])
                for name in sorted(stacks)
            ] + super().get_weight_conversions()

        def pack(self, name: str, value: torch.Tensor) -> torch.Tensor:
            """`value` in 4 bits; its scales are kept for the end of loading."""
            if value.shape != self.shapes[name]:
                self.misfits.append(name)
            config = self.quantization_config
            packed, state = quantize_4bit(value, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant)
            self.parts[name] = state.as_dict(packed=True)
            return packed

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            for name, parts in self.parts.items():
                put_fused(model, name, model.get_parameter(name).data, parts)
            self.parts = {}
            self.quantization_config.quant_method = model.quantization_method = QuantizationMethod.BITS_AND_BYTES
            return super()._process_model_after_weight_loading(model, **kwargs)

    @register_quantizer(DESERIALIZER)
    class ExpertsDeserializer(ExpertsQuantizer):
        """Of files that are quantised already, whatever their config says."""

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})

        def __deepcopy__(self, memo: dict[int, Any]) -> Any:
            return self  # transformers copies its conversions, and so the quantizer, for every tensor
