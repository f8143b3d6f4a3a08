"""Dequantised weights that are kept while a text is generated: the same bits, and nothing stays behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmft.config import LoraConfig
from llmft.data.encode import Ends
from llmft.inference.generate import generate
from llmft.model import adapters, dense
from llmft.model.hub import Located
from tests.model.test_twins import FILES, FIRST, batch, load, logits, twin

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]


def base_of(architecture: str) -> Any:
    base = load(twin(FIRST[architecture]), Located(None, "random"), FILES[FIRST[architecture]])
    base.config.pad_token_id = 0
    return base


@pytest.mark.parametrize("architecture", ["mistral", "mixtral", "gpt2"])
def test_logits_are_the_same_to_the_bit_and_every_layer_is_as_it_was(architecture: str) -> None:
    file, base = FILES[FIRST[architecture]], base_of(architecture)
    plain = logits(base, file)
    forwards = {name: vars(module).get("forward") for name, module in base.named_modules()}
    with dense.dequantized(base) as kept:
        assert kept
        assert torch.equal(logits(base, file), plain)
        assert torch.equal(logits(base, file), plain)
    assert {name: vars(module).get("forward") for name, module in base.named_modules()} == forwards
    assert torch.equal(logits(base, file), plain)
    assert not torch.nn.utils.parametrize._cache


def test_an_adapted_base_writes_the_same_text(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapters.attach(base_of("mistral"), LoraConfig(r=4), auto_class="causal_lm", seed=0, name="x").eval()
    options: dict[str, Any] = {"pad_id": 0, "ends": Ends([2]), "max_new_tokens": 12}
    found = generate(model, PROMPTS, **options)
    monkeypatch.setattr(dense, "MOST_BYTES", 0)
    assert generate(model, PROMPTS, **options) == found


def test_what_does_not_fit_or_is_not_computed_in_fp32_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("mistral")
    with torch.autocast("cpu", dtype=torch.bfloat16), dense.dequantized(base) as kept:
        assert not kept
    weights = sum(2 * parameter.numel() for parameter in base.parameters() if parameter.dtype is torch.uint8)
    monkeypatch.setattr(dense, "MOST_BYTES", 4 * weights)
    with dense.dequantized(base) as kept:
        assert kept
    monkeypatch.setattr(dense, "MOST_BYTES", 4 * weights - 1)
    with dense.dequantized(base) as kept:
        assert not kept


def test_the_layers_come_back_when_the_block_fails() -> None:
    base = base_of("mistral")
    with pytest.raises(RuntimeError), dense.dequantized(base):
        raise RuntimeError
    assert not any("forward" in vars(module) for module in base.modules())
    assert torch.isfinite(base(input_ids=batch().input_ids).logits).all()
