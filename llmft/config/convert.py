"""The door from Hydra's config to the plain dataclasses of `llmft.config.sections`, and back."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import sys
import typing
from collections.abc import Iterator
from enum import Enum
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import GrammarParseError, OmegaConfBaseException

import llmft.config.sections
from llmft.core.errors import ConfigError, did_you_mean


def from_plain(plain: Any, schema: type) -> Any:
    """What `to_plain` made of a `schema`, as a `schema` again: a stored config, or one handed to another process.

    Raises ConfigError for a key that the schema lacks or a value of the wrong type or out of range.
    """
    if not isinstance(plain, dict):
        raise ConfigError(f"a config was expected, not {type(plain).__name__}.")
    try:
        node = OmegaConf.create(_literal(plain))
        assert isinstance(node, DictConfig)
        _refuse_extra_keys(node, schema, "")
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), node))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'config'}: {str(error).splitlines()[0]}") from None


def from_json(plain: dict[str, Any], schema: type) -> Any:
    """The same for what this very process's parent has checked: in a hundredth of the time, and without checks."""
    kinds = _kinds(schema)
    return schema(**{name: _restored(value, kinds[name]) for name, value in plain.items()})


def _restored(value: Any, kind: Any) -> Any:
    if isinstance(value, dict) and isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return from_json(value, kind)
    return value if value is None or not issubclass(kind, Enum) else kind(value)


@functools.cache
def _kinds(schema: type) -> dict[str, type]:
    """What fields hold, as far as JSON does not tell: dataclasses and enums; elsewhere `object`."""
    kinds: dict[str, type] = {}
    for name, hint in typing.get_type_hints(schema, vars(llmft.config.sections)).items():
        held = [kind for kind in (typing.get_args(hint) or (hint,)) if isinstance(kind, type)]
        special = [kind for kind in held if dataclasses.is_dataclass(kind) or issubclass(kind, Enum)]
        if special and typing.get_origin(hint) in (list, dict):
            raise TypeError(f"{schema.__name__}.{name}: several {special[0].__name__} in one field are not restored")
        kinds[name] = next(iter(special), object)
    return kinds


def _literal(value: Any) -> Any:
    """`value` with `${` escaped: text that stands in a stored config, never a question to the environment."""
    if isinstance(value, dict):
        return {key: _literal(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_literal(item) for item in value]
    if isinstance(value, str) and "${" in value:
        return re.sub(r"(\\*)\$\{", lambda found: found[1] * 2 + "\\${", value)
    return value


def schema_fields(schema: type, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every dotted key of a schema, groups included, and what it holds as it is annotated."""
    for entry in dataclasses.fields(schema):
        key = f"{prefix}{entry.name}"
        yield key, str(entry.type)
        kind = dataclass_of(entry.type, schema)
        if kind is not None:
            yield from schema_fields(kind, f"{key}.")


def schema_keys(schema: type) -> Iterator[str]:
    """Every dotted key of a schema, groups included."""
    return (key for key, _ in schema_fields(schema))


def fields_not_in_key(schema: type) -> list[str]:
    """The names of a schema's own fields that cannot change a run's numbers."""
    return [entry.name for entry in dataclasses.fields(schema) if entry.metadata.get("not_in_key")]


def open_keys(schema: type) -> Iterator[str]:
    """The dotted keys that hold a dictionary, under which any key may stand."""
    return (key for key, kind in schema_fields(schema) if kind.startswith("dict["))


def dataclass_of(annotation: Any, owner: type) -> type | None:
    """The dataclass that a field of `owner` holds, looked for beside `owner` and in `llmft.config.sections`."""
    found = annotation
    if isinstance(annotation, str):
        home = sys.modules.get(owner.__module__)
        found = getattr(home, annotation, None) or getattr(llmft.config.sections, annotation, None)
    return found if isinstance(found, type) and dataclasses.is_dataclass(found) else None


def to_config(composed: DictConfig, schema: type) -> Any:
    """Turns a composed config into `schema`'s plain dataclasses, once, at the door.

    Raises ConfigError for a key that the schema lacks (Hydra lets `+lora.zz=1` pass), a missing value, or a
    value out of range.
    """
    try:
        _refuse_extra_keys(composed, schema, "")
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]} has no value: set {missing[0]}=… on the command line.")
        made = OmegaConf.to_object(composed)
    except OmegaConfBaseException as error:
        raise ConfigError(explained(error, schema)) from None
    if not isinstance(made, schema):
        raise ConfigError(f"this config is none of {schema.__name__}: leave out --config-name, or name one like ours.")
    return made


_WANTED = {
    r"^(Cannot merge DictConfig with ListConfig|Cannot assign \w+ to Dict.*)": "a dictionary is wanted, {name: value}",
    r"^(Cannot merge ListConfig with DictConfig|.*is not a ListConfig, list or tuple)": "a list is wanted, [a,b]",
    r"^field '(.*)' is not Optional": r"\1 cannot be null",
    r"^Invalid type assigned: .* is not a subclass of .*": "this holds keys of its own; set one of them",
}
"""What OmegaConf says of a value's kind, and the same for people."""


def explained(error: OmegaConfBaseException, schema: type) -> str:
    """What is wrong with which key, in a sentence."""
    told, key = str(error).splitlines()[0].rstrip("."), error.full_key
    if isinstance(error, GrammarParseError) or told.startswith("GrammarParseError"):
        told = "${ begins an interpolation, such as ${seed}, and this is none; write \\${ for the characters themselves"
    for pattern, wanted in _WANTED.items():
        told = re.sub(pattern, wanted, told)
    told = re.sub(r"^\w+ raised while resolving interpolation: \"?(.*?)\"?$", r"\1", told)
    if variable := re.fullmatch(r"Environment variable '(.+)' not found", told):
        told = f"no environment variable {variable[1]}; set it, or write a default: ${{oc.env:{variable[1]},…}}"
    if missing := re.fullmatch(r"Interpolation key '(.+)' not found", told):
        told = f"${{{missing[1]}}} names no key{did_you_mean(missing[1], schema_keys(schema))[:100]}"
    told = told.rstrip("?.") + ("?" if told.endswith("?") else ".")
    return f"{key}: {told}" if key and key not in told.split() else told


def _refuse_extra_keys(node: DictConfig, schema: type, prefix: str) -> None:
    fields = {entry.name: entry for entry in dataclasses.fields(schema)}
    for key in node:
        name = f"{prefix}{key!s}"
        if key not in fields:
            raise ConfigError(f"{name}: no such key{did_you_mean(name, (prefix + f for f in fields))}")
        kind = dataclass_of(fields[str(key)].type, schema)
        if kind is not None and not OmegaConf.is_missing(node, key):
            child = node[key]
            if isinstance(child, DictConfig):
                _refuse_extra_keys(child, kind, f"{name}.")


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


def numbers_of(value: Any) -> Any:
    """`value` as plain data, without the fields that cannot change a run's numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            entry.name: numbers_of(getattr(value, entry.name))
            for entry in dataclasses.fields(value)
            if not entry.metadata.get("not_in_key")
        }
    return to_plain(value)


def canonical(value: Any) -> str:
    """JSON with sorted keys: equal configs give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
