"""The groups model, quantization and lora of a training."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from typing import Any

from omegaconf import MISSING

from llmft.config.fields import Texts, later, not_in_key, require, require_each

Kernels = StrEnum("Kernels", "auto none")
"""Whether parts of transformers and PEFT are replaced by faster or smaller ones."""
ModelInit = StrEnum("ModelInit", "pretrained random")
"""Where the weights come from."""
QuantizationFormat = StrEnum("QuantizationFormat", "nf4 fp4 int8 none checkpoint")
"""Number format of the frozen base's linear layers; `checkpoint` is the format of its files."""
Precision = StrEnum("Precision", "auto bf16 fp16 fp32")
"""Number format of the computation; `auto` is the best native format of the device."""


@dataclass
class ModelConfig:
    name: str = not_in_key()
    id: str = MISSING
    revision: str = "main"
    path: str | None = None
    init: ModelInit = ModelInit.pretrained
    architecture: str = MISSING
    config: dict[str, Any] = field(default_factory=dict)
    overrides: dict[str, Any] = field(default_factory=dict)
    load_overrides: dict[str, Any] = field(default_factory=dict)
    train_tokenizer_vocab: int | None = None
    train_tokenizer_extra: list[str] = field(default_factory=list)
    trust_remote_code: bool = False
    requires_remote_code: bool = False
    unsupported: str | None = None
    skip_modules: list[str] = field(default_factory=list)
    attn_implementation: str | None = None
    kernels: Kernels = not_in_key(Kernels.auto)
    learning_rate: float = not_in_key(2e-4)
    precision: Precision = not_in_key(Precision.auto)
    license: str = not_in_key("unknown")
    gated: bool = not_in_key(False)
    context_tokens: int | None = not_in_key(None)

    @property
    def label(self) -> str:
        """The model's name: that of model.path where it is set, else that of the option."""
        if self.path is None or self.path.startswith("package:"):
            return self.name
        return self.path.rstrip("/").rpartition("/")[2] or self.name

    def __post_init__(self) -> None:
        require(self.path is not None or self.id != "local", "model=local needs model.path=DIR, a model directory.")
        require(self.unsupported is None, f"model={self.name} cannot be trained: {self.unsupported}")
        pretrained = self.init is ModelInit.pretrained
        for key in ("overrides", "train_tokenizer_vocab") if pretrained else ():
            unfit = f"model.{key}: pretrained weights would not fit it; set model.init=random or leave it out."
            require(not getattr(self, key), unfit)
        expected = "260 at least (256 bytes and 3 special tokens)."
        require_each(self, "model.", "train_tokenizer_vocab", lambda n: n >= 260, expected)
        require(
            self.trust_remote_code or not (self.requires_remote_code and pretrained),
            f"model={self.name} only runs with code from its repository: read that code, then set "
            "model.trust_remote_code=true and model.revision to the commit you read.",
        )
        require(
            not self.trust_remote_code or self.path is not None or bool(re.fullmatch("[0-9a-f]{40}", self.revision)),
            "model.trust_remote_code=true needs model.revision as a 40-digit commit, or the code may change under you.",
        )


@dataclass
class QuantizationConfig:
    format: QuantizationFormat = QuantizationFormat.nf4
    double_quant: bool = True
    cache: bool = not_in_key(True)
    cache_gib: float = not_in_key(50.0)

    def __post_init__(self) -> None:
        require_each(self, "quantization.", "cache_gib", lambda x: x >= 0, "0 or more.")


MOST_RANK = 65_536
"""Largest LoRA rank; a higher one in an untrusted config would take all memory."""


@dataclass
class LoraConfig:
    enabled: bool = True
    r: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    targets: Texts = "all-linear"
    rslora: bool = False
    dora: bool = False
    modules_to_save: list[str] = field(default_factory=list)
    adapter: str | None = later(None)

    @property
    def scaling_alpha(self) -> float:
        """LoRA's alpha; unset, it is 2 r, so that one learning rate carries over between ranks."""
        return 2.0 * self.r if self.alpha is None else self.alpha

    def __post_init__(self) -> None:
        check = partial(require_each, self, "lora.")
        check("r", lambda n: n >= 1, "an integer of 1 or more (lora=none trains all weights).")
        check("r", lambda n: n <= MOST_RANK, f"{MOST_RANK:,} or less; no layer is so wide.")
        check("dropout", lambda x: 0 <= x < 1, "at least 0 and below 1.")
        check("alpha", lambda x: x > 0, "above 0, or null for 2 r.")
        names = "'all-linear', a regular expression, or a list of module names."
        require(isinstance(self.targets, str | list) and len(self.targets) > 0, f"lora.targets: {names}")
