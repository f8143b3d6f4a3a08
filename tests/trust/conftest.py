"""Fixtures of the trust tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.helpers import whole_run


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The uninterrupted run of LONGER, with all its checkpoints."""
    return whole_run(tmp_path_factory.mktemp("whole"), "trainer.keep_checkpoints=99")
