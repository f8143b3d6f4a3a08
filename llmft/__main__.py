"""`llmft` and `python -m llmft`: the name of a command and its arguments; without a name, those of a training."""

from __future__ import annotations

import sys

COMMANDS = (
    *("train", "check", "predict", "evaluate", "folds", "blend", "refit"),
    *("report", "bench", "doctor", "disk", "completion"),
)


def main() -> None:
    """`llmft check …` is `python -m llmft.check …`, also for processes that Lightning starts by it."""
    word = next(iter(sys.argv[1:]), "")
    if word in COMMANDS:
        del sys.argv[1]
        if word != "train":
            import runpy

            runpy.run_module(f"llmft.{word}", run_name="__main__", alter_sys=True)
            return
    elif word and "=" not in word and word[0] not in "-+~":
        from llmft.core.errors import ConfigError, did_you_mean, report

        sys.exit(report(ConfigError(f"{word}: no such command, and no key=value{did_you_mean(word, COMMANDS)}")))
    from llmft.train import main

    main()


if __name__ == "__main__":
    main()
