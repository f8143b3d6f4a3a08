"""What a training takes in memory, told from transformers' config alone, before any weights load.

Weights, gradients and optimizer states are counted on a model without storage (torch's "meta" device), to which the
rules of `load_base` and `adapters.attach` are applied. Activations are counted too, not modelled: the model's own
forward runs on shapes alone (FakeTensorMode), and what autograd saves in it is added up. So every family, DoRA,
dropout and full fine-tuning come out of the code that will run. A 7B takes two seconds and no memory.

Against what autograd saves in a real forward of a twin of every family, in fp32, bf16 and 4-bit, the error is below
0.1% (tests/model/test_memory.py; 4-bit experts in fp32 up to 20% high). Against the peak of all live tensors over
forward and backward, temporaries included, activations + gradients + logits are 0 to 15% low without checkpointing and
0 to 30% low with it, where one layer's backward weighs more: leave a fifth free. Not counted: those temporaries (one
dequantised weight among them), the device's context and
kernels (0.5 to 1 GiB on CUDA), fragmentation, validation and generation. CUDA's attention may be another: where the
CPU's stores scores (dropout in attention, as GPT-2 has; Falcon), the estimate is too high there. CUDA's autocast
computes LayerNorm in fp32, the CPU's does not: GPT-2, OPT, Phi-2, Falcon, MPT and DeBERTa in bf16 take somewhat more
there.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch.nn.utils import parametrize

from llmft.config.sections import Checkpointing, Kernels, QuantizationFormat, TrainConfig, checkpointing_of
from llmft.model import adapters, families, kernels
from llmft.model.experts import fused_shapes
from llmft.model.heads import positions_at_a_time
from llmft.model.kernels import lora as lora_kernel
from llmft.model.kernels import packing
from llmft.model.quantization import agreed, bitsandbytes_config, unquantized_modules
from llmft.model.meta import meta_model

FP32_BYTES = 4
BLOCK_4BIT = 64  # weights that share a scale (QLoRA, arXiv:2305.14314)
BLOCK_SCALES = 256  # 4-bit scales that share a scale when they are quantised too
BLOCK_8BIT_STATE = 256  # optimizer states that share a scale (bitsandbytes.optim)
MIN_8BIT_STATE = 4096  # smaller tensors keep fp32 states (bitsandbytes.optim)
STATES = {"SGD": 1, "Lion": 1, "RMSprop": 1, "Adagrad": 1, "LARS": 1, "Muon": 1, "AdEMAMix": 3}  # else 2, as Adam's
LOGIT_BYTES = 8  # per logit: itself and its log-probability in fp32, which becomes the gradient


_ACTIVATIONS = {
    Checkpointing.auto: "activations_kept",
    Checkpointing.none: "activations_kept",
    Checkpointing.full: "activations_checkpointed",
}


@dataclass(frozen=True)
class MemoryEstimate:
    """All in bytes, of one device that holds everything.

    Attributes:
        base: frozen weights as held: 4-bit or 8-bit with their scales, the rest in the dtype computed in.
        base_by_dtype: the same by "4-bit", "8-bit", "scales" and torch's names.
        adapter: trained weights; without LoRA all weights, in fp32.
        gradients: one per trained weight.
        optimizer: its states after the first step.
        activations: what one micro-batch keeps for its backward, as configured; under auto, all of it.
        activations_kept: the same without gradient checkpointing.
        activations_checkpointed: with the full one: every layer's input, and the largest layer.
        activations_offloaded: on the device while the rest waits in the CPU's memory: the largest layer.
        logits: the head's output, the loss and their gradients at the labelled positions.
        logits_per_label: the part of it that grows with the labelled positions, for one of them.
        labels_at_a_time: so many positions have logits at once; None for all.
        tokens: positions that were estimated, and `labelled_tokens` of them.
    """

    base: int
    base_by_dtype: dict[str, int]
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    activations_kept: int
    activations_checkpointed: int
    activations_offloaded: int
    logits: int
    logits_per_label: int
    labels_at_a_time: int | None
    tokens: int
    labelled_tokens: int

    def at(
        self, tokens: int, labelled_tokens: int, level: Checkpointing, *, offloaded: bool = False, share: int = 1
    ) -> MemoryEstimate:
        """The same for a micro-batch of so many positions, to which activations are proportional, at `level`.

        `share` is the number of devices that weights and optimizer are divided among.
        """
        grown = tokens / self.tokens
        scaled = {name: math.ceil(getattr(self, name) * grown) for name in _ACTIVATIONS.values()}
        everywhere = self.logits - self._at_a_time(self.labelled_tokens) * self.logits_per_label
        held = {name: getattr(self, name) // share for name in ("base", "adapter", "gradients", "optimizer")}
        scaled["activations_offloaded"] = math.ceil(self.activations_offloaded * grown)
        kept = scaled[_ACTIVATIONS[level]]
        return replace(
            self,
            **held,
            **scaled,
            activations=min(kept, scaled["activations_offloaded"]) if offloaded else kept,
            logits=math.ceil(everywhere * grown) + self._at_a_time(labelled_tokens) * self.logits_per_label,
            tokens=tokens,
            labelled_tokens=labelled_tokens,
        )

    def _at_a_time(self, labelled_tokens: int) -> int:
        return labelled_tokens if self.labels_at_a_time is None else min(labelled_tokens, self.labels_at_a_time)

    @property
    def total(self) -> int:
        """Sum of what is held at once, when the backward of a micro-batch begins."""
        return self.base + self.adapter + self.gradients + self.optimizer + self.activations + self.logits


def estimate_memory(
    config: TrainConfig,
    hf_config: Any,
    *,
    rows: int,
    tokens: int,
    labelled_tokens: int,
    dtype: torch.dtype,
    device_type: str = "cuda",
) -> MemoryEstimate:
    """Memory of a training by `config` of the model that transformers' `hf_config` describes.

    Args:
        rows, tokens: shape of a micro-batch, padding included.
        labelled_tokens: positions with a label in it, where alone logits are computed.
        dtype: what is computed in; trained weights are fp32 throughout.
        device_type: "cuda" or "cpu", where PEFT casts the inputs of quantised layers under autocast.

    Raises whatever the model's forward raises when it needs values, not shapes (some code from repositories).
    """
    config = replace(config, quantization=agreed(config.quantization, hf_config, f"model={config.model.label}"))
    frozen = _base_bytes(_skeleton(config, hf_config, dtype), config, dtype) if config.lora.enabled else {}
    base = _skeleton(config, hf_config, dtype)
    if config.lora.enabled:
        base.requires_grad_(False)
        if config.quantization.format in (QuantizationFormat.nf4, QuantizationFormat.fp4):
            for name in fused_shapes(base):
                path, _, attribute = name.rpartition(".")
                parametrize.register_parametrization(base.get_submodule(path), attribute, _Dequantized(), unsafe=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = adapters.attach(
                base, config.lora, auto_class=str(config.task.auto_class), seed=0, name="", kernels=config.model.kernels
            )
        if config.quantization.format is QuantizationFormat.int8:
            lora_kernel.uninstall(model)  # PEFT's own forward of an 8-bit layer; here it stands as a dense one
    else:
        model = base.requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = sum(parameter.nbytes for parameter in trained)
    model_class: type = type(base)
    selects = families.selects_positions(model_class)
    keep = max(1, math.ceil(labelled_tokens / rows)) if selects else None
    if config.quantization.format is not QuantizationFormat.none and device_type == "cuda":
        for module in model.modules():
            module.cast_input_dtype_enabled = False  # PEFT's quantised layers cast nothing there
    found = _activations(model, config, rows=rows, tokens=tokens, keep=keep, dtype=dtype)
    level = checkpointing_of(config.trainer.gradient_checkpointing)
    per_label = _vocabulary(base) * LOGIT_BYTES
    in_parts = config.lora.enabled and selects
    parts = positions_at_a_time(_vocabulary(base), device_type) if in_parts else None
    return MemoryEstimate(
        base=sum(frozen.values()),
        base_by_dtype=frozen,
        adapter=weights,
        gradients=weights,
        optimizer=optimizer_bytes(config.optimizer, [parameter.numel() for parameter in trained]),
        activations=found[_ACTIVATIONS[level]],
        **found,
        logits=(0 if selects else rows * tokens * _vocabulary(base) * dtype.itemsize)
        + min(labelled_tokens, parts or labelled_tokens) * per_label,
        logits_per_label=per_label,
        labels_at_a_time=parts,
        tokens=rows * tokens,
        labelled_tokens=labelled_tokens,
    )


def _skeleton(config: TrainConfig, hf_config: Any, dtype: torch.dtype) -> Any:
    """The model on the meta device, as `load_base` would build it."""
    hf_config = copy.deepcopy(hf_config)
    if getattr(hf_config, "pad_token_id", None) is None:
        hf_config.pad_token_id = 0
    families.prepare(hf_config.model_type)
    attention = config.model.attn_implementation
    # Kernels that only a GPU has keep what PyTorch's own keep: queries, keys, values and output, no scores.
    arguments = {} if attention is None else {"attn_implementation": "sdpa" if "flash" in attention else attention}
    dtype = dtype if config.lora.enabled else torch.float32
    base = meta_model(str(config.task.auto_class), hf_config, dtype=dtype, **arguments)
    if config.model.kernels is Kernels.auto:
        kernels.install(base)
    return base


def _base_bytes(base: Any, config: TrainConfig, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of the frozen weights by how they are held; takes `base` apart."""
    parameters = dict(base.named_parameters())
    quantized = _quantize_shapes(base, config, dtype)
    found: dict[str, int] = defaultdict(int)
    for name, parameter in parameters.items():
        if name not in quantized:
            found[str(parameter.dtype).removeprefix("torch.")] += parameter.nbytes
        elif config.quantization.format is QuantizationFormat.int8:
            found["8-bit"] += parameter.numel()
            found["scales"] += FP32_BYTES * quantized[name]
        else:
            found["4-bit"] += math.ceil(parameter.numel() / 2)
            found["scales"] += _scale_bytes(parameter.numel(), config.quantization.double_quant)
    return dict(found)


def _quantize_shapes(base: Any, config: TrainConfig, dtype: torch.dtype) -> dict[str, int]:
    """Replaces what is quantised, by transformers' own rule; returns the weights' names and their output widths."""
    import bitsandbytes as bnb
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    skip = unquantized_modules(base, config.model.skip_modules)
    quantization = bitsandbytes_config(config.quantization, dtype, skip)
    if quantization is None:
        return {}
    names: dict[str, int] = {}
    if config.quantization.format is not QuantizationFormat.int8:  # bitsandbytes has no 8-bit experts
        names = dict.fromkeys(fused_shapes(base), 1)
    replace_with_bnb_linear(base, modules_to_not_convert=skip, quantization_config=quantization)
    kinds = (bnb.nn.Linear4bit, bnb.nn.Linear8bitLt)
    modules = {name: module for name, module in base.named_modules() if isinstance(module, kinds)}
    return names | {f"{name}.weight": module.out_features for name, module in modules.items()}


def _scale_bytes(weights: int, double_quant: bool) -> int:
    """Bytes of bitsandbytes' QuantState of one 4-bit tensor: scales, the 16 values of the format, an offset."""
    blocks = math.ceil(weights / BLOCK_4BIT)
    values = 16 * FP32_BYTES
    if not double_quant:
        return blocks * FP32_BYTES + values
    return blocks + math.ceil(blocks / BLOCK_SCALES) * FP32_BYTES + FP32_BYTES + values


def optimizer_bytes(node: dict[str, Any], sizes: list[int]) -> int:
    """Bytes of the states of the optimizer that `node` names, for trained tensors of `sizes` weights; counters apart.

    Paged states may lie in the CPU's memory; they are counted all the same.
    """
    name = str(node["_target_"]).rpartition(".")[2].removeprefix("Paged")
    states = STATES.get(name.removesuffix("8bit").removesuffix("32bit"), 2)
    if name == "SGD" and not node.get("momentum"):
        states = 0
    if not name.endswith("8bit"):
        return states * FP32_BYTES * sum(sizes)
    small = sum(size for size in sizes if size < MIN_8BIT_STATE)
    scales = sum(math.ceil(size / BLOCK_8BIT_STATE) for size in sizes if size >= MIN_8BIT_STATE)
    return states * (FP32_BYTES * small + sum(sizes) - small + FP32_BYTES * scales)


def _vocabulary(base: Any) -> int:
    """Logits of a position; a classifier's few are none."""
    head = base.get_output_embeddings()
    return 0 if head is None else int(head.weight.shape[0])


class _Dequantized(torch.nn.Module):
    """Stands for 4-bit experts: the forward makes another tensor of them, which autograd keeps for the backward."""

    @torch.no_grad()
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.clone()


class _SavedBytes:
    """What autograd saves in a forward, by layer; each storage once, parameters left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        from transformers.modeling_layers import GradientCheckpointingLayer

        self.known = {_storage(parameter): parameter for parameter in model.parameters()}
        self.layer: int | None = None
        self.inputs: dict[int, torch.Tensor] = {}
        self.saved: dict[int, tuple[torch.Tensor, int | None]] = {}
        layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        for number, module in enumerate(layers):
            module.register_forward_pre_hook(partial(self._enter, number), with_kwargs=True)
            module.register_forward_hook(self._leave)

    def _enter(self, number: int, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.layer = number
        hidden = args[0] if args else kwargs["hidden_states"]
        self.inputs[_storage(hidden)] = hidden

    def _leave(self, module: Any, args: Any, output: Any) -> None:
        self.layer = None

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """For `saved_tensors_hooks`."""
        if _storage(tensor) not in self.known:
            self.saved.setdefault(_storage(tensor), (tensor, self.layer))
        return tensor

    def totals(self) -> dict[str, int]:
        """Bytes on each way of keeping them, by the names of MemoryEstimate."""
        by_layer = defaultdict[int | None, int](int)
        for key, (tensor, layer) in self.saved.items():
            by_layer[layer] += 0 if key in self.inputs else _bytes(tensor)
        inputs = sum(map(_bytes, self.inputs.values()))
        outside = by_layer.pop(None, 0)
        largest = max(by_layer.values(), default=0)
        return {
            "activations_kept": sum(_bytes(tensor) for tensor, _ in self.saved.values()),
            "activations_checkpointed": inputs + outside + largest,
            "activations_offloaded": outside + largest,
        }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().nbytes()


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _activations(
    model: Any, config: TrainConfig, *, rows: int, tokens: int, keep: int | None, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes that one forward of `model` keeps, whose weights become shapes without values."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    bf16 = dtype is torch.bfloat16 and config.lora.enabled  # the weights' own dtype
    with FakeTensorMode(), torch.random.fork_rng(devices=[]):
        _give_storage(model)
        saved = _SavedBytes(model)
        model.train()
        ids = torch.zeros(rows, tokens, dtype=torch.long)
        arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids)}
        if config.task.auto_class == "causal_lm":
            arguments = {"use_cache": False} | ({} if keep is None else {"logits_to_keep": keep})
        if packing.uses_packing(model):
            ids = ids.view(1, -1)
            arguments = {
                "position_ids": ids,
                "attention_mask": torch.zeros(1, 1, 1, 1),
                "use_cache": False,
                "llmft_blocks": packing.Blocks(((rows, tokens),)),
            } | ({} if keep is None else {"logits_to_keep": torch.zeros(keep * rows, dtype=torch.long)})
        with (
            torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            # Both ask for values, which are none here: are rows packed (never), are experts' weights aligned.
            mock.patch("transformers.masking_utils.find_packed_sequence_indices", return_value=None, create=True),
            mock.patch("transformers.integrations.moe._can_use_grouped_mm", return_value=bf16, create=True),
        ):
            output = model(input_ids=ids, **arguments)
        del output
    return saved.totals()


def _give_storage(model: torch.nn.Module) -> None:
    """Replaces meta tensors, shared ones once, by the CPU's fake ones: meta's attention would store scores."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fake: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        fake = torch.nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    fakes[id(tensor)] = fake
                table[name] = fakes[id(tensor)]


def device_memory(device: torch.device) -> int | None:
    """Total bytes of the device's memory, or None where it cannot be told."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
