"""From run directories to loaded runs: what chat and serve begin with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llmft.evaluation.jobs import PredictionJob


def open_all(jobs: Sequence[PredictionJob], config: Any) -> list[Any]:
    """Loads the libraries and the runs; raises ConfigError for runs that cannot be talked to, before weights load."""
    from llmft.core.imports import load_libraries, quiet_warnings

    load_libraries()
    from llmft.serving.runs import check_talks, open_runs

    check_talks(jobs)
    with quiet_warnings():
        return open_runs(jobs, config)
