"""Log-probabilities of several answers to one prompt, which is read once."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llmft.data.batch import Answers, MicroBatch, send
from llmft.model.heads import after_one_prompt
from llmft.model.logits import nll_after


def answer_log_probs(model: Any, batch: MicroBatch) -> torch.Tensor:
    """(rows, answers) float64 log-probabilities in nats of whole answers; 0 where a row has fewer answers."""
    answers, device = batch.answers, batch.input_ids.device
    assert answers is not None, "the rows have no answers that are compared"
    arguments, spans = after_one_prompt(model, batch.input_ids, answers.lengths)
    predictors, predicted, indices = [], [], []
    lengths = [(row, n, length) for row, (_, *each) in enumerate(answers.lengths) for n, length in enumerate(each)]
    for (row, number, length), (end, begin) in zip(lengths, spans, strict=True):
        predictors.append([end, *range(begin, begin + length - 1)])
        predicted.append(np.arange(begin, begin + length))
        indices.append(np.full(length, row * answers.max_answers + number))
    labelled, index = send([np.concatenate(predicted), np.concatenate(indices)], device)
    targets = arguments["input_ids"].reshape(-1)[labelled]
    nll = nll_after(model, arguments, np.concatenate(predictors), targets)
    # Sums of hundreds of nats in fp32 would have errors larger than the change by one step.
    sums = torch.zeros(len(answers.lengths) * answers.max_answers, dtype=torch.float64, device=device)
    return -sums.index_add(0, index, nll.double()).view(-1, answers.max_answers)


def token_counts(answers: Answers, device: torch.device) -> torch.Tensor:
    """(rows, answers) tokens of each answer; 1 where a row has fewer answers."""
    padded = [lengths[1:] + [1] * (answers.max_answers + 1 - len(lengths)) for lengths in answers.lengths]
    (counts,) = send([np.array(padded).reshape(-1)], device)
    return counts.view(len(padded), -1)
