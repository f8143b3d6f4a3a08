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


def meta_model(auto_class: str, config: Any, **arguments: Any) -> Any:
    """The model of a transformers config on the meta device; `arguments` as `from_config` takes them."""
    with torch.device("meta"):
        return auto_model(auto_class).from_config(config, **arguments)
