"""A run directory as one object, for machines that share no files."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import tarfile
from pathlib import Path

from llmft.core.files import scratch_directory, sync_files

DIGEST_BYTES = hashlib.sha256().digest_size
STATUS = Path("run.json")
REQUESTS = ("SAVE", "STOP")


def pack(directory: Path) -> bytes:
    """The plain files below `directory` as a tar archive, preceded by its sha256.

    Left out are links, hidden files (the lock, half-written files), requests, and files deleted meanwhile, such as
    old checkpoints.
    """
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        for name in _files(directory):
            try:
                content = (directory / name).read_bytes()
            except FileNotFoundError:
                continue
            entry = tarfile.TarInfo(str(name))
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    content = archive.getvalue()
    return hashlib.sha256(content).digest() + content


def unpack(packed: bytes, directory: Path) -> None:
    """Replaces the files below `directory` with those of `pack`; the run can be resumed at any moment.

    All files are verified and on the disk before the first one is replaced. run.json, which marks a run as done, comes
    last; the lock stays.

    Raises OSError for bytes that were changed in transit.
    """
    content = memoryview(packed)[DIGEST_BYTES:]
    if hashlib.sha256(content).digest() != packed[:DIGEST_BYTES]:
        raise OSError(errno.EIO, "the run arrived damaged", str(directory))
    directory.mkdir(parents=True, exist_ok=True)
    with scratch_directory(directory) as staged:
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            tar.extractall(staged, [entry for entry in tar if entry.isfile()], filter="data")
        sync_files(staged)
        arrived = _files(staged)
        for name in arrived:
            if name != STATUS:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(staged / name, directory / name)
        for gone in set(_files(directory)) - {*arrived, STATUS}:
            (directory / gone).unlink()
        if STATUS in arrived:
            os.replace(staged / STATUS, directory / STATUS)


def _files(directory: Path) -> list[Path]:
    """Names of the plain files below `directory` that belong to the run."""
    names = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file() and not path.is_symlink()]
    hidden = {name for name in names if any(part.startswith(".") for part in name.parts)}
    return sorted(name for name in names if name not in hidden and str(name) not in REQUESTS)
