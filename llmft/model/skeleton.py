"""Models without weights, on the meta device."""

from __future__ import annotations

from typing import Any

import torch


def auto_model(auto_class: str) -> Any:
    """transformers' factory for a kind of model."""
    import transformers

    return {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
    }[auto_class]


def skeleton(auto_class: str, config: Any, **arguments: Any) -> Any:
    """The model of a transformers config on the meta device; `arguments` as `from_config` takes them."""
    from transformers.initialization import no_init_weights

    with torch.device("meta"), no_init_weights():
        model = auto_model(auto_class).from_config(config, **arguments)
    model.tie_weights()  # which is left out with the initial values
    return model
