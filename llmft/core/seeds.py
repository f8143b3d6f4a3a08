"""Seeds for the parts of a run, each a function of the run's seed."""

from __future__ import annotations

import hashlib


def stream(seed: int, *names: int | str) -> int:
    """A seed for one part of a run (a step, a rank, …), which depends only on `seed` and the part's `names`."""
    digest = hashlib.sha256("/".join(map(str, (seed, *names))).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
