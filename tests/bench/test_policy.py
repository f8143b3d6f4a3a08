"""Policies that learn from rewards, against TRL's."""

from __future__ import annotations

import pytest

from tests.bench.bench_policy import PARITY, TRL, compare

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("task", "temperature"), [("grpo", 1.0), ("rloo", 1.0)])
def test_ten_steps_have_the_losses_of_trls_on_the_same_answers(task: str, temperature: float) -> None:
    if not TRL.installed:
        pytest.skip("TRL has no environment here: python -m tests.bench.peers trl")
    ours, theirs = compare(task, 10, 0.04, temperature)
    assert len(ours) == 10
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < PARITY
