"""The parameters of a model's computation, in GGUF files and in transformers' configs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from llmft.core.errors import ConfigError

KNOWN = ("llama", "qwen2", "qwen3", "gemma2", "gemma3", "phi3", "gpt2")
"""The families of llama.cpp whose files transformers reads and that are compared with what it read."""
YARN = {"extrapolation_factor": "ext_factor", "attention_factor": "attn_factor", "beta_fast": "beta_fast",
        "beta_slow": "beta_slow"}  # fmt: skip
"""transformers' parameters of YaRN position scaling, and llama.cpp's."""
LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DECISIVE = ("rope.scaling.factor", "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping",
            "attention.scale", "logit_scale", "embedding_scale", "residual_scale")  # fmt: skip
"""Keys of a file that change what a model computes."""


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters") or {}
    return parameters.get("full_attention", parameters)


def parameters(config: dict[str, Any], arch: str) -> dict[str, Any]:
    """The parameters that llama.cpp needs, by the names of gguf's writer methods."""
    get = config.get
    if arch == "gpt2":
        return {
            "block_count": config["n_layer"],
            "context_length": config["n_positions"],
            "embedding_length": config["n_embd"],
            "feed_forward_length": get("n_inner") or 4 * config["n_embd"],
            "head_count": config["n_head"],
            "layer_norm_eps": config["layer_norm_epsilon"],
        }
    rope = _rope(config)
    heads, width = int(config["num_attention_heads"]), int(config["hidden_size"])
    values = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": width,
        "feed_forward_length": config["intermediate_size"],
        "head_count": heads,
        "head_count_kv": get("num_key_value_heads") or heads,
        "layer_norm_rms_eps": config["rms_norm_eps"],
        "key_length": get("head_dim"),
        "value_length": get("head_dim"),
    }
    scale = get("query_pre_attn_scalar")
    if arch in ("gemma2", "gemma3") and scale not in (None, get("head_dim"), width // heads):
        raise ConfigError(f"format=gguf: query_pre_attn_scalar={scale} is no size of a head, which llama.cpp assumes.")
    if arch in ("gemma", "gemma2"):
        if arch == "gemma2":
            values |= {
                "attn_logit_softcapping": config["attn_logit_softcapping"],
                "final_logit_softcapping": config["final_logit_softcapping"],
                "sliding_window": config["sliding_window"],
            }
        return values
    values |= {"rope_freq_base": rope.get("rope_theta"), **_scaling(rope)}
    if arch == "phi3":
        values |= _phi3(config, rope)
    if arch == "llama":
        values |= {
            "vocab_size": config["vocab_size"],
            "rope_dimension_count": get("head_dim") or width // heads,
            "expert_count": get("num_local_experts"),
            "expert_used_count": get("num_experts_per_tok") if get("num_local_experts") else None,
        }
    if arch == "gemma3":
        local = (get("rope_parameters") or {}).get("sliding_attention", {}).get("rope_theta")
        values |= {"sliding_window": get("sliding_window"), "rope_freq_base_swa": local}
        values |= {"final_logit_softcapping": get("final_logit_softcapping")}
    return values


def _phi3(config: dict[str, Any], rope: dict[str, Any]) -> dict[str, Any]:
    """Phi 3's: partially rotated heads, and long and short factors of position scaling."""
    longest, width = config["max_position_embeddings"], int(config["hidden_size"])
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    trained = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    scale = longest / (trained or longest)
    attention = math.sqrt(1 + math.log(scale) / math.log(trained)) if trained and scale > 1 else 1.0
    return {
        "key_length": None,
        "value_length": None,
        "rope_scaling_type": None,
        "rope_scaling_orig_ctx_len": trained or longest,
        "rope_dimension_count": int(share * width) // int(config["num_attention_heads"]),
        "sliding_window": config.get("sliding_window") or 0,
        "rope_scaling_attn_factors": attention if rope.get("long_factor") else None,
    }


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    """Scaling of positions beyond the trained ones; Llama 3's is a tensor."""
    import gguf

    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind == "linear":
        return {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": factor}
    if kind == "yarn":
        rope = {"attention_factor": rope.get("attn_factor"), **rope}
        return {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": factor,
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
            **{f"rope_scaling_yarn_{key}": rope.get(name) for name, key in YARN.items()},
        }
    if kind in ("default", "llama3", "longrope", "su"):
        return {}
    raise ConfigError(f"format=gguf: rotary positions of the kind {kind} have no form in llama.cpp; set converter=DIR.")


def rope_tensors(config: dict[str, Any], arch: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors that no file of the directory contains: frequencies of rotary positions."""
    rope = _rope(config)
    if arch == "llama" and rope.get("rope_type") == "llama3":
        yield "rope_freqs.weight", _llama3_factors(config, rope)
    for key, name in (("long_factor", "rope_factors_long.weight"), ("short_factor", "rope_factors_short.weight")):
        if arch == "phi3" and rope.get(key):
            yield name, torch.tensor(rope[key], dtype=torch.float32)


def _llama3_factors(config: dict[str, Any], rope: dict[str, Any]) -> torch.Tensor:
    """The divisor of each frequency (the inverse of transformers' `_compute_llama3_parameters`)."""
    dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    frequencies = 1.0 / (rope["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    factor, low, high = rope["factor"], rope["low_freq_factor"], rope["high_freq_factor"]
    trained = rope["original_max_position_embeddings"]
    factors = []
    for frequency in frequencies:
        length = 2 * math.pi / frequency
        smooth = (trained / length - low) / (high - low)
        inside = 1 / ((1 - smooth) / factor + smooth)
        factors.append(1 if length < trained / high else factor if length > trained / low else inside)
    return torch.tensor(factors, dtype=torch.float32)


# ---------------------------------------------------------------------------------------------------------- reading


class GgufMetadata:
    """A GGUF file's architecture, metadata (`values`), and tensors by name."""

    def __init__(self, path: Path) -> None:
        import gguf

        reader = gguf.GGUFReader(path)
        self.values: dict[str, Any] = {
            name: entry.contents() for name, entry in reader.fields.items() if not name.startswith("tokenizer.")
        }
        self.arch = str(self.values.get("general.architecture"))
        self.tensors = {tensor.name: tensor for tensor in reader.tensors}

    def get(self, key: str) -> Any:
        """A value of the model's family; None if the file does not state it."""
        return self.values.get(f"{self.arch}.{key}")

    def tensor(self, name: str) -> torch.Tensor | None:
        """A small tensor in full precision; None if the file has none of this name."""
        tensor = self.tensors.get(name)
        return None if tensor is None else torch.tensor(tensor.data, dtype=torch.float32)


def apply_metadata(config: Any, metadata: GgufMetadata) -> None:
    """Adds to a config that transformers made from a GGUF file what it did not read from it.

    Raises ValueError for what the config cannot express: mixtures of experts, unknown kinds of position scaling.
    """
    if metadata.arch not in KNOWN:
        return
    if metadata.get("expert_count"):
        raise ValueError("it is a mixture of experts, which transformers would read as a dense model")
    head = metadata.get("attention.key_length")
    if head and metadata.arch not in ("gpt2", "phi3"):
        config.head_dim = head
    if metadata.arch == "gpt2":
        config.n_positions = metadata.get("context_length")
        config.n_inner = metadata.get("feed_forward_length")
    if metadata.arch in ("gemma2", "gemma3"):
        width = config.hidden_size // config.num_attention_heads
        is_27b = metadata.get("block_count") == {"gemma2": 46, "gemma3": 62}[metadata.arch]
        config.query_pre_attn_scalar = width if is_27b else head or width
        # The first files of Gemma 2 state no caps, and mean the usual ones.
        caps = {cap: metadata.get(cap) for cap in ("attn_logit_softcapping", "final_logit_softcapping")}
        config.update({cap: value for cap, value in caps.items() if value})
    if metadata.arch == "phi3":
        config.sliding_window = metadata.get("attention.sliding_window") or None
    if getattr(config, "rope_parameters", None) is not None:
        rope = config.rope_parameters
        rope.get("full_attention", rope).update(_rope_of_file(config, metadata))


def _rope_of_file(config: Any, metadata: GgufMetadata) -> dict[str, Any]:
    """transformers' parameters of scaled rotary positions."""
    kind, factor = metadata.get("rope.scaling.type"), metadata.get("rope.scaling.factor")
    trained = metadata.get("rope.scaling.original_context_length")
    factors = metadata.tensor("rope_freqs.weight")
    rope = _rope(config.to_dict())
    if factors is not None:
        for power in range(5, 21):
            llama3 = {**LLAMA3, "factor": float(factors.max()), "original_max_position_embeddings": 2**power}
            if torch.allclose(_llama3_factors(config.to_dict(), {**rope, **llama3}), factors, rtol=1e-4):
                return llama3
        raise ValueError("its rotary positions are divided by factors (rope_freqs) that are not those of Llama 3")
    if metadata.arch == "phi3":
        head = config.hidden_size // config.num_attention_heads
        config.original_max_position_embeddings = trained or config.max_position_embeddings
        phi3 = {"partial_rotary_factor": metadata.get("rope.dimension_count") / head}
        long, short = (metadata.tensor(f"rope_factors_{name}.weight") for name in ("long", "short"))
        if long is not None and short is not None:
            phi3 |= {"rope_type": "longrope", "long_factor": long.tolist(), "short_factor": short.tolist()}
            phi3 |= {"original_max_position_embeddings": trained}
        return phi3
    if kind in (None, "none"):
        return {}
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn":
        values = {name: metadata.get(f"rope.scaling.yarn_{key}") for name, key in YARN.items()}
        values = {name: value for name, value in values.items() if value is not None}
        return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": trained, **values}
    raise ValueError(f"its rotary positions are scaled in the unknown way '{kind}'")


def differences(config: Any, metadata: GgufMetadata) -> list[str]:
    """Differences of a config from the file it was made from, as "key: file's value, config's value"."""
    import gguf

    if metadata.arch not in KNOWN:
        return []
    writer = gguf.GGUFWriter(None, metadata.arch)
    values = config.to_dict()
    for method, value in parameters(values, metadata.arch).items():
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    ours = {name: entry.value for name, entry in writer.kv_data[0].items()}
    result = [
        f"{name}: {metadata.values[name]}, {value}"
        for name, value in ours.items()
        if name in metadata.values and not _same(metadata.values[name], value)
    ]
    for name, tensor in rope_tensors(values, metadata.arch):
        theirs = metadata.tensor(name)
        if theirs is None or not torch.allclose(theirs, tensor, rtol=1e-4):
            result.append(f"{name}: other factors")
    unread = [
        f"{name}: {metadata.get(name)}, none"
        for name in DECISIVE
        if metadata.get(name) and f"{metadata.arch}.{name}" not in ours
    ]
    return result + unread


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, float) or isinstance(other, float):
        return math.isclose(float(one), float(other), rel_tol=1e-5)
    return bool(one == other)
