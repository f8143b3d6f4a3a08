"""run -> a model for other programs: `python -m llmft.merge run=DIR`, a directory of transformers or a GGUF file.

The exported model is loaded by other code and compared with the run. If it differs by more than the bound, nothing is
kept, and the exit code is 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llmft.config.commands import MergeConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process


def main(argv: Sequence[str]) -> None:
    run_verb("merge", MergeConfig, lambda config, _: merge(config), argv)


def merge(config: MergeConfig, *, quiet: bool = False) -> list[Path]:
    """Exports each run in `config` in the requested format; returns the paths.

    Raises ConfigError for runs, files or options that cannot be used, NotProved for a model that differs from its run.
    """
    from llmft.core.console import Screen
    from llmft.export.runs import export_runs

    return export_runs(config, Screen(quiet=quiet))


if __name__ == "__main__":
    main(arguments_of_process())
