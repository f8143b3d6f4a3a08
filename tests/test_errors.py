from __future__ import annotations

import errno

from llmft.errors import DiskError, as_user_error, did_you_mean, nearest


def test_nearest_finds_a_typo_and_nothing_for_nonsense() -> None:
    assert nearest("mistrall", ["mistral", "mixtral", "llama2"]) == "mistral"
    assert nearest("zzz", ["mistral"]) is None


def test_without_a_near_name_all_are_listed() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "; choose from a, b"


def test_a_full_disk_is_named_as_such() -> None:
    told = as_user_error(OSError(errno.ENOSPC, "No space left on device", "run.json"))
    assert isinstance(told, DiskError)
    assert told.exit_code == 74
    assert "run.json" in str(told)
