"""Ends a trial that does as a reference run does, validation after validation."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

from llmft.config import TrainConfig
from llmft.errors import ConfigError
from llmft.runs import Run
from llmft.sweeping.trials import Trial

ALIKE_VALIDATIONS = 3
"""So many validations in a row within the noise make a twin: fewer and an early crossing of two curves would."""


def twin_rule(config: TrainConfig) -> Callable[[Trial, int, dict[str, float]], tuple[str, str] | None]:
    """The rule of sweep.twin_of: (status, reason) once a trial's curve has stayed within noise of that run's.

    Raises ConfigError where that is no run with validations.
    """
    if config.sweep.twin_of is None:
        return lambda trial, step, metrics: None
    directory = Path(config.sweep.twin_of)
    monitor = config.trainer.monitor
    curve = validations(directory, monitor)
    if not curve:
        raise ConfigError(f"sweep.twin_of={directory}: not a run with validations of {monitor}.")
    noise = config.sweep.twin_noise
    alike: dict[int, int] = {}

    def decide(trial: Trial, step: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        value = metrics.get(monitor)
        if step == 0 or value is None or step not in curve or trial.run.directory == directory:
            return None
        bound = noise if noise is not None else paired_noise(directory, trial.run.directory, step)
        if bound is None:
            return None
        alike[trial.number] = alike.get(trial.number, 0) + 1 if abs(value - curve[step]) <= bound else 0
        if alike[trial.number] < ALIKE_VALIDATIONS:
            return None
        return "twin", (
            f"a twin of {directory.name}: {monitor} {value:.4f} against {curve[step]:.4f} at step {step}, within "
            f"{bound:.4f} for {ALIKE_VALIDATIONS} validations in a row"
        )

    return decide


def validations(directory: Path, monitor: str) -> dict[int, float]:
    """The monitored metric of a run by step, without that before training."""
    try:
        lines = Run(directory, "").metrics_file.read_text().splitlines()
    except OSError:
        return {}
    records = [json.loads(line) for line in lines]
    return {r["step"]: r[monitor] for r in records if r["step"] > 0 and r.get(monitor) is not None}


def paired_noise(one: Path, other: Path, step: int) -> float | None:
    """Twice the standard error of the difference of two runs' losses over the same rows, in nats per token.

    The loss is a ratio, summed nats over tokens: the error is that of its linearisation (delta method). None where
    the two have not the same rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for directory in (one, other):
        try:
            tables.append(pq.read_table(Run(directory, "").row_losses_file("val", step)).to_pydict())
        except (OSError, pa.ArrowException):
            return None
    ours, theirs = tables
    if ours["row"] != theirs["row"] or ours["tokens"] != theirs["tokens"] or len(ours["row"]) < 2:
        return None
    tokens = sum(ours["tokens"])
    apart = [a - b for a, b in zip(ours["loss_nats"], theirs["loss_nats"], strict=True)]
    mean = sum(apart) / tokens
    rest = [difference - mean * count for difference, count in zip(apart, ours["tokens"], strict=True)]
    count = len(rest)
    return 2 * math.sqrt(sum(value * value for value in rest) * count / (count - 1)) / tokens
