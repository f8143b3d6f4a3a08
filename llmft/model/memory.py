"""What a training step takes in memory, by a formula over the shapes of a model without weights.

For each token a layer keeps the inputs of its norms and of its trained linear layers, and the outputs of the linear
layers that do not end in the residual stream; kernels keep less. At the peak there is more for a while: logits and
their gradient, or what the backward of one layer makes. Estimates are within 15% of measured
peaks on tiny models of every family (`tests/model/test_memory.py`). Over 60 steps of SmolLM2-135M in NF4 on Alpaca rows
a process on a CPU took 1.6 to 2.0 GiB, no more at the end than after the first step, and 2.2 GiB in one step, with an
estimate of 1.7 GiB.
"""

from __future__ import annotations

import copy
import math
import os
import warnings
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

from llmft.config.model import Kernels, QuantizationConfig, QuantizationFormat
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing
from llmft.model import adapters, families, kernels
from llmft.model.experts import BLOCK, SCALE_BLOCK, fused_shapes
from llmft.model.heads import positions_at_a_time
from llmft.model.kernels import lora as lora_kernel
from llmft.model.meta import meta_model
from llmft.model.quantization import effective_quantization, unquantized_modules

FP32_BYTES = 4
STATES = {"SGD": 1, "Lion": 1, "RMSprop": 1, "Adagrad": 1, "LARS": 1, "Muon": 1, "AdEMAMix": 3}  # else 2, as Adam's
LIBRARIES_BYTES = {"cpu": 600 * 2**20, "cuda": 800 * 2**20}
"""Of the process without a model: its imports, and on a GPU its context and kernels."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device.

    Attributes:
        base: frozen weights as stored: 4-bit or 8-bit with their scales, the rest in the dtype of the computation.
        adapter: trained weights; without LoRA all weights, in fp32.
        gradients, optimizer: one per trained weight; its states after the first step.
        activations: what a micro-batch keeps from its forward for its backward.
        workspace: the logits with their gradient, or what one layer's backward allocates, whichever is more.
        libraries: the process without a model.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    workspace: int
    libraries: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


class StepMemory:
    """The memory of a training by `config` of the model that transformers' `hf_config` describes.

    Raises whatever the model's code raises when it is built without weights.
    """

    def __init__(self, config: TrainConfig, hf_config: Any, dtype: torch.dtype, device_type: str) -> None:
        """`dtype` is that of the computation; trained weights are fp32. `device_type` is "cuda" or "cpu"."""
        from transformers.modeling_layers import GradientCheckpointingLayer

        hf_config, auto_class, lora = copy.deepcopy(hf_config), str(config.task.auto_class), config.lora
        hf_config.pad_token_id = getattr(hf_config, "pad_token_id", None) or 0
        families.prepare(hf_config.model_type)
        base = meta_model(auto_class, hf_config, dtype=dtype if lora.enabled else torch.float32)
        quantization = effective_quantization(config.quantization, hf_config, f"model={config.model.label}")
        frozen = _base_bytes(base, quantization, config.model.skip_modules) if lora.enabled else (0, 0, 0)
        self.base, self.scales, dequantized = frozen
        four_bit = quantization.format in (QuantizationFormat.nf4, QuantizationFormat.fp4)
        stacks = sum(math.prod(shape) for shape in fused_shapes(base).values()) if four_bit else 0
        base.requires_grad_(not lora.enabled)
        if config.model.kernels is Kernels.auto:
            kernels.install(base)
        model = base
        if lora.enabled:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                options: dict[str, Any] = {"auto_class": auto_class, "seed": 0, "name": ""}
                model = adapters.attach(base, lora, kernels=config.model.kernels, **options)
        trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
        self.adapter, self.optimizer = FP32_BYTES * sum(trained), optimizer_bytes(config.optimizer, trained)
        self.libraries = LIBRARIES_BYTES[device_type]

        text, self.itemsize = hf_config.get_text_config(), dtype.itemsize
        if quantization.format is QuantizationFormat.int8:
            lora_kernel.uninstall(model)
        modules = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
        layers = [_saved_values(layer, text, dtype) for layer in modules]
        self.hidden, self.num_layers = text.hidden_size, len(layers)
        self.widest = max(max(_widths(m) or (0,)) for layer in modules for m in layer.modules())
        self.saved, self.largest = sum(layers), max(layers)
        # A fused kernel keeps no scores; dropout in attention keeps them, its mask, and its output.
        drops = any(
            getattr(text, name, 0) for name in ("attention_dropout", "attn_pdrop", "attention_probs_dropout_prob")
        )
        eager = base.config._attn_implementation == "eager"
        self.scores = text.num_attention_heads * (3 if drops else 1 if eager else 0)
        groups = text.num_attention_heads - getattr(text, "num_key_value_heads", text.num_attention_heads)
        self.repeated = 2 * groups * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
        # What every layer keeps of its weights: 4-bit experts dequantised, or autocast's copies of trained weights.
        copies = stacks + (sum(trained) if not lora.enabled and dtype is not torch.float32 else 0)
        self.copies = copies * self.itemsize // len(layers)
        self.dequantized = dequantized * self.itemsize
        head, selects = base.get_output_embeddings(), families.selects_positions(base.__class__)
        self.vocabulary = 0 if head is None else int(head.weight.shape[0])
        self.chunk = positions_at_a_time(self.vocabulary, device_type) if selects and lora.enabled else None
        self.logits_everywhere = 0 if selects else self.vocabulary * self.itemsize

    def at(
        self,
        tokens: int,
        longest: int,
        labelled: int,
        level: Checkpointing,
        *,
        offloaded: bool = False,
        num_shards: int = 1,
        flash: bool = True,
    ) -> MemoryEstimate:
        """For a micro-batch of `tokens` positions in rows of up to `longest`, `labelled` of them with a label.

        Weights and optimizer are divided among `num_shards` devices. Without `flash` attention, keys and values are
        repeated for every query head.
        """
        scores = self.scores * longest + (0 if flash else self.repeated)
        inputs = self.num_layers * self.hidden * tokens * self.itemsize
        layer = (self.largest + scores) * tokens * self.itemsize + self.copies
        outside = (2 * self.hidden * self.itemsize + self.logits_everywhere) * tokens
        all_saved = (self.saved + self.num_layers * scores) * tokens * self.itemsize + self.num_layers * self.copies
        backward = (2 * self.hidden + self.widest) * tokens * self.itemsize + self.dequantized
        # Two numbers in fp32 for each logit: itself and its log-probability, which becomes the gradient.
        logits = 2 * FP32_BYTES * self.vocabulary * min(labelled, self.chunk or labelled)
        recompute = level is Checkpointing.full
        return MemoryEstimate(
            base=(self.base - self.scales) // num_shards + self.scales,  # every device holds all scales
            adapter=self.adapter // num_shards,
            gradients=self.adapter // num_shards,
            optimizer=self.optimizer // num_shards,
            activations=outside + (0 if offloaded else inputs if recompute else all_saved),
            # Two layers of sharded weights are gathered at a time: one computes, the next is being fetched.
            workspace=max(logits, backward + (layer if recompute or offloaded else 0))
            + (2 * self.base // self.num_layers if num_shards > 1 else 0),
            libraries=self.libraries,
        )


def _saved_values(layer: torch.nn.Module, text: Any, dtype: torch.dtype) -> float:
    """Values in `dtype` that autograd keeps for each token that goes through `layer`."""
    saved, wide = 0.0, FP32_BYTES / dtype.itemsize
    inputs: dict[tuple[str, int], int] = {}
    blocks: dict[str, list[tuple[int, int]]] = defaultdict(list)
    parts = {"base_layer", "lora_A", "lora_B", "lora_dropout"}
    modules = {name: module for name, module in layer.named_modules() if not parts & set(name.split("."))}
    for name, module in modules.items():
        parent, kind = name.rpartition(".")[0], type(module).__name__
        weight: Any = getattr(module, "weight", None)
        kernel, widths = "forward" in vars(module), _widths(module)
        if widths is not None:
            blocks[parent].append(widths)
            if hasattr(module, "lora_A"):
                saved += module.r["default"] + (widths[1] if module.lora_variant else 0)
                if getattr(module.lora_dropout["default"], "p", 0.0):
                    saved += widths[0] / dtype.itemsize if kernel else 2 * widths[0]
            if hasattr(module, "lora_A") or weight.requires_grad:
                shared = kernel or dtype is torch.float32  # PEFT casts each one's input
                inputs[parent if shared else name, widths[0]] = widths[0]
        elif isinstance(weight, torch.nn.Parameter) and weight.ndim == 1:  # a norm, of queries or keys by heads
            heads = name.endswith(("q_norm", "k_norm"))
            projected = _widths(modules.get(name.removesuffix("norm") + "proj")) if heads else None
            width = projected[1] if projected else weight.numel()
            kernel = kernel and not weight.requires_grad
            rms = "RMS" in kind and not kernel
            saved += width * (wide if rms else 1) * (2 if rms and weight.requires_grad else 1)
        elif isinstance(module, torch.nn.Dropout) and module.p:
            saved += text.hidden_size
        elif kind.endswith("Experts"):  # gate, up and their product, of each chosen one
            inner = getattr(text, "moe_intermediate_size", None) or text.intermediate_size
            saved += 3 * inner * getattr(text, "num_experts_per_tok", 2)
        elif "NewGELU" in kind:
            saved += 3 * 4 * text.hidden_size
    for parent, linear in blocks.items():
        *others, (inner, last) = linear
        first = sum(out for _, out in others)
        saved += first + (last if last != text.hidden_size else 0)
        attention = "att" in parent
        if not attention and first == 2 * inner:  # gated
            network = modules[parent]
            kernel = "forward" in vars(network) and "SiLU" in type(network.act_fn).__name__
            saved += 0 if kernel else inner
            if kernel and "forward" in vars(network.down_proj):
                inputs.pop((parent, inner), None)  # recomputed
        elif attention and len(others) == 1 and not hasattr(text, "n_embd"):
            saved += first * 2 / 3  # queries and keys leave the fused product by a rotation
    return saved + sum(inputs.values())


def _widths(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer."""
    if hasattr(module, "in_features"):
        return module.in_features, module.out_features
    return (module.weight.shape[0], module.nf) if hasattr(module, "nf") else None


def _base_bytes(base: Any, quantization: QuantizationConfig, skip_modules: list[str]) -> tuple[int, int, int]:
    """Bytes of the frozen weights as stored, bytes of their scales, number of weights of the largest quantised one."""
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers.quantizers_utils import should_convert_module

    eight_bit = quantization.format is QuantizationFormat.int8
    outputs: dict[str, int] = {}
    if eight_bit or quantization.format in (QuantizationFormat.nf4, QuantizationFormat.fp4):
        skip = unquantized_modules(base, skip_modules)
        for name, module in base.named_modules():
            if (type(module) is torch.nn.Linear or isinstance(module, Conv1D)) and should_convert_module(name, skip):
                outputs[f"{name}.weight"] = (_widths(module) or (0, 0))[1]
        outputs |= {} if eight_bit else dict.fromkeys(fused_shapes(base), 1)  # bitsandbytes has no 8-bit experts
    total = scales = largest = 0
    for name, parameter in base.named_parameters():
        count, blocks = parameter.numel(), math.ceil(parameter.numel() / BLOCK)
        if name not in outputs:
            total += parameter.nbytes
            continue
        largest = max(largest, count)
        if eight_bit:
            total += count
            scales += FP32_BYTES * outputs[name]
        else:  # the packed weights, and with their scales the 16 values of the format
            total += math.ceil(count / 2)
            doubly = blocks + FP32_BYTES * (math.ceil(blocks / SCALE_BLOCK) + 1)
            scales += (doubly if quantization.double_quant else FP32_BYTES * blocks) + 16 * FP32_BYTES
    return total + scales, scales, largest


def optimizer_bytes(node: dict[str, Any], sizes: list[int]) -> int:
    """Bytes of the states of the optimizer that `node` names, for trained tensors of `sizes` weights; without counters.

    Paged states may lie in the CPU's memory; they are counted all the same.
    """
    name = str(node["_target_"]).rpartition(".")[2].removeprefix("Paged")
    states = STATES.get(name.removesuffix("8bit").removesuffix("32bit"), 2)
    if name == "SGD" and not node.get("momentum"):
        states = 0
    if not name.endswith("8bit"):
        return states * FP32_BYTES * sum(sizes)
    # bitsandbytes.optim: smaller tensors keep fp32 states, and 256 states share a scale.
    return states * sum(
        FP32_BYTES * size if size < 4096 else size + FP32_BYTES * math.ceil(size / 256) for size in sizes
    )


def device_memory(device: torch.device) -> int | None:
    """Total bytes of the device's memory, or None if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if device.type == "cpu" else None
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None
