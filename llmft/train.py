"""config -> run directory: `python -m llmft.train`, or `python -m llmft` for short.

Validates, fine-tunes, validates again, and returns the monitored metric, which a sweep optimises.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmft.config.invocation import Invocation, arguments_of_process
from llmft.core.machine import set_cuda_variables
from llmft.training.run import train

if TYPE_CHECKING:
    from llmft.config.sections import TrainConfig

__all__ = ["main", "train"]


def main(argv: Sequence[str]) -> None:
    set_cuda_variables()
    # A parent process's W&B service writes to that process's directory, and ends with it.
    os.environ.pop("WANDB_SERVICE", None)
    # A character that the terminal cannot show must not end a training.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from llmft.config.hydra_app import run_verb
    from llmft.config.sections import TrainConfig

    run_verb("train", TrainConfig, _train, argv)


def _train(config: TrainConfig, invocation: Invocation) -> float | None:
    from llmft.core.machine import die_with_parent
    from llmft.sweeps.worker import reporter_of_environment

    reporter = reporter_of_environment()
    if reporter is not None:
        die_with_parent(signal.SIGTERM)  # a trial whose supervisor was killed saves and frees its devices
    return train(config, invocation=invocation, reporter=reporter)


if __name__ == "__main__":
    main(arguments_of_process())
