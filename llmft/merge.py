"""run -> a model for other programs: `python -m llmft.merge run=DIR`, a directory of transformers or a GGUF file.

It ends with a proof: what was written is loaded by other code and compared with the run. Above the bound nothing is
left, and the exit code is 1.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from llmft.config.commands import MergeConfig, MergeFormat
from llmft.config.convert import to_config
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process


def main(argv: Sequence[str]) -> None:
    """The command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run_verb("merge", MergeConfig, lambda composed, _: merge(to_config(composed, MergeConfig)), argv)


def merge(config: MergeConfig, *, quiet: bool = False) -> list[Path]:
    """Writes each run that `config` names in the form it wants; returns where.

    Raises ConfigError for runs, files or options that cannot be used, NotProved for a model that is not its run.
    """
    from llmft.core.console import Screen
    from llmft.core.imports import load_libraries, quiet_warnings
    from llmft.export.targets import check_format, is_current, opened, target_of
    from llmft.runs.directory import usable

    screen = Screen(quiet=quiet)
    check_format(config)
    asked = usable(config.run, "run", lambda directory: opened(directory, config), screen.warn)
    load_libraries()
    from llmft.export.merge import merged

    made: list[Path] = []
    for one in asked:
        target = target_of(one, config, several=len(asked) > 1)
        with quiet_warnings():
            if config.format is not MergeFormat.hf:
                from llmft.export.gguf_proof import export

                export(one, config, screen, target)
            elif not config.force and is_current(target, one, config):
                screen.print(f"This is done: [bold]{target}[/bold] (force=true makes it again)")
            else:
                with merged(one, config, screen, target):
                    pass
                screen.print(f"[bold]merged[/bold]  {target}")
        made.append(target)
    return made


if __name__ == "__main__":
    main(arguments_of_process())
