"""Estimates for other GPUs: arithmetic that must not contradict itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from llmft.checks.cards import CARDS, MOST_CARDS, SHARE_OF_RATE, cells, plan_cards, recomputation
from llmft.config.trainer import Checkpointing
from llmft.data.hub import Located
from llmft.model.load import model_config
from llmft.model.memory import StepMemory
from tests.conftest import compose
from tests.model.test_twins import FIRST, twin

OPERATIONS = 1e18
WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}


def wide(layers: int, *overrides: str) -> tuple[Any, Any]:
    """A training's config, and transformers' of a Llama as wide as one of 70B weights."""
    config = compose("model=tiny", "data=alpaca", "data.files=none", "logger=none", *overrides)
    config.model = twin(FIRST["llama"], num_hidden_layers=layers, head_dim=128, **WIDE)
    return config, model_config(config.model, Located(None, "random"))


def planned(layers: int, *overrides: str) -> dict[str, dict[str, Any]]:
    """The plans of its training on rows of 1,000 tokens, by card."""
    config, architecture = wide(layers, *overrides)
    examples: Any = SimpleNamespace(lengths=np.full(100, 1000), labelled_tokens=np.full(100, 100))
    return {plan["card"]: plan for plan in plan_cards(config, examples, architecture, OPERATIONS)}


@pytest.mark.parametrize("double", [True, False])
def test_the_base_takes_what_arithmetic_by_hand_says(double: bool) -> None:
    layers = 4
    config, architecture = wide(layers, f"quantization.double_quant={str(double).lower()}")
    memory = StepMemory(config, architecture, torch.bfloat16, "cuda")
    quantised = layers * (2 * 8192 * 8192 + 2 * 8192 * 1024 + 3 * 8192 * 28672)
    in_16_bits = 2 * 512 * 8192 + (2 * layers + 1) * 8192
    scales = (1 + 4 / 256) / 64 if double else 4 / 64  # bytes a weight
    assert memory.base == pytest.approx(quantised * (1 / 2 + scales) + 2 * in_16_bits, rel=1e-4)
    one, two = (memory.at(1000, 1000, 100, Checkpointing.full, num_shards=shards) for shards in (1, 2))
    quantized_bytes = quantised * scales  # which is on each card
    assert two.base == pytest.approx((one.base - quantized_bytes) / 2 + quantized_bytes, rel=1e-4)


def test_a_larger_card_takes_no_less_and_a_faster_one_no_longer() -> None:
    plans = planned(16)
    assert list(plans) == [card.name for card in CARDS]
    small, large = plans["T4"], plans["H200"]
    assert (small["precision"], large["precision"]) == ("fp16", "bf16")
    assert small["cards"] == large["cards"] == 1
    assert small["micro_batch"]["tokens"] <= large["micro_batch"]["tokens"]
    assert small["gradient_checkpointing"] == "full"
    assert large["gradient_checkpointing"] == "none"
    assert small["hours"][0] > 5 * large["hours"][0]
    for card in CARDS:
        assert plans[card.name]["peak"] < 0.8 * card.gib * 2**30
        assert plans[card.name]["hours"][0] < plans[card.name]["hours"][1]
        rate = card.flops * recomputation(compose(), Checkpointing(plans[card.name]["gradient_checkpointing"])) ** -1
        hours = [OPERATIONS / (share * rate) / 3600 for share in reversed(SHARE_OF_RATE)]
        assert plans[card.name]["hours"] == pytest.approx(hours), "operations over the share of the maker's rate"
    least, most = large["hours"]
    assert cells(large, 2 * most)[-1].endswith("enough")
    assert cells(large, (least + most) / 2)[-1].endswith("perhaps")
    assert cells(large, least / 2)[-1].endswith("too long")


@pytest.mark.slow
def test_a_base_that_fits_on_no_single_card_is_divided() -> None:
    plans = planned(80)  # 70B weights, 33 GiB in 4 bits
    assert plans["H200"]["cards"] == 1
    assert plans["RTX 3090"]["cards"] > 1
    assert "trainer=fsdp" in cells(plans["RTX 3090"], None)[2]
    unquantized = planned(80, "quantization=none")
    assert unquantized["T4"]["cards"] is None
    assert cells(unquantized["T4"], None)[2] == f"not on {MOST_CARDS}"


@pytest.mark.parametrize("key", ["trainer.micro_batch=2", "trainer.gradient_checkpointing=full"])
def test_what_is_configured_stands(key: str) -> None:
    plan = planned(2, key)["H100 80 GB"]
    name = key.partition("=")[0]
    assert (plan["micro_batch"]["rows"] if name.endswith("micro_batch") else plan["gradient_checkpointing"]) in (
        2,
        "full",
    )
