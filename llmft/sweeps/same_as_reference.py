"""Ends a trial whose validations are the same as those of a reference run (sweep.early_stop_if_same_as)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError
from llmft.reports.read import RunRecord
from llmft.sweeps.trials import Trial

SAME_VALIDATIONS = 3
"""Validations in a row that must be within the noise; with fewer, two curves that cross would count as the same."""


def same_as_reference_rule(config: TrainConfig) -> Callable[[Trial, int, dict[str, float]], tuple[str, str] | None]:
    """A function that gives (status, reason) once a trial's curve stayed within the noise of the reference's.

    Raises ConfigError if the reference is not a run with validations, or the noise is not set.
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
        advice = f"the difference in {monitor} between equal runs, such as twice the spread between seeds."
        raise ConfigError(f"sweep.early_stop_if_same_as needs sweep.early_stop_noise: {advice}")
    num_same: dict[int, int] = {}

    def decide(trial: Trial, step: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        value = metrics.get(monitor)
        if step == 0 or value is None or step not in curve or trial.run.directory == directory:
            return None
        num_same[trial.number] = num_same.get(trial.number, 0) + 1 if abs(value - curve[step]) <= bound else 0
        if num_same[trial.number] < SAME_VALIDATIONS:
            return None
        return "twin", (
            f"the same as {directory.name}: {monitor} {value:.4f} against {curve[step]:.4f} at step {step}, within "
            f"{bound:g} for {SAME_VALIDATIONS} validations in a row"
        )

    return decide


def validations(directory: Path, monitor: str) -> dict[int, float]:
    """step -> monitored metric of a run, without the validation before training."""
    return {step: value for step, value in RunRecord(directory).curve(monitor) if step > 0}
