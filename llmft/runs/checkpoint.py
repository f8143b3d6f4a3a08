"""Atomic, verified checkpoints of the trained weights and the training state, never of the frozen base.

A checkpoint is one safetensors file with the trained tensors and the optimizer's tensors. Its header contains the plain
state (step, best value, …). It is written next to its target, flushed to the disk, and then renamed. A file that is
damaged later does not match its digest: it is renamed `.bad`, and the checkpoint before it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from llmft.core.errors import ConfigError
from llmft.core.files import check_space, read_plain, write_atomically

FORMAT = 1
"""Format version in every checkpoint; a newer one needs a newer llmft."""
_NAME = re.compile(r"step-(\d{8})\.safetensors")


@dataclass
class Checkpoint:
    """`weights` by parameter name, the `optimizer`'s state by parameter name, and plain `state`."""

    step: int
    weights: dict[str, torch.Tensor]
    optimizer: dict[str, dict[str, Any]]
    state: dict[str, Any]


def path_of(directory: Path, step: int) -> Path:
    """The file of the checkpoint after `step` optimizer steps."""
    return directory / f"step-{step:08d}.safetensors"


def save_checkpoint(directory: Path, checkpoint: Checkpoint) -> Path:
    """Writes `checkpoint` and its digest; returns the file. Raises OSError when it cannot be written."""
    tensors = {f"weights/{name}": weight for name, weight in checkpoint.weights.items()}
    plain: dict[str, Any] = {}
    for name, value in _flatten(checkpoint.optimizer):
        if isinstance(value, torch.Tensor):
            tensors[f"optimizer/{name}"] = value
        else:
            plain[name] = value
    header = {"format": FORMAT, "step": checkpoint.step, "state": checkpoint.state, "optimizer": plain}
    content = save(
        {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()},
        metadata={"llmft": json.dumps(header, sort_keys=True)},
    )
    path = path_of(directory, checkpoint.step)
    check_space(directory, len(content))
    digest = hashlib.sha256(content).hexdigest()
    # The digest comes first: a file without a digest counts as damaged, a digest without a file is ignored.
    write_atomically(_digest_path(path), digest.encode())
    write_atomically(path, content)
    return path


def _flatten(entries: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in entries.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _digest_path(path: Path) -> Path:
    return path.with_suffix(".sha256")


def steps_on_disk(directory: Path) -> list[int]:
    """The steps with a checkpoint file, oldest first, damaged ones included."""
    if not directory.is_dir():
        return []
    return sorted(int(match[1]) for path in directory.iterdir() if (match := _NAME.fullmatch(path.name)))


def verify(path: Path) -> str | None:
    """None for an undamaged checkpoint, else what is wrong with it."""
    try:
        expected = read_plain(_digest_path(path), 1024).decode()
        digest = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "no plain file"
    except (OSError, UnicodeDecodeError) as error:
        return str(getattr(error, "strerror", None) or error)
    return None if digest == expected else f"sha256 {digest[:12]}… is not the {expected[:12]}… recorded next to it"


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint that `verify` found undamaged.

    Raises ValueError for another kind of file, ConfigError when a newer llmft wrote it.
    """
    weights: dict[str, torch.Tensor] = {}
    optimizer: dict[str, dict[str, Any]] = {}
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["llmft"])
            for name in file.keys():  # noqa: SIM118 (safe_open is not a dict)
                kind, _, rest = name.partition("/")
                if kind == "weights":
                    weights[rest] = file.get_tensor(name)
                else:
                    _set_nested(optimizer, rest, file.get_tensor(name))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a checkpoint of llmft ({error})") from None
    if header.get("format", 1) > FORMAT:
        raise ConfigError(f"{path}: written by a newer llmft (format {header['format']}): install that, or force=true.")
    for name, value in header["optimizer"].items():
        _set_nested(optimizer, name, value)
    return Checkpoint(header["step"], weights, optimizer, header["state"])


def _set_nested(optimizer: dict[str, dict[str, Any]], name: str, value: Any) -> None:
    parameter, *keys = name.split("/")
    node = optimizer.setdefault(parameter, {})
    for key in keys[:-1]:
        node = node.setdefault(key, {})
    node[keys[-1]] = value


def newest_sound(directory: Path, warn: Any, *, mend: bool = True) -> Checkpoint | None:
    """The newest undamaged checkpoint; with `mend`, damaged ones are renamed `.bad` and reported to `warn`."""
    for leftover in directory.glob(".*.tmp") if mend and directory.is_dir() else ():
        leftover.unlink(missing_ok=True)
    for step in reversed(steps_on_disk(directory)):
        path = path_of(directory, step)
        damage = verify(path)
        if damage is None:
            return load_checkpoint(path)
        if not mend:
            continue
        os.replace(path, path.with_suffix(".bad"))
        older = [other for other in steps_on_disk(directory) if other < step]
        warn(
            f"the checkpoint of step {step} is damaged ({damage}), set aside as {path.stem}.bad; "
            + (f"using step {older[-1]}." if older else "starting again.")
        )
    return None


def prune(directory: Path, keep: int, best: int | None) -> None:
    """Deletes all checkpoints except the newest `keep` and that of step `best`."""
    for step in steps_on_disk(directory)[:-keep]:
        if step != best:
            path_of(directory, step).unlink(missing_ok=True)
            _digest_path(path_of(directory, step)).unlink(missing_ok=True)
