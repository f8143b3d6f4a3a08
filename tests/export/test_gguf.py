"""GGUF files: every family gives the same in llama.cpp as in transformers, and as with llama.cpp's converter."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmft.core.errors import ConfigError
from llmft.export import gguf
from llmft.export.llamacpp import LlamaCpp, is_installed
from tests.conftest import ROOT, SHARED

TINY = ROOT / "llmft" / "assets" / "tiny"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False}  # fmt: skip
HEADS = {**SIZES, "head_dim": 16}
TIED = {**HEADS, "tie_word_embeddings": True}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {**SIZES, "rope_parameters": LLAMA3}),
    "mistral": ("mistral", HEADS),
    "mixtral": ("mixtral", {**SIZES, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2": ("qwen2", SIZES),
    "qwen3": ("qwen3", HEADS),
    "gemma": ("gemma", TIED),
    "gemma2": ("gemma2", {**TIED, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "gemma3": ("gemma3_text", {**TIED, "sliding_window": 32, "query_pre_attn_scalar": 16}),
    "phi3": ("phi3", {**SIZES, "original_max_position_embeddings": 128, "pad_token_id": 0}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "n_ctx": 128}),
}
TEXTS = (
    "Hello, World! 123 it's",
    "  two  spaces\n\n\ttab 3.14 don't WE'LL",
    "Straße 日本語 🚀 ünïcode",
    "a" * 40,
    "x = [1, 2];",
)
REAL = ("gpt2", "llama2", "mistral_v3")
CONVERTER = Path(os.environ.get("LLAMA_CPP", "/nowhere")) / "convert_hf_to_gguf.py"


def random_model(
    folder: Path,
    family: str,
    tokenizer: Path = TINY,
    dtype: torch.dtype = torch.float32,
    *,
    exact_norms: bool = False,
    **config: Any,
) -> Path:
    """A small random model of a family, with norms other than 1; `exact_norms` are exact in 16 bits even plus 1."""
    kind, sizes = FAMILIES[family]
    words = AutoTokenizer.from_pretrained(tokenizer)
    ids = {"bos_token_id": words.bos_token_id, "eos_token_id": words.eos_token_id}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(kind, vocab_size=len(words), **{**ids, **sizes, **config})
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.mul_(4)
                continue
            parameter.add_(0.1 * torch.randn_like(parameter))
            if exact_norms:
                parameter.copy_((parameter * 1024).round() / 1024)
    model.to(dtype).save_pretrained(folder)
    words.save_pretrained(folder)
    if (tokenizer / "tokenizer.model").is_file():
        shutil.copy(tokenizer / "tokenizer.model", folder)
    return folder


@pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_writes_in_llama_cpp_what_it_writes_in_transformers(family: str, tmp_path: Path) -> None:
    directory = random_model(tmp_path / "model", family)
    gguf.convert(directory, tmp_path / "model.gguf", "f32")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    prompt = [1, 40, 80, 120, 300, 5, 77, 200]
    with torch.no_grad():
        ids = model.generate(
            torch.tensor([prompt]), max_new_tokens=40, do_sample=False, eos_token_id=None, pad_token_id=0
        )
        logits = model(ids).logits[0].log_softmax(-1)
    engine = LlamaCpp(tmp_path / "model.gguf", 128)
    tokens = engine.generate(prompt, 40)
    assert len(tokens) > 0
    for index, (token, probability) in enumerate(tokens):
        if token != int(ids[0, len(prompt) + index]):  # a tie of two tokens
            two = logits[len(prompt) + index - 1].topk(2).values
            assert float(two[0] - two[1]) < 2e-3
            assert index > 0
            break
        expected = float(logits[len(prompt) + index - 1, token])
        assert probability is None or probability == pytest.approx(expected, abs=5e-3)


@pytest.mark.skipif(not is_installed(), reason="xllamacpp is not installed")
@pytest.mark.parametrize(
    "name", ["tiny", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gpt2", "llama2", "mistral_v3"))]
)
def test_a_tokenizer_makes_in_llama_cpp_the_tokens_it_makes_here(name: str, tmp_path: Path) -> None:
    source = TINY if name == "tiny" else SHARED / "tokenizers" / name
    if not source.is_dir():
        pytest.skip(f"the tokenizer is not here: {source}")
    directory = random_model(tmp_path / "model", "llama", source)
    (directory / "tokenizer.model").unlink(missing_ok=True)  # derived from tokenizer.json alone
    gguf.convert(directory, tmp_path / "model.gguf", "q8_0")
    words, engine = AutoTokenizer.from_pretrained(directory), LlamaCpp(tmp_path / "model.gguf", 128)
    special = f"{words.bos_token}one{words.eos_token}"
    for text in (*TEXTS, special, f"{words.bos_token} two"):
        text = text if name in ("tiny", "gpt2") or text.startswith(words.bos_token) else words.bos_token + text
        assert engine.tokens(text) == words(text, add_special_tokens=False).input_ids, text


@pytest.mark.slow
@pytest.mark.skipif(not CONVERTER.is_file(), reason="LLAMA_CPP names no checkout of llama.cpp")
@pytest.mark.parametrize("kind", ["f16", "bf16", "q8_0", "f32"])
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "qwen2"])
def test_tensors_are_those_of_llama_cpps_own_converter(family: str, kind: str, tmp_path: Path) -> None:
    """Qwen 2 alone of these families asks for a tokenizer on its list; its tensors are written as Qwen 3's."""
    name = "llama2" if family in ("mistral", "mixtral", "gemma", "gemma2", "gemma3", "phi3") else "gpt2"
    directory = random_model(tmp_path / "model", family, SHARED / "tokenizers" / name, torch.float16)
    command = [
        sys.executable,
        str(CONVERTER),
        str(directory),
        "--outfile",
        str(tmp_path / "theirs.gguf"),
        "--outtype",
        kind,
    ]
    subprocess.run(command, check=True, capture_output=True)
    gguf.convert(directory, tmp_path / "ours.gguf", kind)
    from gguf import GGUFReader

    theirs, ours = ({t.name: t for t in GGUFReader(tmp_path / f"{one}.gguf").tensors} for one in ("theirs", "ours"))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].tensor_type == tensor.tensor_type, name
        assert list(ours[name].shape) == list(tensor.shape), name
        assert np.array_equal(ours[name].data, tensor.data), name


def test_what_is_not_known_is_named_with_the_way_out(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    directory = random_model(tmp_path / "model", "qwen3")
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace('"qwen3"', '"olmo"').replace("Qwen3For", "OlmoFor"))
    with pytest.raises(ConfigError, match=r"models of type olmo are not known here .*converter=DIR"):
        gguf.convert(directory, tmp_path / "a.gguf", "f16")
    (directory / "config.json").write_text(config)
    Tokenizer(models.Unigram([("a", 0.0)])).save(str(directory / "tokenizer.json"))
    with pytest.raises(ConfigError, match="a Unigram tokenizer"):
        gguf.convert(directory, tmp_path / "a.gguf", "f16")
    assert not (tmp_path / "a.gguf").exists()
