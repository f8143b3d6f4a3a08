"""Models without weights."""

from __future__ import annotations

import pytest
import torch

from llmft.data.hub import Located
from llmft.model.load import model_config
from llmft.model.meta import auto_model, meta_model
from tests.model.test_twins import FILES, FIRST, classifies, twin


@pytest.mark.parametrize("family", ["llama", "gemma2", "falcon", "mixtral", "deberta-v2"])
def test_meta_models_have_the_weights_of_the_model_and_no_values(family: str) -> None:
    name = FIRST[family]
    config = model_config(twin(name), Located(None, ""))
    kind = "sequence_classification" if classifies(FILES[name]) else "causal_lm"
    empty = meta_model(kind, config, dtype=torch.bfloat16)
    real = auto_model(kind).from_config(config, dtype=torch.bfloat16)
    facts = [
        {name: (tensor.shape, tensor.dtype) for name, tensor in model.state_dict().items()} for model in (empty, real)
    ]
    assert facts[0] == facts[1]
    assert all(parameter.is_meta for parameter in empty.parameters())
