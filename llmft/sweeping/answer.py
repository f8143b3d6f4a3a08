"""What a sweep hands over at its end: the report, the logbook, and Weights & Biases' summary."""

from __future__ import annotations

from pathlib import Path

from rich.markup import escape

from llmft.console import Screen
from llmft.sweeping.trials import Sweep


def give_answer(sweep: Sweep, screen: Screen) -> None:
    """Writes the report beside the sweep's record and prints its main table."""
    offline = offline_folders(sweep)
    if offline:
        listing = sweep.directory / "wandb-offline.txt"
        listing.write_text("".join(f"{folder}\n" for folder in offline))
        screen.print("To upload the whole sweep to W&B later:", f"  wandb sync $(cat {escape(str(listing))})")


def offline_folders(sweep: Sweep) -> list[Path]:
    """The W&B folders of the sweep's runs that were logged offline and are not uploaded."""
    folders = [trial.run.directory / "wandb" for trial in sweep.trials] + [sweep.directory / "wandb"]
    found = [path for folder in folders for path in sorted(folder.glob("offline-run-*"))]
    return [path for path in found if not any(path.glob("*.synced"))]
