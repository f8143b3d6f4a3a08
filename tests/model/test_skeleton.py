"""Models without weights."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from llmft.model import skeleton as module
from llmft.model.hub import Located
from llmft.model.load import model_config
from llmft.model.skeleton import nothing_on_meta, skeleton
from tests.model.test_twins import FILES, FIRST, classifies, twin
from tests.model.twins import TWINS


@pytest.mark.parametrize("family", TWINS)
def test_skeletons_have_the_weights_of_the_model_and_no_values(family: str) -> None:
    """Shapes, names and types are those of the model as transformers builds it on the meta device."""
    name = FIRST[family]
    config = model_config(twin(name), Located(None, ""))
    kind = "sequence_classification" if classifies(FILES[name]) else "causal_lm"
    found = skeleton(kind, config, dtype=torch.bfloat16)
    with torch.device("meta"):
        known = module.auto_model(kind).from_config(config, dtype=torch.bfloat16)
    facts = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} for model in (found, known)
    ]
    assert facts[0] == facts[1]
    assert all(parameter.is_meta for parameter in found.parameters())
    assert not module._computes


def test_outside_the_meta_device_values_are_made_as_always() -> None:
    with nothing_on_meta(SimpleNamespace(model_type="llama")):
        torch.manual_seed(0)
        found = torch.nn.Linear(4, 4)
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.arange(3, device="meta").device.type == "cpu"
        assert torch.arange(100_000, device="meta").is_meta
        assert torch.arange(0, 3, 1).tolist() == [0, 1, 2]
    torch.manual_seed(0)
    assert torch.equal(found.weight, torch.nn.Linear(4, 4).weight)
    assert torch.arange(3, device="meta").is_meta


def test_a_model_that_mixes_ranges_and_weights_is_built_without_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """As code of a model from elsewhere may."""

    class Mixes:
        @staticmethod
        def from_config(config: Any) -> torch.Tensor:
            return torch.arange(4.0) + torch.empty(4)

    monkeypatch.setattr(module, "auto_model", lambda kind: Mixes)
    monkeypatch.setattr(module, "_computes", set())
    assert skeleton("causal_lm", SimpleNamespace(model_type="mixes")).is_meta
    assert module._computes == {"mixes"}
    with nothing_on_meta(SimpleNamespace(model_type="mixes")):
        assert torch.arange(3, device="meta").is_meta
