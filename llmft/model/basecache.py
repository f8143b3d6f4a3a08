"""Quantised bases on the disk, beside the tokenised rows: a second process quantises nothing and reads a quarter.

An entry is a directory: `weights.safetensors` with the packed weights and their scales, and `entry.json` with checksums
of all of them. It appears whole or not at all, never changes, and only ever saves time: what cannot be written is left
out, what is damaged is made again. A CPU computes with the file itself, mapped from a local disk of Linux: nothing is
copied, and processes with the same base share its memory. Elsewhere it is read. An entry that leaves for another one,
or is cleared, takes its room on the disk until the last process that computes with it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import mmap
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmft.core.files import check_space, format_bytes, held, mappable, sync_directory, write_atomically
from llmft.data.examples import cache_directory

if TYPE_CHECKING:
    import torch

    from llmft.model.experts import Slice

CACHE_VERSION = 4
WEIGHTS, FACTS = "weights.safetensors", "entry.json"
LEAST_WEIGHTS = 10_000_000
"""Quantised weights below which nothing is cached: a CPU quantises so many in a fraction of a second."""
ALIGNED_BYTES = 64
"""Where a tensor of a file has to begin to be used in its place: as torch's own do, since sums may depend on it."""
GROUP_BYTES = 2**22
"""Of tensors behind each other from which on they have a checksum of their own, which a thread of its own checks."""


class Damaged(Exception):
    """An entry that cannot be used; the message says why."""


class Busy(Exception):
    """Another process is writing."""


def bases_directory() -> Path:
    """Where quantised bases are kept."""
    return cache_directory() / "bases"


def entries() -> list[tuple[Path, dict[str, Any]]]:
    """(directory, facts) of all entries, the one that was not used for longest first."""
    folder = bases_directory()
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        try:
            used = (path / FACTS).stat().st_mtime
            facts = json.loads((path / FACTS).read_text())
        except (OSError, ValueError):  # another process's, being written or deleted; or damaged
            used, facts = 0.0, {}
        if path.is_dir() and not path.name.startswith("."):
            found.append((used, path, facts if isinstance(facts, dict) else {}))
    return [(path, facts) for _, path, facts in sorted(found, key=lambda entry: (entry[0], entry[1]))]


@dataclass(frozen=True)
class BaseCache:
    """One base's place in the cache.

    Args:
        identity: all that the quantised weights depend on, as text.
        label: what people call it.
        limit_bytes: of all entries together.
        warn: told, in a sentence, why something was not cached or is made again.
    """

    identity: str
    label: str
    limit_bytes: int
    warn: Callable[[str], None] = print

    @property
    def directory(self) -> Path:
        """The entry, which may not be there."""
        digest = hashlib.sha256(f"{CACHE_VERSION}:{self.identity}".encode()).hexdigest()
        return bases_directory() / digest[:24]

    def found(self) -> bool:
        """Whether there is an entry."""
        return (self.directory / FACTS).is_file()

    def read(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors by name, on `device`; raises Damaged for what is not what was written."""
        from llmft.core.machine import usable_cores
        from llmft.model.experts import slices_of

        file = self.directory / WEIGHTS
        try:
            digests = json.loads((self.directory / FACTS).read_text())["checksums"]
            slices = slices_of(file)
            groups = _groups(slices, digests)
        except Damaged:
            raise
        except Exception as error:  # whatever a library says of a broken file
            raise Damaged(str(error).splitlines()[0] if str(error) else type(error).__name__) from None

        with contextlib.suppress(OSError):  # somebody else's
            os.utime(self.directory / FACTS)
        whole = _mapped(file) if device.type == "cpu" and mappable(file) else None

        def read(names: list[str]) -> list[tuple[str, torch.Tensor]]:
            own = [slices[name] for name in names]
            try:
                tensors, digest = _read(own) if whole is None else _taken(whole, own)
            except (OSError, ValueError) as error:
                raise Damaged(str(error)) from None
            if digest != digests[names[0]]:
                raise Damaged(f"{names[0]} or what follows it differs from what was written")
            return [(name, tensor.to(device)) for name, tensor in zip(names, tensors, strict=True)]

        with ThreadPoolExecutor(min(8, usable_cores())) as pool:
            for found in pool.map(read, groups):
                yield from found

    def skipped(self) -> list[str]:
        """Modules of the base that are not quantised, which to find out takes a model without weights."""
        found = self.facts().get("skipped")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise Damaged("what is not quantised in it is not told")
        return found

    def facts(self) -> dict[str, Any]:
        """What is known of the entry; nothing where there is none, or a damaged one."""
        try:
            found = json.loads((self.directory / FACTS).read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def note(self, **facts: Any) -> None:
        """Adds to what is known of an entry, if there is one; what cannot be written is found out again."""
        known = self.facts()
        if known and any(known.get(name) != value for name, value in facts.items()):
            with contextlib.suppress(OSError):
                write_atomically(self.directory / FACTS, json.dumps(known | facts, indent=1).encode())

    def drop(self, why: str) -> None:
        """Deletes a damaged entry and says so."""
        self.warn(f"the cached base {self.directory} is damaged ({why}); it is quantised again.")
        shutil.rmtree(self.directory, ignore_errors=True)

    def write(self, tensors: dict[str, torch.Tensor], skipped: list[str]) -> None:
        """Makes the entry, and room for it: the least recently used ones leave.

        Nothing is written while another process writes. A disk that is full or read-only is told, and no more.
        """
        size = sum(tensor.nbytes for tensor in tensors.values())
        folder = bases_directory()
        if size > self.limit_bytes:
            self.warn(
                f"the quantised base takes {format_bytes(size)}, more than quantization.cache_gib allows: "
                "it is not cached."
            )
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with held(folder / ".lock", Busy()):
                if self.found():
                    return
                self._make_room(size)
                check_space(folder, size)
                self._write(tensors, skipped)
        except Busy:
            return
        except OSError as error:
            self.warn(f"the quantised base could not be cached in {folder} ({error.strerror or error}).")

    def _make_room(self, size: int) -> None:
        for left in bases_directory().glob(".*.tmp"):  # of a process that was killed, since we hold the lock
            shutil.rmtree(left)
        there = [(path, sum(file.stat().st_size for file in path.iterdir())) for path, _ in entries()]
        total = sum(taken for _, taken in there)
        for path, taken in there:
            if total + size <= self.limit_bytes:
                return
            shutil.rmtree(path)
            total -= taken

    def _write(self, tensors: dict[str, torch.Tensor], skipped: list[str]) -> None:
        staged = self.directory.with_name(f".{self.directory.name}.{os.getpid()}.tmp")
        try:
            staged.mkdir()
            digests = _write_tensors(staged / WEIGHTS, tensors)
            facts = {"label": self.label, "identity": self.identity, "skipped": skipped, "checksums": digests}
            with (staged / FACTS).open("w") as file:
                json.dump(facts, file, indent=1)
                file.flush()
                os.fsync(file.fileno())
            shutil.rmtree(self.directory, ignore_errors=True)
            os.replace(staged, self.directory)
            sync_directory(self.directory.parent)
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def _groups(slices: dict[str, Slice], digests: dict[str, str]) -> list[list[str]]:
    """Names of the tensors that have a checksum in common: those from one in `digests` on, as they lie in the file."""
    groups: list[list[str]] = []
    for name in sorted(slices, key=lambda name: slices[name].place):
        if name in digests or not groups:
            groups.append([])
        groups[-1].append(name)
    if {names[0] for names in groups} != digests.keys():
        raise Damaged("its parts are of different bases")
    return groups


def _read(slices: list[Slice]) -> tuple[list[torch.Tensor], str]:
    """Tensors that lie behind each other, and their checksum."""
    tensors, digest = [], _digest()
    for own in slices:
        tensors.append(own[...])
        digest.update(_bytes(tensors[-1]))
    return tensors, digest.hexdigest()


def _mapped(path: Path) -> mmap.mmap | None:
    """A file's bytes, of which what is written to them stays the process's own; None where memory cannot be mapped."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError):
        return None


def _taken(whole: mmap.mmap, slices: list[Slice]) -> tuple[list[torch.Tensor], str]:
    """`_read` from the file's bytes: tensors that can be used in their place are not copied.

    Each has a storage of its own, since whoever copies a tensor copies its storage.
    """
    import torch

    tensors = []
    for own in slices:
        if own.count == 0:
            tensors.append(own[...])
            continue
        tensor = torch.frombuffer(whole, dtype=own.dtype, count=own.count, offset=own.place).view(own.shape)
        tensors.append(tensor if own.place % ALIGNED_BYTES == 0 else tensor.clone())
    digest = _digest()
    digest.update(memoryview(whole)[slices[0].place : slices[-1].place + slices[-1].nbytes])
    return tensors, digest.hexdigest()


def _write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    """Writes a safetensors file tensor by tensor, so that a GPU's base is never whole in the host's memory.

    Those that can be used in their place come first: the format leaves no room between tensors.
    """
    from llmft.model.experts import DTYPES

    names = {dtype: name for name, dtype in DTYPES.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: item[1].nbytes % ALIGNED_BYTES != 0))
    header: dict[str, Any] = {}
    place = 0
    for name, tensor in tensors.items():
        offsets = [place, place := place + tensor.nbytes]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNED_BYTES)
    digests: dict[str, Any] = {}
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        taken = GROUP_BYTES
        for name, tensor in tensors.items():
            if taken >= GROUP_BYTES:
                digest = digests[name] = _digest()
                taken = 0
            here = _bytes(tensor.detach().cpu().contiguous())
            digest.update(here)
            file.write(here)
            taken += tensor.nbytes
        # What others may not write to may be mapped; whether they may read it is the user's mask to say.
        os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o755)
        file.flush()
        os.fsync(file.fileno())
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _digest() -> Any:
    """Of accidents, not of attacks: at the memory's own speed, where SHA-256 would take most of the time."""
    import xxhash

    return xxhash.xxh3_128()
