"""Next-token prediction on the answers."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from llmft.data.batch import MicroBatch
from llmft.data.encode import IGNORE
from llmft.model.flat import flatten, is_flat, takes_varlen
from llmft.training.objectives.base import RowLosses


@lru_cache(maxsize=8)
def selects_positions(model_class: type) -> bool:
    """Whether the model's forward takes a boolean mask of the positions to compute logits at."""
    import transformers.modeling_utils

    known = hasattr(transformers.modeling_utils, "slice_logits_to_keep")
    return known and "logits_to_keep" in inspect.signature(model_class.forward).parameters  # type: ignore[attr-defined]


def logits_at(model: Any, input_ids: torch.Tensor, keep: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """(kept positions, vocabulary) logits at the places where `keep`, (rows, seq_len), is true, row by row.

    `lengths`, (rows,), are the rows' tokens without their padding, which families that can never see.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    model_class: type = type(base)
    if selects_positions(model_class) and is_flat(base):
        flat = flatten(input_ids, lengths.tolist(), varlen=takes_varlen(base))
        return model(**flat.arguments, logits_to_keep=flat.pick(keep)).logits
    if selects_positions(model_class):
        return model(input_ids=input_ids, use_cache=False, logits_to_keep=keep).logits
    return model(input_ids=input_ids, use_cache=False).logits[keep]


class LanguageModeling:
    """Cross-entropy in nats at labelled tokens.

    Logits are computed only where the next token carries a label (about 3% of the tokens when answers are short):
    the same numbers, a fraction of the head's time and memory. Rows stand behind each other without padding where the
    family can (see `llmft.model.flat`); else they are padded on the right, where causal attention never looks, so no
    attention mask is passed and the fast causal kernel is used.
    """

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; `batch.labels` is not shifted, the shift happens here."""
        labels = batch.labels[:, 1:]
        labelled = labels != IGNORE
        keep = F.pad(labelled, (0, 1))
        logits = logits_at(model, batch.input_ids, keep, batch.attention_mask.sum(dim=1))
        nll = F.cross_entropy(logits.float(), labels[labelled], reduction="none")
        rows = labelled.nonzero()[:, 0]
        sums = torch.zeros(labels.shape[0], dtype=nll.dtype, device=nll.device).index_add(0, rows, nll)
        return RowLosses(sums, labelled.sum(dim=1))
