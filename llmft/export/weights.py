"""A run's weights as one plain model: dequantised base + LoRA, merged by tensor and written by file."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llmft.core.errors import ConfigError
from llmft.core.files import check_space
from llmft.model import heads
from llmft.model.families import base_of
from llmft.model.meta import meta_model

SHARD_BYTES = 2 * 10**9
"""Maximum file size; each file is in memory until it is written."""


class Overflow(Exception):
    """A weight is beyond the range of the number format."""


@dataclass
class ExportPlan:
    """The exported model: transformers' own classes, without adapter and quantisation.

    Attributes:
        config: its transformers config.
        meta_model: the model on the meta device.
        shapes, sources: name of each stored tensor -> its shape, and the model's parameters that it is made of.
    """

    config: Any
    auto_class: str
    meta_model: Any
    shapes: dict[str, torch.Size] = field(default_factory=dict)
    sources: dict[str, list[str]] = field(default_factory=dict)


def plan_export(model: Any, auto_class: str) -> ExportPlan:
    """Plans the export of a run's `model`; its embeddings stay tied if training left them equal."""
    config = copy.deepcopy(base_of(model).config)
    vars(config).pop("quantization_config", None)
    empty = meta_model(auto_class, config)
    tied = getattr(empty, "all_tied_weights_keys", None) or {}
    if any(not torch.equal(effective(model, empty, one), effective(model, empty, two)) for one, two in tied.items()):
        for part in {id(part): part for part in (config, config.get_text_config())}.values():
            part.tie_word_embeddings = False
        empty, tied = meta_model(auto_class, config), {}
    plan = ExportPlan(config, auto_class, empty)
    state = {name: tensor for name, tensor in empty.state_dict().items() if name not in tied}
    together = _as_stored(empty, state)
    groups = [[name] for name in state]
    if set().union(*(_as_stored(empty, {name: tensor}) for name, tensor in state.items())) != together.keys():
        groups = [list(state)]  # some are stored together
    for group in groups:
        for target, tensor in _as_stored(empty, {name: state[name] for name in group}).items():
            plan.shapes[target] = tensor.shape
            plan.sources[target] = group
    return plan


def effective(model: Any, empty: Any, name: str) -> torch.Tensor:
    """The run's effective fp32 tensor for the parameter or buffer `name` of the exported model."""
    from peft.tuners.lora.layer import LoraLayer
    from peft.utils.integrations import dequantize_module_weight
    from peft.utils.other import ModulesToSaveWrapper
    from transformers.pytorch_utils import Conv1D

    path, _, attribute = name.rpartition(".")
    module: Any = base_of(model)
    for part in filter(None, path.split(".")):
        module = getattr(module, part)
        if isinstance(module, ModulesToSaveWrapper):
            module = module.modules_to_save[str(module.active_adapter)]
    layer = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if attribute != "weight":
        return getattr(layer, attribute).detach().float()
    with torch.no_grad():
        weight = dequantize_module_weight(layer).detach().float()
        if isinstance(module, LoraLayer):
            weight = _adapted(module, weight)
        # bitsandbytes' layers have GPT-2's weights transposed.
        transposed = isinstance(empty.get_submodule(path), Conv1D) and not isinstance(layer, Conv1D)
        return weight.T if transposed else weight


def _adapted(layer: Any, weight: torch.Tensor) -> torch.Tensor:
    """W + s B A, and DoRA's magnitudes (arXiv 2402.09353, equation 5)."""
    for adapter in layer.active_adapters:
        delta = layer.get_delta_weight(adapter).float().to(weight.device)
        magnitude = dict(layer.lora_magnitude_vector.items()).get(adapter)
        if magnitude is None:
            weight = weight + delta
            continue
        transposed = getattr(layer, "fan_in_fan_out", False)
        norm = magnitude.get_weight_norm(weight, delta.T if transposed else delta, scaling=1)
        factor = (magnitude.weight / norm).view(-1, 1)
        weight = (factor.T if transposed else factor) * (weight + delta)
    return weight


def _as_stored(empty: Any, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Converts tensors to the names and shapes of model files; transformers stacks experts only in memory."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(empty, dict(tensors))


def write(model: Any, plan: ExportPlan, directory: Path, dtype: torch.dtype) -> None:
    """Writes the weights of a run's `model` as safetensors of at most `SHARD_BYTES`, and the config.

    Raises Overflow for a weight beyond the range of `dtype`.
    """
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    # A head keeps its trained precision.
    exact = heads.NAMES if plan.auto_class == "sequence_classification" else ()
    planned = {
        name: torch.empty(shape, dtype=torch.float32 if name.startswith(exact) else dtype, device="meta")
        for name, shape in plan.shapes.items()
    }
    shards = split_torch_state_dict_into_shards(planned, max_shard_size=SHARD_BYTES)
    check_space(directory, shards.metadata["total_size"])
    of_source: dict[str, torch.Tensor] = {}  # tensors of one source are consecutive, and are created together
    for file_name, names in shards.filename_to_tensors.items():
        tensors: dict[str, torch.Tensor] = {}
        for name in names:
            if name not in of_source:
                parts = {part: effective(model, plan.meta_model, part) for part in plan.sources[name]}
                of_source = _as_stored(plan.meta_model, parts)
            tensors[name] = of_source.pop(name).to(planned[name].dtype).contiguous().cpu()
            if not torch.isfinite(tensors[name]).all():
                raise Overflow(name)
        save_file(tensors, directory / file_name, {"format": "pt"})
        (directory / file_name).chmod(0o644)  # safetensors lets nobody else read it, such as a server
    if shards.is_sharded:
        index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    plan.config.dtype = dtype
    plan.config.architectures = [type(plan.meta_model).__name__]
    plan.config.save_pretrained(directory)


def check_mergeable(model: Any, label: str) -> None:
    """Raises ConfigError for a base stored in a number format that cannot be dequantised here."""
    stored = getattr(base_of(model).config, "quantization_config", None)
    method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
    if stored is not None and "bitsandbytes" not in str(getattr(method, "value", method)):
        raise ConfigError(
            f"{label}: its base is stored as {getattr(method, 'value', method)}, which no adapter can be merged into; "
            "serve the adapter on that base, or train on a base that is not quantised already."
        )
