"""config -> report before training: `python -m llmft.check <the arguments of training>`, without loading weights.

Shows the first rows as they would be trained, problems of the data, the effect of length limits, whether memory and
disk suffice, and estimates for other cards (`hours=9`: is that enough?). `format=json` prints the same as JSON.
Exit code 2 or 4 if training would not start.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from llmft.config.commands import OutputFormat
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import Invocation, arguments_of_process, split_off
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError, did_you_mean


def main(argv: Sequence[str]) -> None:
    # `format=` and `hours=` belong to this command; all other arguments are those of training.
    forms, argv = split_off(argv, "format=")
    bounds, argv = split_off(argv, "hours=")

    def job(config: TrainConfig, invocation: Invocation) -> None:
        try:
            hours = float(bounds[-1]) if bounds else None
        except ValueError:
            raise ConfigError(f"hours={bounds[-1]}: not a number.") from None
        check(config, forms[-1] if forms else OutputFormat.text, hours)

    run_verb("check", TrainConfig, job, argv)


def check(config: TrainConfig, form: str = OutputFormat.text, hours: float | None = None) -> dict[str, Any]:
    """Prints the report on `config` and returns it; `hours` is the time available for the training.

    Raises ConfigError or DataError for the first error that would stop training.
    """
    if form not in [*OutputFormat]:
        raise ConfigError(f"format={form}: no such format{did_you_mean(form, OutputFormat)}")
    if config.model.architecture == "tfidf":
        raise ConfigError("model=tfidf reads words and has no tokens, templates or limits to check.")
    from llmft.core.imports import load_libraries, quiet_warnings
    from llmft.training.prepare import prepare

    prepared = prepare(config, open_directory=False)
    load_libraries()
    from llmft.checks.page import show
    from llmft.checks.preflight import examine, warn
    from llmft.data.quality import stop_on_errors
    from llmft.training.readiness import check_room

    with quiet_warnings():
        report, findings = examine(prepared)
    if form == OutputFormat.json:
        print(json.dumps(report, indent=1, ensure_ascii=False))
    else:
        show(report, hours)
    stop_on_errors(findings)
    memory = report["needs"]["memory"]
    check_room(config, prepared.run.directory, memory["adapter"], memory["optimizer"], warn)
    return report


if __name__ == "__main__":
    main(arguments_of_process())
