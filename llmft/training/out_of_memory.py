"""A training that finds no memory goes on with smaller micro-batches: the same numbers, in more pieces."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmft.config import TrainConfig
from llmft.errors import ConfigError

_TOLD = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What errors without a type of their own say: the CPU's allocator, cuBLAS, other libraries on CUDA."""


class OutOfMemory(Exception):
    """No memory in `stage`: "loading", "training" or "validation"."""

    def __init__(self, stage: str, error: BaseException) -> None:
        super().__init__(str(error).splitlines()[0][:300] if str(error) else type(error).__name__)
        self.stage = stage


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the machine has no memory left."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _TOLD)


def smaller(config: TrainConfig, found: OutOfMemory) -> tuple[TrainConfig, dict[str, Any]]:
    """`config` with half the micro-batch of the stage that found no memory, and a note of it for the record.

    Raises ConfigError with what is left to try where that is 1 already, or the base itself does not fit.
    """
    trainer = config.trainer
    key = {"training": "micro_batch_size", "validation": "validation_batch_size"}.get(found.stage)
    size = getattr(trainer, key) if key else 1
    if key == "micro_batch_size":  # a larger one than the batch is never used
        size = min(size, trainer.batch_size)
    if key is None or size == 1:
        raise ConfigError(f"out of memory in {found.stage} ({found}); {_advice(config, found.stage)}.")
    note = {"stage": found.stage, "key": f"trainer.{key}", "from": size, "to": size // 2}
    halved: dict[str, Any] = {key: size // 2}
    return replace(config, trainer=replace(trainer, **halved)), note


def _advice(config: TrainConfig, stage: str) -> str:
    """What is left to try, most harmless first."""
    tries = []
    if stage == "training" and not config.trainer.gradient_checkpointing:
        tries.append("trainer.gradient_checkpointing=true")
    if config.quantization.format.value == "none" and config.lora.enabled:
        tries.append("quantization=nf4")
    if not config.lora.enabled:
        tries.append("lora=default quantization=nf4")
    if stage != "loading":
        tries.append(f"data.max_tokens={max(8, config.data.max_tokens // 2)}")
    if stage == "validation" and config.task.generate_rows:
        tries.append(f"task.max_new_tokens={max(1, config.task.max_new_tokens // 2)}")
    return "try " + ", ".join([*tries, "trainer=fsdp on several devices", "a smaller model"])
