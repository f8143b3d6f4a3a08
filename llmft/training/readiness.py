"""Checks of device, rows and model before weights load, for both `Session` and `python -m llmft.check`."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmft.config.instantiate import build
from llmft.config.model import ModelInit, Precision, QuantizationFormat
from llmft.config.sections import TrainConfig
from llmft.config.trainer import OnSaveError
from llmft.core.errors import ConfigError, DiskError, first_line
from llmft.core.files import check_space
from llmft.data import quality
from llmft.model import adapters, families
from llmft.model.assemble import check_dora
from llmft.model.device import pick_device, pick_precision
from llmft.model.meta import meta_model
from llmft.training.inspection import Inspection, inspect_rows
from llmft.training.micro_batching import architecture_of
from llmft.training.parts import Parts
from llmft.training.prepare import RunInputs, may_be_distributed
from llmft.training.scoring import make_objective
from llmft.training.tokenized_data import TokenizedData, read_rows

if TYPE_CHECKING:
    import lightning as L


LIGHTNING_PRECISION = {Precision.bf16: "bf16-mixed", Precision.fp16: "16-mixed", Precision.fp32: "32-true"}


@dataclass
class Readiness:
    """All that a training needs besides its weights; `objective` is None where errors of the rows stop it."""

    device: torch.device
    precision: Precision
    rows: TokenizedData
    inspection: Inspection
    objective: Any = None


def check_readiness(
    inputs: RunInputs,
    parts: Parts,
    warn: Callable[[str], None],
    *,
    search_near_duplicates: bool = False,
    stop_on_errors: bool = True,
) -> Readiness:
    """Device, rows, inspection and objective; `search_near_duplicates` takes seconds.

    Raises ConfigError or DataError for the first thing that makes a training impossible; for errors of the rows only
    with `stop_on_errors`.
    """
    config = inputs.config
    device, precision = choose_device(config)
    trainer = config.trainer
    if device.type == "cpu" and trainer.accelerator == "auto" and torch.backends.mps.is_available():
        warn("trainer.accelerator=auto is the CPU here: llmft does not use Apple's GPU.")
    if parts.callbacks or trainer.strategy != "auto" or trainer.devices != 1 or trainer.num_nodes != 1:
        callbacks = [*parts.callbacks.values()]
        lightning_trainer(config, device, precision, callbacks=callbacks, logger=False, val_check_interval=1)
    rows = read_rows(inputs, warn)
    inspection = inspect_rows(inputs, rows, search_near_duplicates=search_near_duplicates)
    ready = Readiness(device, precision, rows, inspection)
    if stop_on_errors:
        quality.stop_on_errors(ready.inspection.findings)
    elif any(finding.level == "error" for finding in ready.inspection.findings):
        return ready
    ready.objective = make_objective(config.task, inputs.targets, rows.encoder, rows.splits)
    _check_model(inputs, rows)
    return ready


def choose_device(config: TrainConfig) -> tuple[torch.device, Precision]:
    """A training's device and precision. Raises ConfigError for what the machine does not have."""
    trainer = config.trainer
    local_rank = (
        int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0))) if may_be_distributed(config) else 0
    )
    if isinstance(trainer.devices, list) and local_rank >= len(trainer.devices):
        raise ConfigError(f"trainer.devices={trainer.devices}: {local_rank + 1} processes were started for them.")
    device = pick_device(trainer.accelerator, local_rank, trainer.devices)
    precision = pick_precision(trainer.precision, device)
    check_dora(config, device, int8=config.quantization.format is QuantizationFormat.int8)
    cores = os.cpu_count() or 1
    if device.type == "cpu" and isinstance(trainer.devices, int) and trainer.devices > cores:
        raise ConfigError(f"trainer.devices={trainer.devices}: this machine has {cores} cores.")
    if device.type == "cuda" and trainer.devices != "auto":
        count = torch.cuda.device_count()
        needed = max(trainer.devices) + 1 if isinstance(trainer.devices, list) else trainer.devices
        if needed > count:
            raise ConfigError(f"trainer.devices={trainer.devices}: this machine has {count} GPUs.")
    return device, precision


def lightning_trainer(config: TrainConfig, device: torch.device, precision: Precision, **more: Any) -> L.Trainer:
    """Lightning's Trainer for `config`. Raises ConfigError for devices, strategies and callbacks that it refuses."""
    import lightning as L
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    trainer = config.trainer
    strategy = trainer.strategy
    if isinstance(strategy, dict):
        strategy = build(strategy, "trainer.strategy", "strategy")
    try:
        return L.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=trainer.devices,
            num_nodes=trainer.num_nodes,
            strategy=strategy,
            precision=LIGHTNING_PRECISION[precision],  # type: ignore[arg-type]
            max_epochs=-1,
            check_val_every_n_epoch=None,
            reload_dataloaders_every_n_epochs=1,
            use_distributed_sampler=False,
            deterministic="warn" if trainer.deterministic else False,
            log_every_n_steps=1,  # for callbacks that log at Lightning's interval; llmft logs every step too
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **more,
        )
    except (ValueError, TypeError, RuntimeError, MisconfigurationException) as error:
        raise ConfigError(f"trainer: {first_line(error)}") from None


def _check_model(inputs: RunInputs, rows: TokenizedData) -> None:
    """Raises ConfigError for faults that show in a model's files and shapes alone."""
    from safetensors import SafetensorError, safe_open

    config = inputs.config
    architecture = architecture_of(inputs, len(rows.tokenizer))
    families.check_task(config.model, architecture, str(config.task.auto_class))
    check_vocabulary(config, rows, getattr(architecture.get_text_config(), "vocab_size", None))
    if inputs.located.directory is not None and config.model.init is ModelInit.pretrained:
        for path in sorted(inputs.located.directory.glob("model*.safetensors")):
            try:
                with safe_open(path, framework="pt"):  # reads only the header
                    pass
            except (SafetensorError, OSError) as error:
                raise ConfigError(f"{path}: damaged or cut off ({first_line(error)}); fetch it again.") from None
    if config.lora.enabled and (config.lora.targets != "all-linear" or config.lora.modules_to_save):
        families.prepare(architecture.model_type)
        try:
            base = meta_model(str(config.task.auto_class), copy.deepcopy(architecture), dtype=torch.float32)
        except Exception:  # third-party code may need values; loading will show it
            return
        adapters.attach(base, config.lora, auto_class=str(config.task.auto_class), seed=0, name="")


def check_vocabulary(config: TrainConfig, rows: TokenizedData, size: int | None) -> None:
    """Raises ConfigError where the tokenizer makes tokens that an embedding of `size` rows does not have."""
    highest = max(int(examples.ids.max(initial=0)) for examples in rows.splits.values())
    if size is not None and highest >= size:
        raise ConfigError(
            f"model={config.model.label}: its tokenizer makes token {highest} but the model knows only {size}; "
            "tokenizer and weights do not belong together."
        )


def check_room(config: TrainConfig, directory: Path, weights: int, states: int, warn: Callable[[str], None]) -> None:
    """Checks, before the first step, that all checkpoints kept at one time and the exported weights fit on the disk.

    `weights` and `states`: bytes of the trained weights and of the optimizer's states. Raises DiskError, or only warns
    with trainer.on_save_error=warn.
    """
    trainer = config.trainer
    on_disk = sum(path.stat().st_size for path in directory.rglob("*.safetensors")) if directory.is_dir() else 0
    # The newest, the best, and the one being written, all at one time; then the adapter or the model.
    needed = (weights + states) * (trainer.keep_checkpoints + 2) + weights - on_disk
    try:
        check_space(directory, max(0, needed))
    except OSError as error:
        message = f"{directory}: {error.strerror} for checkpoints and weights"
        if trainer.on_save_error is not OnSaveError.warn:
            raise DiskError(
                f"{message}: free some space, set output_dir to another disk, or lower trainer.keep_checkpoints="
                f"{trainer.keep_checkpoints}."
            ) from None
        warn(f"{message}; training anyway (trainer.on_save_error=warn).")
