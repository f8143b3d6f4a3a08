"""Terminal output: the plan, a progress bar, warnings, tables; all of it also goes to the run's log."""

from __future__ import annotations

import contextlib
import io
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from llmft.core.errors import UserError
from llmft.core.redaction import redact

HEARTBEAT_S = 30.0


class RedactingFile(io.TextIOWrapper):
    """A text file that masks secrets, also those in tables."""

    def write(self, text: str) -> int:
        super().write(redact(text))
        return len(text)


class Screen:
    """Prints to the terminal and, once a run is open, to its log file."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.terminal = Console(quiet=quiet, highlight=False)
        if not self.terminal.is_terminal:
            self.terminal.width = 110
        self._file: RedactingFile | None = None
        self._log: Console | None = None

    def open_log(self, path: Path) -> None:
        """Appends all further output to `path`."""
        self.close_log()
        self._file = RedactingFile(path.open("ab"), encoding="utf-8")
        self._log = Console(file=self._file, width=100, highlight=False, no_color=True)
        self._log.print(time.strftime("--- %Y-%m-%d %H:%M:%S"))

    def close_log(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._log = None

    def print(self, *things: Any) -> None:
        """Prints strings (rich markup) and rich objects, each on its own line."""
        for thing in map(redact, things):
            self.terminal.print(thing, soft_wrap=isinstance(thing, str))
            if self._log is not None and self._file is not None:
                self._log.print(thing, soft_wrap=isinstance(thing, str))
                self._file.flush()

    def log_error(self, error: BaseException) -> None:
        """Writes the error that ended the run to its log only: a sentence for a UserError, else the traceback."""
        if self._file is None:
            return
        text = str(error) if isinstance(error, UserError) else "".join(traceback.format_exception(error))
        with contextlib.suppress(OSError):  # a full disk is reported elsewhere
            self._file.write(f"{text.rstrip()}\n")
            self._file.flush()

    def warn(self, message: str) -> None:
        self.print(f"[yellow]warning:[/yellow] {escape(message)}")

    def plan(self, facts: Mapping[str, str]) -> None:
        """Prints a short table of what is about to happen."""
        table = Table.grid(padding=(0, 2))
        for name, value in facts.items():
            table.add_row(f"[bold]{name}[/bold]", escape(redact(value)))
        self.print(Panel(table, title="llmft", title_align="left", border_style="cyan", expand=False))

    def samples(self, samples: Sequence[Mapping[str, Any]], count: int, step: int) -> None:
        """Prints generations next to their references."""
        if not samples or count == 0:
            return
        table = Table(title=f"generations after step {step}", title_justify="left", box=box.SIMPLE_HEAD)
        table.add_column("prompt", overflow="ellipsis", no_wrap=True, max_width=60)
        table.add_column("reference", overflow="ellipsis", no_wrap=True, max_width=30)
        table.add_column("generated", overflow="ellipsis", no_wrap=True, max_width=30)
        for sample in map(redact, samples[:count]):  # before texts are cut, which could split a secret
            same = sample["reference"].strip() == sample["generated"].strip()
            prompt, reference, generated = (
                " ".join(sample[name].split()) for name in ("prompt", "reference", "generated")
            )
            colour = "green" if same else "red"
            table.add_row(escape(prompt[-60:]), escape(reference), f"[{colour}]{escape(generated)}[/{colour}]")
        self.print(table)


def text_table(
    head: Sequence[str], rows: Iterable[Sequence[str]], title: str = "", left: Sequence[int] = (0,)
) -> Table:
    """A table of plain text, right-aligned but for the columns `left`; long cells are folded."""
    table = Table(title=escape(title) or None, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(head):
        table.add_column(escape(name), justify="left" if index in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    return table


def duration(seconds: float) -> str:
    """Text such as "4.2 s", "3 min 20 s", "2 h 05 min", "3 h", "1,200 h"."""
    if round(seconds, 1) < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min" + (f" {rest:02} s" if rest else "")
    hours, rest = divmod(round(seconds / 60), 60)
    return f"{hours:,} h" + (f" {rest:02} min" if rest and hours < 100 else "")


class StepProgress:
    """A bar on a terminal; elsewhere a line every 30 s or 5% of the steps, whichever is later."""

    def __init__(self, screen: Screen, total: int, *, enabled: bool = True) -> None:
        self.screen = screen
        self.total = total
        self.enabled = enabled
        self.started = self._printed_at = time.monotonic()
        self.first = self._printed_step = 0
        self._bar: Progress | None = None
        self._task: Any = None

    def start(self, step: int) -> None:
        """Shows the bar at `step`."""
        self.first = self._printed_step = step
        self.started = self._printed_at = time.monotonic()
        if self.enabled and self.screen.terminal.is_terminal:
            steps, time_left = (BarColumn(), MofNCompleteColumn()), (TimeElapsedColumn(), "left", TimeRemainingColumn())
            columns = ("[cyan]training[/cyan]", *steps, "loss {task.fields[loss]}", "{task.fields[speed]} tokens/s")
            self._bar = Progress(*columns, *time_left, console=self.screen.terminal, transient=True)
            self._task = self._bar.add_task("training", total=self.total, completed=step, loss="-", speed="-")
            self._bar.start()

    def update(self, step: int, loss: float, tokens_per_s: float) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=step, loss=f"{loss:.4f}", speed=f"{tokens_per_s:,.0f}")
            return
        now = time.monotonic()
        late = now - self._printed_at >= HEARTBEAT_S or step == self.total
        if self.enabled and late and (step - self._printed_step) * 20 >= self.total:
            self._printed_at, self._printed_step = now, step
            pace = (now - self.started) / max(1, step - self.first)
            left = pace * (self.total - step)
            self.screen.print(
                f"step {step}/{self.total}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {left:.0f} s left"
            )

    def stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
