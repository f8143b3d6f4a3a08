"""What a training would take on GPUs that are not here: arithmetic, never measured on such a card."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from llmft.config.sections import Checkpointing, TrainConfig
from llmft.core.files import format_bytes
from llmft.data.batch import Limit
from llmft.data.examples import Examples
from llmft.model.memory import StepMemory
from llmft.training.micro_batching import choose

FSDP = {"_target_": "lightning.pytorch.strategies.ModelParallelStrategy"}
MOST_CARDS = 8
SHARE_OF_RATE = (0.2, 0.8)
"""Of a card's rate that a training may reach: the bounds of what others report of theirs."""


@dataclass(frozen=True)
class Card:
    """A GPU as its maker describes it.

    Attributes:
        gib: that a program finds free on it.
        flops: a second, of dense products in 16 bits that are added up in fp32.
        bf16: whether it computes bf16, and has flash attention.
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


def plans(config: TrainConfig, examples: Examples, architecture: Any, operations: float) -> list[dict[str, Any]]:
    """For every card: how many are needed, the micro-batch, the peak, and (least, most) hours.

    `operations` are those of the whole training without gradient checkpointing. Where one card does not do, weights
    are divided among as few as do (FSDP2); `cards` is None where MOST_CARDS do not.
    """
    dtype = torch.bfloat16 if config.lora.enabled else torch.float32
    memory = StepMemory(config, architecture, dtype, "cuda")
    return [_plan(card, config, examples, memory, operations) for card in CARDS]


def _plan(card: Card, config: TrainConfig, examples: Examples, memory: StepMemory, operations: float) -> dict[str, Any]:
    found: dict[str, Any] = {"card": card.name, "precision": "bf16" if card.bf16 else "fp16", "cards": None}
    cards = 1
    while cards <= MOST_CARDS:
        strategy: Any = FSDP if cards > 1 else "auto"
        alike = replace(config, trainer=replace(config.trainer, devices=cards, num_nodes=1, strategy=strategy))
        limit, level, estimate, fits = choose(alike, examples, memory, "cuda", card.gib * 2**30, flash=card.bf16)
        if fits:
            repeats = 1.5 if level is Checkpointing.full and config.lora.enabled else 1.0
            hours = operations * repeats / (card.flops * cards) / 3600
            least, most = (hours / share for share in reversed(SHARE_OF_RATE))
            return found | {
                "cards": cards,
                "micro_batch": {"rows": limit.rows, "tokens": limit.tokens},
                "gradient_checkpointing": level.value,
                "peak": estimate.total,
                "hours": [least, most],
            }
        cards *= 2
    return found


def told(plan: dict[str, Any], hours: float | None) -> list[str]:
    """The cells of a plan's row; `hours` are those that there are."""
    if plan["cards"] is None:
        return [plan["card"], plan["precision"], f"not on {MOST_CARDS}", "", "", ""]
    least, most = plan["hours"]
    within = "" if hours is None else ", enough" if most <= hours else ", perhaps" if least <= hours else ", too long"
    limit = Limit(**plan["micro_batch"])
    again = ", checkpointing" if plan["gradient_checkpointing"] == "full" else ""
    size = f"{limit.rows} rows" if limit.rows is not None else f"{limit.tokens:,} tokens"
    number = str(plan["cards"]) if plan["cards"] == 1 else f"{plan['cards']}, trainer=fsdp"
    time = f"{_hours(least)} to {_hours(most)}{within}"
    return [plan["card"], plan["precision"], number, size + again, format_bytes(plan["peak"]), time]


def _hours(value: float) -> str:
    return f"{value * 60:.0f} min" if value < 1 else f"{value:.1f} h" if value < 10 else f"{value:,.0f} h"
