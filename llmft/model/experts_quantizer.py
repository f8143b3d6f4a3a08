"""transformers' 4-bit quantizer, extended to stacked experts; importing this module registers it.

transformers reads a checkpoint with separate experts, stacks them by its own conversion table, and passes the stack to
its quantizer, which only handles linear layers. This quantizer handles stacks too, each as soon as it is complete: no
more than one layer's experts are in full precision at a time.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from llmft.model.experts import fused_shapes, put_fused, quantize_4bit

QUANTIZER, DESERIALIZER = "llmft_4bit", "llmft_4bit_stored"
STATE = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "quant_state.bitsandbytes__{}")
"""What bitsandbytes saves with a 4-bit weight; the last has the format's name."""


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) else value


class Quantize(ConversionOps):
    """One weight or stack, when it has been read."""

    def __init__(self, hf_quantizer: Any, linear: Any) -> None:
        self.hf_quantizer, self.linear = hf_quantizer, linear

    def convert(self, input_dict: dict[str, Any], **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights of `input_dict`, which is emptied, in 4 bits if they are to be quantised."""
        converted: dict[str, Any] = {}
        for name in list(input_dict):
            value = _only(input_dict.pop(name))
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
        """The packed stack; its scales are kept for the end of loading."""
        attribute = full_layer_name.rpartition(".")[2]
        tensors = {name: _only(value) for name, value in input_dict.items()}
        packed = tensors.pop(attribute)
        self.hf_quantizer.parts[full_layer_name] = {
            name.removeprefix(f"{attribute}."): value for name, value in tensors.items()
        }
        return {attribute: packed}


@register_quantizer(QUANTIZER)
class ExpertsQuantizer(Bnb4BitHfQuantizer):
    """Attributes: shapes of all stacks; quantisation states of those read; names of those with another shape."""

    def _process_model_before_weight_loading(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        self.shapes = fused_shapes(model)
        self.parts: dict[str, dict[str, Any]] = {}
        self.mismatched: list[str] = []
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
            self.mismatched.append(name)
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
    """For files that are quantised already, whatever their config says."""

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(quantization_config, **{**kwargs, "pre_quantized": True})

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return self  # transformers copies its conversions, and so the quantizer, for every tensor
