"""A model directory as a GGUF file, with the package gguf alone: its names of tensors and its quantisers.

What is written is, tensor by tensor and byte by byte, what llama.cpp's own convert_hf_to_gguf.py writes.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from llmft.core.errors import ConfigError
from llmft.core.files import check_space
from llmft.export import vocabulary

SKIPPED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
SOURCE = "llmft.source"
SMALL = ("q5_1", "q5_0", "q4_1", "q4_0")
"""Beside these, embeddings and head are kept in q8_0: they are most of what so few bits lose."""


@dataclass
class Family:
    """How the tensors of a family of models are written.

    Attributes:
        arch: llama.cpp's name for it.
        change: makes the tensors of the file of one of the directory.
    """

    arch: str
    change: Callable[[str, torch.Tensor, dict[str, Any]], torch.Tensor] = lambda name, tensor, config: tensor


def _permuted(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """llama.cpp turns pairs of neighbouring numbers, transformers the first half with the second."""
    heads = config["num_attention_heads"]
    if name.endswith(("k_proj.weight", "k_proj.bias")):
        heads = config.get("num_key_value_heads") or heads
    elif not name.endswith(("q_proj.weight", "q_proj.bias")):
        return tensor
    return (
        tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)
    )


def _shifted(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """Gemma's norms multiply by one more than their weight."""
    return tensor.float() + 1 if name.endswith("norm.weight") else tensor


def _turned(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """GPT-2's layers have their weights the other way round."""
    return tensor.T if name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")) else tensor


FAMILIES = {
    "llama": Family("llama", _permuted),
    "mistral": Family("llama", _permuted),
    "mixtral": Family("llama", _permuted),
    "qwen2": Family("qwen2"),
    "qwen3": Family("qwen3"),
    "gemma": Family("gemma", _shifted),
    "gemma2": Family("gemma2", _shifted),
    "gemma3_text": Family("gemma3", _shifted),
    "phi3": Family("phi3"),
    "gpt2": Family("gpt2", _turned),
}
"""By transformers' model_type."""


def convert(directory: Path, path: Path, kind: str, source: str = "") -> None:
    """Writes the model of `directory` to the file `path`, numbers as `kind` (f16, q8_0, ...) says.

    `source` is a note of what it was made from. Raises ConfigError for a family or tokenizer that is not known here.
    """
    import gguf

    config, family = described(directory)
    words = vocabulary.read(directory, config["vocab_size"])
    names = tensor_names(config, family)
    writer = gguf.GGUFWriter(path, family.arch)
    planned = []
    for name, shape, load in [*_extra(config, family), *_tensors(pieces(directory), config)]:
        new = name if name.startswith("rope_") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ConfigError(f"{directory}: llama.cpp has no place for {name} in a {family.arch}.")
        stored = _stored(new, shape, kind)
        width = 4 if stored.name == "F32" else 2
        packed = stored.name not in ("F32", "F16")
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, stored)) if packed else math.prod(shape) * width
        planned.append((name, load, stored))
        writer.add_tensor_info(new, shape, np.dtype(np.float32), size, stored)
    check_space(path.parent, sum(info.nbytes for info in writer.tensors[0].values()))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(path.stem)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    if source:
        writer.add_string(SOURCE, source)
    for method, value in _parameters(config, family.arch).items():
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    _write_vocabulary(writer, words, directory)
    _begin(writer)
    for name, load, stored in planned:
        tensor = load()
        tensor = tensor if tensor.dtype in (torch.float16, torch.float32) else tensor.float()
        writer.write_tensor_data(gguf.quants.quantize(family.change(name, tensor, config).contiguous().numpy(), stored))
    writer.close()


def described(directory: Path) -> tuple[dict[str, Any], Family]:
    """A model directory's config and family; raises ConfigError for a family that is not known here."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    family = FAMILIES.get(config["model_type"])
    if family is None:
        raise ConfigError(
            f"format=gguf: models of type {config['model_type']} are not known here ({', '.join(FAMILIES)}): set "
            "converter=DIR to a checkout of llama.cpp, whose converter knows more."
        )
    return config, family


def tensor_names(config: dict[str, Any], family: Family) -> Any:
    """llama.cpp's names of a family's tensors."""
    import gguf

    arch = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == family.arch)
    return gguf.get_tensor_name_map(arch, config.get("num_hidden_layers") or config["n_layer"])


def _begin(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()


def source_of(path: Path) -> str | None:
    """The note of what a GGUF file was made from; None for a file of others, or none."""
    import gguf

    try:
        field = gguf.GGUFReader(path).fields.get(SOURCE)
        return None if field is None else str(field.contents())
    except Exception:
        return None  # whatever the package says of a file that is none


def _stored(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """The number format of a tensor; norms, biases, routers and positions are always in full precision."""
    import gguf

    exact = len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight"))
    if exact or not name.endswith(".weight"):
        return gguf.GGMLQuantizationType.F32
    if kind in SMALL and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    stored = gguf.GGMLQuantizationType[kind.upper()]
    if shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        return gguf.GGMLQuantizationType.F16
    return stored


@dataclass(frozen=True)
class Piece:
    """A tensor of a model directory that is read when it is asked for."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """The tensor; a file is mapped anew each time, so that what was read leaves the memory."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def pieces(directory: Path) -> dict[str, Piece]:
    """All tensors of a model directory by name, unread."""
    tensors: dict[str, Piece] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors |= {name: Piece(path, name, tuple(file.get_slice(name).get_shape())) for name in names}
    return tensors


Loaded = tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]


def _tensors(tensors: dict[str, Piece], config: dict[str, Any]) -> Iterator[Loaded]:
    """Name, shape and content of the tensors to write; the experts of a layer are stacked."""
    stacked: dict[str, list[Piece]] = {}
    count = config.get("num_local_experts") or 0
    for name, piece in tensors.items():
        if name.endswith(SKIPPED) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        expert = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
        if expert is None:
            shape = tuple(reversed(piece.shape)) if _turned_shape(name, config) else piece.shape
            yield name, shape, piece.load
            continue
        together = f"layers.{expert[1]}.feed_forward.experts.{expert[3]}.weight"
        parts = stacked.setdefault(together, [piece] * count)
        parts[int(expert[2])] = piece
    for name, parts in stacked.items():
        shape = (count, *parts[0].shape)
        yield name, shape, lambda parts=parts: torch.stack([piece.load() for piece in parts])  # type: ignore[misc]


def _turned_shape(name: str, config: dict[str, Any]) -> bool:
    return config["model_type"] == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight"))


# ------------------------------------------------------------------------------------------------------- parameters


def _rope(config: dict[str, Any]) -> dict[str, Any]:
    parameters = config.get("rope_parameters") or {}
    return parameters.get("full_attention", parameters)


def _parameters(config: dict[str, Any], arch: str) -> dict[str, Any]:
    """What llama.cpp must know to compute, by the names of gguf's writer."""
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
    """Phi 3's: partly rotated heads, and positions squeezed by factors of two kinds."""
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
    """How positions beyond the trained ones are squeezed; Llama 3's way is a tensor."""
    import gguf

    kind, factor = rope.get("rope_type", "default"), rope.get("factor")
    if kind == "linear":
        return {"rope_scaling_type": gguf.RopeScalingType.LINEAR, "rope_scaling_factor": factor}
    if kind == "yarn":
        return {
            "rope_scaling_type": gguf.RopeScalingType.YARN,
            "rope_scaling_factor": factor,
            "rope_scaling_orig_ctx_len": rope["original_max_position_embeddings"],
            "rope_scaling_yarn_ext_factor": rope.get("extrapolation_factor"),
            "rope_scaling_yarn_attn_factor": rope.get("attention_factor", rope.get("attn_factor")),
            "rope_scaling_yarn_beta_fast": rope.get("beta_fast"),
            "rope_scaling_yarn_beta_slow": rope.get("beta_slow"),
        }
    if kind in ("default", "llama3", "longrope", "su"):
        return {}
    raise ConfigError(f"format=gguf: rotary positions of the kind {kind} have no form in llama.cpp; set converter=DIR.")


def _extra(config: dict[str, Any], family: Family) -> Iterator[Loaded]:
    """Tensors that no file of the directory holds: frequencies of rotary positions."""
    rope = _rope(config)
    if family.arch == "llama" and rope.get("rope_type") == "llama3":
        factors = _llama3_factors(config, rope)
        yield "rope_freqs.weight", tuple(factors.shape), lambda: factors
    for key, name in (("long_factor", "rope_factors_long.weight"), ("short_factor", "rope_factors_short.weight")):
        if family.arch == "phi3" and rope.get(key):
            tensor = torch.tensor(rope[key], dtype=torch.float32)
            yield name, tuple(tensor.shape), lambda tensor=tensor: tensor  # type: ignore[misc]


def _llama3_factors(config: dict[str, Any], rope: dict[str, Any]) -> torch.Tensor:
    """What each frequency is divided by (transformers' `_compute_llama3_parameters`, turned round)."""
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


# ------------------------------------------------------------------------------------------------------- vocabulary


def _write_vocabulary(writer: Any, words: vocabulary.Vocabulary, directory: Path) -> None:
    """Tokens, special ones, and the chat template; a begin token that the template writes is not added again."""
    from transformers import AutoTokenizer, GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    writer.add_tokenizer_model(words.kind)
    writer.add_tokenizer_pre(words.pre)
    writer.add_token_list(words.tokens)
    if words.scores:
        writer.add_token_scores(words.scores)
    writer.add_token_types(words.types)
    if words.merges:
        writer.add_token_merges(words.merges)
    for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"):
        number = getattr(tokenizer, f"{name}_token_id", None)
        if number is not None and hasattr(writer, f"add_{name}_token_id"):
            getattr(writer, f"add_{name}_token_id")(number)
    ends = (
        GenerationConfig.from_pretrained(directory).eos_token_id
        if (directory / "generation_config.json").is_file()
        else []
    )
    others = [one for one in (ends if isinstance(ends, list) else [ends]) if one not in (None, tokenizer.eos_token_id)]
    if others:
        writer.add_eot_token_id(others[0])
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    written = tokenizer.bos_token is not None and _first_text(tokenizer).startswith(tokenizer.bos_token)
    writer.add_add_bos_token(begins and not written)
    if words.space is not None:
        writer.add_add_space_prefix(words.space)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _first_text(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return ""
    return str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))


# ---------------------------------------------------------------------------------------------------------- adapter


def convert_adapter(
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float, directory: Path, path: Path, kind: str
) -> None:
    """Writes LoRA's (A, B) by the name of the weight they belong to; llama.cpp adds alpha / rank * B A.

    `directory` has the config of the base.
    """
    import gguf

    config, family = described(directory)
    names = tensor_names(config, family)
    writer = gguf.GGUFWriter(path, family.arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (one, two) in factors.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise ConfigError(f"format=gguf_adapter: llama.cpp has no place for a LoRA on {name}.")
        if family.change is _permuted:
            two = _permuted(name, two, config)
        for tensor, end in ((one, "lora_a"), (two, "lora_b")):
            stored = gguf.GGMLQuantizationType[kind.upper()]
            packed = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
            writer.add_tensor(f"{new}.{end}", packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------------- llama.cpp's own


def convert_by(checkout: str, directory: Path, path: Path, kind: str) -> None:
    """The same by llama.cpp's converter in `checkout`; raises ConfigError with what it says when it fails."""
    script = Path(checkout).expanduser() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(directory), "--outfile", str(path), "--outtype", kind]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise ConfigError(f"converter={checkout}: {lines[-1] if lines else 'it failed'}")


def quantize(source: Path, path: Path, kind: str) -> str | None:
    """Runs llama.cpp's llama-quantize where it is on the path; returns the command where it is not."""
    program = shutil.which("llama-quantize")
    if program is None:
        return f"llama-quantize {source} {path} {kind.upper()}"
    done = subprocess.run([program, str(source), str(path), kind.upper()], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"type={kind}: llama-quantize failed ({done.stderr.strip().splitlines()[-1:]}).")
    return None
