"""Merged weights of every kind of adapter and base give the same outputs in plain transformers."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from llmft.config.model import QuantizationConfig, QuantizationFormat
from llmft.export import weights
from llmft.model.quantization import keep_packing, quantize_in_place

SIZES = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "pad_token_id": 0,
         "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}  # fmt: skip
GPT2 = {"vocab_size": 96, "n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64}
MIXTRAL = {**SIZES, "num_local_experts": 4}
CASES: dict[str, tuple[str, dict[str, Any], str, dict[str, Any]]] = {
    "4-bit": ("llama", SIZES, "nf4", {}),
    "8-bit": ("llama", SIZES, "int8", {}),
    "dora": ("qwen2", SIZES, "nf4", {"use_dora": True}),
    "rank-stabilised": ("qwen2", SIZES, "none", {"use_rslora": True}),
    "gpt2 turned layers": ("gpt2", GPT2, "nf4", {}),
    "gpt2 dora": ("gpt2", GPT2, "none", {"use_dora": True, "fan_in_fan_out": True}),
    "experts stacked": ("mixtral", MIXTRAL, "nf4", {"target_modules": ["q_proj", "v_proj"]}),
    "tied head": ("llama", {**SIZES, "tie_word_embeddings": True}, "nf4", {}),
    "tied, embeddings trained": (
        "llama",
        {**SIZES, "tie_word_embeddings": True},
        "nf4",
        {"modules_to_save": ["embed_tokens"]},
    ),
    "embeddings adapted": (
        "llama",
        {**SIZES, "tie_word_embeddings": True},
        "none",
        {"target_modules": ["embed_tokens", "q_proj"]},
    ),
    "head trained": ("llama", SIZES, "nf4", {"modules_to_save": ["lm_head"]}),
}


def adapted(
    kind: str, sizes: dict[str, Any], quantization: str, lora: dict[str, Any], auto: Any = AutoModelForCausalLM
) -> Any:
    """A small random model with an adapter that changes its outputs."""
    torch.manual_seed(0)
    base = auto.from_config(AutoConfig.for_model(kind, **sizes)).eval()
    form = QuantizationConfig(QuantizationFormat(quantization))
    quantize_in_place(base, form, torch.float32, ["score"], torch.device("cpu"))
    keep_packing(base)
    task = peft.TaskType.CAUSAL_LM if auto is AutoModelForCausalLM else peft.TaskType.SEQ_CLS
    options = {
        "r": 4,
        "lora_alpha": 8,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "task_type": task,
        **lora,
    }
    model = peft.get_peft_model(base, peft.LoraConfig(**options)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name or "magnitude" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    return model


IDS = torch.tensor([[5, 17, 3, 60, 2, 9, 41, 8]])


@pytest.mark.parametrize("case", CASES)
def test_a_merged_model_computes_what_the_adapter_on_its_base_does(case: str, tmp_path: Path) -> None:
    model = adapted(*CASES[case])
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        weights.write(model, weights.plan_export(model, "causal_lm"), tmp_path, torch.float32)
        logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=IDS).logits
    # 8-bit layers round their inputs as well, which merged weights do not.
    assert logits.sub(expected).abs().max() < (5e-2 if case == "8-bit" else 2e-5)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_head_is_written_whole_with_its_classes(tmp_path: Path) -> None:
    model = adapted("llama", {**SIZES, "num_labels": 3}, "nf4", {}, AutoModelForSequenceClassification)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        weights.write(model, weights.plan_export(model, "sequence_classification"), tmp_path, torch.float16)
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
        logits = plain(input_ids=IDS).logits
    assert logits.sub(expected).abs().max() < 5e-3
    assert torch.equal(plain.score.weight, model.base_model.model.score.modules_to_save["default"].weight.float())


def test_a_weight_beyond_fp16_is_refused_and_large_models_are_divided(tmp_path: Path, monkeypatch: Any) -> None:
    model = adapted("llama", SIZES, "none", {})
    monkeypatch.setattr(weights, "SHARD_BYTES", 60_000)
    merged = weights.plan_export(model, "causal_lm")
    weights.write(model, merged, tmp_path, torch.float16)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob("*.safetensors")} == {0o644}
    assert set(json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"].values()) == set(files)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        logits = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)(input_ids=IDS).logits
        assert logits.sub(expected).abs().max() < 2e-2
        model.base_model.model.model.embed_tokens.weight[0, 0] = 1e6
    with pytest.raises(weights.Overflow, match="embed_tokens"):
        weights.write(model, merged, tmp_path, torch.float16)
