from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llmft.core.errors import DiskError, as_user_error, did_you_mean, nearest, report


def test_nearest_finds_a_typo_and_nothing_for_nonsense() -> None:
    assert nearest("mistrall", ["mistral", "mixtral", "llama2"]) == "mistral"
    assert nearest("zzz", ["mistral"]) is None


def test_without_a_near_name_all_are_listed() -> None:
    assert did_you_mean("zzz", ["b", "a"]) == "; choose from a, b"


def test_a_full_disk_is_named_as_such() -> None:
    error = as_user_error(OSError(errno.ENOSPC, "No space left on device", "run.json"))
    assert isinstance(error, DiskError)
    assert error.exit_code == 74
    assert "run.json" in str(error)


def test_a_file_in_the_way_of_what_is_written_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").touch()
    with pytest.raises(NotADirectoryError) as caught:
        (tmp_path / "x" / "y").mkdir()
    assert report(caught.value) == 74
    assert capsys.readouterr().err.startswith(f"llmft: {tmp_path}/x/y: Not a directory; move what is in the way")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_command_whose_reader_has_gone_ends_silently(unbuffered: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "llmft", "merge", "--cfg", "job", "run=DIR"]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, env=environment)
    os.close(writer)
    assert (result.returncode, result.stderr) == (141, b"")
