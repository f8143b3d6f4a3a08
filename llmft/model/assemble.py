"""Assembles base, head and adapter, and sets the number of threads: for training, prediction and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from llmft.config.convert import canonical, key_fields, to_plain
from llmft.config.model import ModelInit, Precision, QuantizationConfig, QuantizationFormat
from llmft.config.sections import TrainConfig
from llmft.config.task import Head
from llmft.config.trainer import Checkpointing
from llmft.core.errors import ConfigError
from llmft.core.machine import sensible_threads
from llmft.core.seeds import stream
from llmft.data.hub import Located, locate
from llmft.model import adapters
from llmft.model.checkpointing import set_checkpointing
from llmft.model.device import TORCH_DTYPES
from llmft.model.heads import renew_head
from llmft.model.load import drop_base, kept_base, load_base
from llmft.model.quantization import weight_counts
from llmft.model.sharding import is_sharded
from llmft.runs.key import adapter_directory


@dataclass
class Assembled:
    """A loaded model.

    Attributes:
        base: what was loaded.
        model: what is trained or predicts: `base` with an adapter, or itself.
        reused: whether this process had the base already.
        keep_base: whether the base stays for the next run of this process.
    """

    base: Any
    model: Any
    reused: bool
    keep_base: bool

    def release(self) -> None:
        """Gives the base back as it was loaded, or drops it."""
        if self.keep_base and not is_sharded(self.model):
            adapters.detach(self.model)
        else:
            drop_base()
        self.base = self.model = None


def assemble(
    config: TrainConfig,
    located: Located,
    *,
    device: torch.device,
    precision: Precision,
    num_labels: int = 0,
    vocabulary: int | None = None,
    pad_id: int | None = None,
    threads: int | None = None,
    keep_base: bool = True,
    memory_map: bool = False,
    weights_directory: Path | None = None,
    is_peft_directory: bool = False,
    warn: Callable[[str], None] = print,
) -> Assembled:
    """The model of `config` on `device`: quantised base, head, adapter.

    Args:
        vocabulary: the tokenizer's size, for a random model that is built to fit it.
        keep_base, memory_map: as in `load_base`.
        weights_directory: a finished run's adapter or model to load; None: new weights, which are trainable.
        is_peft_directory: whether PEFT, and no run of llmft, wrote that adapter.

    Raises ConfigError for files, targets or weights that do not fit the config.
    """
    lora, model, quantization = config.lora, config.model, config.quantization
    if weights_directory is not None and not lora.enabled:
        model = replace(
            model, path=str(weights_directory), init=ModelInit.pretrained, overrides={}, train_tokenizer_vocab=None
        )
        located, quantization = locate(model), QuantizationConfig(QuantizationFormat.none)
    # modules_to_save replace modules of the base; a head that stays on the base is renewed before the next run.
    keep_base = keep_base and lora.enabled and not lora.modules_to_save and not is_peft_directory
    before = kept_base()
    base = load_base(
        model,
        located,
        quantization,
        auto_class=str(config.task.auto_class),
        num_labels=num_labels,
        dtype=TORCH_DTYPES[precision] if lora.enabled else torch.float32,
        device=device,
        seed=config.seed,
        vocab_size=vocabulary if config.model.train_tokenizer_vocab else None,
        keep_base=keep_base and not memory_map,
        memory_map=memory_map,
        warn=warn,
    )
    if config.task.head is Head.linear or config.task.scores_answers:
        stored = weights_directory is not None and not lora.enabled
        renew_head(base, None if stored else stream(config.seed, "head"))
    counts = weight_counts(base)
    check_dora(config, device, int8=counts["8-bit"] > 0)
    devices = config.trainer.devices
    processes = devices if device.type == "cpu" and weights_directory is None and isinstance(devices, int) else 1
    torch.set_num_threads(threads or sensible_threads(counts["4-bit"] + counts["8-bit"] + counts["full"], processes))
    if pad_id is not None:
        base.config.pad_token_id = pad_id
    set_checkpointing(base, Checkpointing.none)  # PEFT would have the embeddings' output differentiated
    attached = base.requires_grad_(weights_directory is None and not lora.enabled)
    if is_peft_directory and weights_directory is not None:
        attached = adapters.load_peft_adapter(base, weights_directory)
    elif lora.enabled:
        attached = _with_adapter(base, config, located, weights_directory)
    return Assembled(base, attached if weights_directory is None else attached.eval(), base is before, keep_base)


def _with_adapter(base: Any, config: TrainConfig, located: Located, weights_directory: Path | None) -> Any:
    """`base` with the adapter of `config`: that of `weights_directory`, else that of lora.adapter, else a new one."""
    lora = config.lora
    model = adapters.attach(
        base,
        lora,
        auto_class=str(config.task.auto_class),
        seed=stream(config.seed, "lora"),
        name=str(located.directory) if config.model.path is not None else config.model.id,
        kernels=config.model.kernels,
    )
    if weights_directory is not None:
        adapters.load_adapter(model, weights_directory)
    elif lora.adapter is not None:
        adapters.continue_from_adapter(model, adapter_directory(lora.adapter), lora)
    return model


def base_key(config: TrainConfig, fingerprint: str) -> str | None:
    """A key, equal for runs whose adapters share a base, whatever their heads; None without an adapter.

    `fingerprint` is that of the base's files.
    """
    if not config.lora.enabled:
        return None
    model = config.model
    shape = [model.init, model.architecture, model.config, model.overrides, model.load_overrides, model.kernels]
    kind = [model.attn_implementation, model.trust_remote_code, model.skip_modules, config.trainer.precision]
    random = [config.seed, model.train_tokenizer_vocab] if model.init is ModelInit.random else []
    return canonical([fingerprint, to_plain([*shape, *kind, *random]), key_fields(config.quantization)])


def check_dora(config: TrainConfig, device: torch.device, *, int8: bool) -> None:
    """Raises ConfigError for a pair of adapter and base that PEFT computes wrongly on a CPU."""
    if device.type == "cpu" and int8 and config.lora.dora:
        raise ConfigError(
            "lora.dora=true: PEFT loses an 8-bit base's scales on a CPU; take quantization=nf4, or ordinary LoRA."
        )
