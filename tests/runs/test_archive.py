"""A run directory as one object."""

from __future__ import annotations

import io
import tarfile
from hashlib import sha256
from pathlib import Path

import pytest

from llmft.runs.archive import pack, unpack


def make(directory: Path, **files: str) -> Path:
    for name, content in files.items():
        path = directory / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return directory


def content(directory: Path) -> dict[str, str]:
    return {str(p.relative_to(directory)): p.read_text() for p in directory.rglob("*") if p.is_file()}


def test_a_run_arrives_whole_over_an_older_state_of_itself(tmp_path: Path) -> None:
    there = make(tmp_path / "there", run_json="", checkpoints__step_2="new", adapter__weights="w")
    (there / "run_json").rename(there / "run.json")
    make(there, **{".lock": "", ".adapter.1.tmp__half": "x", "STOP": ""})
    (there / "latest").symlink_to("/etc/hostname")
    here = make(tmp_path / "here", checkpoints__step_1="old", **{".lock": "held", "SAVE": ""})
    inode = (here / ".lock").stat().st_ino
    unpack(pack(there), here)
    contents = {".lock": "held", "SAVE": ""}
    assert content(here) == {"run.json": "", "checkpoints/step_2": "new", "adapter/weights": "w", **contents}
    assert (here / ".lock").stat().st_ino == inode


def test_bytes_that_changed_on_their_way_change_nothing(tmp_path: Path) -> None:
    here = make(tmp_path / "here", kept="yes")
    packed = bytearray(pack(make(tmp_path / "there", other="x")))
    packed[-2000] ^= 1
    with pytest.raises(OSError, match="arrived damaged"):
        unpack(bytes(packed), here)
    assert content(here) == {"kept": "yes"}


@pytest.mark.parametrize("name", ["../out", "/tmp/out-of-the-run"])
def test_no_file_lands_outside(name: str, tmp_path: Path) -> None:
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = 1
        tar.addfile(entry, io.BytesIO(b"x"))
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc"
        tar.addfile(link)
    packed = sha256(archive.getvalue()).digest() + archive.getvalue()
    (tmp_path / "deep").mkdir()
    if name.startswith("/"):  # below the run, as tar takes it
        unpack(packed, tmp_path / "deep" / "run")
        assert content(tmp_path) == {"deep/run" + name: "x"}
    else:
        with pytest.raises(tarfile.OutsideDestinationError):
            unpack(packed, tmp_path / "deep" / "run")
        assert content(tmp_path) == {}
