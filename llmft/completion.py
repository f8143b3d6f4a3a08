"""Tab completion of commands, groups' options and keys: `llmft completion bash`, or zsh, prints a script.

In ~/.bashrc: eval "$(python -m llmft completion bash)". It completes `llmft …` and `python -m llmft …`. The script
calls this module for each word: `query LINE` prints the possible last words of a command line, one per line.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from llmft.config.invocation import COMMANDS, arguments_of_process
from llmft.core.errors import ConfigError, did_you_mean, exit_with

SHELLS = ("bash", "zsh")


def main(argv: Sequence[str]) -> None:
    exit_with(lambda: complete(argv))


def complete(arguments: Sequence[str]) -> None:
    """Prints a shell's script, or the candidates for a line; raises ConfigError for anything else."""
    shell = next(iter(arguments), "")
    if shell == "query" and len(arguments) == 2:
        print("\n".join(candidates(arguments[1])))
    elif shell in SHELLS and len(arguments) == 1:
        print(script(shell))
    elif shell in ("-h", "--help"):
        print(__doc__)
    else:
        hint = did_you_mean(shell, SHELLS) if shell else ""
        raise ConfigError(f"completion: write `llmft completion bash` or `llmft completion zsh`{hint}")


def script(shell: str) -> str:
    """The script for `shell`, which calls the current Python interpreter."""
    path = Path(__file__).parent / "assets" / "completion" / f"llmft.{shell}"
    return path.read_text().replace("PYTHON", shlex.quote(sys.executable))


def candidates(line: str) -> list[str]:
    """Possible completions of the last word of a command line."""
    match = re.search(r"(?:^|[\s/])llmft(?:\.(\w+))?\s+(.*)$", line, re.S)
    if match is None:
        return []
    *words, last = re.split(r"\s+", f"{match[1] or ''} {match[2]}".lstrip())
    options = list(COMMANDS) if not words and match[1] is None else []
    command = words.pop(0) if words and words[0] in COMMANDS else "train"
    if command == "completion":
        options = list(SHELLS)
    elif last.startswith("-"):
        from hydra._internal.utils import get_args_parser

        options = [name for name in get_args_parser()._option_string_actions if name.startswith("--")]
    else:
        options += _overrides("train" if command == "check" else command, words, last)
    return [option for option in options if option.startswith(last) and not re.search(r"\s", option)]


def _overrides(command: str, words: Sequence[str], last: str) -> list[str]:
    """Keys and options of groups, as Hydra completes them after `words`."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra
    from hydra.plugins.completion_plugin import DefaultCompletionPlugin

    from llmft.config.commands import schema_of
    from llmft.config.hydra_app import make_known
    from llmft.config.overrides import config_directory

    make_known(command, schema_of(command))
    valid = [word for word in words if re.fullmatch(r"-m|--multirun|[+~]*[\w./]+=[\w./,-]*", word)]
    for other in (valid, []):  # an invalid word should not prevent completion
        try:
            with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
                plugin = DefaultCompletionPlugin(GlobalHydra.instance().config_loader())
                if options := plugin._query(config_name=command, line=" ".join([*other, last])):
                    return options
        except Exception:  # errors of the line are reported when it is run
            continue
    return []


if __name__ == "__main__":
    main(arguments_of_process())
