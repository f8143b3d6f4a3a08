"""Exports the runs of a command in the requested format."""

from __future__ import annotations

from pathlib import Path

from llmft.config.commands import MergeConfig, MergeFormat
from llmft.core.console import Screen
from llmft.core.imports import load_libraries, quiet_warnings
from llmft.export.targets import NotProved, check_format, is_current, opened, target_of
from llmft.runs.directory import open_directories


def export_runs(config: MergeConfig, screen: Screen) -> list[Path]:
    """Exports each run that `config` names; returns the paths. Up-to-date exports are kept.

    Raises ConfigError for runs, files or options that cannot be used, NotProved for a model that differs from its run.
    """
    check_format(config)
    jobs = open_directories(config.run, "run", opened, screen.warn)
    load_libraries()
    from llmft.export.gguf_proof import export
    from llmft.export.merge import merged

    targets: list[Path] = []
    failed: NotProved | None = None
    for job in jobs:
        target = target_of(job, config, several=len(jobs) > 1)
        try:
            with quiet_warnings():
                if config.format is not MergeFormat.hf:
                    export(job, config, screen, target)
                elif not config.force and is_current(target, job, config):
                    screen.print(f"This is done: [bold]{target}[/bold] (force=true makes it again)")
                else:
                    merged(job, config, screen, target)
                    screen.print(f"[bold]merged[/bold]  {target}")
            targets.append(target)
        except NotProved as error:  # the others are still exported
            if len(jobs) > 1:
                screen.warn(str(error))
            failed = error
    if failed is not None:
        raise failed
    return targets
