"""`llmft` and `python -m llmft`: the name of a command and its arguments; without a name, those of a training."""

from __future__ import annotations

import importlib
import sys

from llmft.config.invocation import COMMANDS, arguments_of_process


def main() -> None:
    command, *arguments = arguments_of_process() or [""]
    if command in COMMANDS:
        module = f"llmft.{command}"
    elif command and "=" not in command and command[0] not in "-+~":
        from llmft.core.errors import ConfigError, did_you_mean, report

        sys.exit(report(ConfigError(f"{command}: no such command, and no key=value{did_you_mean(command, COMMANDS)}")))
    else:
        module, arguments = "llmft.train", arguments_of_process()
    importlib.import_module(module).main(arguments)


if __name__ == "__main__":
    main()
