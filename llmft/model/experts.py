"""Experts stacked in one three-dimensional weight, in 4 bits: from a tensor, and while a model's files are read.

transformers reads a checkpoint that holds every expert apart, stacks them by its own table of conversions, and hands
the stack to its quantizer, which knows linear layers alone. The quantizer here takes stacks too, each as soon as it is
made: so no more than one layer's experts are ever held in full precision.
"""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch

PIECE_WEIGHTS = 2**20
"""Quantised at once on a CPU, where bitsandbytes makes five fp32 copies of what it is given."""
BLOCK = 64
SCALE_BLOCK = 256
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


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


QUANTIZER = "llmft_4bit"


@cache
def register() -> None:
    """Registers transformers' 4-bit quantizer, for stacked experts too, as `QUANTIZER`."""
    from transformers.core_model_loading import ConversionOps
    from transformers.quantizers import register_quantizer
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
    from transformers.utils.quantization_config import QuantizationMethod

    class Quantize(ConversionOps):
        """One weight or stack, when it has been read."""

        def __init__(self, quantizer: Any, linear: Any) -> None:
            self.quantizer, self.linear = quantizer, linear

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, Any], **kwargs: Any
        ) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name in list(input_dict):
                value = input_dict.pop(name)
                value = value[0] if isinstance(value, list) else value
                if name in self.quantizer.shapes:
                    found[name] = self.quantizer.pack(name, value)
                elif self.quantizer.param_needs_quantization(kwargs["model"], name):
                    found.update(self.linear.convert({name: value}, **kwargs))
                else:
                    found[name] = value
            return found

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


class Slice:
    """A tensor of a safetensors file that is read when it is asked for, into memory that is free again afterwards.

    A mapped file would stay in the process's memory, page by page, until the last tensor is read.
    """

    def __init__(self, path: Path, dtype: str, shape: list[int], place: int) -> None:
        self.path, self.dtype, self.shape, self.place = path, DTYPES[dtype], shape, place

    @property
    def count(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Of the tensor."""
        return self.count * self.dtype.itemsize

    def __getitem__(self, everything: Any) -> torch.Tensor:
        assert everything is Ellipsis
        made = torch.empty(self.shape, dtype=self.dtype)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.place)
            wanted = memoryview(made.view(-1).view(torch.uint8).numpy().data)
            while wanted:
                got = file.readinto(wanted)
                if not got:
                    raise OSError(f"{self.path} ends too early")
                wanted = wanted[got:]
        return made


def slices(directory: Path) -> dict[str, Slice]:
    """All tensors of a model directory's safetensors files by name, unread."""
    names = {"model.safetensors"}
    if not (directory / "model.safetensors").is_file():
        names = set(json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"].values())
    return {key: tensor for name in sorted(names) for key, tensor in slices_of(directory / name).items()}


def slices_of(path: Path) -> dict[str, Slice]:
    """All tensors of a safetensors file by name, unread; raises the library's error where its header is broken."""
    from safetensors import safe_open

    with safe_open(path, framework="pt"):
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    return {
        name: Slice(path, entry["dtype"], entry["shape"], 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }
