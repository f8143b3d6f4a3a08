"""Sizes of runs and caches, and what can be deleted. Does not import torch."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table

from llmft.config.commands import Cleaning, DiskConfig, KeepCheckpoints
from llmft.config.untrusted import read_yaml
from llmft.core.console import Screen, text_table
from llmft.core.errors import ConfigError
from llmft.core.files import cache_directory, format_bytes, hub_cache, is_abandoned
from llmft.data import gguf_files
from llmft.model import quantized_cache
from llmft.runs.directory import Run

_STEP = re.compile(r"step-(\d{8})\.(safetensors|sha256)")


@dataclass
class RunUsage:
    """A run directory's state and sizes in bytes."""

    name: str
    state: str
    size: int
    checkpoints: int
    merged: int
    model: str | None
    data: str | None
    uploaded: bool


@dataclass
class Cached:
    """An entry of a cache, and the runs that use it."""

    kind: str
    name: str
    size: int
    used_by: list[str] = field(default_factory=list)


@dataclass
class Deletable:
    """A file or folder that may be deleted, and why."""

    path: Path
    size: int
    reason: str
    gone: bool = False


@dataclass
class DiskReport:
    free: int
    runs: list[RunUsage]
    cached: list[Cached]
    doomed: list[Deletable]

    def plain(self) -> dict[str, Any]:
        plain = asdict(self)
        for entry in plain["doomed"]:
            entry["path"] = str(entry["path"])
        return plain


def size_of(path: Path) -> int:
    """Disk usage of `path` in bytes. Hard links count once; symbolic links are not followed."""
    seen: set[tuple[int, int]] = set()
    total = 0
    pending = [path]
    while pending:
        current = pending.pop()
        try:
            status = current.lstat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
            if current.is_dir() and not current.is_symlink():
                pending.extend(current.iterdir())
        except OSError:  # deleted in the meantime
            continue
    return total


def scan(config: DiskConfig) -> DiskReport:
    """The sizes of the runs below config.output_dir and of the caches; changes nothing.

    Raises ConfigError when the directory does not exist.
    """
    root = Path(config.output_dir)
    if not root.is_dir():
        raise ConfigError(f"output_dir={config.output_dir}: no such directory; name the directory of your runs.")
    runs: list[RunUsage] = []
    deletable: list[Deletable] = []
    for directory in sorted((root / "runs").iterdir()) if (root / "runs").is_dir() else ():
        run = Run(directory, directory.name.rpartition("-")[2])
        if directory.is_symlink() or not run.status_file.is_file():
            continue
        usage = _usage(run)
        runs.append(usage)
        if Cleaning.leftovers in config.clean and usage.state != "training":
            deletable += _leftovers(run)
        if Cleaning.checkpoints in config.clean and usage.state == "done":
            deletable += _old_checkpoints(run, config.keep)
        if Cleaning.merged in config.clean and usage.state == "done":
            deletable += _all_of(run.directory, "merged", "written again by llmft.merge")
            deletable += _all_of(run.directory / "gguf", "*.gguf", "written again by llmft.merge")
    cached = [*_hub(runs), *_gguf_files(runs), *_other_caches()]
    for kind, folder, pattern, reason in (
        (Cleaning.tokens, cache_directory(), "tokens-*.arrow", "written again by the next run"),
        (Cleaning.bases, quantized_cache.bases_directory(), "*", "quantised again by the next run"),
        (Cleaning.gguf, gguf_files.directories(), "*", "dequantised again by the next run"),
        (Cleaning.wandb, _wandb_cache(), "*", "downloaded again when needed"),
    ):
        if kind in config.clean:
            deletable += _all_of(folder, pattern, reason)
    return DiskReport(shutil.disk_usage(root).free, runs, cached, deletable)


def _usage(run: Run) -> RunUsage:
    status = run.status()
    state = str(status.get("status", "unknown"))
    if run.busy:
        state = "training"
    elif state == "running":
        state = "killed"
    elif state == "done" and not run.done:
        state = "damaged"
    try:
        plain = read_yaml(run.config_file)
        model, data = plain["model"].get("id"), plain["data"].get("hub")
        model = model if plain["model"].get("path") is None else plain["model"]["path"]
    except (ConfigError, KeyError, TypeError, AttributeError):
        model = data = None
    uploaded = not any((run.directory / "wandb").glob("offline-run-*"))
    merged = sum(size_of(run.directory / name) for name in ("merged", "gguf"))
    sizes = size_of(run.directory), size_of(run.checkpoints), merged
    return RunUsage(run.directory.name, state, *sizes, model, data, uploaded)


def _old_checkpoints(run: Run, keep: list[KeepCheckpoints]) -> list[Deletable]:
    result = run.status().get("result")
    key_of = {KeepCheckpoints.best: "step", KeepCheckpoints.last: "steps"}
    if not isinstance(result, dict) or not all(name in result for name in key_of.values()):
        return []  # an incomplete record
    steps_to_keep = {result[key_of[which]] for which in keep}
    deletable = []
    for path in sorted(run.checkpoints.glob("step-*")):
        step = _STEP.fullmatch(path.name)
        if step and int(step[1]) not in steps_to_keep:
            deletable.append(Deletable(path, size_of(path), "an old checkpoint of a finished run"))
    return deletable


def _leftovers(run: Run) -> list[Deletable]:
    """Damaged checkpoints, and incomplete files of dead processes."""
    leftovers = _all_of(run.checkpoints, "*.bad", "a damaged checkpoint")
    for folder in ("", "checkpoints", "gguf"):
        unfinished = _all_of(run.directory / folder, ".*.tmp", "incomplete, left by a killed process")
        leftovers += [entry for entry in unfinished if is_abandoned(entry.path)]
    return leftovers


def _all_of(folder: Path, pattern: str, reason: str) -> list[Deletable]:
    return [Deletable(path, size_of(path), reason) for path in sorted(folder.glob(pattern))] if folder.is_dir() else []


def _hub(runs: Iterable[RunUsage]) -> list[Cached]:
    entries = []
    folder = hub_cache()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind, _, rest = path.name.partition("--")
        if not path.is_dir() or kind not in ("models", "datasets"):
            continue
        name = rest.replace("--", "/")
        users = [run.name for run in runs if name in ((run.model,) if kind == "models" else (run.data,))]
        entries.append(Cached(f"Hub {kind.rstrip('s')}", name, size_of(path), users))
    return entries


def _gguf_files(runs: Iterable[RunUsage]) -> list[Cached]:
    folder = gguf_files.directories()
    entries = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        source = gguf_files.source_of(path)
        users = [run.name for run in runs if run.model is not None and source == Path(run.model).expanduser()]
        entries.append(Cached("dequantised GGUF", str(source or path.name), size_of(path), users))
    return entries


def _wandb_cache() -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "wandb")
    return Path(os.environ.get("WANDB_CACHE_DIR", default)).expanduser()


def _other_caches() -> list[Cached]:
    tokens = cache_directory()
    bases = [
        Cached("quantised base", str(record.get("label", path.name)), size_of(path))
        for path, record in quantized_cache.entries()
    ]
    rows = size_of(tokens) - size_of(quantized_cache.bases_directory()) - size_of(gguf_files.directories())
    entries = [*bases, Cached("tokenised rows", str(tokens), rows)]
    entries.append(Cached("datasets", str(tokens.parent), size_of(tokens.parent) - size_of(tokens)))
    entries.append(Cached("W&B downloads", str(_wandb_cache()), size_of(_wandb_cache())))
    return [entry for entry in entries if entry.size > 0]


def delete(report: DiskReport) -> None:
    """Deletes the listed files, except those of a run that is being trained now."""
    for entry in report.doomed:
        owner = next((p for p in entry.path.parents if (p / "run.json").is_file()), None)
        if owner is not None and Run(owner, "").busy:
            entry.reason = "kept: the run is being trained now"
            continue
        if entry.path.is_dir() and not entry.path.is_symlink():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink(missing_ok=True)
        entry.gone = True


def show(report: DiskReport, config: DiskConfig) -> None:
    screen = Screen()
    total = sum(run.size for run in report.runs)
    screen.print(
        f"[bold]llmft disk[/bold]  {escape(config.output_dir)} on {socket.gethostname()}: "
        f"{format_bytes(report.free)} free, runs take {format_bytes(total)}"
    )
    if report.runs:
        screen.print(_run_table(report.runs))
    if report.cached:
        screen.print(_cache_table(report.cached))
        unused = [entry.name for entry in report.cached if entry.kind.startswith("Hub") and not entry.used_by]
        if unused:
            screen.print(
                f"{len(unused)} repositories in the Hub's cache are used by no run here; other programs may use them. "
                f"`hf cache rm` deletes one, such as [bold]{escape(unused[0])}[/bold]."
            )
    _show_deletable(screen, report.doomed, config)


def _run_table(runs: list[RunUsage]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="runs", title_justify="left")
    for name in ("run", "state", "size", "checkpoints", "merged", "base"):
        table.add_column(name, justify="left" if name in ("run", "state", "base") else "right", overflow="fold")
    colours = {"done": "green", "training": "cyan"}
    for run in sorted(runs, key=lambda run: -run.size):
        colour = colours.get(run.state, "yellow")
        state = f"[{colour}]{run.state}[/{colour}]" + ("" if run.uploaded else ", W&B not uploaded")
        sizes = map(format_bytes, (run.size, run.checkpoints, run.merged))
        table.add_row(escape(run.name), state, *sizes, escape(str(run.model or "?")))
    return table


def _cache_table(cached: list[Cached]) -> Table:
    rows = []
    for entry in sorted(cached, key=lambda entry: -entry.size):
        used = f"{len(entry.used_by)} runs" if entry.used_by else ("no run" if entry.kind.startswith("Hub") else "")
        rows.append([entry.kind, entry.name, format_bytes(entry.size), used])
    return text_table(["kind", "what", "size", "used by"], rows, "caches", left=(0, 1, 3))


def _show_deletable(screen: Screen, deletable: list[Deletable], config: DiskConfig) -> None:
    if not config.clean:
        screen.print(
            f"Nothing is deleted. clean=\\[{','.join(kind.value for kind in Cleaning)}] shows what can be deleted; "
            "dry_run=false deletes it."
        )
        return
    groups: dict[tuple[str, Path, str], list[Deletable]] = {}
    for entry in deletable:
        mark = "deleted" if entry.gone else "would be deleted" if config.dry_run else "kept"
        groups.setdefault((mark, entry.path.parent, entry.reason), []).append(entry)
    for (mark, folder, reason), entries in groups.items():
        size = format_bytes(sum(entry.size for entry in entries))
        count = f"{len(entries)} files of " if len(entries) > 1 else ""
        path = folder if len(entries) > 1 else entries[0].path
        screen.print(f"{mark}  {size:>10}  {count}{escape(str(path))}  [dim]({reason})[/dim]")
    size = format_bytes(sum(entry.size for entry in deletable if entry.gone or config.dry_run))
    if config.dry_run:
        screen.print(f"[bold]{size}[/bold] in {len(deletable)} files would be freed; add dry_run=false to delete them.")
    else:
        screen.print(f"[bold]{size}[/bold] freed.")
