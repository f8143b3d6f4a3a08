"""A conversation in the terminal with one run, or with several that answer side by side."""

from __future__ import annotations

import contextlib
import json
import queue
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.live import Live
from rich.markup import escape
from rich.table import Table

from llmft.config.commands import ChatConfig
from llmft.core.console import Screen
from llmft.core.errors import DataError, did_you_mean
from llmft.core.redaction import redact
from llmft.data.messages import Message
from llmft.runs.records import append_line
from llmft.serving.engine import Engine, Request
from llmft.serving.runs import OpenRun

COMMANDS = {
    "/system": "TEXT sets the system prompt, /system alone removes it; both start a new conversation",
    "/reset": "starts a new conversation",
    "/temperature": "NUMBER: 0 takes the most likely token, 0.7 varies",
    "/seed": "NUMBER: the random seed of the next answers",
    "/save": "FILE.jsonl appends the conversation, in the format of data=messages",
    "/help": "shows this",
    "/exit": "ends; so does Ctrl-D",
}


class Dialogue:
    """The conversation with each run, and the settings of the next answer."""

    def __init__(self, runs: Sequence[OpenRun], config: ChatConfig, screen: Screen) -> None:
        self.runs, self.config, self.screen = list(runs), config, screen
        self.engine = Engine(runs)
        self.temperature, self.seed, self.system = config.temperature, config.seed, config.system
        self.reset()

    def reset(self) -> None:
        """Starts a new conversation."""
        start: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        self.conversations: dict[str, list[Message]] = {run.name: list(start) for run in self.runs}

    def ask(self, text: str, show: Callable[[OpenRun, str], None] = lambda run, piece: None) -> list[Request]:
        """Each run's answer to `text`; `show` gets its pieces as they arrive.

        Raises DataError for a conversation that a run's format cannot render, or that is too long for its model.
        """
        pieces: queue.SimpleQueue[tuple[OpenRun, str | None]] = queue.SimpleQueue()
        requests = [self._request(run, text, pieces) for run in self.runs]
        for request in requests:
            self.engine.submit(request)
        left = len(requests)
        try:
            while left:
                run, piece = pieces.get()
                left -= piece is None
                if piece is not None:
                    show(run, piece)
        except KeyboardInterrupt:
            for request in requests:
                request.cancelled = True
            for request in requests:
                request.done.wait()
        for request in requests:
            if request.error:
                raise DataError(f"{request.run.name}: {request.error}")
            answer = {"role": "assistant", "content": request.text}
            self.conversations[request.run.name] += [{"role": "user", "content": text}, answer]
        return requests

    def _request(self, run: OpenRun, text: str, pieces: Any) -> Request:
        try:
            ids = run.prompt([*self.conversations[run.name], {"role": "user", "content": text}])
            room = run.check_length(ids, self.config.max_new_tokens)
        except ValueError as error:
            raise DataError(f"{run.name}: {error}; /reset starts a new conversation.") from None
        trained = run.predictor.config.data.max_tokens
        if len(ids) > trained:
            self.screen.warn(f"{run.name}: {len(ids):,} tokens, more than the {trained:,} of any row in its training.")
        return Request(
            run,
            ids,
            room,
            temperature=self.temperature,
            top_p=self.config.top_p,
            seed=self.seed,
            listen=lambda piece: pieces.put((run, piece)),
        )

    def save(self, path: Path) -> None:
        """Appends the conversation with each run to a file in the format of data=messages."""
        path.parent.mkdir(parents=True, exist_ok=True)
        for run, turns in self._answered():
            append_line(path, {"messages": turns, "run": run.name})

    def _answered(self) -> list[tuple[OpenRun, list[Message]]]:
        conversations = [(run, self.conversations[run.name]) for run in self.runs]
        return [(run, turns) for run, turns in conversations if any(turn["role"] == "assistant" for turn in turns)]

    def _keep(self) -> None:
        """Appends the transcript to a file in each run's directory."""
        for run, turns in self._answered():
            folder = run.predictor.job.run.directory / "chats"
            folder.mkdir(exist_ok=True)
            append_line(folder / f"{time.strftime('%Y-%m-%d')}.jsonl", {"messages": turns})

    # -------------------------------------------------------------------------------------------------- the terminal

    def talk(self) -> None:
        """Reads lines and answers them until the end of the input."""
        names = ", ".join(run.name for run in self.runs)
        self.screen.print(f"[bold]{escape(names)}[/bold]  [dim]/help lists the commands[/dim]")
        for line in _lines():
            try:
                if line.startswith("/"):
                    if not self._command(line):
                        break
                else:
                    self._answer(line)
            except DataError as error:
                self.screen.warn(str(error))
        self._keep()

    def _command(self, line: str) -> bool:
        """Executes a line that starts with /; returns False at the end of the conversation."""
        word, _, value = line.partition(" ")
        value = value.strip()
        if word in ("/exit", "/quit", "/bye"):
            return False
        if word == "/help":
            for name, what in COMMANDS.items():
                self.screen.print(f"[bold]{name}[/bold] {what}")
        elif word in ("/reset", "/system"):
            self._keep()
            self.system = self.system if word == "/reset" else value or None
            self.reset()
        elif word in ("/temperature", "/seed"):
            try:
                number = float(value) if word == "/temperature" else int(value)
            except ValueError:
                raise DataError(f"{word} {value}: a number is expected.") from None
            if word == "/temperature" and not number >= 0:
                raise DataError(f"{word} {value}: 0 or more.")
            setattr(self, word[1:], number)
        elif word == "/save" and value:
            self.save(Path(value).expanduser())
            self.screen.print(f"[dim]appended to {value}[/dim]")
        else:
            raise DataError(f"{word}: no such command, or it lacks its value{did_you_mean(word, COMMANDS)}")
        return True

    def _answer(self, text: str) -> None:
        if len(self.runs) == 1:
            requests = self.ask(text, lambda run, piece: _write(piece))
            _write("\n")
        else:
            requests = self._side_by_side(text)
        for request in requests:
            speed = len(request.tokens) / max(request.seconds, 1e-9)
            name = f"{request.run.name}  " if len(requests) > 1 else ""
            cut = "; cut at max_new_tokens" if request.finish == "length" else ""
            self.screen.print(
                f"[dim]{escape(name)}{len(request.tokens)} tokens, {speed:.1f} a second, the first after "
                f"{request.first_token_s:.2f} s{cut}[/dim]"
            )

    def _side_by_side(self, text: str) -> list[Request]:
        """Shows a column for each run, updated while they answer."""
        answers = {run.name: "" for run in self.runs}

        def table() -> Table:
            columns = Table(show_lines=False, expand=True)
            for run in self.runs:
                columns.add_column(escape(run.name), ratio=1, overflow="fold")
            columns.add_row(*(escape(redact(answers[run.name])) for run in self.runs))
            return columns

        shown = time.monotonic()
        with Live(table(), console=self.screen.terminal, auto_refresh=False, transient=False) as live:

            def show(run: OpenRun, piece: str) -> None:
                nonlocal shown
                answers[run.name] += piece
                if time.monotonic() - shown > 0.1:
                    shown = time.monotonic()
                    live.update(table(), refresh=True)

            requests = self.ask(text, show)
            live.update(table(), refresh=True)
        return requests


def _write(piece: str) -> None:
    sys.stdout.write(redact(piece))
    sys.stdout.flush()


def _lines() -> Iterator[str]:
    """Lines from the terminal or a pipe; a backslash at the end continues with the next line."""
    prompt = "\n> " if sys.stdin.isatty() else ""
    if prompt:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401 (gives input() a history and an editor)
    waiting = ""
    while True:
        try:
            line = input(prompt if not waiting else ". ")
        except (EOFError, KeyboardInterrupt):
            return
        if line.endswith("\\"):
            waiting += line[:-1] + "\n"
            continue
        line, waiting = (waiting + line).strip(), ""
        if line:
            yield line


def as_json(requests: Sequence[Request]) -> str:
    """Answers as a JSON object, run -> text."""
    return json.dumps({request.run.name: request.text for request in requests}, ensure_ascii=False)
