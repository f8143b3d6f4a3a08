"""Padded batches, and the order of the training rows.

One item of the training loader is one effective batch, that is, one optimizer step. So a run never stops inside a
step, and the micro-batch size affects memory only. The order is a function of (seed, epoch). A run's position is its
number of steps, so no generator state has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Self

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example, Examples


def send(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """One-dimensional `arrays` of int64 on `device`, by one asynchronous copy."""
    flat = to_device(torch.from_numpy(np.concatenate(arrays)), device)
    return list(flat.split([len(array) for array in arrays]))


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A host tensor on `device`: copied to CUDA asynchronously through pinned memory, to others synchronously."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@dataclass
class OnDevice:
    """A part of a batch, whose fields are tensors, further parts, and plain values."""

    def to(self, device: torch.device) -> Self:
        """The same on `device`."""
        moved: dict[str, Any] = {}
        for name, part in vars(self).items():
            if isinstance(part, (torch.Tensor, OnDevice)):
                moved[name] = part.to(device) if isinstance(part, OnDevice) else to_device(part, device)
        return replace(self, **moved)


@dataclass
class Answers(OnDevice):
    """The answers after each row's prompt, and the human feedback on them.

    Attributes:
        lengths: for each row, the number of tokens of its prompt, its first answer, its second, ….
        pairs: (pairs, 3) row, better answer, worse answer, from 0.
        margins: (rows,) required margin of the better answer in each of the row's pairs.
        has_margins: whether any of them is not 0.
        desirable: (rows,) true for a good answer; None if answers are compared.
        reference: (rows, answers) float64 log-probabilities of the reference; None without one.
    """

    lengths: list[list[int]]
    pairs: torch.Tensor
    margins: torch.Tensor
    has_margins: bool
    desirable: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    @classmethod
    def of(cls, examples: Sequence[Example]) -> Answers:
        """The answers of rows that all have a comparison."""
        compared = [c for example in examples if (c := example.conversation.comparison) is not None]
        lengths = [np.bincount(example.segments).tolist() for example in examples if example.segments is not None]
        pairs = [(row, *pair) for row, comparison in enumerate(compared) for pair in comparison.pairs]
        good = [comparison.desirable for comparison in compared]
        return cls(
            lengths,
            torch.tensor(pairs, dtype=torch.long).view(-1, 3),
            torch.tensor([comparison.margin for comparison in compared]),
            any(comparison.margin for comparison in compared),
            torch.tensor(good) if None not in good else None,
        )

    @property
    def max_answers(self) -> int:
        """The largest number of answers of a row."""
        return max(len(row_lengths) for row_lengths in self.lengths) - 1


@dataclass
class PolicyRows(OnDevice):
    """Training signals of a policy's sampled answers, at the positions of `labels[:, 1:]`; 0 where there is no label.

    Attributes:
        advantages: (rows, seq_len - 1).
        old: (rows, seq_len - 1) log-probabilities in nats of the policy that sampled; None if it is unchanged since.
        reference: (rows, seq_len - 1) log-probabilities of the reference; None without a KL penalty.
        values, returns: (rows, seq_len - 1) a value head's estimates at sampling, and their targets.
    """

    advantages: torch.Tensor
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None


@dataclass
class MicroBatch(OnDevice):
    """A padded batch.

    Attributes:
        input_ids, attention_mask, labels: (rows, seq_len), padded on the right.
        weights: (rows,) weight of each row in the loss; 0 for a row that only fills up a rank's batch.
        targets: (rows,) class indices, (rows, classes) of 0 and 1, or (rows,) numbers; None for rows without target.
        rows: index of each row in its split.
        answers: the compared answers after each row's prompt; None for other rows.
        policy: for answers that the policy itself sampled; None for rows of the data.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor | None
    rows: list[int]
    answers: Answers | None = None
    policy: PolicyRows | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`; `lengths` and `positions` stay on the host, which needs them at once."""
        batch = super().to(device)
        batch.lengths, batch.positions = self.lengths, self.positions
        return batch

    @cached_property
    def lengths(self) -> list[int]:
        """Each row's number of tokens without padding."""
        lengths: list[int] = self.attention_mask.sum(dim=1).tolist()
        return lengths

    @cached_property
    def positions(self) -> tuple[np.ndarray, np.ndarray]:
        """(row, column) of the token before each label, row by row: there the label is predicted."""
        rows, columns = np.nonzero(self.labels[:, 1:].cpu().numpy() != IGNORE)
        return rows, columns

    @property
    def num_tokens(self) -> int:
        """Number of tokens without padding."""
        return int(self.attention_mask.sum())


@dataclass
class StepBatch:
    """The micro-batches of one optimizer step on one device; `weight` is the loss's denominator over all devices."""

    step: int
    micro_batches: list[MicroBatch]
    weight: float

    def to(self, device: torch.device) -> StepBatch:
        """The same batch on `device`."""
        return StepBatch(self.step, [micro.to(device) for micro in self.micro_batches], self.weight)


def collate(examples: Sequence[Example], rows: Sequence[int], pad_id: int) -> MicroBatch:
    """Pads `examples` on the right to the longest one; padding is masked and never a label."""
    # Copies: those of a file are mapped and not writable, of which torch warns.
    ids = [torch.from_numpy(np.array(example.input_ids, np.int64)) for example in examples]
    input_ids = pad_sequence(ids, batch_first=True, padding_value=pad_id)
    mask = pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
    labels = [torch.as_tensor(example.labels, dtype=torch.long) for example in examples]
    targets = [example.conversation.target for example in examples]
    stacked = torch.tensor(targets) if all(target is not None for target in targets) else None
    weights = torch.tensor([example.conversation.weight for example in examples])
    answers = Answers.of(examples) if examples[0].segments is not None else None
    padded_labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)
    return MicroBatch(input_ids, mask, padded_labels, weights, stacked, list(rows), answers)


def zero_weight_batch(batch: MicroBatch) -> MicroBatch:
    """The same batch with weight zero, which keeps all ranks at the same number of micro-batches."""
    return replace(batch, weights=torch.zeros_like(batch.weights), rows=[])


def weight_of(example: Example) -> float:
    """What one example adds to the loss's denominator: weight x labelled tokens, or weight where rows count."""
    conversation = example.conversation
    return conversation.weight * (1.0 if _counts_rows(conversation) else float(example.labelled_tokens))


def _counts_rows(conversation: Conversation) -> bool:
    return conversation.target is not None or conversation.comparison is not None


def weights_and_lengths(examples: Sequence[Example]) -> tuple[list[float], list[int]]:
    """`weight_of` and the number of tokens of every example; vectorised for `Examples`."""
    if isinstance(examples, Examples) and len(examples) and not _counts_rows(examples[0].conversation):
        weights = np.asarray([examples.conversations[row].weight for row in examples.rows])
        return (examples.labelled_tokens * weights).tolist(), examples.lengths.tolist()
    return [weight_of(example) for example in examples], [len(example.input_ids) for example in examples]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps in one pass; the last batch of a pass may be smaller."""
    return math.ceil(num_rows / batch_size)


def rows_of_step(step: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """Row indices of optimizer step `step` (from 0): each epoch is a seeded shuffle, cut into batches."""
    per_epoch = steps_per_epoch(num_rows, batch_size)
    epoch, step_in_epoch = divmod(step, per_epoch)
    order = _order(num_rows, seed, epoch)
    return [int(row) for row in order[step_in_epoch * batch_size : (step_in_epoch + 1) * batch_size]]


@lru_cache(maxsize=4)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


PADDED = 1.25
"""Upper bound of (rows x longest row) / token limit of a group, for models that compute padding."""


@dataclass(frozen=True)
class Limit:
    """Largest batch in rows and in tokens; None is no limit. A row above the token limit is a batch of its own."""

    rows: int | None = None
    tokens: int | None = None

    def groups(self, lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
        """`rows` in batches of similar length, longest first, which keeps padding small."""
        groups: list[list[int]] = []
        longest = total = 0
        for row in sorted(rows, key=lambda row: (-lengths[row], row)):
            if not groups or not self._fits(len(groups[-1]) + 1, total + lengths[row], longest):
                groups.append([])
                longest, total = lengths[row], 0
            groups[-1].append(row)
            total += lengths[row]
        return groups

    def __str__(self) -> str:
        return f"{self.tokens}tokens" if self.rows is None else str(self.rows)

    def _fits(self, rows: int, tokens: int, longest: int) -> bool:
        if self.rows is not None and rows > self.rows:
            return False
        return self.tokens is None or (tokens <= self.tokens and rows * longest <= PADDED * self.tokens)
