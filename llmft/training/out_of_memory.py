"""Halves the micro-batch of a training that runs out of memory, which keeps its effective batch.

The numbers stay the same up to rounding, but with dropout the masks change: each micro-batch draws its own.
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
"""Parts of the messages of untyped errors: the CPU's allocator, cuBLAS, other libraries on CUDA."""


class OutOfMemory(Exception):
    """A stage of a run ran out of memory.

    Attributes:
        stage: "loading", "training" or "validation".
        plan: the micro-batches; None while loading.
        rows, tokens: the most that were computed at once.
    """

    def __init__(
        self, stage: str, error: BaseException, plan: MicroBatchPlan | None = None, rows: int = 0, tokens: int = 0
    ) -> None:
        super().__init__(first_line(error))
        self.stage, self.plan, self.rows, self.tokens = stage, plan, rows, tokens


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the device or the machine has no memory left."""
    if isinstance(error, (MemoryError, OutOfMemory)) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _MESSAGES)


def release_tensors(error: BaseException, module: torch.nn.Module) -> None:
    """Frees what a failed step holds: the local variables of the frames in the traceback of `error`, and gradients.

    Frames that still run keep their variables, and the traceback its lines.
    """
    errors, seen = [error], list[BaseException]()
    while errors:
        seen.append(cause := errors.pop())
        traceback.clear_frames(cause.__traceback__)
        errors += [e for e in (cause.__cause__, cause.__context__) if e is not None and e not in seen]
    module.zero_grad(set_to_none=True)
    free_memory()


def halve_micro_batch(config: TrainConfig, error: OutOfMemory) -> tuple[TrainConfig, dict[str, Any]]:
    """`config` with half the micro-batch or validation batch that ran out of memory, and a note for the record.

    At one row it switches on gradient checkpointing instead, whatever was configured.

    Raises ConfigError with further advice where that is on already, or where the base itself does not fit.
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
    if error.stage == "training":  # keeps the rest of the plan
        values = {"micro_batch": str(plan.limit), "gradient_checkpointing": plan.checkpointing, **values}
    note = {"stage": error.stage, "key": f"trainer.{key}", "from": was, "to": now}
    return replace(config, trainer=replace(config.trainer, **values)), note


def _advice(config: TrainConfig, error: OutOfMemory) -> str:
    """Settings to try, those that change the training least first."""
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
