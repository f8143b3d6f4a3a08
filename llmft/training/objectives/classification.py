"""One class per row, by a linear head on the encoder's or decoder's last state."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from llmft.data.batch import MicroBatch
from llmft.training.objectives.base import RowLosses


class Classification:
    """Cross-entropy in nats over the classes."""

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; `batch.targets` holds the class indices."""
        assert batch.targets is not None, "classification needs data.columns.target"
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        nll = F.cross_entropy(logits.float(), batch.targets, reduction="none")
        return RowLosses(nll, torch.ones_like(batch.targets))
