"""Selects the runs for a report."""

from __future__ import annotations

import glob
from pathlib import Path
from typing import Any

from llmft.core.errors import ConfigError
from llmft.reports.configurations import SweepRecord
from llmft.reports.read import is_run


def select_runs(runs: Any, sweep: str | None, output_dir: Path) -> tuple[list[Path], Path | None]:
    """(runs, sweep) that `runs` (paths and globs of run, sweep and output directories) and `sweep` name.

    The runs of a sweep alone are left to its record. Without both, the newest sweep of `output_dir`, or else all its
    runs. Raises ConfigError if nothing is found.
    """
    named = [str(item) for item in (runs if isinstance(runs, list) else [runs])] if runs else []
    expanded = {item: _expand(item) for item in named}
    directories = [run for below, _ in expanded.values() for run in below]
    if sweep is not None:
        in_output_dir = output_dir / "sweeps" / sweep
        directory = next((path for path in (Path(sweep), in_output_dir) if is_sweep(path)), None)
        if directory is None:
            raise ConfigError(f"sweep={sweep}: no sweep.json there, nor in {in_output_dir}.")
        return directories, directory
    if not named:
        sweeps = [path for path in (output_dir / "sweeps").glob("*") if is_sweep(path)]
        if sweeps:
            newest = max(sweeps, key=lambda path: (str(SweepRecord(path).content.get("created") or ""), path.name))
            return [], newest
        directories = _runs_below(output_dir / "runs")
        if not directories:
            raise ConfigError(f"output_dir={output_dir}: no sweeps and no runs there; name them with runs=[DIR,…].")
    nothing = next((item for item, below in expanded.items() if below == ([], [])), None)
    if nothing is not None:
        raise ConfigError(f"runs={nothing}: no run, sweep or output directory there.")
    sweeps = [path for _, below in expanded.values() for path in below]
    if len(sweeps) == 1 and not directories:
        return [], sweeps[0]
    directories += [run for path in sweeps for run in SweepRecord(path).run_directories]
    if not directories:
        raise ConfigError(f"runs={','.join(named)}: none of the trials there has started.")
    return list(dict.fromkeys(directories)), None


def _expand(item: str) -> tuple[list[Path], list[Path]]:
    """(run directories, sweep directories) given by a path or glob."""
    runs: list[Path] = []
    sweeps: list[Path] = []
    for path in [Path(item)] if Path(item).exists() else sorted(map(Path, glob.glob(item, recursive=True))):
        if is_sweep(path):
            sweeps.append(path)
        elif is_run(path):
            runs.append(path)
        elif path.is_dir():
            runs += _runs_below(path / "runs" if (path / "runs").is_dir() else path)
    return runs, sweeps


def _runs_below(directory: Path) -> list[Path]:
    return [path for path in sorted(directory.glob("*")) if path.is_dir() and is_run(path)]


def is_sweep(directory: Path) -> bool:
    return (directory / "sweep.json").is_file()
