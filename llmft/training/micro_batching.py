"""How a step is cut into micro-batches, and what is kept of them, so that it fits into the memory of the device.

The answer is a function of config, rows, model and the device's total memory (not of what is free at the moment), so
that a run makes the same micro-batches alone, in a sweep and again; a resumed run takes those of its checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from llmft.config.sections import Checkpointing, TrainConfig, checkpointing_of, rows_or_tokens
from llmft.core.files import format_bytes
from llmft.data.batch import PADDED, Limit
from llmft.data.examples import Examples
from llmft.model.families import is_mixture
from llmft.model.load import model_config
from llmft.model.memory import FP32_BYTES, LOGIT_BYTES, MemoryEstimate, device_memory, estimate_memory
from llmft.training.prepare import RunInputs

MEMORY_MARGIN = 0.2
"""Share of the device's memory to keep free: what the estimate leaves out, see `llmft.model.memory`."""
MOST_TOKENS = {"cuda": 16_384, "cpu": 1_024}
"""Tokens at once beyond which nothing is gained. A GPU reads its weights once for all of them: of a 7B in 4-bit that is
some 2% of the time at 16 thousand (arithmetic, not measured). A CPU's caches hold fewer: 1,024 tokens take a fifth less
memory than 2,048, and a step on rows of 200 to 1,024 tokens 1.24 s against 1.12 s for a Llama of 256 units, 12.4 s
against 13.4 s for one of 1,024 units (two cores); 512 gain nothing more."""
ENOUGH_TOKENS = 2_048
"""So many tokens at once are preferred to computing layers again; fewer leave a GPU idle."""
UNTOLD_TOKENS = 2_048
"""At once where the memory cannot be told, with layers computed again."""
STEP = 256
LEVELS = (Checkpointing.none, Checkpointing.full)


@dataclass(frozen=True)
class Fit:
    """What a micro-batch may hold, what is kept of its forward, and why.

    Attributes:
        estimate: of the largest micro-batch; None where it was not needed or cannot be made.
    """

    limit: Limit
    checkpointing: Checkpointing
    why: str
    estimate: MemoryEstimate | None = None

    def to_plain(self) -> dict[str, Any]:
        """For a checkpoint and the run's record."""
        return {"rows": self.limit.rows, "tokens": self.limit.tokens, "checkpointing": self.checkpointing.value}

    def validation(self, rows: int) -> Limit:
        """A batch of a validation, which keeps nothing for a backward: as many rows, or four times the tokens."""
        return Limit(rows, None if self.limit.tokens is None else 4 * self.limit.tokens)

    def __str__(self) -> str:
        limit = self.limit
        size = f"{limit.rows} rows" if limit.rows is not None else f"{limit.tokens:,} tokens"
        again = "layers computed again" if self.checkpointing is Checkpointing.full else "nothing computed again"
        return f"{size}, {again} ({self.why})"


@dataclass(frozen=True)
class StepRows:
    """The largest that a process can meet in one step.

    Attributes:
        rows: of its share of the batch.
        longest: tokens of the longest row.
        tokens, labelled: of as many rows, the longest and those with the most labels.
        density: the largest share of labels in a row.
    """

    rows: int
    longest: int
    tokens: int
    labelled: int
    density: float

    @classmethod
    def of(cls, lengths: np.ndarray, labelled: np.ndarray, rows: int) -> StepRows:
        """From the rows of the training split."""
        top = np.sort(lengths)[::-1][:rows]
        most = int(np.sort(labelled)[::-1][:rows].sum())
        return cls(len(top), int(top[0]), int(top.sum()), most, float((labelled / lengths).max()))

    def largest(self, limit: Limit) -> tuple[int, int]:
        """(positions with padding, labels) of the largest micro-batch within `limit`."""
        rows = min(self.rows, limit.rows or self.rows)
        positions, labels = rows * self.longest, float(self.labelled)
        if limit.rows is not None:
            labels = min(labels, rows * self.density * self.longest)
        if limit.tokens is not None:
            most = max(limit.tokens, self.longest)
            positions = min(positions, max(self.longest, math.floor(PADDED * limit.tokens)))
            labels = min(labels, self.density * most)
        return positions, math.ceil(labels)


def choose_fit(
    config: TrainConfig,
    examples: Examples,
    architecture: Callable[[], Any],
    device: torch.device,
    dtype: torch.dtype,
    *,
    model: Any = None,
    before: dict[str, Any] | None = None,
) -> Fit:
    """How a step of `config` on `examples` is cut.

    Args:
        architecture: makes transformers' config of the model.
        model: the loaded one, where there is one: where a crude bound of its needs fits, nothing is estimated.
        before: what a checkpoint says was chosen; it stands for whatever the config leaves to us.
    """
    trainer = config.trainer
    level = trainer.gradient_checkpointing
    limit = Limit(*rows_or_tokens(trainer.micro_batch))
    given = limit != Limit()
    if before is not None:
        limit = limit if given else Limit(before["rows"], before["tokens"])
        level = checkpointing_of(before["checkpointing"]) if level is Checkpointing.auto else level
        return Fit(limit, level, "as before")
    if given and level is not Checkpointing.auto:
        return Fit(limit, level, "as configured")
    total = _memory(config, device)
    cap = MOST_TOKENS.get(device.type, UNTOLD_TOKENS)
    if total is None:
        return _untold(limit, level, cap, f"the memory of {device} cannot be told")
    rows = StepRows.of(examples.lengths, examples.labelled_tokens, math.ceil(trainer.batch_size / _processes(config)))
    available = int((1 - MEMORY_MARGIN) * total)
    levels = LEVELS if level is Checkpointing.auto else (level,)
    largest = rows.largest(limit if given else Limit(tokens=cap))
    if model is not None and (bound := crude_bytes(model, rows, *largest)) is not None and bound <= available:
        return Fit(limit if given else Limit(tokens=cap), levels[0], f"below {format_bytes(bound)}")
    try:
        estimate = estimate_memory(
            config,
            architecture(),
            rows=1,
            tokens=rows.longest,
            labelled_tokens=max(1, min(rows.labelled, rows.longest)),
            dtype=dtype,
            device_type=device.type,
        )
    except Exception as error:  # code of others, which may ask for anything; what it said is shown
        reason = f"the memory cannot be told: {type(error).__name__}: {str(error).splitlines()[0][:120]}"
        return _untold(limit, level, min(cap, UNTOLD_TOKENS), reason)

    share = _processes(config) if divides_weights(config) else 1

    def at(limit: Limit, level: Checkpointing) -> MemoryEstimate:
        return estimate.at(*rows.largest(limit), level, offloaded=trainer.offload_activations, share=share)

    chosen, used = _smallest_level(limit, levels, rows, cap, lambda *way: at(*way).total <= available)
    needed = at(chosen, used)
    why = f"about {format_bytes(needed.total)} of {format_bytes(total)}"
    return Fit(chosen, used, why if needed.total <= available else f"{why}: may not fit", needed)


def architecture_of(prepared: RunInputs, vocabulary: int) -> Any:
    """transformers' config of the model that a run builds; `vocabulary` is that of its tokenizer."""
    config = prepared.config
    found = model_config(config.model, prepared.located)
    if config.model.train_tokenizer_vocab is not None:
        found.vocab_size = vocabulary
    if config.task.auto_class == "sequence_classification":
        found.num_labels = len(prepared.labels)
    return found


def _smallest_level(
    limit: Limit,
    levels: tuple[Checkpointing, ...],
    rows: StepRows,
    cap: int,
    fits: Callable[[Limit, Checkpointing], bool],
) -> tuple[Limit, Checkpointing]:
    """The first level with room for `limit`, or for enough tokens; else the last, with what it has room for."""
    if limit != Limit():
        return limit, next((level for level in levels if fits(limit, level)), levels[-1])
    enough = min(ENOUGH_TOKENS, cap, rows.tokens)
    for level in levels:
        tokens = _most_tokens(cap, lambda tokens, level=level: fits(Limit(tokens=tokens), level))  # type: ignore[misc]
        if tokens >= enough or level is levels[-1]:
            return Limit(tokens=tokens), level
    raise AssertionError("no level to choose from")


def _most_tokens(cap: int, fits: Callable[[int], bool]) -> int:
    """The largest multiple of STEP up to `cap` that fits, STEP where none does."""
    if fits(cap):
        return cap
    low, high = 1, math.ceil(cap / STEP)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * STEP) else (low, middle)
    return low * STEP


def _untold(limit: Limit, level: Checkpointing, tokens: int, why: str) -> Fit:
    limit = Limit(tokens=tokens) if limit == Limit() else limit
    return Fit(limit, Checkpointing.full if level is Checkpointing.auto else level, why)


def divides_weights(config: TrainConfig) -> bool:
    """Whether the strategy divides weights and optimizer among the devices (FSDP)."""
    strategy = config.trainer.strategy
    return isinstance(strategy, dict) and str(strategy.get("_target_")).endswith("ModelParallelStrategy")


def _processes(config: TrainConfig) -> int:
    """Of the whole run, as far as the config says; "auto" is at least one."""
    devices = config.trainer.devices
    own = len(devices) if isinstance(devices, list) else devices if isinstance(devices, int) else 1
    return own * config.trainer.num_nodes


def _memory(config: TrainConfig, device: torch.device) -> int | None:
    """Total bytes for one process: of the smallest GPU, so that all processes decide alike; its share of a CPU's."""
    if device.type == "cuda":
        found = [device_memory(torch.device("cuda", place)) or 0 for place in range(torch.cuda.device_count())]
        return min(found)
    total = device_memory(device)
    return None if total is None else total // max(1, _processes(config) // config.trainer.num_nodes)


def crude_bytes(model: Any, rows: StepRows, positions: int, labels: int) -> int | None:
    """More than a training of the loaded `model` takes without checkpointing, told at once; None where it cannot be.

    Four numbers in fp32 for each input and output of a linear layer, and for each attention score, cover every family
    that `llmft.model.memory` was tried on; of a mixture of experts it says nothing.
    """
    if is_mixture(model):
        return None
    widths = 0
    for module in model.modules():
        widths += getattr(module, "in_features", 0) or getattr(module, "nx", 0)
        widths += getattr(module, "out_features", 0) or getattr(module, "nf", 0)
    own = model.config
    scores = own.num_hidden_layers * own.num_attention_heads * rows.longest
    weights = sum(parameter.nbytes for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    words = getattr(own, "vocab_size", 0)
    activations = 4 * FP32_BYTES * (widths + scores) * positions
    logits = words * (LOGIT_BYTES * labels + FP32_BYTES * positions)
    return int(weights + 4 * FP32_BYTES * trained + activations + logits)
