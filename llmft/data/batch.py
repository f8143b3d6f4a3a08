"""Examples to padded tensors, and the order in which they are seen.

One item of the training loader is one effective batch, that is, one optimizer step. So a step is never half done
when a run stops, and the micro-batch is a matter of memory alone. The order is a function of (seed, epoch), and a
run's position is its number of steps: no generator or library counter has to be saved.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from llmft.data.examples import IGNORE, Example, Examples


@dataclass
class MicroBatch:
    """A padded batch.

    Attributes:
        input_ids, attention_mask, labels: (rows, seq_len), padded on the right.
        weights: (rows,) what each row counts for; 0 for a row that only fills a process's share.
        targets: (rows,) class indices, (rows, classes) of 0 and 1, or (rows,) numbers; None where rows have none.
        rows: index of each row in its split.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    targets: torch.Tensor | None
    rows: list[int]

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        return MicroBatch(
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.labels.to(device),
            self.weights.to(device),
            None if self.targets is None else self.targets.to(device),
            self.rows,
        )

    @property
    def num_tokens(self) -> int:
        """Real tokens, padding left out."""
        return int(self.attention_mask.sum())


@dataclass
class StepBatch:
    """All that one optimizer step takes on one device; `weight` counts what the loss is divided by, everywhere."""

    step: int
    micro_batches: list[MicroBatch]
    weight: float

    def to(self, device: torch.device) -> StepBatch:
        """The same batch on `device`."""
        return StepBatch(self.step, [micro.to(device) for micro in self.micro_batches], self.weight)


def collate(examples: Sequence[Example], rows: Sequence[int], pad_id: int) -> MicroBatch:
    """Pads `examples` on the right to the longest; padding is masked and never a label."""
    width = max(len(example.input_ids) for example in examples)
    shape = (len(examples), width)
    input_ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORE, dtype=torch.long)
    mask = torch.zeros(shape, dtype=torch.long)
    for place, example in enumerate(examples):
        length = len(example.input_ids)
        input_ids[place, :length] = torch.as_tensor(example.input_ids)
        labels[place, :length] = torch.as_tensor(example.labels)
        mask[place, :length] = 1
    targets = [example.conversation.target for example in examples]
    classes = torch.tensor(targets) if all(target is not None for target in targets) else None
    weights = torch.tensor([example.conversation.weight for example in examples])
    return MicroBatch(input_ids, mask, labels, weights, classes, list(rows))


def zero_weight_batch(example: Example, pad_id: int) -> MicroBatch:
    """A batch that counts for nothing: every process must take as many as the others, or one waits for ever."""
    batch = collate([example], [], pad_id)
    batch.weights.zero_()
    return batch


def weight_of(example: Example) -> float:
    """What one example adds to the loss's denominator: its labelled tokens, or 1 for a target; times its weight."""
    own = example.conversation
    return own.weight * (1.0 if own.target is not None else float(example.labelled_tokens))


def weights_and_lengths(examples: Sequence[Example]) -> tuple[list[float], list[int]]:
    """`weight_of` and number of tokens of every example; at once where they are held in columns."""
    if isinstance(examples, Examples) and len(examples) and examples[0].conversation.target is None:
        weights = np.asarray([examples.conversations[row].weight for row in examples.rows])
        return (examples.labelled_tokens * weights).tolist(), examples.lengths.tolist()
    return [weight_of(example) for example in examples], [len(example.input_ids) for example in examples]


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps in one pass; the last batch of a pass may be smaller."""
    return math.ceil(num_rows / batch_size)


def rows_of_step(step: int, num_rows: int, batch_size: int, seed: int) -> list[int]:
    """The rows of optimizer step `step` (from 0): a seeded shuffle of each epoch, cut into batches."""
    per_epoch = steps_per_epoch(num_rows, batch_size)
    epoch, place = divmod(step, per_epoch)
    order = _order(num_rows, seed, epoch)
    return [int(row) for row in order[place * batch_size : (place + 1) * batch_size]]


@lru_cache(maxsize=4)
def _order(num_rows: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(num_rows)


PADDED = 1.25
"""A group's rows times its longest row are at most so many times its tokens' limit, for models that compute padding."""


@dataclass(frozen=True)
class Limit:
    """What is computed at once: at most so many rows, and so many tokens; None is no limit.

    A row that is longer than the limit goes alone.
    """

    rows: int | None = None
    tokens: int | None = None

    def groups(self, lengths: Sequence[int], rows: Sequence[int]) -> list[list[int]]:
        """`rows` in groups of like length, longest first, so that little is padded."""
        found: list[list[int]] = []
        width = total = 0
        for row in sorted(rows, key=lambda row: (-lengths[row], row)):
            if not found or not self._holds(len(found[-1]) + 1, total + lengths[row], width):
                found.append([])
                width, total = lengths[row], 0
            found[-1].append(row)
            total += lengths[row]
        return found

    def __str__(self) -> str:
        return f"{self.tokens}tokens" if self.rows is None else str(self.rows)

    def _holds(self, rows: int, tokens: int, width: int) -> bool:
        if self.rows is not None and rows > self.rows:
            return False
        return self.tokens is None or (tokens <= self.tokens and rows * width <= PADDED * self.tokens)
