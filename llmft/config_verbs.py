"""The dataclasses of the verbs that take run directories: predict, evaluate, folds, blend, refit."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from llmft.config import require


class Form(Enum):
    """What `python -m llmft.predict` writes besides the predictions."""

    predictions = "predictions"
    submission = "submission"


class Method(Enum):
    """How members become one prediction."""

    mean = "mean"
    geometric = "geometric"
    rank = "rank"
    hill_climbing = "hill_climbing"
    convex = "convex"


def as_list(value: Any) -> list[str]:
    """One name, or a list of them."""
    return [str(item) for item in value] if isinstance(value, (list, tuple)) else [str(value)]


@dataclass
class PredictData:
    """The rows to predict; columns are those of the run."""

    files: Any = MISSING
    csv_columns: list[str] | None = None


@dataclass
class PredictConfig:
    """What `python -m llmft.predict` takes."""

    run: Any = MISSING
    data: PredictData = field(default_factory=PredictData)
    name: str | None = None
    batch_size: int = 32
    max_new_tokens: int | None = None
    format: Form = Form.predictions
    template: str | None = None
    columns: dict[str, str] = field(default_factory=dict)
    accelerator: str = "auto"
    threads: int | None = None
    force: bool = False

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, f"batch_size={self.batch_size}: 1 or more.")
        for key in ("max_new_tokens", "threads"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"{key}={value}: 1 or more, or null.")
        require(
            self.name not in ("val", "test"),
            f"name={self.name}: a run's own held-out rows are called so; choose another.",
        )
        require(
            self.format is not Form.submission or self.template is not None,
            "format=submission needs template=FILE, the competition's sample submission.",
        )


@dataclass
class EvaluateConfig:
    """What `python -m llmft.evaluate` takes."""

    predictions: str = MISSING
    references: Any = None
    target: str | None = None
    id: str | None = None
    slice: list[str] = field(default_factory=list)
    metrics: list[str] = field(default_factory=list)
    metric_options: dict[str, Any] = field(default_factory=dict)
    bootstrap: int = 1000
    confidence: float = 0.95
    seed: int = 0
    format: str = "text"

    def __post_init__(self) -> None:
        require(self.bootstrap >= 0, f"bootstrap={self.bootstrap}: resamples, 0 for none.")
        require(0 < self.confidence < 1, f"confidence={self.confidence}: above 0 and below 1.")
        require(self.format in ("text", "json"), f"format={self.format}: text or json.")


@dataclass
class FoldsConfig:
    """What `python -m llmft.folds` takes."""

    runs: Any = None
    output_dir: str = "outputs"
    name: str | None = None
    metrics: list[str] = field(default_factory=list)


@dataclass
class BlendConfig:
    """What `python -m llmft.blend` takes."""

    runs: Any = MISSING
    method: Method = Method.mean
    predictions: str = "val"
    metric: str | None = None
    steps: int = 100
    num_folds: int = 5
    seed: int = 0
    output_dir: str = "outputs"
    name: str | None = None

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"steps={self.steps}: 1 or more rounds of hill climbing.")
        require(self.num_folds >= 2, f"num_folds={self.num_folds}: 2 or more.")


@dataclass
class RefitConfig:
    """What `python -m llmft.refit` takes."""

    runs: Any = MISSING
    output_dir: str | None = None
    progress: bool = True
    logger: bool = True
