"""Policies that learn from compared answers: DPO and its kin; and from answers that are marked good or bad: KTO."""

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
    """The loss of task.loss, a name of `preference_losses` or a dotted path, which takes task.loss_options."""
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
    """1 where the chosen answer has more, one half where both have the same, else 0."""
    return (torch.sign(difference) + 1) / 2


def pair_columns(chosen: torch.Tensor, rejected: torch.Tensor, longer_by: torch.Tensor) -> list[torch.Tensor]:
    """What validations keep of each pair: who is ahead, by how much, both rewards, and the same of lengths."""
    margin = chosen - rejected
    return [share_ahead(margin), margin, chosen, rejected, longer_by, share_ahead(longer_by)]


class Preference:
    """The loss `loss` of each pair of answers; of a prompt with more than two answers the mean over its pairs.

    A row's nll is its loss, its count 1. Its outputs, means over its pairs, are named by `columns`.

    Args:
        loss: a name of `preference_losses`, or the dotted path of a function (pairs, beta, …) -> (pairs,) losses.
        beta: how strongly the policy is held to its reference.
        loss_options: further arguments of `loss`.
        sft_weight: what the chosen answer's nats per token are added with (RPO, arXiv:2404.19733).
        label_smoothing: an argument of `loss`, where it is above 0.
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
        """(pairs, columns) float64: without a reference, rewards are of log-probabilities per token."""
        chosen, rejected = pairs.chosen_ratio, pairs.rejected_ratio
        if answers.reference is None:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        chosen, rejected = self.beta * chosen.double(), self.beta * rejected.double()
        drift = pairs.chosen_ratio / pairs.chosen_tokens
        longer_by = pairs.chosen_tokens - pairs.rejected_tokens
        columns = [*pair_columns(chosen, rejected, longer_by), pairs.chosen, pairs.rejected, drift]
        return torch.stack([column.double() for column in columns], dim=1)


class Kto:
    """Learns to give good answers rather than bad ones, each judged by itself (KTO, arXiv:2402.01306).

    How far the policy is from its reference is estimated on answers of other prompts, which stand behind each row's
    own, over the whole effective batch: `before_step` takes a pass for it. A validation estimates it on each of its
    groups.

    Args:
        beta: how strongly the policy is held to its reference.
        loss_options: `desirable` and `undesirable`, what good and bad answers' losses are multiplied with.
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
        """[sum, rows] of log pi/pi_ref of other prompts' answers; of all processes their sum goes to `begin_step`."""
        sums = [self._ratios(model, batch)[:, 1].sum() * float(bool(batch.rows)) for batch in batches]
        return torch.stack([torch.stack(sums).sum(), sums[0].new_full((), sum(len(batch.rows) for batch in batches))])

    def begin_step(self, total: torch.Tensor) -> None:
        """Takes the distance of a step."""
        self.distance = (total[0] / total[1].clamp(min=1)).clamp(min=0)

    def losses(self, model: Any, batch: MicroBatch) -> RowLosses:
        """See RowLosses; needs `begin_step`. Other prompts' answers are left out: the distance is known."""
        assert self.distance is not None, "before_step and begin_step come first"
        assert batch.answers is not None
        answers = replace(batch.answers, lengths=[lengths[:2] for lengths in batch.answers.lengths])
        return self._losses(batch, self._ratios(model, replace(batch, answers=answers))[:, 0], self.distance)

    def evaluate(self, model: Any, batch: MicroBatch) -> RowLosses:
        """The same with the distance of these rows."""
        ratios = self._ratios(model, batch)
        return self._losses(batch, ratios[:, 0], ratios[:, 1].mean().clamp(min=0))

    def _ratios(self, model: Any, batch: MicroBatch) -> torch.Tensor:
        """(rows, answers) log pi/pi_ref of each row's answer, and of another prompt's behind it."""
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
            lengths = [torch.zeros_like(ratio), torch.full_like(ratio, 0.5)]  # one answer is not longer than another
            columns = [share_ahead(sign * ratio), sign * reward, *sides[:2], *lengths, *sides[2:], drift]
        return RowLosses.per_row(losses, torch.stack(columns, dim=1).double())
