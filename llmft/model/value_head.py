"""The value head: an answer's expected return at each of its tokens, from the policy's hidden states."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmft.data.batch import MicroBatch
from llmft.model.families import base_of, body_of
from llmft.model.heads import FullPrecisionLinear
from llmft.model.kernels.packing import inputs_of

NAME = "llmft_value_head"


def add_value_head(model: Any) -> None:
    """Adds a zero-initialised head to the adapter's wrapper: trained and kept in checkpoints, but not exported."""
    base = base_of(model)
    head = FullPrecisionLinear(base.config.get_text_config().hidden_size, 1)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    model.add_module(NAME, head.to(base.device))


@dataclass
class Values:
    """(tokens,) values of the labelled tokens of the last forward."""

    flat: list[torch.Tensor] = field(default_factory=list)

    def of(self, mask: torch.Tensor) -> torch.Tensor:
        """(rows, seq_len - 1) values where `mask` is 1; 0 elsewhere."""
        return torch.zeros_like(mask).masked_scatter(mask > 0, self.flat[-1])


@contextmanager
def token_values(model: Any, batch: MicroBatch, *, enabled: bool) -> Iterator[Values]:
    """Inside, a forward over `batch` leaves the values at the position before each labelled token.

    The hidden states are the policy's own, and the head's loss trains them too.
    """
    values, base = Values(), base_of(model)
    if not enabled:
        yield values
        return
    _, positions = inputs_of(base, batch.input_ids, batch.lengths, batch.positions)

    def read(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        values.flat.append(getattr(model, NAME)(output.last_hidden_state.flatten(0, 1)[positions])[:, 0])

    handle = body_of(base).register_forward_hook(read)
    try:
        yield values
    finally:
        handle.remove()
