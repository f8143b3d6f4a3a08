"""run -> the Hub: `python -m llmft.push run=DIR repo=NAME/MODEL` shows what would be sent; send=true sends it."""

from __future__ import annotations

from collections.abc import Sequence

from llmft.config.commands import PushConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process


def main(argv: Sequence[str]) -> None:
    run_verb("push", PushConfig, lambda config, _: push(config), argv)


def push(config: PushConfig) -> None:
    """Shows the files and the model card for the Hub, and sends them with `send`.

    Raises ConfigError if the requested export does not exist, or the Hub cannot be reached or refuses.
    """
    from llmft.core.console import Screen
    from llmft.export.hub import plan, send

    screen = Screen()
    with plan(config) as folder:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                screen.print(f"  {path.stat().st_size:>14,} bytes  {path.relative_to(folder)}")
        screen.print("", (folder / "README.md").read_text(encoding="utf-8").replace("[", "\\["))
        if not config.send:
            kind = "private" if config.private else "PUBLIC"
            screen.print(f"[bold]nothing was sent[/bold]; send=true sends it to {config.repo} ({kind})")
            return
        screen.print(f"[bold]sent[/bold]  {send(config, folder)}")


if __name__ == "__main__":
    main(arguments_of_process())
