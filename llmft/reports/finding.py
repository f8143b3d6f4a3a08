"""Which runs a report is about."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft.core.errors import ConfigError
from llmft.reports.configurations import read_sweep
from llmft.reports.read import is_run


@dataclass(frozen=True)
class Found:
    """Run directories, the sweep that they belong to if it is one, and where the report and the logbook go."""

    runs: list[Path]
    sweep: Path | None
    directory: Path
    logbook: Path | None


def find(runs: Any, sweep: str | None, output_dir: Path) -> Found:
    """The runs that `runs` (paths and globs of run, sweep and output directories) and `sweep` name.

    With neither, the newest sweep of `output_dir`, or else all its runs.
    Raises ConfigError in one sentence where nothing is found.
    """
    wanted = [str(item) for item in (runs if isinstance(runs, list) else [runs])] if runs else []
    if sweep is not None:
        place = Path(sweep) if is_sweep(Path(sweep)) else output_dir / "sweeps" / sweep
        if not is_sweep(place):
            raise ConfigError(f"sweep={sweep}: no sweep.json there, nor in {output_dir / 'sweeps' / sweep}.")
        return _of_sweep(place, [run for item in wanted for run in _expand(item)[0]])
    if not wanted:
        newest = newest_sweep(output_dir / "sweeps")
        if newest is not None:
            return _of_sweep(newest, [])
        found = _runs_below(output_dir / "runs")
        if not found:
            raise ConfigError(f"output_dir={output_dir}: no sweeps and no runs there; name them with runs=[DIR,…].")
        return Found(found, None, output_dir / "report", None)
    found, sweeps = [], []
    for item in wanted:
        here, also = _expand(item)
        if not here and not also:
            raise ConfigError(f"runs={item}: no run, sweep or output directory there.")
        found += here
        sweeps += also
    if len(sweeps) == 1 and not found:
        return _of_sweep(sweeps[0], [])
    from llmft.reports.configurations import trial_directory, trials_of

    for place in sweeps:
        record = read_sweep(place)
        found += [
            path for t in trials_of(record) if (path := trial_directory(t, record, place)) is not None and path.is_dir()
        ]
    if not found:
        raise ConfigError(f"runs={','.join(wanted)}: none of the trials there has begun.")
    return Found(list(dict.fromkeys(found)), None, output_dir / "report", None)


def _of_sweep(place: Path, runs: Sequence[Path]) -> Found:
    root = place.resolve().parent.parent
    logbook = root / "LOGBOOK.md" if place.resolve().parent.name == "sweeps" else None
    return Found(list(runs), place, place, logbook)


def _expand(item: str) -> tuple[list[Path], list[Path]]:
    """(run directories, sweep directories) that a path or glob stands for."""
    paths = [Path(item)] if Path(item).exists() else sorted(map(Path, glob.glob(item, recursive=True)))
    runs: list[Path] = []
    sweeps: list[Path] = []
    for path in paths:
        if is_sweep(path):
            sweeps.append(path)
        elif is_run(path):
            runs.append(path)
        elif (path / "runs").is_dir():
            runs += _runs_below(path / "runs")
        elif path.is_dir():
            runs += _runs_below(path)
    return runs, sweeps


def _runs_below(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*")) if path.is_dir() and is_run(path)]


def is_sweep(directory: Path) -> bool:
    """Whether `directory` is a sweep's."""
    return (directory / "sweep.json").is_file()


def newest_sweep(sweeps: Path) -> Path | None:
    """The sweep that was begun last."""
    found = [path for path in sweeps.glob("*") if is_sweep(path)]
    return max(found, key=lambda path: (str(read_sweep(path).get("created") or ""), path.name), default=None)
