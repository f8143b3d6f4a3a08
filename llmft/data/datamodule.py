"""The one LightningDataModule: tokenised splits, and loaders that start where the run stands."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import lightning as L
from torch.utils.data import DataLoader, Dataset

from llmft.data.batch import (
    MicroBatch,
    StepBatch,
    by_length,
    collate,
    filler,
    rows_of_step,
    steps_per_epoch,
    weights_and_lengths,
)
from llmft.data.examples import Encoded


class _Items(Dataset):
    """A list of thunks as a dataset, so that a batch is made when the loop asks for it."""

    def __init__(self, makers: list[Callable[[], object]]) -> None:
        self.makers = makers

    def __len__(self) -> int:
        return len(self.makers)

    def __getitem__(self, index: int) -> object:
        return self.makers[index]()

    def __iter__(self) -> Iterator[object]:
        return (make() for make in self.makers)


class DataModule(L.LightningDataModule):
    """Hands out one effective batch per optimizer step.

    Lightning's epochs are the stretches between two validations: `train_dataloader` is asked anew for each and
    returns the steps from `position()` up to the next one in `stops`.
    """

    def __init__(
        self,
        splits: Mapping[str, Sequence[Encoded]],
        *,
        pad_id: int,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        validation_batch_size: int,
    ) -> None:
        super().__init__()
        self.splits = splits
        self.pad_id = pad_id
        self.seed = seed
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.validation_batch_size = validation_batch_size
        self.stops: list[int] = []
        self.position: Callable[[], int] = lambda: 0
        self._weights, self._lengths = {}, {}
        for split, examples in splits.items():
            self._weights[split], self._lengths[split] = weights_and_lengths(examples)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in one pass over the training rows."""
        return steps_per_epoch(len(self.splits["train"]), self.batch_size)

    def _share(self) -> tuple[int, int]:
        trainer = self.trainer
        return (trainer.global_rank, trainer.world_size) if trainer is not None else (0, 1)

    def step_batch(self, step: int) -> StepBatch:
        """The batch of optimizer step `step`, this process's share of it."""
        examples = self.splits["train"]
        rows = rows_of_step(step, len(examples), self.batch_size, self.seed)
        rank, world = self._share()
        # Dealt longest first, in turn, so that the processes have like work.
        lengths = self._lengths["train"]
        mine = sorted(rows, key=lambda row: (-lengths[row], row))[rank::world]
        groups = by_length(lengths, mine, self.micro_batch_size)
        most = math.ceil(math.ceil(len(rows) / world) / self.micro_batch_size)
        micro_batches = [collate([examples[row] for row in group], group, self.pad_id) for group in groups]
        while len(micro_batches) < most:
            micro_batches.append(filler(examples[rows[0]], self.pad_id))
        return StepBatch(step, micro_batches, sum(self._weights["train"][row] for row in rows))

    def first_row(self, step: int) -> MicroBatch:
        """The first row of optimizer step `step` alone, the same in every process and with every micro-batch."""
        examples = self.splits["train"]
        row = rows_of_step(step, len(examples), self.batch_size, self.seed)[0]
        return collate([examples[row]], [row], self.pad_id)

    def train_dataloader(self) -> DataLoader:
        """The steps from here to the next validation."""
        start = self.position()
        stop = next((stop for stop in self.stops if stop > start), start)
        makers: list[Callable[[], object]] = [partial(self.step_batch, step) for step in range(start, stop)]
        return DataLoader(_Items(makers), batch_size=None, num_workers=0)

    def val_dataloader(self) -> DataLoader:
        """Validation rows in batches of like length; every process has its share."""
        return self._evaluation("validation")

    def _evaluation(self, split: str) -> DataLoader:
        examples = self.splits[split]
        rank, world = self._share()
        groups = by_length(self._lengths[split], range(len(examples))[rank::world], self.validation_batch_size)
        makers: list[Callable[[], object]] = [
            partial(collate, [examples[row] for row in group], group, self.pad_id) for group in groups
        ]
        return DataLoader(_Items(makers), batch_size=None, num_workers=0)

    def test_dataloader(self) -> DataLoader:
        """Test rows, likewise."""
        return self._evaluation("test")
