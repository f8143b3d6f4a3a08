"""The runs of a command, each in the form that it asks for."""

from __future__ import annotations

from pathlib import Path

from llmft.config.commands import MergeConfig, MergeFormat
from llmft.core.console import Screen
from llmft.core.imports import load_libraries, quiet_warnings
from llmft.export.targets import check_format, is_current, opened, target_of
from llmft.runs.directory import usable


def export_runs(config: MergeConfig, screen: Screen) -> list[Path]:
    """Writes each run that `config` names; returns where. What is there already, of the same weights, stays.

    Raises ConfigError for runs, files or options that cannot be used, NotProved for a model that is not its run.
    """
    check_format(config)
    jobs = usable(config.run, "run", lambda directory: opened(directory, config), screen.warn)
    load_libraries()
    from llmft.export.merge import merged

    made: list[Path] = []
    for one in jobs:
        target = target_of(one, config, several=len(jobs) > 1)
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
