"""The stages of a pipeline: their dependencies and command lines."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llmft.config.commands import PipelineConfig, StageConfig, schema_of
from llmft.config.convert import to_config
from llmft.config.hydra_app import explain, make_known
from llmft.config.invocation import COMMANDS
from llmft.config.overrides import config_directory, hydra_arguments
from llmft.core.errors import ConfigError, did_you_mean

NAMED = re.compile(r"\$\{stage:([^}]*)\}")
"""An earlier stage's result in an override: its directory, or with .runs after its name the runs of a sweep."""


def filled(overrides: Sequence[str], results: Mapping[str, str]) -> list[str]:
    """`overrides` with the results of earlier stages filled in."""
    return [NAMED.sub(lambda match: results[match[1]], override) for override in overrides]


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline.

    Attributes:
        needs: the earlier stages that its overrides refer to, in order.
    """

    name: str
    command: str
    overrides: tuple[str, ...]
    sweep: bool
    needs: tuple[str, ...]

    def arguments(self, results: Mapping[str, str]) -> list[str]:
        """The overrides with the results of earlier stages filled in."""
        return filled(self.overrides, results)

    def module(self) -> str:
        """The module for `python -m`."""
        return "llmft" if self.command == "train" else f"llmft.{self.command}"

    def line(self, arguments: Sequence[str]) -> str:
        """The command line as text."""
        return shlex.join(["python", "-m", self.module(), *(["-m"] if self.sweep else []), *arguments])


def stages_of(config: PipelineConfig) -> list[Stage]:
    """The stages in order. Raises ConfigError for unknown commands, and references to later or missing stages."""
    stages: list[Stage] = []
    for name, stage in config.stages.items():
        key = f"stages.{name}"
        if stage is None:  # left out
            continue
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"{key}: a stage's name has only letters, digits and underscores.")
        if stage.command not in COMMANDS or stage.command == "pipeline":
            raise ConfigError(f"{key}.command={stage.command}: no command{did_you_mean(stage.command, COMMANDS)}")
        if stage.sweep and stage.command != "train":
            raise ConfigError(f"{key}.sweep: only trainings can be swept; leave it out.")
        overrides = _with_common(stage, config)
        names = (match for override in overrides for match in NAMED.findall(override))
        needs = tuple(dict.fromkeys(match.removesuffix(".runs") for match in names))
        earlier = [before.name for before in stages]
        for needed in needs:
            if needed not in earlier:
                later = "comes later" if needed in config.stages else "there is no such stage"
                raise ConfigError(f"{key}: ${{stage:{needed}}}: {later}{did_you_mean(needed, earlier)}")
        stages.append(Stage(name, stage.command, tuple(overrides), stage.sweep, needs))
    if not stages:
        raise ConfigError("stages: none; choose pipeline=…, or declare stages of your own in conf/pipeline.")
    return stages


def _with_common(stage: StageConfig, config: PipelineConfig) -> list[str]:
    """A stage's overrides after the common ones of trainings, or of commands that read runs.

    A key that the stage sets itself replaces the common one.
    """
    common = list(config.training) if stage.command == "train" else []
    if stage.command in ("train", "folds", "blend", "refit"):
        common.append(f"output_dir={config.output_dir}")
    keys = {_key(override) for override in stage.overrides}
    return [*(override for override in common if _key(override) not in keys), *stage.overrides]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def check_composes(stage: Stage, arguments: Sequence[str]) -> Any:
    """The config of a stage's command; raises ConfigError if it cannot be composed.

    None for a sweep, and for a command with arguments other than Hydra's.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    if stage.sweep or stage.command in ("check", "chat", "serve", "report", "completion"):
        return None
    schema = schema_of(stage.command)
    make_known(stage.command, schema)
    GlobalHydra.instance().clear()
    try:
        overrides = hydra_arguments(arguments, schema, multirun=False)
        with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
            return to_config(hydra.compose(stage.command, overrides), schema)
    except Exception as error:
        sentence = explain(error, schema, arguments)
        if sentence is None:
            raise
        raise ConfigError(f"stages.{stage.name}: {sentence}") from None
    finally:
        GlobalHydra.instance().clear()
