"""Progress of a sweep on the screen: bars on a terminal, else a line whenever a trial starts or ends."""

from __future__ import annotations

import time
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from llmft.core.console import HEARTBEAT_S, Screen
from llmft.sweeps.trials import Trial

COLOURS = {"done": "green", "failed": "red", "interrupted": "yellow", "pruned": "cyan", "twin": "cyan"}


class SweepProgress:
    """Shows the progress of a sweep."""

    def __init__(self, screen: Screen, total: int, *, enabled: bool = True, monitor: str = "") -> None:
        self.screen = screen
        self.total = total
        self.enabled = enabled
        self.monitor = monitor
        self.ready = 0
        self._bars: Progress | None = None
        self._overall: Any = None
        self._lines: dict[int, Any] = {}
        self._said_at: dict[int, float] = {}

    def start(self) -> None:
        if self.enabled and self.screen.terminal.is_terminal:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[shown]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.screen.terminal,
                transient=True,
            )
            self._overall = self._bars.add_task("[bold]trials[/bold]", total=self.total, completed=self.ready, shown="")
            self._bars.start()

    def say(self, text: str) -> None:
        """Prints a line above the bars."""
        self.screen.print(escape(text))

    def begins(self, trial: Trial) -> None:
        slot = trial.number
        self._said_at[slot] = time.monotonic()
        if self._bars is not None:
            self._drop(slot)
            self._lines[slot] = self._bars.add_task(f"[cyan]{escape(trial.label)}[/cyan]", total=None, shown="loading")
        elif self.enabled:
            self.say(f"trial {trial.number + 1}/{self.total} begins: {trial.label}")

    def step(self, trial: Trial, event: dict[str, Any]) -> None:
        slot = trial.number
        shown = f"loss {event['loss']:.4f}  {event['tokens_per_s']:,.0f} tokens/s"
        if self._bars is not None:
            self._bars.update(self._lines[slot], completed=event["step"], total=event["total"], shown=shown)
        elif self.enabled and time.monotonic() - self._said_at[slot] >= HEARTBEAT_S:
            self._said_at[slot] = time.monotonic()
            self.say(f"trial {trial.number + 1}/{self.total} step {event['step']}/{event['total']}  {shown}")

    def validation(self, trial: Trial, event: dict[str, Any]) -> None:
        value = event["metrics"].get(self.monitor)
        if self._bars is not None and value is not None:
            self._bars.update(self._lines[trial.number], shown=f"{self.monitor} {value:.4f}")

    def finished_before(self, trial: Trial) -> None:
        self._ready(trial, "was done before")

    def waits(self, trial: Trial) -> None:
        owner = trial.run.status().get("owner", {})
        who = f"process {owner.get('pid', '?')} on {owner.get('host', '?')}"
        self.say(f"trial {trial.number + 1}/{self.total} waits: {who} is training it  {trial.label}")

    def ended(self, trial: Trial) -> None:
        self._drop(trial.number)
        if trial.status in ("busy", "pending"):
            return
        took = f"{trial.seconds:.{0 if trial.seconds >= 10 else 1}f} s" if trial.seconds is not None else ""
        self._ready(trial, took)

    def _ready(self, trial: Trial, took: str) -> None:
        self.ready += 1
        if self._bars is not None:
            self._bars.update(self._overall, completed=self.ready)
        colour = COLOURS.get(trial.status, "yellow")
        value = f"  {self.monitor} {trial.value:.4f}" if trial.value is not None else ""
        error = f"  {escape(trial.error)}" if trial.error and trial.status != "done" else ""
        self.screen.print(
            f"trial {trial.number + 1}/{self.total} [{colour}]{trial.status}[/{colour}] {escape(trial.label)}"
            f"{value}{error}  {took}"
        )

    def _drop(self, slot: int) -> None:
        line = self._lines.pop(slot, None)
        if self._bars is not None and line is not None:
            self._bars.remove_task(line)

    def stop(self) -> None:
        if self._bars is not None:
            self._bars.stop()
            self._bars = None
