"""External engines for many users: prepares a run for them and starts their command."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape

from llmft.config.commands import MergeConfig, MergeFormat, ServeConfig, ServedBy
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.core.imports import missing
from llmft.evaluation.jobs import PredictionJob

KEY = "LLMFT_API_KEY"
"""The environment variable with the API key that clients must send."""


@dataclass(frozen=True)
class Program:
    """How an engine is started.

    Attributes:
        command: without the address; {model} is the merged directory or GGUF file, {name} the name for clients.
        install: how to install it, and the Python `packages` that its command needs to serve.
        key: the environment variable from which it reads an API key; None if it supports none.
    """

    command: tuple[str, ...]
    install: str
    packages: tuple[str, ...] = ()
    key: str | None = None


PROGRAMS = {
    ServedBy.vllm: Program(
        ("vllm", "serve", "{model}", "--served-model-name", "{name}"), "pip install vllm", key="VLLM_API_KEY"
    ),
    ServedBy.llamacpp: Program(
        ("llama-server", "--model", "{model}", "--alias", "{name}", "--jinja"), "llama.cpp", key="LLAMA_API_KEY"
    ),
    ServedBy.transformers: Program(
        ("transformers", "serve", "{model}"), 'pip install "transformers[serving]"', ("fastapi", "uvicorn", "openai")
    ),
}


def hand_over(jobs: Sequence[PredictionJob], config: ServeConfig, key: str | None, screen: Screen) -> None:
    """Merges a run for the engine in `config` and executes its command; only prints it if it is not installed.

    Raises ConfigError for several runs, since each engine has one model, and for a key that it would ignore.
    """
    program, engine = PROGRAMS[config.engine], config.engine.value
    if len(jobs) > 1:
        raise ConfigError(f"with={engine}: one run at a time; with=llmft serves several from one base.")
    if key and program.key is None:
        raise ConfigError(f"with={engine}: it supports no API key; unset {KEY}, or use with=vllm or llamacpp.")
    names = {"model": prepared(jobs[0], config), "name": jobs[0].run.directory.name}
    command = [word.format(**names) for word in program.command]
    command += ["--host", config.host, "--port", str(config.port)]
    shown = (f'{program.key}="${KEY}" ' if key else "") + shlex.join(command)
    executable = shutil.which(command[0])
    if executable is None or missing(*program.packages):
        screen.warn(f"with={engine}: not installed here ({program.install}); this command starts it elsewhere:")
        print(shown)
        return
    screen.print(escape(shown))
    sys.stdout.flush()
    os.execve(executable, command, {**os.environ, program.key: key} if key and program.key else os.environ)


def prepared(job: PredictionJob, config: ServeConfig) -> Path:
    """The merged directory or GGUF file of a run, exported if it does not exist."""
    from llmft.export.runs import export_runs
    from llmft.export.targets import target_of

    gguf = config.engine is ServedBy.llamacpp
    wanted: dict[str, Any] = {"format": MergeFormat.gguf, "type": "q8_0"} if gguf else {}
    merge = MergeConfig(run=str(job.run.directory), accelerator=config.accelerator, threads=config.threads, **wanted)
    export_runs(merge, Screen())
    return target_of(job, merge, several=False)
