"""model.path=FILE.gguf: a GGUF file is a model directory, dequantised once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llmft.core.errors import ConfigError
from llmft.data.gguf_files import as_directory

pytest.importorskip("gguf")

from llmft.data.gguf_parameters import GgufMetadata, apply_metadata, differences
from llmft.export import gguf
from tests.conftest import SHARED
from tests.export.test_gguf import FAMILIES, TEXTS, random_model


def test_a_gguf_file_is_read_back_as_what_it_was_made_from_and_made_again(tmp_path: Path) -> None:
    source = random_model(tmp_path / "model", "llama", dtype=torch.float16)
    gguf.convert(source, tmp_path / "model.gguf", "f16")
    directory = as_directory(tmp_path / "model.gguf")
    assert as_directory(tmp_path / "model.gguf") == directory
    before, after = (load_file(folder / "model.safetensors") for folder in (source, directory))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    gguf.convert(directory, tmp_path / "again.gguf", "f16")
    assert (tmp_path / "again.gguf").stat().st_size > 0


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
          "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64,
        "partial_rotary_factor": 0.5, "long_factor": [1.0, 2.0, 4.0, 8.0],
        "short_factor": [1.0, 1.1, 1.2, 1.3]}  # fmt: skip
SQUEEZED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2 yarn": ("qwen2", {"rope_parameters": YARN}),
    "llama linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "gemma3 linear": ("gemma3", {"rope_parameters": LINEAR, "num_hidden_layers": 6}),
    "phi3 window": ("phi3", {"sliding_window": 32}),
    "phi3 long": ("phi3", {"rope_parameters": LONG, "original_max_position_embeddings": 64}),
}
READ = [family for family in FAMILIES if family not in ("mixtral", "gemma")]


@pytest.mark.parametrize("name", [*READ, *SQUEEZED])
def test_a_model_computes_what_it_did_before_it_was_a_gguf_file(name: str, tmp_path: Path) -> None:
    """Head sizes, scales and scaled positions are read too, which transformers alone does not read."""
    family, more = SQUEEZED.get(name, (name, {}))
    source = random_model(tmp_path / "model", family, dtype=torch.float16, exact_norms=True, **more)
    gguf.convert(source, tmp_path / "model.gguf", "f16")
    ids = torch.randint(1, 300, (1, 100), generator=torch.Generator().manual_seed(0))
    logits = []
    for directory in (source, as_directory(tmp_path / "model.gguf")):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        with torch.no_grad():
            logits.append(model(ids).logits)
    assert torch.allclose(*logits, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "llama2", "mistral_v3"])
def test_a_text_has_the_tokens_that_it_had_before(name: str, tmp_path: Path) -> None:
    tokenizer = SHARED / "tokenizers" / name
    if not tokenizer.is_dir():
        pytest.skip(f"the tokenizer is not here: {tokenizer}")
    source = random_model(tmp_path / "model", "llama", tokenizer, torch.float16)
    gguf.convert(source, tmp_path / "model.gguf", "f16")
    before, after = (AutoTokenizer.from_pretrained(d) for d in (source, as_directory(tmp_path / "model.gguf")))
    for text in (*TEXTS, " lead", "trail  ", f"one{before.eos_token} two{before.eos_token}three"):
        assert after(text).input_ids == before(text).input_ids, text
        assert after.decode(after(text).input_ids) == before.decode(before(text).input_ids)


def test_what_transformers_would_read_wrongly_is_refused(tmp_path: Path) -> None:
    gguf.convert(random_model(tmp_path / "experts", "mixtral"), tmp_path / "experts.gguf", "f16")
    with pytest.raises(ConfigError, match="a mixture of experts"):
        as_directory(tmp_path / "experts.gguf")
    gguf.convert(random_model(tmp_path / "model", "llama"), tmp_path / "model.gguf", "f16")
    config = AutoConfig.from_pretrained(tmp_path, gguf_file="model.gguf")
    metadata = GgufMetadata(tmp_path / "model.gguf")
    apply_metadata(config, metadata)
    assert differences(config, metadata) == []
    metadata.values |= {"llama.logit_scale": 0.5, "llama.attention.head_count_kv": 4}
    assert differences(config, metadata) == ["llama.attention.head_count_kv: 4, 2", "logit_scale: 0.5, none"]
    metadata.values |= {"llama.rope.scaling.type": "longrope"}
    del metadata.tensors["rope_freqs.weight"]  # which alone implies Llama 3's scaling
    with pytest.raises(ValueError, match="scaled in the unknown way 'longrope'"):
        apply_metadata(config, metadata)


def test_a_file_that_is_none_is_refused_in_one_sentence(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "model.gguf"
    with pytest.raises(ConfigError, match=r"model\.path=.*: No such file"):
        as_directory(path)
    path.write_bytes(b"PK" * 100)
    with pytest.raises(ConfigError, match="not a GGUF file"):
        as_directory(path)
    path.write_bytes(b"GGUF" + b"\xff" * 100)
    with pytest.raises(ConfigError, match="transformers cannot read it"):
        as_directory(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "llmft\[gguf\]"'):
        as_directory(path)
