"""A run's key: a hash of everything that can change its numbers, and of nothing else."""

from __future__ import annotations

from pathlib import Path

from llmft.config.convert import digest_of, key_fields
from llmft.config.renamed import RENAMED, move
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError
from llmft.core.files import sha256_of
from llmft.runs.directory import finished_run

SCHEMA_VERSION = 1


def run_key(config: TrainConfig, data_fingerprint: str, model_fingerprint: str) -> str:
    """Ten hex digits of a hash over the config's numbers and the content of data, model and a given adapter.

    The location of files does not count, their content does: a moved data file or model gives the same run.
    """
    # A run keeps its key where a key of the config gets another name.
    numbers = move(key_fields(config), {new: old for old, new in RENAMED.items()})
    # The fingerprints represent these.
    for name in ("id", "revision", "path"):
        numbers["model"].pop(name)
    for name in ("source", "hub", "hub_config", "hub_revision", "hub_splits", "rows"):
        numbers["data"].pop(name)
    content = [SCHEMA_VERSION, numbers, data_fingerprint, model_fingerprint]
    if config.lora.adapter is not None:
        numbers["lora"]["adapter"] = adapter_digest(config.lora.adapter)
    return digest_of(content)[:10]


def adapter_directory(path: str) -> Path:
    """The adapter's directory of lora.adapter: a finished run's, or one that PEFT wrote.

    Raises ConfigError if there is none.
    """
    directory = Path(path).expanduser()
    if (directory / "run.json").is_file():
        directory = finished_run(directory)[0].adapter
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise ConfigError(
                f"lora.adapter={path}: no {name} in {directory}; name a finished run, or PEFT's directory."
            )
    return directory


def adapter_digest(path: str) -> str:
    """sha256 of the weights in `adapter_directory(path)`."""
    return sha256_of(adapter_directory(path) / "adapter_model.safetensors")
