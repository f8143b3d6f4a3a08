"""Batches: every row once an epoch, padding masked, the order from the seed alone."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmft.data.batch import PADDED, Limit, collate, rows_of_step, steps_per_epoch
from llmft.data.columns import Conversation
from llmft.data.datamodule import DataModule
from llmft.data.examples import IGNORE, Example


def example(length: int, labelled: int = 2) -> Example:
    ids = list(range(3, 3 + length))
    labels = [IGNORE] * (length - labelled) + ids[length - labelled :]
    return Example(ids, labels, Conversation([], "f:1"))


def test_padding_is_masked_and_never_a_label() -> None:
    batch = collate([example(5), example(3)], [0, 1], pad_id=0)
    assert batch.input_ids.tolist() == [[3, 4, 5, 6, 7], [3, 4, 5, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels[1].tolist() == [IGNORE, 4, 5, IGNORE, IGNORE]
    assert batch.num_tokens == 8


def test_a_pad_token_that_is_also_the_end_token_stays_a_label_where_it_ends_an_answer() -> None:
    row = example(4)
    row.input_ids[-1] = row.labels[-1] = 2
    batch = collate([row, example(6)], [0, 1], pad_id=2)
    assert batch.labels[0].tolist() == [IGNORE, IGNORE, 5, 2, IGNORE, IGNORE]


@pytest.mark.parametrize(("rows", "size"), [(10, 4), (8, 4), (3, 8), (1, 1)])
def test_every_row_comes_once_an_epoch_in_a_new_order(rows: int, size: int) -> None:
    per_epoch = steps_per_epoch(rows, size)
    first = [row for step in range(per_epoch) for row in rows_of_step(step, rows, size, seed=3)]
    second = [row for step in range(per_epoch, 2 * per_epoch) for row in rows_of_step(step, rows, size, seed=3)]
    assert sorted(first) == sorted(second) == list(range(rows))
    if rows > 3:
        assert first != second
        assert first != [row for step in range(per_epoch) for row in rows_of_step(step, rows, size, seed=4)]


def test_groups_are_of_like_length_and_hold_every_row_once() -> None:
    examples = [example(length) for length in (3, 9, 5, 7, 4)]
    groups = Limit(rows=2).groups([len(e.input_ids) for e in examples], range(5))
    assert groups == [[1, 3], [2, 4], [0]]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 300), min_size=1, max_size=40), st.integers(1, 600), st.integers(1, 8) | st.none())
def test_a_limit_in_tokens_bounds_tokens_and_padding_and_loses_no_row(
    lengths: list[int], tokens: int, rows: int | None
) -> None:
    groups = Limit(rows, tokens).groups(lengths, range(len(lengths)))
    assert sorted(row for group in groups for row in group) == list(range(len(lengths)))
    for group in groups:
        assert rows is None or len(group) <= rows
        if len(group) > 1:
            assert sum(lengths[row] for row in group) <= tokens
            assert len(group) * max(lengths[row] for row in group) <= PADDED * tokens
    for first, second in pairwise(groups):  # none is cut before it is full
        joined = [lengths[row] for row in (*first, second[0])]
        full = rows is not None and len(joined) > rows
        assert full or sum(joined) > tokens or len(joined) * max(joined) > PADDED * tokens


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("micro", [Limit(1), Limit(2), Limit(16), Limit(tokens=12), Limit(tokens=16)], ids=str)
def test_processes_share_a_step_without_overlap_and_with_equally_many_micro_batches(world: int, micro: Limit) -> None:
    class Trainer:
        global_rank = 0
        world_size = world

    examples = [example(3 + n) for n in range(7)]
    data = DataModule(
        {"train": examples, "validation": examples},
        pad_id=0,
        seed=0,
        batch_size=5,
        micro_batch=micro,
        validation_batch=Limit(2),
    )
    for step in range(data.steps_per_epoch):
        shares = []
        for rank in range(world):
            data.trainer = Trainer()  # type: ignore[assignment]
            data.trainer.global_rank = rank  # type: ignore[union-attr, misc]
            shares.append(data.step_batch(step))
        rows = [row for share in shares for batch in share.micro_batches for row in batch.rows]
        assert sorted(rows) == sorted(rows_of_step(step, 7, 5, 0))
        assert len({len(share.micro_batches) for share in shares}) == 1
        assert {share.weight for share in shares} == {2.0 * len(rows)}
        fillers = [b for share in shares for b in share.micro_batches if not b.rows]
        assert all(float(b.weights.sum()) == 0 for b in fillers)


def test_a_loader_goes_from_the_position_to_the_end_of_the_pass_or_of_the_training() -> None:
    examples = [example(3) for _ in range(6)]
    data = DataModule(
        {"train": examples, "validation": examples},
        pad_id=0,
        seed=0,
        batch_size=2,
        micro_batch=Limit(2),
        validation_batch=Limit(2),
    )
    data.validation_steps = [4, 7]
    data.current_step = lambda: 2
    assert data.steps_per_epoch == 3
    assert [batch.step for batch in data.train_dataloader()] == [2]
    data.current_step = lambda: 4
    assert [batch.step for batch in data.train_dataloader()] == [4, 5]
    data.current_step = lambda: 6
    assert [batch.step for batch in data.train_dataloader()] == [6]
    assert sum(len(batch.rows) for batch in data.val_dataloader()) == 6
