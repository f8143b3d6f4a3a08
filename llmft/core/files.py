"""Writing that a kill cannot spoil."""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[IO[bytes]]:
    """A file beside `path` to write to; when the block ends well it is flushed to the disk and takes `path`'s place.

    So `path` is old or new, never half, and nothing is left behind when the block fails; what a killed process left
    of the same file is taken away.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(path)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with staged.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, path)
    except OSError as error:
        error.filename = error.filename or str(path)  # a failing write names none
        raise
    finally:
        staged.unlink(missing_ok=True)
    sync_directory(path.parent)


@contextlib.contextmanager
def scratch_directory(path: Path) -> Iterator[Path]:
    """An empty directory beside `path` that is gone when the block ends, and what a killed process left of it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_leftovers(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def staged_directory(path: Path) -> Iterator[Path]:
    """A directory to fill; it takes `path`'s place when the block ends well, else nothing is left of it."""
    with scratch_directory(path) as scratch:
        staged = scratch / path.name
        staged.mkdir()
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                with file.open("rb") as opened:
                    os.fsync(opened.fileno())
        if path.exists():
            os.replace(path, scratch / "old")
        os.replace(staged, path)
    sync_directory(path.parent)


def _drop_leftovers(path: Path) -> None:
    if os.name == "nt":  # os.kill would end the process that it is to look at
        return
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        pid = left.name.removesuffix(".tmp").rpartition(".")[2]
        if not pid.isdigit() or int(pid) in (0, os.getpid()):
            continue
        try:
            os.kill(int(pid), 0)
        except ProcessLookupError:
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
        except (OSError, OverflowError):
            continue  # somebody else's, and alive


def sync_directory(path: Path) -> None:
    """Flushes the names in a directory to the disk; Windows opens no directory, and has no need to."""
    if os.name == "nt":
        return
    directory = os.open(path, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def held(path: Path, busy: Exception, *, timeout_s: float = 0.0) -> Iterator[None]:
    """Takes the lock file `path` for this process; raises `busy` where another one keeps it for `timeout_s`."""
    import filelock

    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=timeout_s)
    except filelock.Timeout:
        raise busy from None
    try:
        yield
    finally:
        lock.release()


def read_plain(path: Path, most: int = 256 * 2**20) -> bytes:
    """The content of a plain file of at most `most` bytes; raises OSError for any other.

    A pipe, socket or device that lies in a file's place is refused and never waited for.
    """
    # A pipe that nobody writes to would keep a plain open waiting.
    flags = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    handle = os.open(path, os.O_RDONLY | flags)
    with open(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise OSError(errno.EFBIG, f"larger than {most:,} bytes, which no such file is; it is not read", str(path))
    return content


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` to `path` by way of `staged_file`."""
    with staged_file(path) as file:
        file.write(content)


def cache_directory() -> Path:
    """llmft's folder in the cache of `datasets`, found by the same environment variables without importing it."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get("HF_DATASETS_CACHE", os.path.join(home, "datasets"))).expanduser() / "llmft"


RECORDS_BYTES = 2**20
"""Left free beside a large file, for the small ones that come with it."""


def check_space(directory: Path, needed: int) -> None:
    """Raises OSError naming both numbers when fewer than `needed` bytes are free on the disk of `directory`.

    So a large file is refused before it fills the disk, and the small ones of the record still find room.
    """
    place = next(p for p in (directory.absolute(), *directory.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < needed + RECORDS_BYTES:
        reason = f"{format_bytes(needed + RECORDS_BYTES)} needed, {format_bytes(free)} free"
        raise OSError(errno.ENOSPC, reason, str(directory))


def format_bytes(n: int) -> str:
    """`n` bytes in the unit that people read: "3.6 GiB"."""
    size = float(n)
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{n} B" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
