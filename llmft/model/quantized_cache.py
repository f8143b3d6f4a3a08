"""Quantised bases on the disk, next to the tokenised rows: the next process reads a quarter and quantises nothing.

An entry is a model directory as transformers saves it, with `entry.json`, which has a checksum of every file. It is
written atomically and never changes. Write failures are warnings; damaged entries are rebuilt. On a CPU safetensors
maps the files, so that processes with the same base share its memory.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft.core.files import cache_directory, check_space, exclusive_lock, format_bytes, scratch_directory

CACHE_VERSION = 5
FACTS = "entry.json"
LEAST_WEIGHTS = 10_000_000
"""Quantised weights below which nothing is cached: a CPU quantises this many in a fraction of a second."""


class Busy(Exception):
    """Another process is writing."""


def bases_directory() -> Path:
    return cache_directory() / "bases"


def entries() -> list[tuple[Path, dict[str, Any]]]:
    """(directory, record) of all entries, the least recently used first; those of former versions too."""
    used: list[tuple[float, Path, dict[str, Any]]] = []
    for path in bases_directory().glob("[!.]*/"):
        try:
            used.append(((path / FACTS).stat().st_mtime, path, dict(json.loads((path / FACTS).read_text()))))
        except (OSError, ValueError, TypeError):  # another process's, being deleted; or damaged
            used.append((0.0, path, {}))
    return [(path, facts) for _, path, facts in sorted(used, key=lambda entry: entry[:2])]


@dataclass(frozen=True)
class QuantizedCache:
    """The cache entry of one base.

    Args:
        identity: all that the quantised weights depend on, as text.
        label: the model's name for users.
        limit_bytes: of all entries together.
        warn: called with a sentence if something was not cached or is rebuilt.
    """

    identity: str
    label: str
    limit_bytes: int
    warn: Callable[[str], None] = print

    @property
    def directory(self) -> Path:
        """The entry's directory, which may not exist."""
        digest = hashlib.sha256(f"{CACHE_VERSION}:{self.identity}".encode()).hexdigest()
        return bases_directory() / digest[:24]

    def find(self) -> Path | None:
        """The entry's directory after checking its files' checksums; None if it is missing, or was damaged."""
        if not self.directory.is_dir():
            return None
        try:
            checksums = json.loads((self.directory / FACTS).read_text())["checksums"]
            damaged = [name for name, checksum in checksums.items() if _checksum(self.directory / name) != checksum]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            damaged = [f"{FACTS}: {error}"]
        if damaged:
            self.drop(damaged[0])
            return None
        with contextlib.suppress(OSError):  # of another user
            now = time.time_ns()  # a file system's own clock ticks some milliseconds apart
            os.utime(self.directory / FACTS, ns=(now, now))
        return self.directory

    def alone(self) -> contextlib.AbstractContextManager[None]:
        """Holds the entry's lock; other processes wait."""
        bases_directory().mkdir(parents=True, exist_ok=True)
        return exclusive_lock(self.directory.with_name(f".{self.directory.name}.lock"), Busy(), timeout_s=-1)

    def drop(self, why: str) -> None:
        self.warn(f"the cached base {self.directory} is damaged ({why}); it is quantised again.")
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, base: Any, left_out: Collection[str]) -> None:
        """Writes the entry of a quantised model without the weights `left_out`; evicts the least recently used entries.

        Nothing is written while another process writes. A disk that is full or read-only costs a warning.
        """
        from safetensors import SafetensorError

        tensors = {name: tensor for name, tensor in base.state_dict().items() if name not in left_out}
        size = sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors.values()}.values())
        folder = bases_directory()
        if size > self.limit_bytes:
            taken = format_bytes(size)
            self.warn(f"the quantised base takes {taken}, more than quantization.cache_gib allows: it is not cached.")
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with exclusive_lock(folder / ".lock", Busy()):
                if not self.directory.exists():
                    self._make_room(size)
                    check_space(folder, size)
                    self._write(base, tensors)
        except Busy:
            return
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            self.warn(f"the quantised base could not be cached in {folder} ({reason}).")

    def _make_room(self, size: int) -> None:
        for left in bases_directory().glob(".*.tmp"):  # of a process that was killed, since we hold the lock
            shutil.rmtree(left)
        sizes = {path: sum(file.stat().st_size for file in path.iterdir()) for path, _ in entries()}
        for path in list(sizes):
            if sum(sizes.values()) + size > self.limit_bytes:
                shutil.rmtree(path)
                del sizes[path]

    def _write(self, base: Any, tensors: dict[str, Any]) -> None:
        from huggingface_hub import save_torch_state_dict

        with scratch_directory(self.directory) as staged:
            # `save_pretrained` ignores its `state_dict` for a quantised model, and would save a new random head too.
            save_torch_state_dict(tensors, staged, shared_tensors_to_discard=list(base.all_tied_weights_keys))
            base.config.save_pretrained(staged)
            if base.can_generate():
                base.generation_config.save_pretrained(staged)
            checksums = {file.name: _checksum(file) for file in sorted(staged.iterdir())}
            record = {"label": self.label, "identity": self.identity, "checksums": checksums}
            (staged / FACTS).write_text(json.dumps(record, indent=1))
            os.replace(staged, self.directory)


def _checksum(path: Path) -> str:
    """Detects accidents, not attacks: xxHash runs at memory speed, where SHA-256 would take most of the time."""
    import xxhash

    with path.open("rb") as file:
        return str(hashlib.file_digest(file, xxhash.xxh3_128).hexdigest())
