"""Seeds of a run's places, each a function of the run's seed alone."""

from __future__ import annotations

import hashlib


def stream(seed: int, *place: int | str) -> int:
    """A seed for one place of a run (step, process, …), as a function of the run's seed and nothing else."""
    digest = hashlib.sha256("/".join(map(str, (seed, *place))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
