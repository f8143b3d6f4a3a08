"""A run directory: its key, file names, lock, status; create, open, list.

A run's directory is named by its config, so the same config always means the same directory and the same numbers.
The key is a hash of everything that can change a run's numbers, and of nothing else.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import filelock

from llmft.config.convert import digest_of, numbers_of, to_plain
from llmft.config.data import TrainOn
from llmft.config.renamed import RENAMED, move
from llmft.config.sections import TrainConfig
from llmft.config.untrusted import check_plain_files, read_json, stored_config
from llmft.core.errors import ConfigError, DataError, DiskError, RunBusy, nearest
from llmft.core.files import existing_parent, read_plain, write_atomically
from llmft.core.redaction import redact
from llmft.runs.predictions import write_table

T = TypeVar("T")
SCHEMA_VERSION = 1
MAX_NAME = 80
"""Longest directory name without the key, in characters."""


def run_key(config: TrainConfig, data_fingerprint: str, model_fingerprint: str) -> str:
    """Ten hex digits of a hash over the config's numbers and the content of data, model and a given adapter.

    The location of files does not count, their content does: a moved data file or model gives the same run.
    """
    # A run keeps its key where a key of the config gets another name.
    numbers = move(numbers_of(config), {new: old for old, new in RENAMED.items()})
    # The fingerprints stand for these.
    for name in ("id", "revision", "path"):
        numbers["model"].pop(name)
    for name in ("source", "hub", "hub_config", "hub_revision", "hub_splits", "rows"):
        numbers["data"].pop(name)
    content = [SCHEMA_VERSION, numbers, data_fingerprint, model_fingerprint]
    if config.lora.adapter is not None:
        numbers["lora"]["adapter"] = adapter_digest(config.lora.adapter)
    return digest_of(content)[:10]


def adapter_directory(path: str) -> Path:
    """The adapter's directory of lora.adapter: a finished run's, or one that PEFT wrote.

    Raises ConfigError where there is none.
    """
    directory = Path(path).expanduser()
    if (directory / "run.json").is_file():
        directory = finished_run(directory)[0].adapter
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (directory / name).is_file():
            raise ConfigError(
                f"lora.adapter={path}: no {name} in {directory}; name a finished run, or PEFT's directory."
            )
    return directory


def adapter_digest(path: str) -> str:
    """sha256 of the weights in `adapter_directory(path)`."""
    return _sha256(adapter_directory(path) / "adapter_model.safetensors")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def slug(text: str) -> str:
    """`text` in lower case with only letters, digits, dot, dash and underscore: safe as a file name anywhere."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-.") or "run"


def run_name(config: TrainConfig) -> str:
    """The readable part of the directory's name: model, data and the values that experiments vary."""
    if config.name:
        return slug(redact(config.name))[:MAX_NAME]
    parts = [config.model.label, config.data.name]
    if config.model.architecture != "tfidf":
        method = f"r{config.lora.r}" if config.lora.enabled else "full"
        parts += [config.quantization.format.value, method, f"lr{config.learning_rate.peak:g}"]
        parts += [config.task.head.value] if config.task.head is not None else []
        parts += [config.task.name] if config.task.feedback is not None else []
    if config.data.train_on is TrainOn.all:
        parts.append("all")
    elif config.data.fold is not None:
        parts.append(f"fold{config.data.fold}")
    return slug("-".join([*parts, f"seed{config.seed}"]))[:MAX_NAME]


class _Inside:
    """A path in a run's directory."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, run: Run, owner: type) -> Path:
        return run.directory / self.name


@dataclass
class Run:
    """One run directory, and the paths of its files."""

    directory: Path
    key: str
    _lock: filelock.BaseFileLock | None = field(default=None, repr=False)

    config_file = _Inside("config.yaml")  # the resolved config
    status_file = _Inside("run.json")  # status, command and result
    environment_file = _Inside("environment.json")  # versions, device, git state, fingerprints
    metrics_file = _Inside("metrics.jsonl")  # all numbers that the config determines, one JSON object per line
    timing_file = _Inside("timing.jsonl")  # speed and memory, which differ from machine to machine
    samples_file = _Inside("samples.jsonl")  # generations beside the references, per validation
    rejected_file = _Inside("rejected.jsonl")  # rows that could not be used, with the reason
    row_losses = _Inside("row_losses")  # the loss of every validation row, one file per validation
    targets_file = _Inside("targets.json")  # the classes in their order, and the scale of a regression
    reference_file = _Inside("reference.parquet")  # what a policy's reference says of every answer
    log_file = _Inside("log.txt")  # the printed output
    save_file = _Inside("SAVE")  # `touch` it, and the run saves a checkpoint at the next step
    stop_file = _Inside("STOP")  # `touch` it, and the run saves at the next step and ends
    checkpoints = _Inside("checkpoints")  # training state to resume from
    adapter = _Inside("adapter")  # the trained adapter, in PEFT's format
    rollouts = _Inside("rollouts")  # the answers that a policy drew of itself, a parquet file per window of updates
    model = _Inside("model")  # the trained model, where all weights were trained

    def row_losses_file(self, split: str, step: int) -> Path:
        return self.row_losses / f"{split}-{step:08d}.parquet"

    def status(self) -> dict[str, Any]:
        """The content of run.json; empty for a run that was never started, or whose file is damaged."""
        try:
            status = json.loads(read_plain(self.status_file))
        except (OSError, ValueError, RecursionError):
            return {}
        return status if isinstance(status, dict) else {}

    def update(self, **values: Any) -> None:
        content = json.dumps(redact({**self.status(), **values}), indent=1, ensure_ascii=False, default=str)
        write_atomically(self.status_file, content.encode())

    def fact(self, group: str, name: str) -> Any:
        """One value of environment.json. Raises ConfigError where it is missing."""
        values = read_json(self.environment_file).get(group)
        if not isinstance(values, dict) or name not in values:
            raise ConfigError(f"{self.environment_file}: damaged, it has no {group}.{name}; train the run again.")
        return values[name]

    def finish(self, result: dict[str, Any]) -> None:
        """Marks the run as done, with its result and the digests of its exported weights."""
        finished = time.strftime("%Y-%m-%d %H:%M:%S")
        self.update(handed_over=self.digests(), status="done", finished=finished, error=None, result=result)

    @property
    def done(self) -> bool:
        """Whether the run finished and its exported weights are unchanged."""
        status = self.status()
        return status.get("status") == "done" and status.get("handed_over") == self.digests()

    def digests(self) -> dict[str, str]:
        files = sorted(p for folder in (self.adapter, self.model) for p in folder.glob("*.safetensors") if p.is_file())
        return {str(path.relative_to(self.directory)): _sha256(path) for path in files}

    def lock(self) -> None:
        """Locks the run for this process until `unlock` or the end of the process.

        Raises RunBusy naming the process that holds the lock.
        """
        lock = filelock.FileLock(self.directory / ".lock")
        try:
            lock.acquire(timeout=1)  # `busy` holds the lock for a moment
        except filelock.Timeout:
            owner = self.status().get("owner", {})
            raise RunBusy(
                f"{self.directory}: process {owner.get('pid', '?')} on {owner.get('host', '?')} is training this run "
                f"(since {owner.get('since', '?')}): wait for it, or change the config."
            ) from None
        except OSError as error:
            raise unwritable(str(self.directory), error) from None
        self._lock = lock
        try:
            self._sign()
        except OSError:
            self.unlock()
            raise

    def _sign(self) -> None:
        """Records this process as the owner of the lock."""
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        self.update(owner={"pid": os.getpid(), "host": socket.gethostname(), "since": since})

    @property
    def busy(self) -> bool:
        """Whether another process is training the run."""
        if not (self.directory / ".lock").exists():
            return False
        lock = filelock.FileLock(self.directory / ".lock")
        try:
            with lock.acquire(timeout=0):
                return False
        except filelock.Timeout:
            return True

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def clear_requests(self) -> None:
        """Takes away what was asked: it is done, or was asked of an earlier process."""
        for path in (self.save_file, self.stop_file):
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Empties the run's directory for `force=true`; the lock and its owner stay."""
        for path in self.directory.iterdir():
            if path.name == ".lock":
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()
        self._sign()

    def keep_until(self, step: int) -> None:
        """Drops records after `step` and of the test split, which will be written again."""
        for path in self.row_losses.glob("*.parquet"):
            split, _, step_of_file = path.stem.rpartition("-")
            if split == "test" or not step_of_file.isdigit() or int(step_of_file) > step:
                path.unlink()
        for path in (self.metrics_file, self.timing_file, self.samples_file):
            if path.is_file():
                lines = path.read_bytes().splitlines(keepends=True)
                write_atomically(path, b"".join(line for line in lines if _is_until(line, step)))


@dataclass
class ForeignRun(Run):
    """A directory with an adapter that PEFT wrote, in the place of a run's; no record says how it was trained.

    Attributes:
        fingerprint: of the base that its config names.
    """

    fingerprint: str = ""

    adapter = _Inside("")

    def fact(self, group: str, name: str) -> Any:
        """The base's fingerprint, which is all that is known."""
        return {("model", "fingerprint"): self.fingerprint}[group, name]


def _is_until(line: bytes, step: int) -> bool:
    try:
        record = json.loads(line)
        tested = record.get("split") == "test" or any(key.startswith("test/") for key in record)
        return record["step"] <= step and not tested
    except (ValueError, KeyError, TypeError, AttributeError):
        return False  # a line that a kill cut off


def existing_run(config: TrainConfig, key: str) -> Run:
    """The run of `key`, whether or not it exists; creates nothing."""
    root = Path(config.output_dir) / "runs"
    existing = sorted(root.glob(f"*-{key}"))
    return Run(existing[0] if existing else root / f"{run_name(config)}-{key}", key)


def free_run(config: TrainConfig, key: str) -> Run:
    """The run of `key`, if its directory exists or can be made; creates nothing.

    Raises ConfigError where something else is in its place, DiskError where nothing can be written.
    """
    run = existing_run(config, key)
    existing_path = existing_parent(run.directory)
    if not existing_path.is_dir():
        raise ConfigError(f"output_dir={config.output_dir}: there is a file in the way; choose another place.")
    names = os.listdir(run.directory) if run.directory.exists() else []
    if "run.json" not in names and any(not name.startswith(".") for name in names):
        raise ConfigError(
            f"{run.directory}: not empty, and not a run of llmft: move it away or set output_dir to another place."
        )
    if not os.access(existing_path, os.W_OK | os.X_OK) and not run.done:  # a finished run needs no writing
        code = errno.EROFS if os.statvfs(existing_path).f_flag & os.ST_RDONLY else errno.EACCES
        raise unwritable(f"output_dir={config.output_dir}", OSError(code, os.strerror(code)))
    return run


def open_run(config: TrainConfig, key: str) -> Run:
    """The run directory of `key` under config.output_dir/runs, created if it is missing.

    A directory that ends in the key is that run, whatever its name.

    Raises ConfigError when the directory holds something that is not a run of llmft.
    """
    run = free_run(config, key)
    try:
        run.directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(f"output_dir={config.output_dir}", error) from None
    check_plain_files(run.directory)
    return run


def unwritable(where: str, error: OSError) -> DiskError:
    return DiskError(f"{where}: {error.strerror}; set output_dir to another place.")


def finished_run(directory: Path) -> tuple[Run, TrainConfig]:
    """A finished run, and the config it was trained with.

    Raises ConfigError where there is no run, it is not finished, or its exported weights have changed.
    """
    run = Run(directory, "")
    if run.status_file.exists():  # else it is any directory, whose files do not matter
        check_plain_files(directory)
    status = run.status()
    if not status:
        raise ConfigError(f"{directory}: not a run directory, since it has no run.json.")
    if status.get("kind"):
        raise ConfigError(f"{directory}: joined {status['kind']}, not a run; name a run directory of outputs/runs.")
    if status.get("status") != "done":
        raise ConfigError(f"{directory}: this run is {status.get('status')}, not done; train it to its end first.")
    if not run.done:
        raise ConfigError(f"{directory}: its weights have changed since it finished; train it again with force=true.")
    if "key" not in status:
        raise ConfigError(f"{run.status_file}: damaged, it has no key; train the run again with force=true.")
    return Run(directory, str(status["key"])), stored_config(run.config_file)


def usable(paths: Any, key: str, open_one: Callable[[Path], T], warn: Callable[[str], None]) -> list[T]:
    """`open_one` of each directory. One that it refuses is left out with a warning if it was named by a glob.

    Raises its ConfigError or DataError for a directory named without a glob, and where no directory is left.
    """
    opened, refused = [], []
    from_globs = {path for name in _listed(paths) if _is_glob(name) for path in directories(name, key)}
    for directory in directories(paths, key):
        try:
            opened.append(open_one(directory))
        except (ConfigError, DataError) as error:
            if directory not in from_globs:
                raise
            refused.append(error)
    if refused and not opened:
        raise refused[0]
    for reason in refused:
        warn(f"left out: {reason}")
    return opened


def _listed(paths: Any) -> list[str]:
    return list(map(str, paths if isinstance(paths, (list, tuple)) else [paths]))


def _is_glob(text: str) -> bool:
    """Whether `text` is a pattern, and not an existing path."""
    return glob.has_magic(text) and not Path(text).expanduser().exists()


def directories(paths: Any, key: str) -> list[Path]:
    """Paths and globs as a list of unique directories. Raises ConfigError for one that is missing."""
    result: list[Path] = []
    for name in _listed(paths):
        path = Path(name).expanduser()
        matches = map(Path, sorted(glob.glob(str(path)))) if _is_glob(name) else [path]
        existing = [match for match in matches if match.is_dir()]
        if not existing:
            similar = nearest(path.name, os.listdir(path.parent) if path.parent.is_dir() else [])
            hint = f"; did you mean {path.parent / similar}?" if similar else "."
            raise ConfigError(f"{key}={name}: no such directory{hint}")
        result += [match for match in existing if match not in result]
    return result


def source_facts(run: Run, config: TrainConfig, rows_fingerprint: str, prior: Sequence[float]) -> dict[str, Any]:
    """The record of a run in its predictions."""
    return {
        "run": str(run.directory),
        "key": run.key,
        "rows_fingerprint": rows_fingerprint,
        "fold": config.data.fold,
        "num_folds": config.data.num_folds if config.data.fold is not None else None,
        "train_on": config.data.train_on.value,
        "prior": list(prior),
    }


def write_config(run: Run, config: TrainConfig) -> None:
    from omegaconf import OmegaConf

    write_atomically(run.config_file, OmegaConf.to_yaml(OmegaConf.create(redact(to_plain(config)))).encode())


def write_row_losses(
    path: Path,
    rows: Sequence[tuple[int, float, float]],
    describe: Callable[[int], str],
    names: Sequence[str] = (),
    outputs: Any = None,
    *,
    groups: Sequence[str | None] = (),
    scores: Mapping[str, Sequence[float]] | None = None,
) -> None:
    """Writes a table of `row` (file:line), `loss_nats` (summed over the row's labelled tokens) and `tokens`.

    `groups` becomes a column `group`, each of `scores` a column score_NAME, and `outputs`, (rows, names), a column for
    each of `names`.
    """
    import numpy as np

    columns: dict[str, Any] = {
        "row": [describe(row) for row, _, _ in rows],
        "loss_nats": np.array([loss for _, loss, _ in rows], np.float64),
        "tokens": np.array([tokens for _, _, tokens in rows], np.int32),
    }
    if outputs is not None:
        columns |= {name: outputs[:, index].astype(np.float64) for index, name in enumerate(names)}
    if any(group is not None for group in groups):
        columns["group"] = [str(group) for group in groups]
    columns |= {f"score_{name}": np.array(values, np.float64) for name, values in (scores or {}).items()}
    write_table(path, columns)


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Appends one JSON line, after completing a line that a kill cut off."""
    with path.open("ab+") as file:
        end = file.seek(0, os.SEEK_END)
        if end:
            file.seek(end - 1)
            if file.read(1) != b"\n":
                file.write(b"\n")
        blank = [key for key, value in record.items() if isinstance(value, float) and not math.isfinite(value)]
        plain = record | dict.fromkeys(blank)
        file.write((json.dumps(redact(plain), ensure_ascii=False) + "\n").encode())
