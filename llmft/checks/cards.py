"""Estimates the needs of a training on GPUs that are not here; nothing is measured on them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llmft.config.model import Precision
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing
from llmft.core.console import duration
from llmft.core.files import format_bytes
from llmft.data.batch import Limit
from llmft.data.examples import Examples
from llmft.model.memory import StepMemory
from llmft.training.micro_batching import choose

FSDP = {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}
MOST_CARDS = 8
SHARE_OF_RATE = (0.2, 0.8)
"""The range of a card's peak rate that trainings reach, from published reports."""


@dataclass(frozen=True)
class Card:
    """A GPU by its maker's specification.

    Attributes:
        gib: memory available to a program.
        flops: operations per second of dense 16-bit products with fp32 accumulation.
        bf16: whether it supports bf16 and flash attention.
    """

    name: str
    gib: float
    flops: float
    bf16: bool = True


CARDS = (
    Card("T4", 14.6, 65e12, bf16=False),
    Card("V100 16 GB", 15.7, 125e12, bf16=False),
    Card("RTX 3090", 23.6, 71e12),
    Card("RTX 4090", 23.5, 165e12),
    Card("A100 80 GB", 79.2, 312e12),
    Card("H100 80 GB", 79.2, 989e12),
    Card("H200", 139.8, 989e12),
)


def plan_cards(config: TrainConfig, examples: Examples, architecture: Any, operations: float) -> list[dict[str, Any]]:
    """A plan for each kind of card; `operations` are those of the whole training without gradient checkpointing."""
    dtype = torch.bfloat16 if config.lora.enabled else torch.float32
    memory = StepMemory(config, architecture, dtype, "cuda")
    return [_plan(card, config, examples, memory, operations) for card in CARDS]


def _plan(card: Card, config: TrainConfig, examples: Examples, memory: StepMemory, operations: float) -> dict[str, Any]:
    """The smallest sufficient number of `cards`, micro-batch and peak bytes of each, and [minimum, maximum] hours.

    Weights are sharded over several cards (FSDP2). `cards` is None if MOST_CARDS do not suffice.
    """
    plan = {"card": card.name, "precision": (Precision.bf16 if card.bf16 else Precision.fp16).value, "cards": None}
    for cards in (2**power for power in range(MOST_CARDS.bit_length())):
        strategy: Any = FSDP if cards > 1 else "auto"
        distributed = replace(config, trainer=replace(config.trainer, devices=cards, num_nodes=1, strategy=strategy))
        limit, level, estimate, fits = choose(distributed, examples, memory, "cuda", card.gib * 2**30, flash=card.bf16)
        if fits:
            at_full_rate = operations * recomputation(config, level) / (card.flops * cards) / 3600
            return plan | {
                "cards": cards,
                "micro_batch": {"rows": limit.rows, "tokens": limit.tokens},
                "gradient_checkpointing": level.value,
                "peak": estimate.total,
                "hours": [at_full_rate / share for share in reversed(SHARE_OF_RATE)],
            }
    return plan


def recomputation(config: TrainConfig, level: Checkpointing) -> float:
    """The factor on a training's operations from gradient checkpointing.

    Each token and weight take 2 operations forward, 2 for the gradient of the activations and, without a LoRA, 2 for
    the gradient of the weight; recomputed layers take the first 2 again.
    """
    if level is not Checkpointing.full:
        return 1.0
    return 6 / 4 if config.lora.enabled else 8 / 6


def cells(plan: dict[str, Any], available_hours: float | None) -> list[str]:
    """A plan's row in the table."""
    if plan["cards"] is None:
        return [plan["card"], plan["precision"], f"not on {MOST_CARDS}", "", "", ""]
    limit = Limit(**plan["micro_batch"])
    size = f"{limit.rows} rows" if limit.rows is not None else f"{limit.tokens:,} tokens"
    size += ", checkpointing" if plan["gradient_checkpointing"] == "full" else ""
    number = "1" if plan["cards"] == 1 else f"{plan['cards']}, trainer=fsdp"
    lower, upper = plan["hours"]
    time = " to ".join(duration(60 * max(1, round(60 * hours))) for hours in (lower, upper))
    if available_hours is not None:
        time += f", {'enough' if upper <= available_hours else 'perhaps' if lower <= available_hours else 'too long'}"
    return [plan["card"], plan["precision"], number, size, format_bytes(plan["peak"]), time]
