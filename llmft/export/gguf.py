"""Converts a model directory to a GGUF file, with the tensor names and quantisers of the package gguf.

The tensors are byte for byte those that llama.cpp's convert_hf_to_gguf.py writes.
"""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from llmft.core.errors import ConfigError
from llmft.core.files import check_space
from llmft.data.gguf_parameters import parameters, rope_tensors
from llmft.export import vocabulary

SKIPPED = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
SOURCE = "llmft.source"
SMALL_TYPES = ("q5_1", "q5_0", "q4_1", "q4_0")
"""With these types, embeddings and head are stored in q8_0, since they would lose the most."""


ARCHITECTURES = {
    **dict.fromkeys(("llama", "mistral", "mixtral"), "llama"),
    **{name: name for name in ("qwen2", "qwen3", "gemma", "gemma2", "phi3", "gpt2")},
    "gemma3_text": "gemma3",
}
"""transformers' model_type -> llama.cpp's name of the architecture."""


def as_llamacpp(name: str, tensor: torch.Tensor, config: dict[str, Any], arch: str) -> torch.Tensor:
    """Converts a tensor of a model directory to llama.cpp's layout."""
    if arch == "llama" and name.endswith(("q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")):
        # RoPE: llama.cpp rotates adjacent pairs, transformers pairs the first half with the second.
        heads = config["num_attention_heads"]
        if "k_proj" in name:
            heads = config.get("num_key_value_heads") or heads
        pairs = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
        return pairs.swapaxes(1, 2).reshape(tensor.shape)
    if arch.startswith("gemma") and name.endswith("norm.weight"):
        return tensor + 1  # Gemma's norms multiply by weight + 1
    if arch == "gpt2" and name.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
        return tensor.T  # GPT-2's layers have transposed weights
    return tensor


def convert(directory: Path, path: Path, kind: str, source: str = "") -> None:
    """Writes the model in `directory` to the file `path` in the number format `kind` (f16, q8_0, ...).

    `source` identifies what it was made from. Raises ConfigError for an unknown architecture or tokenizer.
    """
    import gguf

    config, arch, names = described(directory)
    words = vocabulary.read(directory, config["vocab_size"])
    writer = gguf.GGUFWriter(path, arch)
    planned = []
    for name, shape, load in _tensors(stored_tensors(directory), config, arch):
        new = name if name.startswith("rope_") else names.get_name(name, try_suffixes=(".weight", ".bias"))
        if new is None:
            raise ConfigError(f"{directory}: llama.cpp has no tensor for {name} in a {arch} model.")
        shape = tuple(as_llamacpp(name, torch.empty(shape, device="meta"), config, arch).shape)
        stored = _stored(new, shape, kind)
        planned.append((name, load, stored))
        size = math.prod(gguf.quant_shape_to_byte_shape(shape, stored))
        writer.add_tensor_info(new, shape, np.dtype(np.float32), size, stored)
    check_space(path.parent, sum(info.nbytes for info in writer.tensors[0].values()))
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(path.stem)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(gguf.LlamaFileType["ALL_F32" if kind == "f32" else f"MOSTLY_{kind.upper()}"])
    if source:
        writer.add_string(SOURCE, source)
    for method, value in parameters(config, arch).items():
        if value is not None:
            getattr(writer, f"add_{method}")(value)
    _write_vocabulary(writer, words, directory)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, load, stored in planned:
        tensor = load()
        tensor = tensor if tensor.dtype in (torch.float16, torch.float32) else tensor.float()
        tensor = as_llamacpp(name, tensor, config, arch)
        writer.write_tensor_data(gguf.quants.quantize(tensor.contiguous().numpy(), stored))
    writer.close()


def described(directory: Path) -> tuple[dict[str, Any], str, Any]:
    """(config, llama.cpp's name of the architecture, its tensor names) of a model directory.

    Raises ConfigError for an unknown architecture.
    """
    import gguf
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(directory, local_files_only=True).to_dict()
    arch = ARCHITECTURES.get(config["model_type"])
    if arch is None:
        raise ConfigError(
            f"format=gguf: models of type {config['model_type']} are not known here ({', '.join(ARCHITECTURES)}): set "
            "converter=DIR to a checkout of llama.cpp, whose converter supports more."
        )
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == arch)
    return config, arch, gguf.get_tensor_name_map(number, config.get("num_hidden_layers") or config["n_layer"])


def source_of(path: Path) -> str | None:
    """The `source` of a GGUF file that llmft wrote; None for other files, or if there is none."""
    import gguf

    try:
        field = gguf.GGUFReader(path).fields.get(SOURCE)
        return None if field is None else str(field.contents())
    except Exception:
        return None  # the package's errors for a file that is not GGUF


def _stored(name: str, shape: tuple[int, ...], kind: str) -> Any:
    """The number format of a tensor; norms, biases, routers and positions are always fp32."""
    import gguf

    exact = len(shape) < 2 or name.endswith(("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight"))
    if exact or not name.endswith(".weight"):
        return gguf.GGMLQuantizationType.F32
    if kind in SMALL_TYPES and name in ("token_embd.weight", "output.weight"):
        kind = "q8_0"
    stored = gguf.GGMLQuantizationType[kind.upper()]
    if shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
        return gguf.GGMLQuantizationType.F16
    return stored


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a model directory that is loaded on demand."""

    path: Path
    name: str
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """Loads the tensor; the file is mapped each time, so that memory is released."""
        with safe_open(self.path, framework="pt") as file:
            return file.get_tensor(self.name)


def stored_tensors(directory: Path) -> dict[str, StoredTensor]:
    """name -> tensor of a model directory, not loaded."""
    tensors: dict[str, StoredTensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            tensors |= {name: StoredTensor(path, name, tuple(file.get_slice(name).get_shape())) for name in names}
    return tensors


def _tensors(
    tensors: dict[str, StoredTensor], config: dict[str, Any], arch: str
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], torch.Tensor]]]:
    """(name, shape, loader) of the tensors to write; the experts of a layer are stacked."""
    for name, tensor in rope_tensors(config, arch):
        yield name, tuple(tensor.shape), tensor.clone
    stacked: dict[str, list[StoredTensor]] = {}
    count = config.get("num_local_experts") or 0
    for name, piece in tensors.items():
        if name.endswith(SKIPPED) or (name == "lm_head.weight" and config.get("tie_word_embeddings")):
            continue
        expert = re.fullmatch(r"model\.layers\.(\d+)\.block_sparse_moe\.experts\.(\d+)\.(w[123])\.weight", name)
        if expert is None:
            yield name, piece.shape, piece.load
            continue
        together = f"layers.{expert[1]}.feed_forward.experts.{expert[3]}.weight"
        parts = stacked.setdefault(together, [piece] * count)
        parts[int(expert[2])] = piece
    for name, parts in stacked.items():
        yield name, (count, *parts[0].shape), partial(_stack, parts)


def _stack(parts: list[StoredTensor]) -> torch.Tensor:
    return torch.stack([piece.load() for piece in parts])


# ------------------------------------------------------------------------------------------------------- vocabulary


def _write_vocabulary(writer: Any, words: vocabulary.Vocabulary, directory: Path) -> None:
    """Writes tokens, special tokens and the chat template; a BOS token in the template is not added twice."""
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
        if number is not None and number < len(words.tokens) and hasattr(writer, f"add_{name}_token_id"):
            getattr(writer, f"add_{name}_token_id")(number)
    if (directory / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(directory).eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        if others := [end for end in ends if end not in (None, tokenizer.eos_token_id)]:
            writer.add_eot_token_id(others[0])
    begins = tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    if tokenizer.chat_template:
        text = str(tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False))
        begins = begins and not (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))
        writer.add_chat_template(tokenizer.chat_template)
    writer.add_add_bos_token(begins)
    if words.space is not None:
        writer.add_add_space_prefix(words.space)


# ---------------------------------------------------------------------------------------------------------- adapter


def convert_adapter(
    factors: dict[str, tuple[torch.Tensor, torch.Tensor]], alpha: float, directory: Path, path: Path, kind: str
) -> None:
    """Writes LoRA's `factors`, name of a weight -> (A, B); llama.cpp adds alpha / rank * B A.

    `directory` contains the base's config.
    """
    import gguf

    config, arch, names = described(directory)
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    for name, (a, b) in factors.items():
        new = names.get_name(name, try_suffixes=(".weight",))
        if new is None:
            raise ConfigError(f"format=gguf_adapter: llama.cpp has no tensor for a LoRA on {name}.")
        if arch == "llama":  # its q and k rows have another order
            b = as_llamacpp(name, b, config, arch)
        for tensor, end in ((a, "lora_a"), (b, "lora_b")):
            stored = gguf.GGMLQuantizationType[kind.upper()]
            packed = gguf.quants.quantize(tensor.float().contiguous().numpy(), stored)
            writer.add_tensor(f"{new}.{end}", packed, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ---------------------------------------------------------------------------------------------------- llama.cpp's own


def convert_by(checkout: str, directory: Path, path: Path, kind: str) -> None:
    """Like `convert`, by llama.cpp's converter in `checkout`; raises ConfigError with its message if it fails."""
    script = Path(checkout).expanduser() / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(directory), "--outfile", str(path), "--outtype", kind]
    _run(command, f"converter={checkout}")


def quantize(source: Path, path: Path, kind: str) -> bool:
    """Runs llama.cpp's llama-quantize; returns False if it is not on the path."""
    program = shutil.which("llama-quantize")
    if program is None:
        return False
    _run([program, str(source), str(path), kind.upper()], f"type={kind}: llama-quantize")
    return True


def _run(command: list[str], what: str) -> None:
    """Runs a program. Raises ConfigError with its last line if it fails."""
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        lines = (result.stderr.strip() or result.stdout.strip()).splitlines()
        raise ConfigError(f"{what} failed ({lines[-1] if lines else 'no message'}).")
