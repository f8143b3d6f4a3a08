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
    found = [Measured(*point, error="no time left") for point in case.points]
    about: dict[str, Any] = {}
    left = list(range(len(case.points)))
    while left:
        asked = replace(case, points=[case.points[number] for number in left])
        begun, ended, told = _ask(asked, tell, about)
        for place, line in told.items():
            own = found[left[place]]
            measured = line.get("measured")
            found[left[place]] = Measured(**measured) if measured else replace(own, error=line["error"])
        if ended == "done" or ended == "late":
            return found, about
        # Killed: by the kernel, for want of memory. The point under way is the one that did not fit.
        if begun is None or begun in told:
            return [replace(own, error="does not fit") if own.error else own for own in found], about
        found[left[begun]] = replace(found[left[begun]], error="does not fit")
        left = [number for place, number in enumerate(left) if place > begun]
    return found, about


def _ask(
    case: Case, tell: Callable[[str], None], about: dict[str, Any]
) -> tuple[int | None, str, dict[int, dict[str, Any]]]:
    """(point under way, how it ended, answers by point) of one process."""
    told: dict[int, dict[str, Any]] = {}
    begun: int | None = None
    late = threading.Event()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmft.benchmarks.measure"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
        )

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(GRACE * case.seconds + 30, stop)
        timer.start()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(json.dumps(asdict(case)))
            process.stdin.close()
            for text in process.stdout:
                if not text.startswith(MARK):
                    continue
                line = json.loads(text.removeprefix(MARK))
                if line["kind"] == "error":
                    raise ConfigError(line["message"])
                if line["kind"] == "about":
                    about |= {"device": line["device"], "precision": line["precision"]}
                elif line["kind"] == "begun":
                    begun = int(line["number"])
                    tell("{} tokens in, {} out".format(*case.points[begun]))
                else:
                    told[int(line["number"])] = line
            code = process.wait()
        finally:
            timer.cancel()
            if process.poll() is None:
                process.kill()
                process.wait()
        if late.is_set():
            return begun, "late", told
        if code == 0:
            return begun, "done", told
        if code < 0:
            return begun, "killed", told
        errors.seek(0)
        last = [line.strip() for line in errors.read().splitlines() if line.strip()]
        raise RuntimeError(f"the measuring process ended with code {code}: {last[-1] if last else 'it said nothing'}")
