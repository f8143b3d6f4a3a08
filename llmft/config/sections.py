"""The training config: its groups together.

All values that llmft reads are typed in this folder, so a typo or a wrong type fails at composition. Objects of
libraries (optimizer, callbacks, loggers) are `_target_` nodes, which `llmft.config.instantiate` checks before any
weights load. `__post_init__` refuses values out of range and contradictions, in one sentence that names the key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from llmft.config.data import DataConfig, PromptConfig
from llmft.config.fields import not_in_key, require, require_each
from llmft.config.model import LoraConfig, ModelConfig, QuantizationConfig, QuantizationFormat
from llmft.config.sweep import SweepConfig
from llmft.config.task import TaskConfig
from llmft.config.trainer import LearningRateConfig, LoggerConfig, TrainerConfig
from llmft.core.errors import ConfigError


@dataclass
class TrainConfig:
    """Config of `python -m llmft`."""

    model: ModelConfig = MISSING
    quantization: QuantizationConfig = MISSING
    lora: LoraConfig = MISSING
    learning_rate: LearningRateConfig = MISSING
    optimizer: dict[str, Any] = MISSING
    prompt: PromptConfig = MISSING
    data: DataConfig = MISSING
    task: TaskConfig = MISSING
    trainer: TrainerConfig = MISSING
    logger: LoggerConfig = not_in_key()
    sweep: SweepConfig = not_in_key()
    trusted_packages: list[str] = not_in_key(factory=list)
    seed: int = 0
    force: bool = not_in_key(False)
    progress: bool = not_in_key(True)
    output_dir: str = not_in_key("outputs")
    name: str | None = not_in_key(None)
    tags: list[str] = not_in_key(factory=list)
    notes: str | None = not_in_key(None)

    def __post_init__(self) -> None:
        require(
            self.lora.enabled or self.quantization.format is QuantizationFormat.none,
            f"quantization.format={self.quantization.format} with lora=none leaves nothing to train: "
            "use quantization=none for full fine-tuning, or a LoRA.",
        )
        if self.lora.adapter is not None and not self.lora.enabled:
            raise ConfigError(
                "lora.adapter with lora=none: an adapter needs LoRA to be trained on; choose lora=default."
            )
        self._check_margins()
        require_each(self, "", "seed", lambda n: 0 <= n < 2**32, "0 to 4294967295.")

    def _check_margins(self) -> None:
        """Raises ConfigError for a margin that no row would have."""
        margin, columns = self.task.margin, self.data.columns
        if margin == "none":
            return
        if columns.degree is None:
            advice = "name its column in data.columns.degree."
            raise ConfigError(f"task.margin={margin}: a pair's margin comes from its degree; {advice}")
        if columns.margin is not None:
            raise ConfigError(f"task.margin={margin}: data.columns.margin={columns.margin} gives one too; keep one.")
        for name in sorted(set(margin) ^ set(self.data.degrees)) if isinstance(margin, dict) else ():
            raise ConfigError(f"task.margin: {name}: give each of data.degrees={self.data.degrees} a number.")
