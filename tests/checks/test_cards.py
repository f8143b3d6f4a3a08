"""What other cards would take: arithmetic that must not contradict itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from llmft.checks.cards import CARDS, plans, told
from llmft.data.hub import Located
from llmft.model.load import model_config
from tests.conftest import compose
from tests.model.test_twins import FIRST, twin

WIDE = {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_key_value_heads": 8}


def planned(layers: int, *overrides: str) -> dict[str, dict[str, Any]]:
    """The plans of a training of a Llama as wide as one of 70B weights, by card."""
    config = compose("model=tiny", "data=alpaca", "data.files=none", "logger=none", *overrides)
    config.model = twin(FIRST["llama"], num_hidden_layers=layers, head_dim=128, **WIDE)
    examples: Any = SimpleNamespace(lengths=np.full(100, 1000), labelled_tokens=np.full(100, 100))
    architecture = model_config(config.model, Located(None, "random"))
    return {plan["card"]: plan for plan in plans(config, examples, architecture, 1e18)}


def test_a_larger_card_takes_no_less_and_a_faster_one_no_longer() -> None:
    found = planned(16)
    assert list(found) == [card.name for card in CARDS]
    small, large = found["T4"], found["H200"]
    assert (small["precision"], large["precision"]) == ("fp16", "bf16")
    assert small["cards"] == large["cards"] == 1
    assert small["micro_batch"]["tokens"] <= large["micro_batch"]["tokens"]
    assert small["gradient_checkpointing"] == "full"
    assert large["gradient_checkpointing"] == "none"
    assert small["hours"][0] > 5 * large["hours"][0]
    for card in CARDS:
        assert found[card.name]["peak"] < 0.8 * card.gib * 2**30
        assert found[card.name]["hours"][0] < found[card.name]["hours"][1]
    least, most = large["hours"]
    assert told(large, 2 * most)[-1].endswith("enough")
    assert told(large, (least + most) / 2)[-1].endswith("perhaps")
    assert told(large, least / 2)[-1].endswith("too long")


@pytest.mark.slow
def test_a_base_that_fits_on_no_single_card_is_divided() -> None:
    found = planned(80)  # 70B weights, 36 GiB in 4 bits
    assert found["H200"]["cards"] == 1
    assert found["RTX 3090"]["cards"] > 1
    assert "trainer=fsdp" in told(found["RTX 3090"], None)[2]
    whole = planned(80, "quantization=none")
    assert whole["T4"]["cards"] is None
    assert told(whole["T4"], None)[2] == "not on 8"


@pytest.mark.parametrize("key", ["trainer.micro_batch=2", "trainer.gradient_checkpointing=full"])
def test_what_is_configured_stands(key: str) -> None:
    plan = planned(2, key)["H100 80 GB"]
    name = key.partition("=")[0]
    assert (plan["micro_batch"]["rows"] if name.endswith("micro_batch") else plan["gradient_checkpointing"]) in (
        2,
        "full",
    )
