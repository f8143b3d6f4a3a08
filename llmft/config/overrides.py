"""Shell arguments as overrides in Hydra's grammar: texts may contain anything, open dictionaries any key.

A key of type text takes its argument literally. Only these have a special meaning:

- `null`, for a key that may be empty, and `${…}`, as in Hydra;
- one pair of quotes around all of it, `'…'` or `"…"`, which Hydra's grammar removes;
- with `-m`, commas between values that contain no spaces (`-m data.name=a,b`), are quoted (`'a b','c, d'`) or null, and
  Hydra's functions, such as `choice(a,b)`. A comma inside brackets, or in a text with spaces, is a comma.

A list of texts is written `[a,b]`; its items are texts in the same way.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llmft.config.convert import schema_fields
from llmft.config.renamed import with_new_names
from llmft.config.sections import TrainConfig
from llmft.config.sweep import SearchConfig
from llmft.core.errors import ConfigError, nearest
from llmft.core.redaction import redact

BRACKETS = {"(": ")", "[": "]", "{": "}"}
PLAIN_NAME = re.compile(r"[A-Za-z_][\w.-]*", re.ASCII)


def config_directory() -> Path:
    """The directory of the YAML files."""
    return shipped_directory("conf")


def shipped_directory(name: str) -> Path:
    """A directory that ships with llmft: next to the package in a checkout, or inside the installed one."""
    package = Path(__file__).resolve().parents[1]
    for candidate in (package / "assets" / name, package.parent / name):
        if candidate.is_dir():
            return candidate
    raise ConfigError(f"no {name}/ next to or inside {package}: the installation is incomplete, install llmft again.")


def hydra_arguments(arguments: Sequence[str], schema: type, *, multirun: bool) -> list[str]:
    """Shell arguments for the command of `schema` in Hydra's form, options first.

    Raises ConfigError for an option that does not exist or is not offered, such as -m without `multirun`.
    """
    from hydra._internal.utils import get_args_parser

    arguments = with_new_names(yes_or_no(arguments))
    for argument in arguments:
        shown = argument.encode(errors="backslashreplace").decode()
        if shown != argument:
            raise ConfigError(f"{shown}: this argument is not UTF-8.")
        if redact(argument) != argument:
            key = argument.partition("=")[0]
            raise ConfigError(f"{key}: this looks like a secret; tokens belong in the environment or a login file.")
    parser = get_args_parser()

    def refuse(message: str) -> NoReturn:
        option = message.removeprefix("unrecognized arguments: ").partition(" ")[0]
        if option == message.partition(" ")[0]:
            raise ConfigError(f"{message.replace(chr(10), ' ')}; `--help` lists the options.")
        best = nearest(option, parser._option_string_actions)
        raise ConfigError(f"{option}: no such option; " + (f"did you mean {best}?" if best else "see `--help`."))

    parser.error = refuse  # type: ignore[method-assign]
    parsed = parser.parse_intermixed_args(list(arguments))
    if parsed.experimental_rerun is not None:
        raise ConfigError("--experimental-rerun unpickles a file, which may run anything; it is not offered.")
    if parsed.package is not None and parsed.cfg is None:
        raise ConfigError("--package: the part of the config that --cfg shows; write --cfg job with it.")
    several = parsed.multirun or "hydra.mode=MULTIRUN" in parsed.overrides
    if several and not multirun:
        raise ConfigError("-m: only a training has several jobs; this command takes one config.")
    for argument in (f"--config-name={parsed.config_name or ''}", *parsed.overrides):
        key, _, value = argument.partition("=")
        if chooses(key.lstrip("+~"), schema) and value[:1] != "{" and re.search(r"(^|[\[,'\"/\s])\.\.?(/|$)", value):
            raise ConfigError(
                f"{argument}: a name is expected, not a path; --config-dir=DIR adds a directory of yours."
            )
    waiting, options = list(parsed.overrides), []
    for argument in arguments:
        if waiting and argument == waiting[0]:
            waiting.pop(0)
        else:
            options.append(argument)
    overrides = [as_override(argument, schema, several=several) for argument in parsed.overrides]
    # A file of sweeps/ may say otherwise.
    return [*options, *overrides, *([] if multirun else ["hydra.mode=RUN"])]


@functools.cache
def kinds_of(schema: type) -> dict[str, str]:
    """The annotated type of each dotted key of a command."""
    kinds = schema_fields(schema)
    return kinds | schema_fields(SearchConfig, "hydra.sweeper.") if schema is TrainConfig else kinds


def is_text(key: str, schema: type) -> bool:
    """Whether a key is of type text."""
    return kinds_of(schema).get(key.lstrip("+"), "").partition(" |")[0] == "str"


def chooses(key: str, schema: type) -> bool:
    """Whether a key or option names a file of the config, ours or one that `--config-dir` adds."""
    kind = kinds_of(schema).get(key.lstrip("+"))
    is_group = kind is not None and (kind.endswith("Config") or kind.startswith("dict["))
    return "." not in key and (is_group or key not in kinds_of(schema))


def as_override(argument: str, schema: type, *, several: bool = False) -> str:
    """One argument of the command of `schema` as an override; `several`: commas may separate values."""
    spelled, equals, value = argument.partition("=")
    if not equals or spelled.startswith("-"):
        return argument
    key, kinds = spelled.lstrip("+"), kinds_of(schema)
    kind, _, optional = kinds.get(key, "").partition(" |")
    convert: dict[str, Callable[[str], str]] = {
        "str": lambda text: _text(text, optional=bool(optional)),
        "list[str]": _list,
        "Texts": lambda text: _list(text) if _is_list(text) else _text(text, optional=True),
    }
    if kind in convert:
        pieces = _values(value) if several or kind == "Texts" else []
        if kind == "Texts" and not several and len(pieces) > 1 and not os.path.exists(value):
            return argument  # more likely a list without its brackets, which Hydra's sentence explains
        if not several:
            return f"{spelled}={convert[kind](value)}"
        function = _read(value) if re.match(r"\w+\s*\(", value) else None
        if function is not None and function.is_sweep_override():
            return argument
        return f"{spelled}={','.join(map(convert[kind], pieces))}"
    if kind.startswith("dict[") and value.startswith("{"):
        return f"++{key}={value}"
    inside = next((name for name in kinds if key.startswith(f"{name}.") and kinds[name].startswith("dict[")), None)
    if inside is None:
        return argument
    if "Config" in kinds[inside]:  # a pipeline's stages, which its file declares: no key is added to them
        return f"{key}={_list(value)}"
    if kinds[inside].startswith("dict[str, str]"):
        name, value = key.removeprefix(f"{inside}."), _text(value, optional=False)
        if "." in name or not PLAIN_NAME.fullmatch(name):  # a dot is part of it, as in a class's name
            return f"++{inside}={{{re.sub(r'([^A-Za-z0-9_.-])', _escaped, name)}:{value}}}"
    return f"++{key}={value}"


def yes_or_no(arguments: Sequence[str]) -> list[str]:
    """`arguments` with GROUP=false as the option none of a group that has one, and without GROUP=true, its default."""
    converted = []
    for argument in arguments:
        group, _, value = argument.partition("=")
        if re.fullmatch(r"\w+", group) and (config_directory() / group / "none.yaml").is_file():
            if value.lower() == "true":
                continue
            argument = f"{group}=none" if value.lower() in ("false", "null") else argument
        converted.append(argument)
    return converted


def quoted(text: str) -> str:
    """`text` in quotes, as Hydra's grammar reads it back."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(text, Quote.single).with_quotes()


def unquoted(text: str) -> str:
    """A value of an override without the quotes around it."""
    override = _read(text)
    return str(override.value()) if text[:1] in ("'", '"') and override is not None else text


def _read(value: str) -> Any:
    """Hydra's override of any key with `value`; None where its grammar refuses it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        return OverridesParser.create().parse_override(f"key={value}")
    except (HydraException, ValueError, RecursionError):
        return None


def _is_quoted(text: str) -> bool:
    override = _read(text) if text[:1] in ("'", '"') else None
    return override is not None and not override.is_sweep_override()


def _is_list(value: str) -> bool:
    return value.strip().startswith("[") and value.strip().endswith("]") and not os.path.exists(value)


def _text(value: str, *, optional: bool, within: str = "{}") -> str:
    if (optional and value == "null") or _is_quoted(value):
        return value
    override = _read(within.format(value))
    alike = override is not None and override.value() in (value, [value])
    return value if alike else quoted(value)


def _list(value: str) -> str:
    if not _is_list(value):
        return value
    inner = value.strip()[1:-1]
    items = [item.strip() for item in split_at_commas(inner)] if inner.strip() else []
    if not all(items):
        return value  # Hydra's grammar refuses it
    return f"[{','.join(item if _is_quoted(item) else _text(item, optional=False, within='[{}]') for item in items)}]"


def _values(value: str) -> list[str]:
    """The values that one argument of a multirun gives; just itself if no comma separates values."""
    pieces = split_at_commas(value)
    stripped = [piece.strip() for piece in pieces]
    pairs = zip(pieces, stripped, strict=True)
    separable = all(s == "null" or _is_quoted(s) or (s and not re.search(r"\s", p)) for p, s in pairs)
    return stripped if len(pieces) > 1 and separable else [value]


def split_at_commas(text: str) -> list[str]:
    """The parts of `text` between commas outside quotes and brackets; a quote counts where a part begins with it."""
    parts: list[str] = []
    closing: list[str] = []
    start = at = 0
    while at < len(text):
        sign = text[at]
        if sign in "'\"" and not text[start:at].strip() and not closing:
            ends = re.compile(rf"(?<!\\)(?:\\\\)*{sign}\s*(?=,|$)").search(text, at + 1)
            at = ends.end() if ends else at + 1
            continue
        if closing and sign == closing[-1]:
            closing.pop()
        elif sign in BRACKETS and BRACKETS[sign] in text[at:]:
            closing.append(BRACKETS[sign])
        elif sign == "," and not closing:
            parts.append(text[start:at])
            start = at + 1
        at += 1
    return [*parts, text[start:]]


def _escaped(sign: re.Match[str]) -> str:
    return f"\\{sign[0]}" if sign[0] in "()[]{}:=, \t\\" else sign[0]
