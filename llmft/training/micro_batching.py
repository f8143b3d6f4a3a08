"""Chooses micro-batch and gradient checkpointing so that a step fits into the memory of the device.

The choice is a function of config, rows, model and the device's total memory (not of what is free at the moment), so
that a run makes the same micro-batches alone, in a sweep and repeatedly; a resumed run takes those of its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmft.config.sections import TrainConfig
from llmft.config.trainer import Checkpointing, checkpointing_of, rows_or_tokens
from llmft.core.errors import one_line
from llmft.core.files import format_bytes
from llmft.data.batch import PADDED, Limit
from llmft.data.examples import Examples
from llmft.model.kernels.packing import has_flash
from llmft.model.load import model_config
from llmft.model.memory import MemoryEstimate, StepMemory, device_memory
from llmft.training.prepare import RunInputs

MEMORY_MARGIN = 0.2
"""Share of the device's memory to keep free: the estimate is right to some 15%, and memory fragments."""
MOST_TOKENS = {"cuda": 16_384, "cpu": 640}
"""Tokens at once beyond which little is gained. A GPU reads its weights once for all of them: of a 7B in 4-bit that is
some 2% of the time at 16 thousand (arithmetic, not measured). A CPU's caches hold fewer: SmolLM2-135M on Alpaca rows in
fp32 took 2.4 GiB with 640 tokens, 3.0 with 1,024 and 2.1 with 512, in 1.02, 1.00 and 1.09 of the CPU time."""
ENOUGH_TOKENS = 2_048
"""Tokens at once below which gradient checkpointing is used, since fewer leave a GPU idle. Also the micro-batch where
the memory cannot be estimated, with gradient checkpointing."""
STEP = 256
LEVELS = (Checkpointing.none, Checkpointing.full)


@dataclass(frozen=True)
class MicroBatchPlan:
    """The largest micro-batch, its gradient checkpointing, and why.

    Attributes:
        estimate: of the largest micro-batch; None where it is not needed or impossible.
    """

    limit: Limit
    checkpointing: Checkpointing
    why: str
    estimate: MemoryEstimate | None = None

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint and the run's record."""
        return {"rows": self.limit.rows, "tokens": self.limit.tokens, "checkpointing": self.checkpointing.value}

    def validation(self, rows: int) -> Limit:
        """The limit of a validation batch, which keeps nothing for a backward: `rows`, and four times the tokens."""
        return Limit(rows, None if self.limit.tokens is None else 4 * self.limit.tokens)

    @property
    def size(self) -> str:
        """Limit and gradient checkpointing in words, without the reason."""
        limit = self.limit
        size = f"{limit.rows} rows" if limit.rows is not None else f"{limit.tokens:,} tokens"
        level = "full" if self.checkpointing is Checkpointing.full else "no"
        return f"up to {size}, {level} gradient checkpointing"

    def __str__(self) -> str:
        return f"{self.size} ({self.why})"


@dataclass(frozen=True)
class StepRows:
    """Upper bounds of what one process gets in a step.

    Attributes:
        rows: of its part of the batch.
        longest: tokens of the longest row.
        tokens, labelled: summed over the longest `rows`, and over those with the most labels.
        density: the largest fraction of labels in a row.
    """

    rows: int
    longest: int
    tokens: int
    labelled: int
    density: float

    @classmethod
    def of(cls, lengths: np.ndarray, labelled: np.ndarray, rows: int) -> StepRows:
        top = np.sort(lengths)[::-1][:rows]
        most = int(np.sort(labelled)[::-1][:rows].sum())
        return cls(len(top), int(top[0]), int(top.sum()), most, float((labelled / lengths).max()))

    def largest(self, limit: Limit) -> tuple[int, int, int]:
        """(positions with padding, longest row, labels) of the largest micro-batch within `limit`."""
        rows = min(self.rows, limit.rows or self.rows)
        positions, labels = rows * self.longest, float(self.labelled)
        if limit.rows is not None:
            labels = min(labels, rows * self.density * self.longest)
        if limit.tokens is not None:
            most = max(limit.tokens, self.longest)
            positions = min(positions, max(self.longest, math.floor(PADDED * limit.tokens)))
            labels = min(labels, self.density * most)
        return positions, self.longest, math.ceil(labels)


Peak = Callable[..., MemoryEstimate]
"""From a limit and a level to the peak memory of the largest micro-batch; `offload=False`: without offloading."""


def estimator(
    config: TrainConfig, examples: Examples, architecture: Any, device: torch.device, dtype: torch.dtype
) -> Peak:
    """A function for the peak memory of the largest micro-batch of `examples` within a limit."""
    memory = StepMemory(config, architecture, dtype, device.type)
    return _peaks(config, examples, memory, device.type, flash=has_flash(device, dtype))


def _peaks(config: TrainConfig, examples: Examples, memory: StepMemory, device_type: str, *, flash: bool) -> Peak:
    rows = StepRows.of(examples.lengths, examples.labelled_tokens, _process_rows(config))
    num_shards = _processes(config) if divides_weights(config) else 1
    offloads = config.trainer.offload_activations and device_type == "cuda"  # on a CPU they are in main memory already

    def peak(limit: Limit, level: Checkpointing, *, offload: bool = offloads) -> MemoryEstimate:
        return memory.at(*rows.largest(limit), level, offloaded=offload, num_shards=num_shards, flash=flash)

    return peak


def choose(
    config: TrainConfig, examples: Examples, memory: StepMemory, device_type: str, total: float, *, flash: bool = True
) -> tuple[Limit, Checkpointing, MemoryEstimate, bool]:
    """(limit, level, their peak, whether that fits) on a device of `total` bytes.

    Takes the first level at which enough tokens fit, and as many as fit. Offloaded activations must fit into half of
    the machine's main memory, which its processes share and the base passes through.
    """
    limit, level = Limit(*rows_or_tokens(config.trainer.micro_batch)), config.trainer.gradient_checkpointing
    configured, cap = limit != Limit(), MOST_TOKENS.get(device_type, ENOUGH_TOKENS)
    peak = _peaks(config, examples, memory, device_type, flash=flash)
    host = device_memory(torch.device("cpu")) or 0

    def fits(size: Limit, level: Checkpointing) -> bool:
        needed = peak(size, level)
        offloaded = peak(size, level, offload=False).activations - needed.activations
        return needed.total <= (1 - MEMORY_MARGIN) * total and offloaded * _local_processes(config) <= host / 2

    levels = LEVELS if level is Checkpointing.auto else (level,)
    enough = min(ENOUGH_TOKENS, cap, int(np.sort(examples.lengths)[::-1][: _process_rows(config)].sum()))
    sizes = [limit] if configured else [Limit(tokens=tokens) for tokens in range(cap, 0, -STEP)]
    for level in levels:
        fitting = next((size for size in sizes if fits(size, level)), None)
        if fitting is not None and (configured or (fitting.tokens or 0) >= enough):
            break
    chosen = fitting or sizes[-1]
    return chosen, level, peak(chosen, level), fitting is not None


def plan_micro_batches(
    config: TrainConfig,
    examples: Examples,
    architecture: Callable[[], Any],
    device: torch.device,
    dtype: torch.dtype,
    saved: dict[str, Any] | None = None,
) -> MicroBatchPlan:
    """The micro-batches of a step of `config` on `examples`.

    `architecture` makes transformers' config of the model. `saved`, the choice in a checkpoint, fills in what the
    config leaves open.
    """
    level, limit = config.trainer.gradient_checkpointing, Limit(*rows_or_tokens(config.trainer.micro_batch))
    configured = limit != Limit()
    if saved is not None:
        limit = limit if configured else Limit(saved["rows"], saved["tokens"])
        level = checkpointing_of(saved["checkpointing"]) if level is Checkpointing.auto else level
        return MicroBatchPlan(limit, level, "as before")
    if configured and level is not Checkpointing.auto:
        return MicroBatchPlan(limit, level, "as configured")
    total = _memory(config, device)
    try:
        if total is None:
            raise NotImplementedError(f"of {device}")
        memory = StepMemory(config, architecture(), dtype, device.type)
    except Exception as error:  # third-party code may raise anything; its message is shown
        reason = f"the memory cannot be estimated: {one_line(error)}"
        limit = limit if configured else Limit(tokens=min(MOST_TOKENS.get(device.type, ENOUGH_TOKENS), ENOUGH_TOKENS))
        return MicroBatchPlan(limit, Checkpointing.full if level is Checkpointing.auto else level, reason)
    flash = has_flash(device, dtype)
    limit, level, needed, fits = choose(config, examples, memory, device.type, total, flash=flash)
    why = f"estimated peak {format_bytes(needed.total)} of {format_bytes(total)}"
    if device.type == "cuda":
        why += ", arithmetic that was never measured on this card"
    return MicroBatchPlan(limit, level, why if fits else f"{why}: may not fit", needed)


def architecture_of(inputs: RunInputs, vocabulary: int) -> Any:
    """transformers' config of the model that a run builds; `vocabulary` is that of its tokenizer."""
    config = inputs.config
    architecture = model_config(config.model, inputs.located)
    if config.model.train_tokenizer_vocab is not None:
        architecture.vocab_size = vocabulary
    if config.task.auto_class == "sequence_classification":
        architecture.num_labels = inputs.num_outputs
    return architecture


def divides_weights(config: TrainConfig) -> bool:
    """Whether the strategy shards weights and optimizer states over the devices (FSDP)."""
    strategy = config.trainer.strategy
    return isinstance(strategy, dict) and str(strategy.get("_target_")).endswith("ModelParallelStrategy")


def _processes(config: TrainConfig) -> int:
    """The run's processes by its config; "auto" counts as one device."""
    devices = config.trainer.devices
    local = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return local * config.trainer.num_nodes


def _local_processes(config: TrainConfig) -> int:
    return max(1, _processes(config) // config.trainer.num_nodes)


def _process_rows(config: TrainConfig) -> int:
    return math.ceil(config.trainer.batch_size / _processes(config))


def _memory(config: TrainConfig, device: torch.device) -> int | None:
    """Total bytes for one process: of the smallest GPU, so that all processes choose alike; on a CPU its share."""
    if device.type == "cuda":
        return min(device_memory(torch.device("cuda", index)) or 0 for index in range(torch.cuda.device_count()))
    total = device_memory(device)
    return None if total is None else total // _local_processes(config)
