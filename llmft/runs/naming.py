"""Names of directories: of a run by its config, and of any text."""

from __future__ import annotations

import re

from llmft.config.data import TrainOn
from llmft.config.sections import TrainConfig
from llmft.core.redaction import redact

MAX_NAME = 80
"""Longest directory name without the key, in characters."""


def slug(text: str) -> str:
    """`text` in lower case with only letters, digits, dot, dash and underscore: safe as a file name anywhere."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "run"


def run_name(config: TrainConfig) -> str:
    """The readable part of the directory's name: model, data and the values that experiments vary."""
    if config.name:
        return slug(redact(config.name))[:MAX_NAME]
    parts = [config.model.label, config.data.name]
    if config.model.architecture != "tfidf":
        method = f"r{config.lora.r}" if config.lora.enabled else "full"
        parts += [config.quantization.format.value, method, f"lr{config.learning_rate.peak:g}"]
        parts += [config.task.head.value] if config.task.head is not None else []
        parts += [config.task.name] if config.task.feedback is not None else []
    if config.data.train_on is TrainOn.all:
        parts.append("all")
    elif config.data.fold is not None:
        parts.append(f"fold{config.data.fold}")
    return slug("-".join([*parts, f"seed{config.seed}"]))[:MAX_NAME]
