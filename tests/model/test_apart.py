"""What a model does with rows behind each other is asked of the model, not of its name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from llmft.model import apart, flat, tail
from tests.model.test_flat import base, check_as_each_alone, rows
from tests.model.test_tail import at_the_ends

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "attn_implementation": "sdpa",
}
HEADS = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
LINEAR = ["linear_attention", "full_attention"]
STREAMS = {"head_dim": 8, "vocab_size_per_layer_input": 512, "hidden_size_per_layer_input": 8, "laurel_rank": 4}
ODD: dict[str, tuple[dict[str, Any], tuple[bool, bool]]] = {
    # A layer that asks for attention twice, with other values; one whose states have a dimension more.
    "diffllama": ({}, (True, False)),
    "gemma3n_text": ({**STREAMS, "num_kv_shared_layers": 0, "layer_types": ["full_attention"] * 2}, (True, False)),
    # Layers that look back without attention: their states would run on from row to row.
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, (False, False)),
    "qwen3_5_text": ({**HEADS, "head_dim": 8, "layer_types": LINEAR}, (False, False)),
    "minimax": ({"num_local_experts": 2, "layer_types": LINEAR}, (False, False)),
    "llama": ({}, (True, True)),
}


def model_of(architecture: str, **config: Any) -> Any:
    torch.manual_seed(0)
    made = transformers.AutoConfig.for_model(architecture, **{**SIZES, **config})
    return transformers.AutoModelForCausalLM.from_config(made, attn_implementation="sdpa").eval()


def test_a_layer_that_looks_back_is_found_at_the_end_too() -> None:
    assert not flat.enable(model_of("lfm2", layer_types=["full_attention", "conv"])).rows


@pytest.mark.parametrize("architecture", ODD)
def test_odd_families_compute_rows_as_each_alone(architecture: str) -> None:
    config, (packed, ends) = ODD[architecture]
    model, ids = model_of(architecture, **config), rows()
    flat.enable(model)
    assert (flat.is_flat(model), tail.takes_ends(model)) == (packed, ends)
    check_as_each_alone(model, ids, at_the_ends(ids))


def test_a_last_layer_that_is_used_again_is_computed_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama")
    layer = model.model.layers[-1]
    forward = type(model.model).forward

    def twice(self: Any, **kwargs: Any) -> Any:
        handle = layer.register_forward_hook(
            lambda module, args, kwargs, output: handle.remove() or module(output, **kwargs), with_kwargs=True
        )
        return forward(self, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", twice)
    flat.enable(model)
    assert (flat.is_flat(model), tail.takes_ends(model)) == (True, False)
    assert not layer._forward_hooks


def test_an_8_bit_base_that_was_asked_has_its_scales_where_they_are_looked_for() -> None:
    model = base("llama", "int8")
    layers = [module for module in model.modules() if type(module).__name__ == "Linear8bitLt"]
    assert tail.takes_ends(model)
    assert all(layer.weight.SCB is not None and layer.state.SCB is None for layer in layers)
    assert len(layers) > 6


def test_a_model_is_left_as_it_was() -> None:
    model, ids = model_of("llama"), rows()
    with torch.no_grad():
        before = model(input_ids=ids).logits
        assert apart.ask(model) == apart.Kept(False, False)  # without the attention that takes blocks
        assert torch.equal(model(input_ids=ids).logits, before)
    assert not model.get_input_embeddings()._forward_hooks
