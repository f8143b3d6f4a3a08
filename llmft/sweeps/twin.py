"""Ends a trial that does as a reference run does, validation after validation."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError
from llmft.reports.read import RunRecord
from llmft.sweeps.trials import Trial

ALIKE_VALIDATIONS = 3
"""So many validations in a row within the noise make a twin: fewer and an early crossing of two curves would."""


def twin_rule(config: TrainConfig) -> Callable[[Trial, int, dict[str, float]], tuple[str, str] | None]:
    """The rule of sweep.early_stop_if_same_as: (status, reason) once a trial's curve stayed within noise of that run's.

    Raises ConfigError where that is no run with validations.
    """
    if config.sweep.early_stop_if_same_as is None:
        return lambda trial, step, metrics: None
    directory = Path(config.sweep.early_stop_if_same_as)
    monitor = config.trainer.monitor
    curve = validations(directory, monitor)
    if not curve:
        raise ConfigError(f"sweep.early_stop_if_same_as={directory}: not a run with validations of {monitor}.")
    bound = config.sweep.early_stop_noise
    if bound is None:
        advice = f"how far apart in {monitor} equal runs may be, such as twice the spread between seeds."
        raise ConfigError(f"sweep.early_stop_if_same_as needs sweep.early_stop_noise: {advice}")
    alike: dict[int, int] = {}

    def decide(trial: Trial, step: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        value = metrics.get(monitor)
        if step == 0 or value is None or step not in curve or trial.run.directory == directory:
            return None
        alike[trial.number] = alike.get(trial.number, 0) + 1 if abs(value - curve[step]) <= bound else 0
        if alike[trial.number] < ALIKE_VALIDATIONS:
            return None
        return "twin", (
            f"a twin of {directory.name}: {monitor} {value:.4f} against {curve[step]:.4f} at step {step}, within "
            f"{bound:g} for {ALIKE_VALIDATIONS} validations in a row"
        )

    return decide


def validations(directory: Path, monitor: str) -> dict[int, float]:
    """The monitored metric of a run by step, without that before training."""
    return {step: value for step, value in RunRecord(directory).curve(monitor) if step > 0}
