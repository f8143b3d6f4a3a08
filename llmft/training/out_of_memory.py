"""A training that finds no memory goes on with smaller micro-batches: the same numbers, in more pieces.

The same up to rounding, that is; and where there is dropout, with other draws: each micro-batch has its own.
"""

from __future__ import annotations

import traceback
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing
from llmft.core.errors import ConfigError, first_line
from llmft.core.machine import free_memory
from llmft.training.micro_batching import MicroBatchPlan

if TYPE_CHECKING:
    import torch

_MESSAGES = ("out of memory", "can't allocate memory", "not enough memory", "alloc_failed")
"""What errors without a type of their own say: the CPU's allocator, cuBLAS, other libraries on CUDA."""


class OutOfMemory(Exception):
    """No memory in a stage of a run.

    Attributes:
        stage: "loading", "training" or "validation".
        plan: how steps were cut; None while loading.
        rows, tokens: what was at most computed at once when memory ran out.
    """

    def __init__(
        self, stage: str, error: BaseException, plan: MicroBatchPlan | None = None, rows: int = 0, tokens: int = 0
    ) -> None:
        super().__init__(first_line(error))
        self.stage, self.plan, self.rows, self.tokens = stage, plan, rows, tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that the device or the machine has no memory left."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MESSAGES)


def let_go(error: BaseException, module: torch.nn.Module) -> None:
    """Gives back what a step that failed holds: the variables of the frames that `error` has passed, and gradients.

    What is still running keeps its own; so do the lines of a traceback.
    """
    errors, seen = [error], list[BaseException]()
    while errors:
        seen.append(cause := errors.pop())
        traceback.clear_frames(cause.__traceback__)
        errors += [e for e in (cause.__cause__, cause.__context__) if e is not None and e not in seen]
    module.zero_grad(set_to_none=True)
    free_memory()


def smaller(config: TrainConfig, error: OutOfMemory) -> tuple[TrainConfig, dict[str, Any]]:
    """`config` with half of what was computed at once where memory ran out, and a note of it for the record.

    At one row, layers are computed again instead, whatever was configured.

    Raises ConfigError with what is left to try where that is done already, or the base itself does not fit.
    """
    plan, key = error.plan, "micro_batch"
    was: Any = error.rows
    now: Any = error.rows // 2
    if plan is not None and error.rows > 1:
        if error.stage == "validation":
            key = "validation_batch_size"
        elif plan.limit.rows is None:
            was, now = f"{error.tokens}tokens", f"{error.tokens // 2}tokens"
    elif plan is not None and error.stage == "training" and plan.checkpointing is not Checkpointing.full:
        key, was, now = "gradient_checkpointing", plan.checkpointing.value, Checkpointing.full.value
    else:
        raise ConfigError(f"out of memory in {error.stage} ({error}); {_advice(config, error)}.")
    values: dict[str, Any] = {key: now}
    if error.stage == "training":  # what was chosen stays, but for this
        values = {"micro_batch": str(plan.limit), "gradient_checkpointing": plan.checkpointing, **values}
    note = {"stage": error.stage, "key": f"trainer.{key}", "from": was, "to": now}
    return replace(config, trainer=replace(config.trainer, **values)), note


def _advice(config: TrainConfig, error: OutOfMemory) -> str:
    """What is left to try, most harmless first."""
    tries = []
    if error.stage == "training" and not config.trainer.offload_activations and config.trainer.accelerator != "cpu":
        tries.append("trainer.offload_activations=true")
    if config.quantization.format.value == "none" and config.lora.enabled:
        tries.append("quantization=nf4")
    if not config.lora.enabled:
        tries.append("lora=default quantization=nf4")
    if error.stage != "loading":
        tries.append(f"data.max_tokens={max(8, config.data.max_tokens // 2)}")
    if error.stage == "validation" and config.task.generate_rows:
        tries.append(f"task.max_new_tokens={max(1, config.task.max_new_tokens // 2)}")
    return "try " + ", ".join([*tries, "trainer=fsdp on several devices", "a smaller model"])
