"""A GGUF file as a model directory: read and dequantised by transformers, once."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

from llmft.core.errors import ConfigError, first_line
from llmft.core.files import cache_directory, staged_directory

PIECES = 256
PIECE_BYTES = 4096
HEAD_BYTES = 2**22
SOURCE = "source"
"""In a converted directory: the path of its GGUF file."""


def directories() -> Path:
    """Where converted files are kept."""
    return cache_directory() / "gguf"


def source_of(directory: Path) -> Path | None:
    """The GGUF file that a converted directory was made from; None if unknown."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return Path((directory / SOURCE).read_text(encoding="utf-8"))
    return None


def as_directory(path: Path) -> Path:
    """The model directory of a GGUF file, from the cache or converted now.

    Raises ConfigError for any other file, or a model that transformers does not read.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            digest = hashlib.sha256(f"3:{size}:".encode() + file.read(HEAD_BYTES))
            for piece in range(PIECES):
                file.seek(size * piece // PIECES)
                digest.update(file.read(PIECE_BYTES))
            file.seek(0)
            magic = file.read(4)
    except OSError as error:
        raise ConfigError(f"model.path={path}: {error.strerror}.") from None
    if magic != b"GGUF":
        raise ConfigError(f"model.path={path}: not a GGUF file.")
    directory = directories() / digest.hexdigest()[:24]
    if not (directory / "config.json").is_file():
        if importlib.util.find_spec("gguf") is None:
            raise ConfigError(f'model.path={path}: GGUF files need the package gguf: pip install "llmft[gguf]".')
        with staged_directory(directory) as staged:
            _convert(path, staged)
    return directory


def _convert(path: Path, directory: Path) -> None:
    """Writes a GGUF file's model, dequantised to fp16, or bf16 if that overflows, and its tokenizer."""
    from llmft.core.imports import load_libraries, quiet_warnings

    load_libraries(training=False)
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

    from llmft.data.gguf_parameters import KNOWN, GgufMetadata, apply_metadata, differences

    with quiet_warnings():
        try:
            metadata = GgufMetadata(path)
            if metadata.arch not in KNOWN:
                print(f"model.path={path}: transformers reads it, which is not checked here.", file=sys.stderr)
            config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
            apply_metadata(config, metadata)
            if different := differences(config, metadata):
                raise ValueError(f"it reads {'; '.join(different)}")
            for dtype in (torch.float16, torch.bfloat16):
                model: Any = AutoModelForCausalLM.from_pretrained(
                    path.parent,
                    gguf_file=path.name,
                    config=config,
                    dtype=dtype,
                    quantization_config=GgufConfig(dequantize=True),
                    local_files_only=True,
                )
                if all(torch.isfinite(weight).all() for weight in model.state_dict().values()):
                    break
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
        except Exception as error:
            message = first_line(error)
            if "ignore_mismatched_sizes" in message:
                message = "its tensors have other shapes than what it reads of the file's metadata"
            raise ConfigError(f"model.path={path}: transformers cannot read it ({message}).") from None
        # Its weights are not quantised any more.
        vars(model.config).pop("quantization_config", None)
        model.hf_quantizer, model.is_quantized = None, False
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
    _mend_tokenizer(directory / "tokenizer.json", model.get_input_embeddings().weight.shape[0])
    (directory / SOURCE).write_text(str(path.resolve()), encoding="utf-8")


def _mend_tokenizer(file: Path, vocabulary: int) -> None:
    """Removes tokens beyond the embeddings: transformers adds those that a tokenizer's class usually has.

    SentencePiece's leading space is added whatever the text begins with, and after special tokens, as in llama.cpp;
    transformers omits it before a space.
    """
    content = json.loads(file.read_text(encoding="utf-8"))
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < vocabulary]
    if (content["pre_tokenizer"] or {}).get("prepend_scheme") == "first" and content["normalizer"] is None:
        replaced = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
        content["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replaced]}
        content["pre_tokenizer"] = None
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
