"""Asks a process for one case, and another one for what it could not finish."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from llmft.benchmarks.measure import MARK, Case, Measured
from llmft.core.errors import ConfigError

GRACE = 1.5
"""A process that is not done after so many times its seconds is ended: a single point may take longer than all."""


def run_case(case: Case, tell: Callable[[str], None]) -> tuple[list[Measured], dict[str, Any]]:
    """Each point of `case` in its order, and what the process said of itself (device, precision).

    `tell` hears what is under way. Raises ConfigError for what the process cannot use.
    """
    results = [Measured(*point, error="no time left") for point in case.points]
    about: dict[str, Any] = {}
    remaining = list(range(len(case.points)))
    while remaining:
        current, ended, answers = _ask(replace(case, points=[case.points[number] for number in remaining]), tell, about)
        for index, line in answers.items():
            result = results[remaining[index]]
            measured = line.get("measured")
            results[remaining[index]] = Measured(**measured) if measured else replace(result, error=line["error"])
        if ended != "killed":
            break
        # By the kernel, for want of memory. The point under way is the one that did not fit.
        if current is None or current in answers:
            return [replace(result, error="does not fit") if result.error else result for result in results], about
        results[remaining[current]] = replace(results[remaining[current]], error="does not fit")
        remaining = remaining[current + 1 :]
    return results, about


def _ask(
    case: Case, tell: Callable[[str], None], about: dict[str, Any]
) -> tuple[int | None, str, dict[int, dict[str, Any]]]:
    """(point under way, how it ended, answers by point) of one process."""
    answers: dict[int, dict[str, Any]] = {}
    current: int | None = None
    late = threading.Event()
    command = [sys.executable, "-m", "llmft.benchmarks.measure"]
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(command, stderr=errors, text=True, env=environment, **pipes) as process,
    ):
        assert process.stdin is not None
        assert process.stdout is not None

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(GRACE * case.seconds + 30, stop)
        timer.start()
        try:
            process.stdin.write(json.dumps(asdict(case)))
            process.stdin.close()
            for text in process.stdout:
                line: dict[str, Any] = json.loads(text.removeprefix(MARK)) if text.startswith(MARK) else {"kind": None}
                if line["kind"] == "error":
                    raise ConfigError(line["message"])
                if line["kind"] == "about":
                    about |= {"device": line["device"], "precision": line["precision"]}
                elif line["kind"] == "begun":
                    current = int(line["number"])
                    tell("{} tokens in, {} out".format(*case.points[current]))
                elif line["kind"] == "point":
                    answers[int(line["number"])] = line
            code = process.wait()
        finally:
            timer.cancel()
            process.kill()
        if late.is_set() or code <= 0:
            return current, "late" if late.is_set() else "killed" if code else "done", answers
        errors.seek(0)
        last = [line.strip() for line in errors.read().splitlines() if line.strip()]
        raise RuntimeError(f"the measuring process ended with code {code}: {last[-1] if last else 'it said nothing'}")
