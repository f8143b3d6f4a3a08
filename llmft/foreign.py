"""Files that others wrote: configs of run directories, YAML of other directories, models and adapters of strangers.

Reading them must run nothing, hang on nothing and lead nowhere else. What is refused is named in one sentence.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from llmft.errors import ConfigError
from llmft.schema import from_plain

MIB = 2**20
MOST_YAML_BYTES = MIB
MOST_ALIASES = 50
"""In one YAML file: 54 of them, nested, make ten million nodes, and OmegaConf copies each."""
MOST_LAYERS = 2_000
MOST_COUNTED = 1_000_000
"""Largest number of anything that a model's config may ask for where a Python object is made for each."""
JSON_LIMITS = {
    "config.json": 4 * MIB,
    "generation_config.json": MIB,
    "tokenizer_config.json": 16 * MIB,
    "special_tokens_map.json": 4 * MIB,
    "added_tokens.json": 16 * MIB,
    "model.safetensors.index.json": 64 * MIB,
    "tokenizer.json": 512 * MIB,
    "adapter_config.json": MIB,
}
PARSED = ("config.json", "model.safetensors.index.json", "adapter_config.json")


def read_bounded(path: Path, most: int) -> str:
    """The text of a file of at most `most` bytes; raises ConfigError for a larger or unreadable one."""
    try:
        with path.open("rb") as file:  # not by its size: a pipe or a device has none
            content = file.read(most + 1)
        if len(content) > most:
            raise ConfigError(f"{path}: larger than {most:,} bytes, which no such file is; it is not read.")
        return content.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8.") from None


def read_json(path: Path, most: int = 16 * MIB) -> dict[str, Any]:
    """A JSON object of a file of at most `most` bytes; raises ConfigError for anything else."""
    try:
        found = json.loads(read_bounded(path, most))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: a JSON object was expected, not {type(found).__name__}.")
    return found


# ------------------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path) -> Any:
    """The plain content of a YAML file, bounded in size and aliases; raises ConfigError for what is refused."""
    import yaml

    text = read_bounded(path, MOST_YAML_BYTES)
    _check_aliases(path, text)
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]}).") from None


def _check_aliases(path: Path, text: str) -> None:
    import yaml

    if text.count("*") <= MOST_ALIASES:
        return
    try:
        aliases = sum(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path}: not YAML ({str(error).splitlines()[0]}).") from None
    if aliases > MOST_ALIASES:
        raise ConfigError(f"{path}: {aliases} aliases (*name), more than {MOST_ALIASES}; it is not read.")


def check_config_directories(arguments: Sequence[str]) -> None:
    """Checks the YAML files of the directories that a command line adds to Hydra's search path."""
    for directory in _added_directories(arguments):
        for path in sorted(directory.rglob("*.yaml")) if directory.is_dir() else ():
            _check_aliases(path, read_bounded(path, MOST_YAML_BYTES))


def _added_directories(arguments: Sequence[str]) -> Iterator[Path]:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        # argparse completes --config-d; a --config-name in between does no harm.
        if name in ("-cd", "-cp") or name.startswith("--c"):
            yield Path(value if equals else next(iter(arguments[place + 1 :]), "."))
        elif name.lstrip("+") == "hydra.searchpath":
            for part in value.strip("[] ").split(","):
                yield Path(part.strip(" '\"").removeprefix("file://"))


def stored_config(path: Path, schema: type) -> Any:
    """The config that a run directory holds, as `schema`; nothing it names is built, and nobody is trusted by it.

    Raises ConfigError for one that is damaged, of another version, or asks to run a repository's code.
    """
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: not a config of llmft.")
    model = plain.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code") not in (None, False):
        raise ConfigError(
            f"{path}: model.trust_remote_code: a file cannot say whom you trust, and this command runs no code of "
            f"{model.get('path') or model.get('id')}, with which the run was trained; plain peft loads its adapter."
        )
    return from_plain(plain, schema)


# ----------------------------------------------------------------------------------------------- models and adapters


def check_model(directory: Path) -> None:
    """Refuses a model directory whose JSON files are made to hang or to lead elsewhere; weights are not read."""
    for name, most in JSON_LIMITS.items():
        path = directory / name
        if not path.is_file():
            continue
        if path.stat().st_size > most:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes, more than {most:,}; it is not read.")
        if name == "config.json":
            _check_values(path, read_json(path, most))
        elif name == "model.safetensors.index.json":
            names = read_json(path, most).get("weight_map")
            for shard in names.values() if isinstance(names, dict) else ():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise ConfigError(f"{path}: it names a file outside the directory: {shard!r}.")


def _check_values(path: Path, config: dict[str, Any]) -> None:
    for key, value in config.items():
        if isinstance(value, dict):
            _check_values(path, value)
        elif isinstance(value, int):
            layers = "layer" in key and not key.endswith(("_id", "_idx"))
            most = MOST_LAYERS if layers and key.startswith(("n_", "num_")) else MOST_COUNTED
            if key.startswith(("n_", "num_")) and value > most:
                raise ConfigError(f"{path}: {key}={value} is more than {most:,}; it is not built.")
        elif isinstance(value, str) and "implementation" in key and "/" in value:
            raise ConfigError(f"{path}: {key}={value!r} would fetch and run code of others.")


def check_adapter(directory: Path) -> dict[str, Any]:
    """The content of a LoRA's adapter_config.json; refuses what would make PEFT import modules or unpickle weights."""
    config = read_json(directory / "adapter_config.json", JSON_LIMITS["adapter_config.json"])
    for key in ("auto_mapping", "megatron_config", "layer_replication", "runtime_config"):
        value = config.get(key)
        if key == "runtime_config" and value == {"ephemeral_gpu_offload": False}:
            continue
        if value:
            raise ConfigError(f"{directory}/adapter_config.json: {key} is not read (it names code, or memory).")
    if config.get("peft_type") != "LORA":
        raise ConfigError(
            f"{directory}/adapter_config.json: peft_type={config.get('peft_type')!r}: LORA alone is read."
        )
    if not (directory / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{directory}: no adapter_model.safetensors, and pickled weights are not loaded.")
    return config
