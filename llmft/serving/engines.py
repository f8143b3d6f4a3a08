"""Engines of others that are made for many users: what they need of a run, and the command that starts them."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmft.config.commands import MergeConfig, MergeFormat, ServeConfig, ServedBy
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.evaluation.jobs import PredictionJob

PROGRAMS = {ServedBy.vllm: "vllm", ServedBy.llamacpp: "llama-server", ServedBy.transformers: "transformers"}


def hand_over(jobs: Sequence[PredictionJob], config: ServeConfig, screen: Screen) -> None:
    """Merges a run for the engine that `config` names, and becomes its command; prints it where it is not installed.

    Raises ConfigError for several runs: each engine has one model.
    """
    if len(jobs) > 1:
        raise ConfigError(f"with={config.engine.value}: one run at a time; with=llmft serves several from one base.")
    command = command_of(jobs[0], prepared(jobs[0], config), config)
    program = shutil.which(command[0])
    if program is None:
        screen.warn(f"with={config.engine.value}: {command[0]} is not installed here; this starts it where it is:")
        print(shlex.join(command))
        return
    screen.print(shlex.join(command))
    os.execv(program, command)


def prepared(job: PredictionJob, config: ServeConfig) -> Path:
    """The merged directory or GGUF file of a run, made where it is not there."""
    from llmft.export.runs import export_runs
    from llmft.export.targets import target_of

    gguf = config.engine is ServedBy.llamacpp
    wanted: dict[str, Any] = {"format": MergeFormat.gguf, "type": "q8_0"} if gguf else {}
    given = MergeConfig(run=str(job.run.directory), accelerator=config.accelerator, threads=config.threads, **wanted)
    export_runs(given, Screen())
    return target_of(job, given, several=False)


def command_of(job: PredictionJob, model: Path, config: ServeConfig) -> list[str]:
    """What starts the engine with `model`."""
    name, place = job.run.directory.name, ["--host", config.host, "--port", str(config.port)]
    program = PROGRAMS[config.engine]
    if config.engine is ServedBy.vllm:
        return [program, "serve", str(model), "--served-model-name", name, *place]
    if config.engine is ServedBy.llamacpp:
        return [program, "--model", str(model), "--alias", name, "--jinja", *place]
    return [program, "serve", "--force-model", str(model), *place]
