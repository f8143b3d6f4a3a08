"""Files from other people: configs of run directories, YAML of other directories, models and adapters.

Reading them runs no code, does not hang, and does not read or write outside their directory. Everything else is refused
in one sentence.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from llmft.config.convert import from_plain
from llmft.config.instantiate import HYDRA_KEYWORDS
from llmft.config.renamed import RENAMED, move
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError, first_line
from llmft.core.files import read_plain

MIB = 2**20
MAX_YAML_BYTES = MIB
MAX_ALIASES = 50
"""Most aliases in one YAML file: 54 nested ones make ten million nodes, and OmegaConf copies each."""
MAX_LAYERS = 2_000
MAX_COUNT = 1_000_000
"""Largest count in a model's config of things that each become a Python object."""
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


def read_bounded(path: Path, max_bytes: int) -> str:
    """The text of a file of at most `max_bytes` bytes. Raises ConfigError for a larger or unreadable file."""
    try:
        return read_plain(path, max_bytes).decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8.") from None


def read_json(path: Path, max_bytes: int = 16 * MIB) -> dict[str, Any]:
    """The JSON object in a file of at most `max_bytes` bytes. Raises ConfigError for anything else."""
    try:
        content = json.loads(read_bounded(path, max_bytes))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: a JSON object was expected, not {type(content).__name__}.")
    return content


# ------------------------------------------------------------------------------------------------------------- YAML


def read_yaml(path: Path) -> Any:
    """The plain content of a YAML file of limited size and aliases. Raises ConfigError for any other file."""
    import yaml

    text = read_bounded(path, MAX_YAML_BYTES)
    try:
        tokens = yaml.scan(text, Loader=yaml.SafeLoader) if text.count("*") > MAX_ALIASES else ()
        aliases = sum(isinstance(token, yaml.AliasToken) for token in tokens)
        if aliases > MAX_ALIASES:
            raise ConfigError(f"{path}: {aliases} aliases (*name), more than {MAX_ALIASES}; it is not read.")
        return yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{path}: not YAML ({first_line(error)}).") from None


def check_config_directories(arguments: Sequence[str]) -> None:
    """Checks the YAML files of the directories that a command line adds to Hydra's search path.

    They may set llmft's values, refer to other keys, and choose a search. They may not use resolvers, which read the
    environment or build objects, nor Hydra's settings that run or write something.
    """
    for directory in _added_directories(arguments):
        for path in sorted(directory.rglob("*")) if directory.is_dir() else ():
            if path.is_symlink() and path.is_dir():
                raise ConfigError(f"{path}: a link to a directory, which is not followed; copy its files.")
            if path.suffix != ".yaml":
                continue
            content = read_yaml(path)
            if not isinstance(content, dict | None):
                raise ConfigError(f"{path}: a config contains keys and values, not a {type(content).__name__}.")
            for key, text in _texts(content):
                if "${" in _REFERENCE.sub("", _ESCAPED.sub("", text)):
                    advice = "a file may refer to another key as in ${a.b}; write other values on the command line."
                    raise ConfigError(f"{path}: {key}={text}: {advice}")
                if key.startswith("defaults") and re.search(r"(^|[\s/}])\.", text):
                    raise ConfigError(f"{path}: {key}={text}: a name is expected, not a path out of the directory.")
            _check_hydra(path, path.relative_to(directory), content)


_ESCAPED = re.compile(r"(?<!\\)\\\$\{")
_REFERENCE = re.compile(r"\$\{(stage:)?[\w.\[\]-]+\}")
"""Another key, or an earlier stage of a pipeline, which is resolved once that stage has run."""
HYDRA_SETTINGS = {"mode", "sweeper", "launcher"}
"""The settings of hydra that a file may set; others (callbacks, logging, job, searchpath) run code or set variables."""


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain data with its dotted key, keys included."""
    if isinstance(value, dict):
        for name, item in value.items():
            yield key, str(name)
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value


def _check_hydra(path: Path, inside: Path, content: Any) -> None:
    """Raises ConfigError for settings that make Hydra build, log, write or set something."""
    packages = re.findall(r"^\s*#\s*@package\s+(\S+)", read_bounded(path, MAX_YAML_BYTES), re.MULTILINE)
    content = content or {}
    defaults, settings = content.get("defaults"), content.get("hydra")
    for entry in defaults if isinstance(defaults, list) else ():
        packages += [str(name).partition("@")[2] for name in (entry if isinstance(entry, dict) else [entry])]
    set_by = [package for package in packages if "hydra" in package or "$" in package]
    set_by += [".".join(inside.parts[:-1])] if inside.parts[0] == "hydra" else []
    set_by += [f"hydra.{name}" for name in settings] if isinstance(settings, dict) else []
    for key in set_by:
        if key.removeprefix("hydra.").partition(".")[0] not in HYDRA_SETTINGS:
            raise ConfigError(f"{path}: {key}: a file may set only {', '.join(sorted(HYDRA_SETTINGS))} of hydra.")
    if not set_by:
        return
    checked = settings if set_by[-1].startswith("hydra.") and isinstance(settings, dict) else content
    if any(text in HYDRA_KEYWORDS or text.lstrip("+~").startswith("hydra.") for _, text in _texts(checked)):
        raise ConfigError(f"{path}: {set_by[0]}: only plain values; a file builds nothing and sets nothing in hydra.")


def _added_directories(arguments: Sequence[str]) -> Iterator[Path]:
    for index, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        # argparse accepts the prefix --config-d; taking a --config-name for a directory does no harm.
        if name in ("-cd", "-cp") or name.startswith("--c"):
            yield Path(value if equals else next(iter(arguments[index + 1 :]), "."))
        elif name.lstrip("+") == "hydra.searchpath":
            for part in value.strip("[] ").split(","):
                yield Path(part.strip(" '\"").removeprefix("file://"))


def stored_config(path: Path) -> TrainConfig:
    """The config of a run directory. Builds nothing, and ignores its trusted packages.

    Raises ConfigError for one that is damaged, of another version, or that would run a repository's code.
    """
    plain = read_yaml(path)
    if not isinstance(plain, dict):
        raise ConfigError(f"{path}: not a config of llmft.")
    model = plain.get("model")
    if isinstance(model, dict) and model.get("trust_remote_code") not in (None, False):
        code = f"this command runs no code of {model.get('path') or model.get('id')}; plain peft loads its adapter."
        raise ConfigError(f"{path}: model.trust_remote_code: a file cannot grant trust, and {code}")
    # A file cannot grant trust; only the command line can.
    plain = {**plain, "trusted_packages": []} if "trusted_packages" in plain else plain
    for key, text in _texts(plain):
        if "${" not in text:
            continue
        names = re.findall(r"\$\{\s*([\w.]+)\s*:", text)
        is_resolved = any(name.startswith(("oc.", "hydra")) or OmegaConf.has_resolver(name) for name in names)
        if is_resolved or not key.startswith(TEXT_KEYS):
            raise ConfigError(f"{path}: {key}={text}: a run's config contains plain values; nothing is resolved in it.")
    implementation = model.get("attn_implementation") if isinstance(model, dict) else None
    if implementation is not None and not _is_implementation(implementation):
        raise ConfigError(
            f"{path}: model.attn_implementation={implementation!r} would download and run third-party code."
        )
    if isinstance(sweep := plain.get("sweep"), dict):
        plain = {**plain, "sweep": {key: value for key, value in sweep.items() if key not in REMOVED_KEYS}}
    try:
        config: TrainConfig = from_plain(move(plain, RENAMED), TrainConfig)
        return config
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


REMOVED_KEYS = ("stack", "halving")
"""Removed keys of `sweep` in runs of llmft 0.1; no result depends on them."""


TEXT_KEYS = ("notes", "tags", "prompt.", "data.columns.", "data.labels", "task.words", "sweep.question")
"""Keys of a stored config that contain free text, in which `${` may occur."""


def _is_implementation(value: Any) -> bool:
    """Whether `value` names an attention of transformers, not a repository."""
    return isinstance(value, str) and "/" not in value


def check_inside(node: Any, key: str) -> None:
    """Raises ConfigError for a `_target_` node of a stored config that chooses where it writes or sends to."""
    for name, text in _texts(node, key):
        if (
            re.search(r"(settings|executable|host|ur[il])(\.|$)", name)
            or "://" in text
            or text.startswith(("/", "~"))
            or ".." in Path(text).parts
        ):
            raise ConfigError(
                f"{name}={text}: a run's file does not choose where this writes or sends to; train again."
            )


def check_plain_files(directory: Path) -> None:
    """Raises ConfigError for a directory with pipes, devices, or links out of it. W&B's folder is not checked."""
    root = directory.resolve()
    for folder, folders, names in os.walk(directory):
        folders[:] = [name for name in folders if name != "wandb"]
        for path in (Path(folder) / name for name in [*folders, *names]):
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise ConfigError(f"{path}: a link out of the directory, which is not followed.")
            _refuse_special(path)


def _refuse_special(path: Path) -> None:
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise ConfigError(f"{path}: not a plain file; nothing in its directory is read.")


# ----------------------------------------------------------------------------------------------- models and adapters


def check_model(directory: Path) -> None:
    """Raises ConfigError for a model directory with harmful JSON files; weights are not read."""
    for path in directory.iterdir():  # the Hub's cache contains links
        _refuse_special(path)
    for name, max_bytes in JSON_LIMITS.items():
        path = directory / name
        if not path.is_file():
            continue
        if path.stat().st_size > max_bytes:
            raise ConfigError(f"{path}: {path.stat().st_size:,} bytes, more than {max_bytes:,}; it is not read.")
        if name == "config.json":
            check_values(path, read_json(path, max_bytes))
        elif name == "model.safetensors.index.json":
            names = read_json(path, max_bytes).get("weight_map")
            for shard in names.values() if isinstance(names, dict) else ():
                if not isinstance(shard, str) or Path(shard).name != shard:
                    raise ConfigError(f"{path}: names a file outside the directory: {shard!r}.")


def check_values(path: Path | str, config: dict[str, Any]) -> None:
    """Raises ConfigError for values of a model's config that take too much memory or run code. `path` is for errors."""
    for key, value in config.items():
        if "implementation" in key and value is not None and not _is_implementation(value):
            raise ConfigError(f"{path}: {key}={value!r} would download and run third-party code.")
        if isinstance(value, dict):
            check_values(path, value)
        elif isinstance(value, int):
            is_layer_count = "layer" in key and not key.endswith(("_id", "_idx"))
            limit = MAX_LAYERS if is_layer_count else MAX_COUNT
            if key.startswith(("n_", "num_")) and value > limit:
                raise ConfigError(f"{path}: {key}={value} is more than {limit:,}; it is not built.")


def check_adapter(directory: Path) -> dict[str, Any]:
    """A LoRA's adapter_config.json. Raises ConfigError for one that makes PEFT import modules or unpickle weights."""
    path = directory / "adapter_config.json"
    config = read_json(path, JSON_LIMITS[path.name])
    for key in ("auto_mapping", "megatron_config", "layer_replication", "runtime_config"):
        if config.get(key) and (key, config[key]) != ("runtime_config", {"ephemeral_gpu_offload": False}):
            raise ConfigError(f"{path}: {key} is refused (it names code, or takes memory).")
    if config.get("peft_type") != "LORA":
        raise ConfigError(f"{path}: peft_type={config.get('peft_type')!r}: only LORA is supported.")
    if not (directory / "adapter_model.safetensors").is_file():
        raise ConfigError(f"{directory}: no adapter_model.safetensors, and pickled weights are not loaded.")
    return config
