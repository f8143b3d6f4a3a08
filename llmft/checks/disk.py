"""Sizes of runs and caches, and what of them may be deleted; without torch."""

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
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from llmft.config.sections import Cleaning, DiskConfig, Keep
from llmft.config.untrusted import read_yaml
from llmft.core.errors import ConfigError
from llmft.core.files import cache_directory, format_bytes
from llmft.model import quantized_cache
from llmft.runs.directory import Run

_STEP = re.compile(r"step-(\d{8})\.(safetensors|sha256)")


@dataclass
class RunFacts:
    """One run directory; sizes in bytes."""

    name: str
    state: str
    size: int
    checkpoints: int
    model: str | None
    data: str | None
    uploaded: bool


@dataclass
class Cached:
    """One thing in a cache, and the runs that use it."""

    kind: str
    name: str
    size: int
    used_by: list[str] = field(default_factory=list)


@dataclass
class Deletable:
    """A file or folder that may go, and why."""

    path: Path
    size: int
    reason: str
    gone: bool = False


@dataclass
class DiskReport:
    """All that was found."""

    free: int
    runs: list[RunFacts]
    cached: list[Cached]
    doomed: list[Deletable]

    def plain(self) -> dict[str, Any]:
        """As JSON-ready data."""
        made = asdict(self)
        for entry in made["doomed"]:
            entry["path"] = str(entry["path"])
        return made


def size_of(path: Path) -> int:
    """Bytes that `path` takes on the disk, files with several names once; links are not followed."""
    seen: set[tuple[int, int]] = set()
    total = 0
    pending = [path]
    while pending:
        place = pending.pop()
        try:
            status = place.lstat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            total += status.st_blocks * 512
            if place.is_dir() and not place.is_symlink():
                pending.extend(place.iterdir())
        except OSError:  # it went while we looked
            continue
    return total


def find(config: DiskConfig) -> DiskReport:
    """Looks at the runs below config.output_dir and at the caches; changes nothing.

    Raises ConfigError when there is no such directory.
    """
    root = Path(config.output_dir)
    if not root.is_dir():
        raise ConfigError(f"output_dir={config.output_dir}: no such directory; name the one that your runs are in.")
    runs: list[RunFacts] = []
    doomed: list[Deletable] = []
    for directory in sorted((root / "runs").iterdir()) if (root / "runs").is_dir() else ():
        run = Run(directory, directory.name.rpartition("-")[2])
        if directory.is_symlink() or not run.status_file.is_file():
            continue
        facts = _facts(run)
        runs.append(facts)
        if facts.state == "training":
            continue
        if Cleaning.leftovers in config.clean:
            doomed += _leftovers(run)
        if Cleaning.checkpoints in config.clean and facts.state == "done":
            doomed += _old_checkpoints(run, config.keep)
    cached = [*_hub(runs), *_others()]
    if Cleaning.tokens in config.clean:
        doomed += _all_of(cache_directory(), "tokens-*.arrow", "made again by the next run")
    if Cleaning.bases in config.clean:
        doomed += _all_of(quantized_cache.bases_directory(), "*", "quantised again by the next run")
    if Cleaning.wandb in config.clean:
        doomed += _all_of(_wandb_cache(), "*", "downloaded again when needed")
    return DiskReport(shutil.disk_usage(root).free, runs, cached, doomed)


def _facts(run: Run) -> RunFacts:
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
    return RunFacts(run.directory.name, state, size_of(run.directory), size_of(run.checkpoints), model, data, uploaded)


def _old_checkpoints(run: Run, keep: list[Keep]) -> list[Deletable]:
    result = run.status().get("result")
    named = {Keep.best: "step", Keep.last: "steps"}
    if not isinstance(result, dict) or not all(name in result for name in named.values()):
        return []  # a record that does not say which are which
    kept = {result[named[which]] for which in keep}
    found = []
    for path in sorted(run.checkpoints.glob("step-*")):
        step = _STEP.fullmatch(path.name)
        if step and int(step[1]) not in kept:
            found.append(Deletable(path, size_of(path), "steps of a finished run"))
    return found


def _leftovers(run: Run) -> list[Deletable]:
    """What kills and damage left: half-written files, checkpoints set aside."""
    patterns = {
        "checkpoints/*.bad": "a damaged checkpoint that was set aside",
        "checkpoints/.*.tmp": "a file that a kill left half written",
        ".*.tmp": "a file that a kill left half written",
        ".adapter.*": "an export that a kill left half written",
        ".model.*": "an export that a kill left half written",
    }
    return [
        Deletable(path, size_of(path), reason)
        for pattern, reason in patterns.items()
        for path in sorted(run.directory.glob(pattern))
    ]


def _all_of(folder: Path, pattern: str, reason: str) -> list[Deletable]:
    return [Deletable(path, size_of(path), reason) for path in sorted(folder.glob(pattern))] if folder.is_dir() else []


def hub_cache() -> Path:
    """Where huggingface_hub keeps what it downloads, told as it tells, without importing it."""
    home = os.environ.get("HF_HOME", os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "huggingface"))
    return Path(os.environ.get("HF_HUB_CACHE", os.path.join(home, "hub"))).expanduser()


def _hub(runs: Iterable[RunFacts]) -> list[Cached]:
    made = []
    folder = hub_cache()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        kind, _, rest = path.name.partition("--")
        if not path.is_dir() or kind not in ("models", "datasets"):
            continue
        name = rest.replace("--", "/")
        users = [run.name for run in runs if name in ((run.model,) if kind == "models" else (run.data,))]
        made.append(Cached(f"Hub {kind.rstrip('s')}", name, size_of(path), users))
    return made


def _wandb_cache() -> Path:
    default = os.path.join(os.environ.get("XDG_CACHE_HOME", "~/.cache"), "wandb")
    return Path(os.environ.get("WANDB_CACHE_DIR", default)).expanduser()


def _others() -> list[Cached]:
    tokens = cache_directory()
    bases = [
        Cached("quantised base", str(facts.get("label", path.name)), size_of(path))
        for path, facts in quantized_cache.entries()
    ]
    made = [*bases, Cached("tokenised rows", str(tokens), size_of(tokens) - size_of(quantized_cache.bases_directory()))]
    made.append(Cached("datasets", str(tokens.parent), size_of(tokens.parent) - size_of(tokens)))
    made.append(Cached("W&B downloads", str(_wandb_cache()), size_of(_wandb_cache())))
    return [entry for entry in made if entry.size > 0]


def delete(report: DiskReport) -> None:
    """Deletes what may go; a run that somebody started to train meanwhile keeps its files."""
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
    """Prints the report on a page."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    total = sum(run.size for run in report.runs)
    console.print(
        f"[bold]llmft disk[/bold]  {escape(config.output_dir)} on {socket.gethostname()}: "
        f"{format_bytes(report.free)} free, runs take {format_bytes(total)}"
    )
    if report.runs:
        console.print(_run_table(report.runs))
    if report.cached:
        console.print(_cache_table(report.cached))
        unused = [entry.name for entry in report.cached if entry.kind.startswith("Hub") and not entry.used_by]
        if unused:
            console.print(
                f"{len(unused)} repositories of the Hub's cache are used by no run here; other programs may use them. "
                f"`hf cache rm` deletes one, such as [bold]{escape(unused[0])}[/bold]."
            )
    _show_doomed(console, report.doomed, config)


def _run_table(runs: list[RunFacts]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="runs", title_justify="left")
    for name in ("run", "state", "size", "checkpoints", "base"):
        table.add_column(name, justify="right" if name in ("size", "checkpoints") else "left", overflow="fold")
    colours = {"done": "green", "training": "cyan"}
    for run in sorted(runs, key=lambda run: -run.size):
        colour = colours.get(run.state, "yellow")
        state = f"[{colour}]{run.state}[/{colour}]" + ("" if run.uploaded else ", W&B not uploaded")
        sizes = format_bytes(run.size), format_bytes(run.checkpoints)
        table.add_row(escape(run.name), state, *sizes, escape(str(run.model or "?")))
    return table


def _cache_table(cached: list[Cached]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="caches", title_justify="left")
    for name in ("kind", "what", "size", "used by"):
        table.add_column(name, justify="right" if name == "size" else "left", overflow="fold")
    for entry in sorted(cached, key=lambda entry: -entry.size):
        used = f"{len(entry.used_by)} runs" if entry.used_by else ("no run" if entry.kind.startswith("Hub") else "")
        table.add_row(entry.kind, escape(entry.name), format_bytes(entry.size), used)
    return table


def _show_doomed(console: Console, doomed: list[Deletable], config: DiskConfig) -> None:
    if not config.clean:
        console.print(
            "Nothing is deleted. clean=\\[checkpoints,leftovers,tokens,bases,wandb] shows what may go; "
            "dry_run=false deletes."
        )
        return
    together: dict[tuple[str, Path, str], list[Deletable]] = {}
    for entry in doomed:
        mark = "deleted" if entry.gone else "would go" if config.dry_run else "kept"
        together.setdefault((mark, entry.path.parent, entry.reason), []).append(entry)
    for (mark, folder, reason), entries in together.items():
        size = format_bytes(sum(entry.size for entry in entries))
        what = f"{len(entries)} files of " if len(entries) > 1 else ""
        place = folder if len(entries) > 1 else entries[0].path
        console.print(f"{mark}  {size:>10}  {what}{escape(str(place))}  [dim]({reason})[/dim]", soft_wrap=True)
    size = format_bytes(sum(entry.size for entry in doomed if entry.gone or config.dry_run))
    if config.dry_run:
        console.print(
            f"[bold]{size}[/bold] in {len(doomed)} files would be freed: the same command with dry_run=false."
        )
    else:
        console.print(f"[bold]{size}[/bold] freed.")
