from __future__ import annotations

import pytest
import torch
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from llmft.config.trainer import LearningRateConfig, Schedule
from llmft.training.schedule import make_schedule


@pytest.mark.parametrize("schedule", [Schedule.linear, Schedule.cosine])
@pytest.mark.parametrize("warmup", [0, 7])
def test_linear_and_cosine_agree_with_transformers_after_the_warm_up(schedule: Schedule, warmup: int) -> None:
    ours = make_schedule(LearningRateConfig(peak=0.1, warmup_steps=warmup, schedule=schedule), 50)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    reference = get_linear_schedule_with_warmup if schedule is Schedule.linear else get_cosine_schedule_with_warmup
    scheduler = reference(optimizer, warmup, 50)
    for step in range(50):
        if step >= warmup:
            assert ours(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-12), step
        optimizer.step()
        scheduler.step()


def test_the_warm_up_rises_to_the_peak_and_no_step_is_wasted_on_a_rate_of_zero() -> None:
    rate = make_schedule(LearningRateConfig(peak=1.0, warmup_steps=4, schedule=Schedule.cosine), 20)
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert all(rate(step) > 0 for step in range(20))


def test_the_floor_holds_and_constant_stays() -> None:
    floored = make_schedule(LearningRateConfig(peak=2.0, floor=0.1, schedule=Schedule.linear), 1000)
    assert min(floored(step) for step in range(100, 2000)) == pytest.approx(0.2)
    constant = make_schedule(LearningRateConfig(peak=2.0, warmup_fraction=0.0, schedule=Schedule.constant), 10)
    assert {constant(step) for step in range(10)} == {2.0}
