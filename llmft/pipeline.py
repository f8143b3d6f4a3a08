"""stages -> one chain: `python -m llmft.pipeline pipeline=llama2`.

A stage is a command with its overrides, in which `${stage:NAME}` is where an earlier one left its result. Every stage
is asked every time, in its order: what is done says so at once, what was killed goes on, what has changed is another
run. So the chain has no state of its own but a record of what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from llmft.config.commands import PipelineConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process

# What a stage is called stays as it is written until the stage has run.
OmegaConf.register_new_resolver("stage", lambda name: f"${{stage:{name}}}", replace=True)


def main(argv: Sequence[str]) -> None:
    run_verb("pipeline", PipelineConfig, lambda config, _: pipeline(config), argv)


def pipeline(config: PipelineConfig) -> Path | None:
    """Runs every stage of `config` that is not done, then the report; returns the directory of the record.

    Raises ConfigError, before anything runs, for stages that cannot be composed; StageFailed where one ends in an
    error.
    """
    from llmft.core.console import Screen
    from llmft.pipelines.run import run_pipeline

    return run_pipeline(config, Screen())


if __name__ == "__main__":
    main(arguments_of_process())
