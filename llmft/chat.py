"""run -> a conversation in the terminal: `python -m llmft.chat run=DIR`, or with several runs side by side.

`message="…"` asks once and prints only the answer, for scripts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmft.config.commands import ChatConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import Invocation, arguments_of_process, split_off, with_lists


def main(argv: Sequence[str]) -> None:
    # A message may contain any character, so it is not parsed by Hydra.
    messages, argv = split_off(with_lists(argv), "message=")
    systems, argv = split_off(argv, "system=")

    def job(config: ChatConfig, invocation: Invocation) -> None:
        texts: dict[str, Any] = {
            key: values[-1] for key, values in (("message", messages), ("system", systems)) if values
        }
        chat(replace(config, **texts))

    run_verb("chat", ChatConfig, job, argv)


def chat(config: ChatConfig, *, quiet: bool = False) -> dict[str, str] | None:
    """Runs a dialogue with the runs in `config` until the input ends; with `message` prints and returns the answers.

    Raises ConfigError for runs that generate no text, DataError for a message that is too long.
    """
    from llmft.core.console import Screen
    from llmft.core.imports import load_libraries
    from llmft.export.targets import opened
    from llmft.runs.directory import open_directories

    screen = Screen(quiet=quiet or config.message is not None)
    jobs = open_directories(config.run, "run", opened, screen.warn)
    screen.print("[dim]loading …[/dim]")
    load_libraries()
    from llmft.serving.dialogue import Dialogue, as_json
    from llmft.serving.runs import open_runs

    dialogue = Dialogue(open_runs(jobs, config), config, screen)
    try:
        if config.message is None:
            dialogue.talk()
            return None
        requests = dialogue.ask(config.message)
        if not quiet:
            print(requests[0].text if len(requests) == 1 else as_json(requests))
        return {request.run.name: request.text for request in requests}
    finally:
        if config.save is not None:
            dialogue.save(Path(config.save).expanduser())
        dialogue.engine.close()


if __name__ == "__main__":
    main(arguments_of_process())
