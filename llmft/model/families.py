"""Code for single families, beyond their YAML files."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from llmft.config.model import ModelConfig
from llmft.core.errors import ConfigError

NOT_ADAPTED = r".*\.(router|gate|experts)(\..*)?"
"""Modules of a mixture of experts that "all linear layers" leaves out: the router, which chooses
the experts of a token, and the fused experts, whose 4-bit weights cannot take a LoRA."""


def prepare(model_type: str) -> None:
    """Makes a family's classes fit for quantisation; call before a model of it is built.

    Falcon's linear layers are a subclass that only writes the product differently, and transformers quantises
    `torch.nn.Linear` itself only: the whole model would silently stay unquantised. The logits are bit-identical.
    """
    if model_type == "falcon":
        from transformers.models.falcon import modeling_falcon

        modeling_falcon.FalconLinear = torch.nn.Linear  # type: ignore[misc, assignment]


def check_task(model: ModelConfig, config: Any, auto_class: str) -> None:
    """Raises ConfigError if a model of this kind cannot do the task, such as an encoder asked to write."""
    import transformers

    if model.trust_remote_code:
        return
    writes = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if auto_class == "causal_lm" and not writes:
        raise ConfigError(f"model={model.label} is an encoder and writes no text: set task=classification.")
    if auto_class == "sequence_classification" and type(config) not in (
        transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING
    ):
        raise ConfigError(
            f"model={model.label} has no classification head in transformers: use task=language_modeling."
        )


LEARNED_POSITIONS = (
    *("gpt2", "openai-gpt", "opt", "gpt_neo", "gpt_bigcode", "biogpt", "bert", "electra", "albert", "distilbert"),
    *("roberta", "xlm-roberta", "camembert", "mpnet", "longformer", "deberta", "deberta-v2"),
)
"""Families with one learned vector per position, which fail on a longer row."""
FIRST_BEHIND_PAD = ("roberta", "xlm-roberta", "camembert", "mpnet", "longformer")
"""Those of them whose first position is the one after the padding's."""


def positions(config: Any) -> tuple[int | None, bool]:
    """How many positions a model of transformers' `config` knows, and whether it fails on any other."""
    kind = str(config.model_type)
    count = getattr(config.get_text_config(), "max_position_embeddings", None)
    if count is not None and kind in FIRST_BEHIND_PAD:
        count -= (getattr(config, "pad_token_id", None) or 0) + 1
    return count, kind in LEARNED_POSITIONS and getattr(config, "position_biased_input", True)


def dense_layers(model: Any) -> list[str] | None:
    """Last names of a mixture of experts' linear layers outside router, experts and head; None of other models."""
    if not any(name.endswith(".experts") for name, _ in model.named_modules()):
        return None
    head = model.get_output_embeddings()
    return sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and not re.fullmatch(NOT_ADAPTED, name)
        }
    )


def base_of(model: Any) -> Any:
    """The transformers model below any adapter."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: Any) -> Any:
    """The part of a transformers model below its head, under any adapter."""
    return base_of(model).base_model


@contextlib.contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Inside, `model` computes without dropout; afterwards in its previous mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@lru_cache(maxsize=8)
def selects_positions(model_class: Any) -> bool:
    """Whether the model's forward takes a boolean mask of the positions to compute logits at.

    True if it uses transformers' own function for that; a repository's code may slice in ways that take no mask.
    """
    forward = model_class.forward
    knows = "slice_logits_to_keep" in getattr(inspect.unwrap(forward), "__globals__", ())
    return knows and "logits_to_keep" in inspect.signature(forward).parameters


def layers_of(model: Any) -> list[Any]:
    """The decoder layers of a transformers model, under any adapter."""
    names = set(base_of(model)._no_split_modules or ())
    return [module for module in body_of(model).modules() if type(module).__name__ in names]
