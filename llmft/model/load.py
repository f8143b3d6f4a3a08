"""A model's config and its (quantised) base, which is kept for the next run in the process."""

from __future__ import annotations

import contextlib
import gc
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmft.config.convert import canonical, key_fields, to_plain
from llmft.config.model import Kernels, ModelConfig, ModelInit, QuantizationConfig, QuantizationFormat
from llmft.config.untrusted import check_values
from llmft.core.errors import ConfigError, did_you_mean, first_line
from llmft.core.machine import free_memory, versions
from llmft.data.hub import Located
from llmft.model import families, heads, kernels
from llmft.model.meta import auto_model, meta_model
from llmft.model.quantization import (
    bitsandbytes_config,
    effective_quantization,
    keep_packing,
    quantize_in_place,
    stored_quantization,
    weight_counts,
)
from llmft.model.quantized_cache import LEAST_WEIGHTS, QuantizedCache


@dataclass
class _Kept:
    """The base kept from the last run; only one, since memory rarely suffices for two."""

    key: str | None = None
    model: Any = None
    loaded_before: bool = False


_kept = _Kept()


def model_config(model: ModelConfig, located: Located) -> Any:
    """transformers' config: from the model's directory, or made from its architecture and overrides."""
    from transformers import AutoConfig

    overrides = {**model.load_overrides, **model.overrides}
    if located.directory is not None:
        try:
            config = AutoConfig.from_pretrained(
                located.directory, local_files_only=True, trust_remote_code=model.trust_remote_code
            )
        except Exception as error:
            raise ConfigError(f"{located.directory}/config.json cannot be used: {first_line(error)}") from None
        _check_overrides(config, model)
        check_values("model.overrides", overrides)
        config.update(overrides)
        if model.init is ModelInit.random and hasattr(config, "quantization_config"):
            del config.quantization_config  # of weights that are not read; as transformers' HfQuantizer removes it
        return config
    if model.requires_remote_code:
        raise ConfigError(f"model={model.name} has no architecture in transformers to make at random: use model.path.")
    check_values("model.config", {**model.config, **overrides})
    try:
        _check_overrides(AutoConfig.for_model(model.architecture, **model.config), model)
        return AutoConfig.for_model(model.architecture, **{**model.config, **overrides})
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"model.architecture={model.architecture}: {first_line(error)}") from None


def _check_overrides(config: Any, model: ModelConfig) -> None:
    """Raises ConfigError for a misspelt name, which transformers would ignore, building a model of full size."""
    for key in model.overrides:
        if not hasattr(config, key):
            known = [name for name in config.to_dict() if not name.startswith("_")]
            raise ConfigError(
                f"model.overrides.{key}: {type(config).__name__} has no such value{did_you_mean(key, known)}"
            )


@dataclass(frozen=True)
class _BaseSpec:
    """The arguments of `load_base`."""

    model: ModelConfig
    located: Located
    quantization: QuantizationConfig
    auto_class: str
    num_labels: int
    dtype: torch.dtype
    device: torch.device
    seed: int
    vocab_size: int | None

    @property
    def key(self) -> str:
        """Equal for bases with the same weights in the same place."""
        model, random = self.model, self.model.init is ModelInit.random
        kind = [key_fields(self.quantization), self.auto_class, self.num_labels, str(self.dtype), str(self.device)]
        made_of = [self.seed, self.vocab_size] if random else []
        return canonical([to_plain(model), self.located.fingerprint, *kind, *made_of])

    @property
    def full_precision(self) -> list[str]:
        """Modules that are not quantised: what the model's file names, and all parts of a new head."""
        head = heads.NAMES if self.auto_class == "sequence_classification" else ()
        return [*self.model.skip_modules, *head]

    @contextlib.contextmanager
    def seeded(self) -> Iterator[None]:
        """Inside, random numbers come from `seed` alone, for new weights."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.seed)
            yield

    def config(self) -> Any:
        config = model_config(self.model, self.located)
        families.check_task(self.model, config, self.auto_class)
        if self.auto_class == "sequence_classification":
            config.num_labels = self.num_labels
        if self.model.init is ModelInit.random and self.vocab_size is not None:
            config.vocab_size = self.vocab_size
        families.prepare(config.model_type)
        return config


def load_base(
    model: ModelConfig,
    located: Located,
    quantization: QuantizationConfig,
    *,
    auto_class: str,
    num_labels: int,
    dtype: torch.dtype,
    device: torch.device,
    seed: int,
    vocab_size: int | None = None,
    keep_base: bool = True,
    memory_map: bool = False,
    warn: Callable[[str], None] = print,
) -> Any:
    """The (quantised) base model on `device`, in evaluation mode, nothing trainable.

    With `memory_map`, on the CPU, the weights stay in files, of which each process reads only what it uses: one
    process quantises into the cache, and all read from there.

    With `keep_base`, the model stays in the process, and the next call with the same arguments returns it at once. With
    `quantization.cache` it is also stored quantised on the disk, for other processes; a failure goes to `warn`.
    A random model's weights come from `seed`; its vocabulary is `vocab_size` where that is given.
    """
    quantization = effective_quantization(quantization, model_config(model, located), f"model={model.label}")
    spec = _BaseSpec(model, located, quantization, auto_class, num_labels, dtype, device, seed, vocab_size)
    if keep_base and _kept.key == spec.key:
        return _kept.model
    if _kept.loaded_before:  # also one that was not kept; a search for garbage takes longer than to load a small base
        drop_base()
    _kept.loaded_before = True
    try:
        base = _random(spec) if model.init is ModelInit.random else _pretrained(spec, warn, memory_map)
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if os.environ.get("LLMFT_TRACE"):
            raise
        raise ConfigError(f"model={model.label} cannot be loaded: {first_line(error)}") from error
    keep_packing(base)
    base.requires_grad_(False)
    base.eval()
    if model.kernels is Kernels.auto:
        kernels.install(base)
    if keep_base:
        _kept.key, _kept.model = spec.key, base
    return base


def kept_base() -> Any:
    """The base that the last run of this process left for the next one; None if there is none."""
    return _kept.model


def drop_base() -> None:
    """Frees the memory of the kept base, and of any other without references."""
    _kept.key = _kept.model = None
    free_memory()


PIECEMEAL_WEIGHTS = 10**9
"""A random model of more weights is made and quantised tensor by tensor: in 16 bits a whole 13B fits on few GPUs."""


def _random(spec: _BaseSpec) -> Any:
    config, attention = spec.config(), _attention(spec.model)

    def fill(module: torch.nn.Module) -> None:
        if any(tensor.is_meta for tensor in (*module.parameters(False), *module.buffers(False))):
            module.to_empty(device=spec.device, recurse=False)
            base._init_weights(module)

    piecemeal = False
    if spec.quantization.format is not QuantizationFormat.none:
        base = meta_model(spec.auto_class, config, dtype=spec.dtype, **attention)
        piecemeal = sum(parameter.numel() for parameter in base.parameters()) > PIECEMEAL_WEIGHTS
    with spec.seeded():
        if not piecemeal:
            with torch.device(spec.device):
                base = auto_model(spec.auto_class).from_config(config, dtype=spec.dtype, **attention)
        quantize_in_place(base, spec.quantization, spec.dtype, spec.full_precision, spec.device, fill)
    if piecemeal:
        base.tie_weights()
    return base


def _pretrained(spec: _BaseSpec, warn: Callable[[str], None], memory_map: bool) -> Any:
    """The base from the cache of quantised bases, else from the model's files, and then written to the cache."""
    cache = _cache(spec, warn)
    if cache is not None and memory_map:
        with cache.alone():
            if cache.find() is None:
                _cached_or_made(spec, cache)
                gc.collect()
    return _cached_or_made(spec, cache)


def _cached_or_made(spec: _BaseSpec, cache: QuantizedCache | None) -> Any:
    assert spec.located.directory is not None
    entry = None if cache is None else cache.find()
    if cache is not None and entry is not None:
        try:
            base, _ = _read(spec, entry, _stored_config(entry))
            base.config.name_or_path = base.name_or_path = str(spec.located.directory)
            return base
        except (ConfigError, OSError, ValueError, KeyError) as error:
            cache.drop(first_line(error))
    base, missing = _read(spec, spec.located.directory, _quantization(spec))
    counts = weight_counts(base)
    if cache is not None and counts["4-bit"] + counts["8-bit"] >= LEAST_WEIGHTS:
        cache.write(base, missing)
    return base


def _read(spec: _BaseSpec, directory: Path, quantization: Any) -> tuple[Any, set[str]]:
    """The model of a directory's files, and the names of weights that are new because the files have none."""
    config = spec.config()
    stored = stored_quantization(config)
    if stored.get("quant_method") == "bitsandbytes":  # computed in the run's dtype, not in its maker's
        stored["bnb_4bit_compute_dtype"] = str(spec.dtype).removeprefix("torch.")
        config.quantization_config = stored
    elif isinstance(quantization, dict):
        config.quantization_config, quantization = quantization, None
    with spec.seeded():  # a new classification head is random
        base, info = auto_model(spec.auto_class).from_pretrained(
            directory,
            config=config,
            dtype=spec.dtype,
            quantization_config=None if stored else quantization,
            device_map={"": spec.device},
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=spec.model.trust_remote_code,
            output_loading_info=True,
            **_attention(spec.model),
        )
    _refuse_missing(base, directory, info, spec.auto_class)
    return base, set(info["missing_keys"])


def _quantization(spec: _BaseSpec) -> Any:
    """How transformers quantises the files that it reads; None if they are not to be quantised."""
    config = spec.config()
    if stored_quantization(config) or spec.quantization.format is QuantizationFormat.none:
        return None
    empty = meta_model(spec.auto_class, config, dtype=spec.dtype)
    return bitsandbytes_config(empty, spec.quantization, spec.dtype, spec.full_precision)


def _stored_config(entry: Path) -> Any:
    """The quantisation config to read a cached base with; for 4 bits, one that reads stacked experts too."""
    from transformers import BitsAndBytesConfig

    from llmft.model.experts_quantizer import DESERIALIZER

    stored = json.loads((entry / "config.json").read_text())["quantization_config"]
    if stored.get("load_in_8bit"):
        return stored
    quantization = BitsAndBytesConfig.from_dict(stored)
    quantization.quant_method = DESERIALIZER
    return quantization


def _cache(spec: _BaseSpec, warn: Callable[[str], None]) -> QuantizedCache | None:
    """The base's cache entry, identified by everything that its quantised weights depend on; None without caching.

    Models that run a repository's code are not cached; they are quantised every time.
    """
    model, quantization = spec.model, spec.quantization
    if quantization.format is QuantizationFormat.none or not quantization.cache or model.trust_remote_code:
        return None
    installed = versions()
    identity = canonical(
        [
            [model.id, model.revision] if model.path is None else None,
            spec.located.fingerprint,
            [model.load_overrides, model.overrides],
            key_fields(quantization),
            spec.full_precision,
            [spec.auto_class, spec.num_labels],
            [str(spec.dtype), spec.device.type],
            [installed["bitsandbytes"], installed["transformers"]],
        ]
    )
    label = f"{model.label} {quantization.format.value} {str(spec.dtype).removeprefix('torch.')}"
    return QuantizedCache(identity, label, int(quantization.cache_gib * 2**30), warn)


def _refuse_missing(base: Any, directory: Path, info: Any, auto_class: str) -> None:
    """Raises ConfigError for missing weights, which transformers would fill with random ones and only log."""
    new_head = heads.NAMES if auto_class == "sequence_classification" else ()
    missing = sorted(key for key in info["missing_keys"] if not key.startswith(new_head))
    missing += sorted(str(key) for key in info.get("mismatched_keys", []))
    missing += [
        f"{name}.weight"
        for name, module in base.named_modules()
        if getattr(getattr(module, "weight", None), "quant_state", None) is not None
        and tuple(module.weight.quant_state.shape) != (module.out_features, module.in_features)
    ]
    missing += getattr(getattr(base, "hf_quantizer", None), "mismatched", [])
    if missing:
        raise ConfigError(
            f"{directory}: {len(missing)} weights of the model are not in its files or have another shape "
            f"({', '.join(missing[:3])}{', …' if len(missing) > 3 else ''}): the directory is incomplete."
        )


def _attention(model: ModelConfig) -> dict[str, Any]:
    return {} if model.attn_implementation is None else {"attn_implementation": model.attn_implementation}
