"""What stands in the way of a training on this machine, and what to do about it: `python -m llmft.doctor`.

Exit code 0 when nothing does, 2 when something must be mended first.
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
    """Prints a verdict for each part of the machine, and returns them.

    Raises ConfigError when one of them is bad enough to stop a training.
    """
    from llmft.checks.machine import examine, show

    verdicts = examine(config)
    if config.format is OutputFormat.json:
        print(json.dumps([vars(verdict) for verdict in verdicts], indent=1, ensure_ascii=False))
    else:
        show(verdicts)
    bad = [verdict.part for verdict in verdicts if verdict.level == "bad"]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: a training would fail here; see above what to do.")
    return [vars(verdict) for verdict in verdicts]


if __name__ == "__main__":
    main(arguments_of_process())
