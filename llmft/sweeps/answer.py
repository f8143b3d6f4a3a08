"""What a sweep hands over at its end: the report, the logbook, Weights & Biases' summary and how to upload it all."""

from __future__ import annotations

import shlex
from pathlib import Path

from rich.markup import escape

from llmft.core.console import Screen
from llmft.core.files import write_atomically
from llmft.reports.write import write_report
from llmft.sweeps.trials import Sweep


def give_answer(sweep: Sweep, screen: Screen, *, anew: bool) -> None:
    """Writes the report beside the sweep's record and prints what it says.

    With `anew`, when trials ran just now, the sweep is also summed up in W&B.
    """
    runs = [trial.run.directory for trial in sweep.trials]
    logbook = Path(sweep.config.output_dir) / "LOGBOOK.md"
    report = write_report(runs, sweep.directory, sweep=sweep.directory, logbook=logbook)
    report.console(screen, failures=False)
    if anew and sweep.config.logger.wandb.enabled:
        from llmft.sweeps.summary import log_sweep

        log_sweep(sweep, screen, report.html, [report.verdicts.answer])
    offline = offline_folders(sweep)
    if offline:
        listing = sweep.directory / "wandb-offline.txt"
        write_atomically(listing, "".join(f"{folder}\n" for folder in offline).encode())
        # A folder's name may hold spaces, which `$(cat …)` would take apart.
        sync = escape(f"tr '\\n' '\\0' < {shlex.quote(str(listing))} | xargs -0 wandb sync")
        screen.print("To upload the whole sweep to W&B later:", f"  {sync}")


def offline_folders(sweep: Sweep) -> list[Path]:
    """The W&B folders of the sweep's runs that were logged offline and are not uploaded."""
    folders = [trial.run.directory / "wandb" for trial in sweep.trials] + [sweep.directory / "wandb"]
    offline = [path for folder in dict.fromkeys(folders) for path in sorted(folder.glob("offline-run-*"))]
    return [path for path in offline if not any(path.glob("*.synced"))]
