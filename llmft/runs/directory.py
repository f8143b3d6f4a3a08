"""A run directory: file names, lock, status; create, open, list.

A run's directory is named by its config, so the same config always means the same directory and the same numbers.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import shutil
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import filelock

from llmft.config.convert import to_plain
from llmft.config.sections import TrainConfig
from llmft.config.untrusted import check_plain_files, read_json, stored_config
from llmft.core.errors import ConfigError, DataError, DiskError, RunBusy, nearest
from llmft.core.files import existing_parent, read_plain, sha256_of, write_atomically
from llmft.core.redaction import redact
from llmft.runs.naming import run_name

T = TypeVar("T")


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
    samples_file = _Inside("samples.jsonl")  # generations next to the references, per validation
    rejected_file = _Inside("rejected.jsonl")  # rows that could not be used, with the reason
    row_losses = _Inside("row_losses")  # the loss of every validation row, one file per validation
    targets_file = _Inside("targets.json")  # the classes in their order, and the scale of a regression
    reference_file = _Inside("reference.parquet")  # the reference's log-probability of every answer
    log_file = _Inside("log.txt")  # the printed output
    save_file = _Inside("SAVE")  # `touch` it, and the run saves a checkpoint at the next step
    stop_file = _Inside("STOP")  # `touch` it, and the run saves at the next step and ends
    checkpoints = _Inside("checkpoints")  # training state to resume from
    adapter = _Inside("adapter")  # the trained adapter, in PEFT's format
    rollouts = _Inside("rollouts")  # the answers that the policy sampled, a parquet file per window of updates
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

    def recorded(self, group: str, name: str) -> Any:
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
        return {str(path.relative_to(self.directory)): sha256_of(path) for path in files}

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
        """Deletes handled and stale SAVE/STOP files."""
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

    def truncate_records(self, step: int) -> None:
        """Deletes records after `step` and those of the test split; they are rewritten."""
        for path in self.row_losses.glob("*.parquet"):
            split, _, step_of_file = path.stem.rpartition("-")
            if split == "test" or not step_of_file.isdigit() or int(step_of_file) > step:
                path.unlink()
        for path in (self.metrics_file, self.timing_file, self.samples_file):
            if path.is_file():
                lines = path.read_bytes().splitlines(keepends=True)
                write_atomically(path, b"".join(line for line in lines if _is_until(line, step)))


@dataclass
class PeftAdapter(Run):
    """A directory with an adapter that PEFT wrote, used like a run; it has no record of its training.

    Attributes:
        fingerprint: of the base that its config names.
    """

    fingerprint: str = ""

    adapter = _Inside("")

    def recorded(self, group: str, name: str) -> Any:
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


def check_run_directory(config: TrainConfig, key: str) -> Run:
    """The run of `key`, if its directory exists or can be made; creates nothing.

    Raises ConfigError if something else is in its place, DiskError if nothing can be written.
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

    Raises ConfigError when the directory contains something that is not a run of llmft.
    """
    run = check_run_directory(config, key)
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

    Raises ConfigError if there is no run, it is not finished, or its exported weights have changed.
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


def open_directories(paths: Any, key: str, open_one: Callable[[Path], T], warn: Callable[[str], None]) -> list[T]:
    """Opens each directory with `open_one`. One that it refuses is left out with a warning if a glob named it.

    Raises its ConfigError or DataError for a directory named without a glob, and if no directory is left.
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


def source_record(run: Run, config: TrainConfig, rows_fingerprint: str, prior: Sequence[float]) -> dict[str, Any]:
    """The record of a run in the provenance of its predictions."""
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
