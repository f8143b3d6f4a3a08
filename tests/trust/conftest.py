"""What the trust tests share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.helpers import whole_run


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of LONGER from beginning to end."""
    return whole_run(tmp_path_factory.mktemp("whole"))
