"""Checks whether this machine can train, and how to fix it if not: `python -m llmft.doctor`.

Exit code 0 if it can, 2 if something must be fixed first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from llmft.config.commands import DoctorConfig, OutputFormat
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process
from llmft.core.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    run_verb("doctor", DoctorConfig, lambda config, _: doctor(config), argv)


def doctor(config: DoctorConfig) -> list[dict[str, str]]:
    """Prints a result for each part of the machine, and returns them.

    Raises ConfigError if one of them would stop a training.
    """
    from llmft.checks.machine import examine, show

    results = examine(config)
    if config.format is OutputFormat.json:
        print(json.dumps([vars(result) for result in results], indent=1, ensure_ascii=False))
    else:
        show(results)
    bad = [result.part for result in results if result.level == "bad"]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: a training would fail here; see the fixes above.")
    return [vars(result) for result in results]


if __name__ == "__main__":
    main(arguments_of_process())
