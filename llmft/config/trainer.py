"""The groups trainer, learning_rate and logger of a training."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import partial
from typing import Any

from omegaconf import MISSING

from llmft.config.fields import is_count, not_in_key, require, require_each, seconds_of
from llmft.config.model import Precision
from llmft.core.errors import ConfigError, did_you_mean

Schedule = StrEnum("Schedule", "constant linear cosine")
"""Schedule of the learning rate from its peak to its floor."""
OnNan = StrEnum("OnNan", "stop skip")
"""What happens to a step whose loss or gradient is not a finite number."""
OnSaveError = StrEnum("OnSaveError", "stop warn")
"""What happens when a checkpoint cannot be written."""
Checkpointing = StrEnum("Checkpointing", "auto none full")
"""Activation checkpointing: none, or full (only layers' inputs are kept); `auto` is none if it fits, else full."""


class Mode(Enum):
    """The better direction of the monitored metric; `auto` is the direction that the metric declares."""

    auto = "auto"
    min = "min"
    max = "max"

    @property
    def sign(self) -> float:
        """1 or -1: a value times this is better when it is lower."""
        assert self is not Mode.auto, "llmft.metrics.monitor.with_mode comes first"
        return 1.0 if self is Mode.min else -1.0


Export = StrEnum("Export", "best last")
"""The weights that a run exports."""


@dataclass
class LearningRateConfig:
    peak: float = MISSING
    warmup_fraction: float = 0.03
    warmup_steps: int | None = None
    schedule: Schedule = Schedule.cosine
    floor: float = 0.0

    def __post_init__(self) -> None:
        check = partial(require_each, self, "learning_rate.")
        check("peak", lambda x: 0 < x < math.inf, "above 0, and finite.")
        check("warmup_fraction", lambda x: 0 <= x <= 1, "0 to 1.")
        check("warmup_steps", lambda n: n >= 0, "0 or more, or null for warmup_fraction.")
        check("floor", lambda x: 0 <= x <= 1, "a share of the peak, 0 to 1.")


def rows_or_tokens(micro_batch: Any) -> tuple[int | None, int | None]:
    """trainer.micro_batch as (rows, None) or (None, tokens); (None, None) for auto."""
    if micro_batch == "auto":
        return None, None
    match = re.fullmatch(r"([1-9]\d*) ?(tokens)?", str(micro_batch))
    if match is None:
        expected = "a number of rows, a number of tokens (4096tokens), or auto."
        raise ConfigError(f"trainer.micro_batch={micro_batch}: {expected}")
    return (None, int(match[1])) if match[2] else (int(match[1]), None)


def checkpointing_of(value: Any) -> Checkpointing:
    """A value of trainer.gradient_checkpointing; true and false mean full and none."""
    if isinstance(value, Checkpointing):
        return value
    if isinstance(value, bool):
        return Checkpointing.full if value else Checkpointing.none
    if value == "selective":  # in runs of llmft 0.1
        warnings.warn("trainer.gradient_checkpointing=selective is gone; full is taken.", FutureWarning, stacklevel=2)
        return Checkpointing.full
    hint = did_you_mean(str(value), Checkpointing)
    require(value in [*Checkpointing], f"trainer.gradient_checkpointing={value}: auto, none or full{hint}")
    return Checkpointing(value)


@dataclass
class TrainerConfig:
    batch_size: int = 16
    epochs: float = 3.0
    max_steps: int | None = None
    validate_every: float = 0.25
    gradient_clip: float | None = 1.0
    monitor: str = "val/loss_nats"
    mode: Mode = Mode.auto
    patience: int | None = None
    export: Export = Export.best
    precision: Precision = Precision.auto
    callbacks: dict[str, Any] = field(default_factory=dict)
    # The following change time and memory, not the results.
    micro_batch: Any = not_in_key("auto")
    gradient_checkpointing: Any = not_in_key(Checkpointing.auto)
    offload_activations: bool = not_in_key(False)
    compile: bool = not_in_key(False)
    validation_batch_size: int = not_in_key(64)
    checkpoint_every: int | None = not_in_key(None)
    keep_checkpoints: int = not_in_key(2)
    accelerator: str = not_in_key("auto")
    devices: Any = not_in_key(1)
    num_nodes: int = not_in_key(1)
    strategy: Any = not_in_key("auto")
    threads: int | None = not_in_key(None)
    deterministic: bool = not_in_key(True)
    # The following matter only when something goes wrong.
    max_time: str | None = not_in_key(None)
    on_nan: OnNan = not_in_key(OnNan.stop)
    on_save_error: OnSaveError = not_in_key(OnSaveError.stop)

    def __post_init__(self) -> None:
        if self.max_time is not None:
            limit = seconds_of(self.max_time, "trainer.max_time")
            require(limit > 0, f"trainer.max_time={self.max_time}: above 0, or null for no limit.")
        rows_or_tokens(self.micro_batch)
        self.gradient_checkpointing = checkpointing_of(self.gradient_checkpointing)
        check = partial(require_each, self, "trainer.")
        check("batch_size validation_batch_size keep_checkpoints num_nodes", lambda n: n >= 1, "1 or more.")
        check("max_steps checkpoint_every patience threads", lambda n: n >= 1, "1 or more, or null.")
        require(
            is_count(self.devices) or self.devices == "auto" or (isinstance(self.devices, list) and self.devices != []),
            f"trainer.devices={self.devices}: 1 or more, a list of device numbers, or auto.",
        )
        check("epochs", lambda x: x > 0, "above 0.")
        check("validate_every", lambda x: x > 0, "a share of the run (0.25) or a number of steps (100).")
        check("gradient_clip", lambda x: x > 0, "above 0, or null for none.")


@dataclass
class WandbConfig:
    """Settings of Weights & Biases; `logger=wandb` sets `enabled`."""

    enabled: bool = False
    project: str = "llmft"
    entity: str | None = None
    group: str | None = None
    job_type: str = "train"
    start_timeout_s: float = 4.0
    finish_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check = partial(require_each, self, "logger.wandb.")
        characters = "W&B takes 1 to 128 characters, none of them /, \\, #, ?, % or :."
        check("project entity", lambda name: re.fullmatch(r"[^/\\#?%:]{1,128}", name) is not None, characters)
        check("start_timeout_s finish_timeout_s", lambda x: 0 < x < math.inf, "a number of seconds above 0.")


@dataclass
class LoggerConfig:
    wandb: WandbConfig = field(default_factory=WandbConfig)
    loggers: dict[str, Any] = field(default_factory=dict)
