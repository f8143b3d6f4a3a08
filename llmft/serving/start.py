"""From run directories to loaded runs: what chat and serve begin with."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from llmft.config.commands import ServeConfig
from llmft.evaluation.jobs import PredictionJob

KEY = "LLMFT_API_KEY"
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def open_all(jobs: Sequence[PredictionJob], config: Any) -> list[Any]:
    """Loads the libraries and the runs; raises ConfigError for runs that cannot be talked to, before weights load."""
    from llmft.core.imports import load_libraries, quiet_warnings

    load_libraries()
    from llmft.serving.runs import check_talks, open_runs

    check_talks(jobs)
    with quiet_warnings():
        return open_runs(jobs, config)


def api_key(config: ServeConfig, screen: Any) -> str | None:
    """The key that requests must have; warns where everybody may ask."""
    key = os.environ.get(KEY)
    if config.host not in LOOPBACK and not key:
        screen.warn(f"host={config.host}: everybody who reaches this machine may ask; set {KEY}.")
    return key
