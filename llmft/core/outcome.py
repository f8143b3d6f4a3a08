"""The directories of a command's result, for the process that started it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from llmft.core.files import write_atomically

VARIABLE = "LLMFT_OUTCOME"
"""The file that a command writes its result's directories to."""


def write_outcome(*directories: Path) -> None:
    """Writes result directories to the file named by the environment variable; the last call wins."""
    if name := os.environ.get(VARIABLE):
        write_atomically(Path(name), json.dumps([str(path) for path in directories]).encode())


def read_outcome(file: Path) -> Sequence[Path]:
    """The directories that a command wrote; none if it wrote none."""
    try:
        return [Path(name) for name in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        return []
