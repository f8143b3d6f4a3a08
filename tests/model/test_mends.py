"""Workarounds for library bugs: each test fails once its workaround is no longer needed and can be removed."""

from __future__ import annotations

import inspect
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from transformers import BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.models.falcon import modeling_falcon
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

from llmft.data.hub import Located
from llmft.model.experts import fused_shapes
from llmft.model.load import model_config
from llmft.model.meta import meta_model
from llmft.model.quantization import keep_packing
from tests.model.test_twins import FIRST, twin

NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")


def test_transformers_still_leaves_falcons_linear_layers_unquantised() -> None:
    """`families.prepare`."""
    assert "class FalconLinear(nn.Linear)" in inspect.getsource(modeling_falcon)
    model = torch.nn.ModuleDict({"own": type("FalconLinear", (torch.nn.Linear,), {})(64, 64)})
    model["plain"] = torch.nn.Linear(64, 64)
    replace_with_bnb_linear(model, quantization_config=NF4)
    assert [type(model[name]).__name__ for name in ("own", "plain")] == ["FalconLinear", "Linear4bit"]


def test_transformers_still_leaves_stacked_experts_unquantised() -> None:
    """`llmft.model.experts`."""
    model = meta_model("causal_lm", model_config(twin(FIRST["mixtral"]), Located(None, "")))
    replace_with_bnb_linear(model, quantization_config=NF4)
    quantizer = Bnb4BitHfQuantizer(NF4)
    needed = [quantizer.param_needs_quantization(model, name) for name in fused_shapes(model)]
    assert needed
    assert not any(needed)
    assert quantizer.param_needs_quantization(model, "model.layers.0.self_attn.q_proj.weight")


@pytest.mark.skipif(not bnb.functional.has_avx512bf16(), reason="this processor has no bf16 units")
def test_bitsandbytes_still_repacks_the_weights_of_a_layer_that_is_evaluated_on_such_a_cpu() -> None:
    """`keep_packing`."""

    def evaluated(mended: bool) -> bool:
        layer: Any = bnb.nn.Linear4bit(64, 64, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4").to("cpu")
        if mended:
            keep_packing(layer)
        before = layer.weight.data.clone()
        with torch.no_grad():
            layer.eval()(torch.ones(1, 64, dtype=torch.bfloat16))
        return torch.equal(layer.weight.data.flatten(), before.flatten())

    assert [evaluated(False), evaluated(True)] == [False, True]
