"""Several commands as stages of one pipeline: `python -m llmft.pipeline pipeline=llama2`.

A stage is a command with its overrides, in which `${stage:NAME}` is the result directory of an earlier stage. Every
stage's command is run every time, in order: a finished one returns at once, a killed one continues, a changed one is
another run. So the pipeline has no state of its own except a record.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from llmft.config.commands import PipelineConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process

# References to stages are kept as text until the stage has run.
OmegaConf.register_new_resolver("stage", lambda name: f"${{stage:{name}}}", replace=True)


def main(argv: Sequence[str]) -> None:
    run_verb("pipeline", PipelineConfig, lambda config, _: pipeline(config), argv)


def pipeline(config: PipelineConfig) -> Path | None:
    """Runs the unfinished stages of `config` and writes the report; returns the directory of the record.

    Raises ConfigError, before anything runs, for stages that cannot be composed; StageFailed if one fails.
    """
    from llmft.core.console import Screen
    from llmft.pipelines.run import run_pipeline

    return run_pipeline(config, Screen())


if __name__ == "__main__":
    main(arguments_of_process())
