"""Atomic writes, locks, and bounded reads."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[IO[bytes]]:
    """A temporary file next to `path`, which it replaces, flushed to the disk, if the block succeeds.

    `path` is never half written, and a failed block leaves nothing behind. Deletes leftovers of killed processes.
    """
    staged = _staging_path(path)
    try:
        with staged.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failed write has no file name
        raise
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory next to `path`, deleted when the block ends; so are leftovers of killed processes."""
    scratch = _staging_path(path)
    shutil.rmtree(scratch, ignore_errors=True)  # of a killed process with the same PID, as in containers
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A directory to fill. Replaces `path` if the block succeeds; deleted otherwise."""
    with scratch_directory(path) as scratch:
        staged = scratch / path.name
        staged.mkdir()
        yield staged
        sync_files(staged)
        if path.exists():
            os.replace(path, scratch / "old")
        os.replace(staged, path)
    sync_directory(path.parent)


def _staging_path(path: Path) -> Path:
    """This process's temporary name next to `path`; deletes what killed processes left under theirs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if is_abandoned(leftover):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_abandoned(path: Path) -> bool:
    """Whether the process that was writing `path`, a `.NAME.PID.tmp`, no longer runs."""
    pid = path.name.removesuffix(".tmp").rpartition(".")[2]
    if os.name == "nt" or not pid.isdigit() or int(pid) in (0, os.getpid()):  # on Windows, os.kill would end it
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        return False  # of another user's process, which is alive
    return False


def sync_files(directory: Path) -> None:
    """Flushes all files below a directory to the disk."""
    for path in directory.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Flushes a directory's entries to the disk; does nothing on Windows, which opens no directories."""
    if os.name == "nt":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def exclusive_lock(path: Path, busy: Exception, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Holds the lock file `path`; raises `busy` if another process holds it for `timeout_s`."""
    import filelock

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(filelock.FileLock(path).acquire(timeout=timeout_s))
        except filelock.Timeout:
            raise busy from None
        yield


def read_plain(path: Path, max_bytes: int = 256 * 2**20) -> bytes:
    """The content of a regular file of at most `max_bytes` bytes.

    Raises OSError for a larger file, and for a pipe, socket or device, without waiting for it.
    """
    # Without O_NONBLOCK, opening a pipe without a writer would wait.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, os.O_RDONLY | flags)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        reason = f"larger than {max_bytes:,} bytes, which is too large for this file; it is not read"
        raise OSError(errno.EFBIG, reason, str(path))
    return content


def sha256_of(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, content: bytes) -> None:
    with staged_file(path) as file:
        file.write(content)


def write_json(path: Path, content: Any) -> None:
    """Plain data as a file that people can read; secrets are masked by the caller."""
    write_atomically(path, json.dumps(content, indent=1, ensure_ascii=False).encode())


def _hugging_face_cache(variable: str, folder: str) -> Path:
    """The directory in the environment `variable`, or `folder` in Hugging Face's home; imports none of its packages."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get(variable, os.path.join(home, folder))).expanduser()


def hub_cache() -> Path:
    """The cache of huggingface_hub."""
    return _hugging_face_cache("HF_HUB_CACHE", "hub")


def cache_directory() -> Path:
    """llmft's folder in the cache of `datasets`."""
    return _hugging_face_cache("HF_DATASETS_CACHE", "datasets") / "llmft"


RECORDS_BYTES = 2**20
"""Space kept free next to a large file, for the small files that come with it."""


def existing_parent(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    return next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())


def check_space(directory: Path, needed: int) -> None:
    """Raises OSError with both numbers when fewer than `needed` bytes are free on the disk of `directory`.

    So a large file does not fill the disk, and small files of the record can still be written.
    """
    free = shutil.disk_usage(existing_parent(directory)).free
    if free < needed + RECORDS_BYTES:
        reason = f"{format_bytes(needed + RECORDS_BYTES)} needed, {format_bytes(free)} free"
        raise OSError(errno.ENOSPC, reason, str(directory))


def format_bytes(n: int) -> str:
    """`n` bytes in a readable unit, such as "3.6 GiB"."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
