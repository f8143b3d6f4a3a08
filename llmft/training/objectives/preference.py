"""Policies that learn from compared answers (DPO and its variants), or from answers labelled good or bad (KTO)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from llmft.config.instantiate import check_arguments, find
from llmft.core.errors import ConfigError, did_you_mean
from llmft.data.batch import Answers, MicroBatch
from llmft.metrics.preference import COLUMNS
from llmft.training.objectives.answers import answer_log_probs, token_counts
from llmft.training.objectives.base import RowLosses
from llmft.training.objectives.preference_losses import Pairs, kto

LOSSES = "llmft.training.objectives.preference_losses"


def find_loss(name: str, options: dict[str, Any]) -> Callable[..., torch.Tensor]:
    """The loss function named by task.loss, in `preference_losses` or by dotted path; checks task.loss_options."""
    path = name if "." in name else f"{LOSSES}.{name}"
    loss: Callable[..., torch.Tensor] = find(path, "task.loss", "loss")
    check_arguments(loss, path, options, "task.loss_options", "pairs", "beta")
    return loss


def over_rows(values: torch.Tensor, answers: Answers) -> torch.Tensor:
    """(rows, …) means of (pairs, …) values over each row's pairs."""
    row = answers.pairs[:, 0]
    num_rows = len(answers.lengths)
    counts = values.new_zeros(num_rows).index_add(0, row, values.new_ones(len(row))).clamp(min=1)
    sums = torch.zeros(num_rows, *values.shape[1:], dtype=values.dtype, device=values.device).index_add(0, row, values)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))


def share_ahead(difference: torch.Tensor) -> torch.Tensor:
    """1 where the chosen answer is ahead (`difference` > 0), 0.5 at a tie, else 0."""
    return (torch.sign(difference) + 1) / 2


def pair_columns(chosen: torch.Tensor, rejected: torch.Tensor, longer_by: torch.Tensor) -> list[torch.Tensor]:
    """Columns that validations keep of each pair: see `llmft.metrics.preference.REWARD_COLUMNS`."""
    margin = chosen - rejected
    return [share_ahead(margin), margin, chosen, rejected, longer_by, share_ahead(longer_by)]


class Preference:
    """The mean of `loss` over the pairs of answers to a prompt.

    A row's nll is its loss, its count 1. Its outputs, means over its pairs, are named by `columns`.

    Args:
        loss: a name of `preference_losses`, or the dotted path of a function (pairs, beta, …) -> (pairs,) losses.
        beta: strength of the pull to the reference.
        loss_options: further arguments of `loss`.
        sft_weight: weight of the chosen answer's nats per token in the loss (RPO, arXiv:2404.19733).
        label_smoothing: passed to `loss` where it is above 0.
    """

    columns = COLUMNS

    def __init__(
        self,
        loss: str = "sigmoid",
        beta: float = 0.1,
        loss_options: dict[str, Any] | None = None,
        sft_weight: float = 0.0,
        label_smoothing: float = 0.0,
    ) -> None:
        options = dict(loss_options or {}) | ({"label_smoothing": label_smoothing} if label_smoothing else {})
        self.loss, self.options = find_loss(loss, options), options
        self.beta = beta
        self.sft_weight = sft_weight

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses."""
        answers = batch.answers
        assert answers is not None, "task.feedback=pairs brings rows with answers"
        row, better, worse = answers.pairs.unbind(1)
        log_probs = answer_log_probs(model, batch)
        reference = torch.zeros_like(log_probs) if answers.reference is None else answers.reference.to(log_probs.dtype)
        tokens = token_counts(answers, log_probs.device).to(log_probs.dtype)
        pairs = Pairs(*(table[row, answer] for table in (log_probs, reference, tokens) for answer in (better, worse)))
        margin = {"margin": answers.margins[row]} if answers.has_margins else {}
        losses = self.loss(pairs, self.beta, **margin, **self.options)
        if self.sft_weight:
            losses = losses - self.sft_weight * pairs.chosen / pairs.chosen_tokens
        outputs = over_rows(self._outputs(pairs, answers), answers)
        return RowLosses.per_row(over_rows(losses, answers), outputs)

    @torch.no_grad()
    def _outputs(self, pairs: Pairs, answers: Answers) -> torch.Tensor:
        """(pairs, columns) float64; without a reference, rewards are beta x log-probabilities per token."""
        chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
        if answers.reference is None:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        chosen, rejected = self.beta * chosen.double(), self.beta * rejected.double()
        drift = pairs.chosen_ratio / pairs.chosen_tokens
        longer_by = pairs.chosen_tokens - pairs.rejected_tokens
        columns = [*pair_columns(chosen, rejected, longer_by), pairs.chosen, pairs.rejected, drift]
        return torch.stack([column.double() for column in columns], dim=1)


class Kto:
    """The loss of single answers that are good or bad (KTO, arXiv:2402.01306).

    The policy's divergence from its reference is estimated on answers to other prompts, which follow each row's own,
    over the effective batch, in an extra pass by `before_step`. A validation estimates it on each of its batches.

    Args:
        beta: strength of the pull to the reference.
        loss_options: `desirable` and `undesirable`, the loss weights of good and bad answers.
    """

    columns = COLUMNS

    def __init__(self, beta: float = 0.1, loss_options: dict[str, Any] | None = None) -> None:
        options = dict(loss_options or {})
        self.beta = beta
        self.weights = (float(options.pop("desirable", 1.0)), float(options.pop("undesirable", 1.0)))
        if options:
            name = next(iter(options))
            hint = did_you_mean(name, ("desirable", "undesirable"))
            raise ConfigError(f"task.loss_options.{name}: no such option{hint}")
        self.distance: torch.Tensor | None = None

    @torch.no_grad()
    def before_step(self, model: Any, batches: list[MicroBatch]) -> torch.Tensor:
        """[sum, rows] of log pi/pi_ref of other prompts' answers; `begin_step` gets the sum over all processes."""
        sums = [self._ratios(model, batch)[:, 1].sum() * float(bool(batch.rows)) for batch in batches]
        return torch.stack([torch.stack(sums).sum(), sums[0].new_full((), sum(len(batch.rows) for batch in batches))])

    def begin_step(self, total: torch.Tensor) -> None:
        """Sets the step's divergence from `before_step` summed over all processes."""
        self.distance = (total[0] / total[1].clamp(min=1)).clamp(min=0)

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; needs `begin_step`. Does not compute other prompts' answers: the divergence is known."""
        assert self.distance is not None, "call before_step and begin_step first"
        assert batch.answers is not None
        answers = replace(batch.answers, lengths=[lengths[:2] for lengths in batch.answers.lengths])
        return self._losses(batch, self._ratios(model, replace(batch, answers=answers))[:, 0], self.distance)

    def evaluate(self, model: Any, batch: MicroBatch) -> RowLosses:
        """Like `losses`, with the divergence estimated on these rows."""
        ratios = self._ratios(model, batch)
        return self._losses(batch, ratios[:, 0], ratios[:, 1].mean().clamp(min=0))

    def _ratios(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """(rows, answers) log pi/pi_ref of each row's answer, and of another prompt's answer after it."""
        assert batch.answers is not None
        assert batch.answers.reference is not None, "KTO needs a reference"
        log_probs = answer_log_probs(model, batch)
        return log_probs - batch.answers.reference[:, : log_probs.shape[1]]

    def _losses(self, batch: MicroBatch, ratio: torch.Tensor, distance: torch.Tensor) -> RowLosses:
        answers = batch.answers
        assert answers is not None
        assert answers.desirable is not None
        good, sign = answers.desirable, torch.where(answers.desirable, 1.0, -1.0)
        losses = kto(ratio, distance, good, self.beta) * torch.where(good, *self.weights)
        with torch.no_grad():
            reward, missing = self.beta * ratio, torch.full_like(ratio, float("nan"))
            logp = ratio + answers.reference[:, 0]  # type: ignore[index]
            drift = ratio / token_counts(answers, ratio.device)[:, 0]
            sides = [torch.where(good == side, value, missing) for value in (reward, logp) for side in (True, False)]
            # A single answer has no other to be longer than.
            lengths = [torch.zeros_like(ratio), torch.full_like(ratio, 0.5)]
            columns = [share_ahead(sign * ratio), sign * reward, *sides[:2], *lengths, *sides[2:], drift]
        return RowLosses.per_row(losses, torch.stack(columns, dim=1).double())
