"""Conversion between Hydra's configs, their dataclasses, and plain data."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
import typing
from enum import Enum
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

from llmft.core.errors import ConfigError, did_you_mean, first_line

# For conf/: the model's learning rate times a factor; the data's value, else the task's.
OmegaConf.register_new_resolver("llmft.times", lambda one, other: one * other, replace=True)
OmegaConf.register_new_resolver("llmft.first", lambda one, other: other if one is None else one, replace=True)


def from_plain(plain: Any, schema: type) -> Any:
    """The inverse of `to_plain`, with checks: a `schema` from a stored config, or from another process.

    Raises ConfigError for an unknown key, or for a value of the wrong type or out of range.
    """
    if not isinstance(plain, dict):
        raise ConfigError(f"a config was expected, not {type(plain).__name__}.")
    try:
        node = OmegaConf.create(_escape_interpolations(plain))
        assert isinstance(node, DictConfig)
        _refuse_extra_keys(node, schema, "")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {first_line(error)}") from None


def _escape_interpolations(value: Any) -> Any:
    """`value` with `${` escaped, so that nothing in a stored config is resolved."""
    if isinstance(value, dict):
        return {key: _escape_interpolations(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_escape_interpolations(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda match: match[1] * 2 + "\\${", value)
    return value


def schema_fields(schema: type, prefix: str = "") -> dict[str, str]:
    """Every dotted key of a schema, groups included, with its annotation."""
    annotations: dict[str, str] = {}
    for entry in dataclasses.fields(schema):
        annotations[f"{prefix}{entry.name}"] = str(entry.type)
        if (group := group_of(schema, entry.name)) is not None:
            annotations |= schema_fields(group, f"{prefix}{entry.name}.")
    return annotations


_type_hints = functools.cache(typing.get_type_hints)


def group_of(schema: type, name: str) -> type | None:
    """The dataclass of the field `name` of `schema`; None for a plain value."""
    kind = _type_hints(schema)[name]
    return kind if isinstance(kind, type) and dataclasses.is_dataclass(kind) else None


def to_config(composed: DictConfig, schema: type) -> Any:
    """A composed config as the dataclasses of `schema`.

    Raises ConfigError for an unknown key (Hydra accepts `+lora.zz=1`), a missing value, or a value out of range.
    """
    try:
        _refuse_extra_keys(composed, schema, "")
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=… on the command line.")
        config = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explain_error(error, schema)) from None
    if not isinstance(config, schema):
        raise ConfigError(f"--config-name: not a config of this command, a {schema.__name__}; leave it out.")
    return config


_PLAIN_MESSAGES = {
    r"^(Cannot merge DictConfig with ListConfig|Cannot assign \w+ to Dict.*)": (
        "a dictionary is expected, {name: value}"
    ),
    r"^(Cannot merge ListConfig with DictConfig|.*is not a ListConfig, list or tuple)": "a list is expected, [a,b]",
    r"^field '(.*)' is not Optional": r"\1 cannot be null",
    r"^Invalid type assigned: .* is not a subclass of .*": "this group has keys; set one of them",
}
"""OmegaConf's messages about types, and plain replacements."""


def explain_error(error: OmegaConfBaseException, schema: type) -> str:
    """OmegaConf's error as one sentence that names the key."""
    message, key = first_line(error).rstrip("."), error.full_key
    if isinstance(error, GrammarParseError) or message.startswith("GrammarParseError"):
        message = (
            "${ begins an interpolation, such as ${seed}, and this is none; write \\${ for the characters themselves"
        )
    for pattern, replacement in _PLAIN_MESSAGES.items():
        message = re.sub(pattern, replacement, message)
    message = re.sub(r"^\w+ raised while resolving interpolation: \"?(.*?)\"?$", r"\1", message)
    if variable := re.fullmatch(r"Environment variable '(.+)' not found", message):
        message = f"no environment variable {variable[1]}; set it, or write a default: ${{oc.env:{variable[1]},…}}"
    if missing := re.fullmatch(r"Interpolation key '(.+)' not found", message):
        message = f"${{{missing[1]}}} names no key{did_you_mean(missing[1], schema_fields(schema))[:100]}"
    message = message.rstrip("?.") + ("?" if message.endswith("?") else ".")
    return f"{key}: {message}" if key and key not in message.split() else message


def _refuse_extra_keys(node: DictConfig, schema: type, prefix: str) -> None:
    fields = [entry.name for entry in dataclasses.fields(schema)]
    for key in node:
        name = f"{prefix}{key!s}"
        if key not in fields:
            raise ConfigError(f"{name}: no such key{did_you_mean(name, (prefix + f for f in fields))}")
        group = group_of(schema, str(key))
        if group is not None and not OmegaConf.is_missing(node, key) and isinstance(node[key], DictConfig):
            _refuse_extra_keys(node[key], group, f"{name}.")


def to_plain(value: Any) -> Any:
    """Dataclasses, enums and OmegaConf containers as JSON-ready values."""
    if isinstance(value, (DictConfig, ListConfig)):
        return OmegaConf.to_container(value, resolve=True)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {entry.name: to_plain(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_plain(item) for item in value]
    return value


def key_fields(value: Any) -> Any:
    """The fields of `value` in a run's key, as plain data: without `not_in_key` ones, and `later` ones at default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: key_fields(getattr(value, entry.name))
            for entry in dataclasses.fields(value)
            if not entry.metadata.get("not_in_key")
            and not (entry.metadata.get("later") and getattr(value, entry.name) == _default(entry))
        }
    return to_plain(value)


def _default(entry: dataclasses.Field[Any]) -> Any:
    return entry.default if entry.default_factory is dataclasses.MISSING else entry.default_factory()


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level of dotted keys."""
    if isinstance(value, dict) and (value or not prefix):
        return {key: leaf for name, item in value.items() for key, leaf in flatten(item, f"{prefix}{name}.").items()}
    return {prefix.rstrip("."): value}


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal configs give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_of(value: Any) -> str:
    """64 hex digits (SHA-256) of plain data; equal data give equal digits."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()
