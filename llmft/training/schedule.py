"""The learning rate as a function of the step, without a state to save."""

from __future__ import annotations

import math
from collections.abc import Callable

from llmft.config.trainer import LearningRateConfig, Schedule


def make_schedule(config: LearningRateConfig, total_steps: int) -> Callable[[int], float]:
    """The rate at each optimizer step, counted from 0.

    It rises linearly to `peak` at the last warm-up step, then falls towards `floor` x `peak`, which the step after the
    last would have: linearly, on half a cosine (Loshchilov & Hutter 2017, arXiv:1608.03983), or stays constant.
    """
    warmup = config.warmup_steps
    if warmup is None:
        warmup = round(config.warmup_fraction * total_steps)

    def rate(step: int) -> float:
        if step < warmup:
            return config.peak * (step + 1) / warmup
        progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
        if config.schedule is Schedule.constant:
            share = 1.0
        elif config.schedule is Schedule.linear:
            share = 1.0 - progress
        else:
            share = 0.5 * (1.0 + math.cos(math.pi * progress))
        return config.peak * (config.floor + (1.0 - config.floor) * share)

    return rate
