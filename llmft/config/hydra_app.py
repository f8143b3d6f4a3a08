"""Shared by all commands: composing a config with Hydra, and reporting a mistake in one sentence."""

from __future__ import annotations

import atexit
import gc
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llmft.config.convert import explain_error, schema_fields, to_config
from llmft.config.instantiate import trust
from llmft.config.invocation import Invocation, arguments_for_hydra
from llmft.config.overrides import chooses, config_directory, hydra_arguments
from llmft.config.renamed import RENAMED
from llmft.config.sections import TrainConfig
from llmft.config.sweep import SearchConfig
from llmft.config.untrusted import check_config_directories
from llmft.core.errors import ConfigError, Interrupted, UserError, did_you_mean, exit_with, first_line, nearest, report

has_ready_sweeps = False
"""Whether the composed command finds sweeps/. For other commands `sweep` is an ordinary key, not a config group."""


def make_known(name: str, schema: type) -> None:
    """Registers the schema of conf/<name>.yaml and llmft's plugins with Hydra; call before anything is composed."""
    global has_ready_sweeps
    has_ready_sweeps = name == "train"
    plugins = str(Path(__file__).resolve().parents[1] / "plugins")
    if plugins not in sys.path:
        sys.path.append(plugins)  # Hydra loads plugins from folders hydra_plugins on the path
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name=f"{name}_schema", node=schema)


def run_verb(verb: str, schema: type, job: Callable[[Any, Invocation], Any], argv: Sequence[str]) -> None:
    """Runs the command `verb`: composes its file of conf/, that of `schema`, under `argv`, then calls `job`.

    `job` gets the config, as `schema`, and the command's invocation. Only a training's command line may ask for several
    jobs. Exits with the code of the error, if any.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else a warning at every later fork
    # Spares the garbage collections at exit: 0.1 s for a sweep, more with torch. Files are closed by then.
    atexit.register(gc.freeze)
    exit_with(lambda: _run_app(verb, schema, job, argv))


def _run_app(verb: str, schema: type, job: Callable[[Any, Invocation], Any], argv: Sequence[str]) -> None:
    """Composes with Hydra and runs `job`; raises its first error, or a ConfigError for a wrong command line."""
    import hydra

    name = "train" if schema is TrainConfig else verb
    make_known(name, schema)
    arguments = hydra_arguments(argv, schema, multirun=verb == "train")
    check_config_directories(arguments)
    invocation = Invocation.of(arguments, verb)
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that errors reach us instead of being printed by Hydra
    process = os.getpid()
    failures: list[Exception] = []  # of the job, not to be taken for errors of the command line

    def task(config: Any) -> Any:
        try:
            if os.getpid() == process:
                restore_arguments()
            return job(config_of_command(config, schema, invocation), invocation)
        except Interrupted as error:
            raise SystemExit(report(error)) from None  # passes through Hydra, and skips the remaining jobs
        except Exception as error:
            if os.getpid() != process:  # in another launcher's process, which must see it fail
                raise RuntimeError(str(error)) from None
            failures.append(error)
            return None

    task.__module__ = "__main__"
    task.invocation = invocation  # type: ignore[attr-defined]
    try:
        with warnings.catch_warnings(), arguments_for_hydra(arguments) as restore_arguments:
            # A directory that is not there.
            warnings.filterwarnings("error", "provider=.* is not available", UserWarning)
            hydra.main(config_path=str(config_directory()), config_name=name, version_base="1.3")(task)()
    except (UserError, BrokenPipeError):
        raise
    except SystemExit as end:
        if end.code != 1 or "--cfg" not in (option[:5] for option in arguments):
            raise
        raise ConfigError("--package: no such key, or nothing in it; `--cfg job` prints all keys.") from None
    except Exception as error:
        sentence = explain(error, schema, arguments)
        if sentence is None:
            raise
        raise sentence from error
    if failures:
        raise failures[0]


def config_of_command(composed: Any, schema: type, invocation: Invocation) -> Any:
    """The typed config of a composed command line.

    Raises ConfigError also if a file, not the command line, asks to run a repository's code.
    """
    packages = composed.trusted_packages if "trusted_packages" in composed else ()
    for package in filter(None, packages):
        _require_typed("trusted_packages", str(package).lower(), f"[{package}]", invocation)
    trust(packages)
    config = to_config(composed, schema)
    if schema is TrainConfig and config.model.trust_remote_code:
        _require_typed("model.trust_remote_code", "true", "true", invocation)
    return config


def _require_typed(key: str, word: str, value: str, invocation: Invocation) -> None:
    if word not in invocation.words(key):
        advice = f"write {key}={value} on the command line if you have read the code."
        raise ConfigError(f"{key}: a file cannot grant trust; {advice}")


def explain(error: BaseException, schema: type, argv: Sequence[str] = ()) -> ConfigError | None:
    """A mistake in keys, values or options of the command line `argv` as one sentence; None for any other error."""
    from hydra.errors import HydraException, MissingConfigException, OverrideParseException
    from omegaconf.errors import OmegaConfBaseException

    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    if isinstance(error, OverrideParseException):
        key = error.override.partition("=")[0].lstrip("+~")
        if re.fullmatch(r"\w+(\.\w+)+", key) and key not in (keys := schema_fields(schema)) and nearest(key, keys):
            return _unknown_key(key, schema)  # a text stands unquoted, which it may where its key is known
        return ConfigError(f"'{error.override}' is no override: write key=value, and quote spaces and commas.")
    chain: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in chain:
        chain.append(current)
        current = current.__cause__ or current.__context__
    for link in chain:
        if isinstance(link, UserError):
            return link if isinstance(link, ConfigError) else ConfigError(str(link))
    if isinstance(error, UserWarning):
        path = re.search(r"path=(.*) is not available", str(error))
        return ConfigError(f"hydra.searchpath: {path[1] if path else error} is no directory.")
    if isinstance(error, OSError):
        where = f" ({error.filename})" if error.filename else ""
        return ConfigError(f"output_dir cannot be used: {error.strerror}{where}; choose another.")
    if isinstance(error, RecursionError):
        return ConfigError("files of the config name each other in their defaults lists without end; break the circle.")
    full_key = next((str(name) for link in chain if (name := getattr(link, "full_key", None))), None)
    if "Config group override must be a string" in str(error) or full_key == "_dummy_":
        named = (a for a in argv if chooses(a.partition("=")[0].lstrip("+"), schema))
        argument = next((a for a in named if re.search(r"[^=]=([-+.\d]|\$\{|(null|true|false)$)", a)), None)
        if argument is not None:
            return ConfigError(f"{argument}: the name of one of the group's options is expected, as in model=tiny.")
    if isinstance(error, ValueError) and not isinstance(error, (HydraException, OmegaConfBaseException)):
        return ConfigError(f"the command line cannot be read: {first_line(error)}")
    if isinstance(error, (AssertionError, KeyError)) and _raised_in_hydra(error):
        return ConfigError("the command line cannot be read: an override is key=value, as in lora.r=4.")
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    text = "\n".join(str(link) for link in chain)
    if "Ambiguous value" in text:
        argument = next((a for a in argv if "," in a), "")
        return ConfigError(f"{argument}: several values; add -m to run them all, or write a list as [a,b].")
    override = re.search(r"Could not override '([^']+)'", str(error))
    override_key = override[1] if override else None
    if "is not in struct" in text or "Key not found" in text or "not in '" in text:
        nodes = (getattr(link, "parent_node", None) for link in chain)
        beside = next((list(map(str, node)) for node in nodes if node is not None), [])
        return _unknown_key(full_key or override_key, schema, beside)
    if override_key is not None:
        return _unknown_key(override_key, schema)
    for link in chain:
        if isinstance(link, OmegaConfBaseException):
            return ConfigError(explain_error(link, schema))
    return ConfigError(f"{first_line(error).rstrip('.')}.")


def _raised_in_hydra(error: BaseException) -> bool:
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and frames[-1].f_globals.get("__name__", "").startswith("hydra.")


def _missing_option(error: Any) -> ConfigError:
    wanted = str(error.missing_cfg_file or "")
    group, _, option = wanted.rpartition("/")
    options = [str(o) for o in error.options or []]
    if not wanted:
        return ConfigError(f"{first_line(error).rstrip('.')}.")
    if not group:
        return ConfigError(f"no config named {wanted}{did_you_mean(wanted, options)}")
    if wanted in ("hydra/launcher/submitit_slurm", "hydra/launcher/submitit_local"):
        return ConfigError(f'{group}={option}: submitit is not installed; pip install "llmft[slurm]" adds it.')
    best = nearest(option, options)
    rest = [o for o in options if o != best]
    shown = ", ".join(rest[:40]) + (", …" if len(rest) > 40 else "")
    hint = f"did you mean {group}={best}? (others: {shown})" if best else f"choose from {', '.join(options)}"
    return ConfigError(f"{group}={option}: no such option; {hint}")


def _unknown_key(key: str | None, schema: type, beside: Sequence[str] = ()) -> ConfigError:
    """The sentence for a key that does not exist; `beside` are the keys of the same group."""
    if key is None:
        return ConfigError("an override names a key that does not exist; `--cfg job` prints all keys.")
    keys = schema_fields(schema)
    if key in RENAMED:
        return ConfigError(f"{key} is now called {RENAMED[key]}.")
    if key.startswith("hydra."):
        return _unknown_setting(key)
    if beside and keys.get(key.partition(".")[0], "").startswith("dict["):  # a pipeline's stages, or keys of one
        return ConfigError(f"{key}: no such key; choose from {', '.join(beside)}.")
    if key in keys:
        return ConfigError(f"{key}: not among this command's defaults; write +{key}=OPTION to add one.")
    best = nearest(key, keys)
    if best is None:  # the right name in the wrong place
        best = next((known for known in keys if known.rpartition(".")[2] == key.rpartition(".")[2]), None)
    hint = f"; did you mean {best}?" if best else "; `--cfg job` prints all keys."
    return ConfigError(f"{key}: no such key{hint}")


def _unknown_setting(key: str) -> ConfigError:
    if key.startswith("hydra.sweeper."):
        options = [f"hydra.sweeper.{name}" for name in SearchConfig.__dataclass_fields__]
        return ConfigError(f"{key}: no such key{did_you_mean(key, options)}")
    from hydra.conf import HydraConf

    parent, _, name = key.rpartition(".")
    best = nearest(name, {*HydraConf.__dataclass_fields__} - {name}) if parent == "hydra" else None
    hint = f"did you mean hydra.{best}?" if best else "`--cfg hydra` prints all keys."
    return ConfigError(f"{key}: no such key; {hint}")
