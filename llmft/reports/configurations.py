"""Runs grouped into configurations, the keys that were varied, and failures.

A configuration is a set of runs that differ only in replications (seed, fold, seed of the split). The varied keys are
found by comparing resolved configs, so runs without a sweep and runs of several sweeps are treated the same.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft.config.convert import group_of
from llmft.config.sections import TrainConfig
from llmft.config.trainer import Mode
from llmft.core.redaction import redact
from llmft.metrics.monitor import declared, mode_of, named_metric
from llmft.reports.read import RunRecord, read_dictionary
from llmft.reports.statistics import Looks, Replicate, Sample
from llmft.reports.svg import clip

REPLICATIONS = ("seed", "data.fold", "data.split_seed")
NAMED = ("model", "prompt", "data", "task")
"""Groups whose `name` represents all their settings."""
CONTENT = {"data": ("data.files", "data.source", "data.hub"), "model": ("model.path", "model.id")}
"""Locations of files are ignored; fingerprints decide whether two runs used the same files."""
STOPPED = ("pruned", "twin", "stopped")
UNFINISHED = {
    "running": "still running, or killed",
    "not started": "was never started",
    "pending": "was not started",
}


@dataclass
class Failure:
    """A trial without a result: its status and cause, and the command that runs it alone."""

    name: str
    status: str
    cause: str
    command: str
    log: str | None = None


@dataclass
class Configuration:
    """Runs that differ only in replications."""

    name: str
    values: dict[str, str]
    runs: list[RunRecord]
    lost: int = 0
    """Number of its runs that diverged or failed."""

    def sample(self, metric: str, *, rows: bool = False) -> Sample:
        """The metric of each run; with `rows` (slower) also the contribution of each validation row."""
        replicates: dict[tuple[str, str], Replicate] = {}
        for run in self.runs:
            value = run.value(metric)
            if value is not None and (run.seed, run.part) not in replicates:  # a copy is not an independent run
                of_rows = run.row_scores(metric) if rows else None
                replicates[run.seed, run.part] = Replicate(run.seed, run.part, value, of_rows)
        parts = {part for _, part in replicates}
        return Sample(self.name, tuple(replicates.values()), self._overlap() if len(parts) > 1 else 0.0, self.lost)

    def _overlap(self) -> float:
        """The number of validation rows divided by that of training rows."""
        run = self.runs[0]
        if run.config.get("data.fold") is not None:
            return 1.0 / max(run.setting("data.num_folds", 5.0) - 1.0, 1.0)
        validation = min(max(run.setting("data.validation_fraction", 0.1), 0.0), 1.0)
        return validation / max(1.0 - validation - run.setting("data.test_fraction", 0.0), validation, 1e-9)


class SweepRecord:
    """A sweep's sweep.json: `content`, and `trials` with their run directories; empty for None."""

    def __init__(self, directory: Path | None) -> None:
        self.content: dict[str, Any] = read_dictionary(directory / "sweep.json", []) if directory is not None else {}
        # Run directories are below the recorded output_dir, or the one that contains the sweep now.
        self.roots = [Path(str(self.content.get("output_dir") or "."))]
        self.roots += [directory.parent.parent] if directory is not None else []
        entries = self.content.get("trials")
        entries = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
        self.trials = [(entry, self._run_directory(entry.get("run"))) for entry in entries]

    def _run_directory(self, run: Any) -> Path | None:
        if not isinstance(run, str) or not run or "\0" in run or Path(run).is_absolute() or ".." in Path(run).parts:
            return None
        return next((root / run for root in self.roots if (root / run).is_dir()), self.roots[-1] / run)

    @property
    def run_directories(self) -> list[Path]:
        """The existing run directories of the trials."""
        return [path for _, path in self.trials if path is not None and path.is_dir()]


Trial = tuple[dict[str, Any], Path | None, RunRecord | None]
"""A trial's entry in sweep.json, its run directory, and the run if it exists."""


class Study:
    """The runs that a report is about, and their sweep if there is one.

    Attributes:
        monitor, lower_is_better: the metric that is compared, and its direction.
        keys: the varied keys, without replications.
        follows: keys that always changed together with one of `keys`, which they map to.
        configurations: those with a result, best mean first.
        others: finished runs without the monitored metric.
        stopped: trials that were ended on purpose: pruned, or the same as a reference run.
        looks: the declared number of looks at the sweep's results.
    """

    def __init__(self, runs: Sequence[Path], sweep: Path | None = None, mode: Mode = Mode.auto) -> None:
        """Raises ConfigError if neither the metric, the records nor `mode` gives the better direction."""
        sweep_record = SweepRecord(sweep)
        record = sweep_record.content
        paths: dict[Path, Path] = {}
        for path in (*runs, *sweep_record.run_directories):
            if path.is_dir():
                paths.setdefault(path.resolve(), path)
        self.runs = sorted(map(RunRecord, paths.values()), key=lambda run: run.name)
        name = redact(str(record.get("name") or sweep.name)) if sweep is not None else ""
        self.title: str = name or (self.runs[0].name if len(self.runs) == 1 else f"{len(self.runs)} runs")
        self.monitor, self.lower_is_better = _monitor(self.runs, record, mode)
        by_path = {run.directory.resolve(): run for run in self.runs}
        trials: list[Trial] = []
        for entry, directory in sweep_record.trials:
            resolved = directory.resolve() if directory is not None else None
            run = by_path.get(resolved) if resolved is not None else None
            if run is not None and entry.get("command"):  # the run's own record may have the command of the whole sweep
                run.command = str(redact(str(entry["command"])))
            trials.append((entry, resolved, run))
        ended = _ended(trials, by_path)
        self.stopped, self.failures = sorted(ended.values()), _failures(trials, by_path, ended)
        done = [run for path, run in by_path.items() if run.status == "done" and path not in ended]
        with_value = [run for run in done if run.value(self.monitor) is not None]
        self.others = [run for run in done if run.value(self.monitor) is None]
        swept, looks, smallest = (record.get(name) for name in ("swept", "looks", "smallest_difference"))
        self.keys, self.follows = varied_keys(with_value or self.runs, swept if isinstance(swept, dict) else {})
        lost = [run for run in self.runs if run.status in ("diverged", "failed")] + self.others
        self.configurations = _configurations(with_value, lost, self.keys)
        self.configurations.sort(key=lambda c: c.sample(self.monitor).mean * (1 if self.lower_is_better else -1))
        self.looks: Looks = "any" if looks == "any" else looks if isinstance(looks, int) and looks > 0 else 1
        self.smallest_difference = float(smallest) if isinstance(smallest, (int, float)) and smallest > 0 else None
        self.question, self.notes, self.command, self.created = (
            str(redact(str(record[name]))) if record.get(name) else None
            for name in ("question", "notes", "command", "created")
        )

    def values_of(self, key: str) -> list[str]:
        """The values of `key` in the configurations: numbers in order, then words alphabetically."""

        def order(value: str) -> tuple[int, float, str]:
            try:
                return 0, float(value), value
            except ValueError:
                return 1, 0.0, value

        return sorted({c.values[key] for c in self.configurations}, key=order)


def _monitor(records: Sequence[RunRecord], record: Mapping[str, Any], requested: Mode) -> tuple[str, bool]:
    """(metric, whether lower is better): as declared by the metric, else as recorded."""
    monitors = Counter(r.monitor for r in records if r.config)
    monitor = str(record.get("monitor") or next(iter(monitors.most_common(1)), ("val/loss_nats",))[0])
    monitored = [r for r in records if r.monitor == monitor]
    lists = [paths for r in monitored if isinstance(paths := r.config.get("task.metrics"), list)]
    metric = named_metric(monitor, [str(path) for paths in lists for path in paths])
    modes = {str(mode) for mode in (record.get("mode"), *(r.config.get("trainer.mode") for r in monitored))}
    modes &= {"min", "max"}
    if requested is Mode.auto and declared(metric) is None and len(modes) == 1:
        requested = Mode(modes.pop())
    lower = mode_of(metric, monitor, requested, key="mode") is Mode.min
    for run in monitored:  # runs of a version that assumed trainer.mode=min
        if run.config.get("trainer.mode") == ("max" if lower else "min"):
            worst = "lowest" if run.config["trainer.mode"] == "min" else "highest"
            run.faults.append(
                f"its trainer.mode={run.config['trainer.mode']} is wrong for {monitor}: its weights are those "
                f"of its {worst} validation, not of its best; train it again"
            )
    return monitor, lower


def _ended(trials: Sequence[Trial], by_path: Mapping[Path, RunRecord]) -> dict[Path, str]:
    """run directory -> reason of runs that were stopped on purpose: their metric is not that of a complete run."""
    ended = {p: f"{run.name} ({run.status})" for p, run in by_path.items() if run.status in STOPPED}
    for entry, path, _ in trials:
        if entry.get("status") in STOPPED and path is not None:
            why = f": {entry['error']}" if entry.get("error") else ""
            ended[path] = str(redact(f"{_trial_name(entry)} ({entry['status']}{why})"))
    return ended


def _trial_name(trial: Mapping[str, Any]) -> str:
    overrides = trial.get("overrides")
    if isinstance(overrides, list) and overrides:
        return " ".join(str(override) for override in overrides)
    return Path(str(trial.get("run") or f"trial {trial.get('number', '?')}")).name


def _failures(trials: Sequence[Trial], by_path: Mapping[Path, RunRecord], ended: Mapping[Path, str]) -> list[Failure]:
    failures = []
    for entry, path, run in trials:
        status = str(entry.get("status") or "unknown")
        if status == "done" and run is None:
            failures.append(_failure({**entry, "error": f"{entry.get('run')} no longer exists"}, "missing", run))
        elif path not in ended and (run is None or run.status != "done"):  # else it finished later
            failures.append(_failure(entry, status, run))
    listed = {path for _, path, _ in trials} | ended.keys()
    return failures + [
        _failure({}, run.status, run) for path, run in by_path.items() if path not in listed and run.status != "done"
    ]


def _failure(trial: Mapping[str, Any], status: str, run: RunRecord | None) -> Failure:
    name, command = _trial_name(trial) if trial or run is None else run.name, trial.get("command")
    causes, log = [trial.get("error"), trial.get("cause"), UNFINISHED.get(status)], trial.get("log")
    if run is not None:
        causes = [trial.get("error"), run.error, trial.get("cause"), UNFINISHED.get(run.status), "; ".join(run.faults)]
        command, log = command or run.command, log or run.directory / "log.txt"
    cause = next((str(cause) for cause in causes if cause), "no cause was recorded")
    return Failure(*redact([name, status, cause, str(command or ""), str(log) if log else None]))


# Varied keys.


@functools.cache
def _without_effect(schema: type = TrainConfig, prefix: str = "") -> frozenset[str]:
    """Dotted keys of fields and groups that cannot change a run's numbers."""
    keys: set[str] = set()
    for entry in dataclasses.fields(schema):
        group = group_of(schema, entry.name)
        if entry.metadata.get("not_in_key"):
            keys.add(f"{prefix}{entry.name}")
        elif group is not None:
            keys |= _without_effect(group, f"{prefix}{entry.name}.")
    return frozenset(keys)


@functools.cache
def _has_effect(key: str) -> bool:
    parts = key.split(".")
    return not any(".".join(parts[:end]) in _without_effect() for end in range(1, len(parts) + 1))


def _identity(run: RunRecord) -> dict[str, str]:
    """The settings that can change the run's numbers, including replications and names of groups."""
    located = {name for names in CONTENT.values() for name in names}
    values = {k: show(value) for k, value in run.config.items() if k not in located and _has_effect(k)}
    for group in NAMED:
        if f"{group}.name" in run.config:
            values[group] = show(run.config[f"{group}.name"])
    for group, fingerprint in zip(CONTENT, run.content, strict=True):
        if fingerprint:
            values[f"{group} content"] = fingerprint[:8]
    return values


def varied_keys(runs: Sequence[RunRecord], swept: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """(varied keys without replications; dependent keys: key -> the one that it follows).

    A named group represents its keys as long as they add no difference. Of keys that change together, those swept are
    preferred, then names of groups, then single values in the config's order.
    """
    tables = [_identity(run) for run in runs]
    every = dict.fromkeys(key for table in tables for key in table)
    differ = [key for key in every if len({table.get(key) for table in tables}) > 1 and key not in REPLICATIONS]
    ranked = [*swept, *NAMED, *(key for key in differ if not key.endswith(" content")), *differ]
    keys: list[str] = []
    follows: dict[str, str] = {}
    for key in dict.fromkeys(key for key in ranked if key in differ):
        if _follows(tables, key, [*keys, *REPLICATIONS] if key.endswith(" content") else keys):
            follows[key] = next((other for other in keys if _follows(tables, key, [other])), "several")
        else:
            keys.append(key)
    return keys, follows


def _follows(tables: Sequence[Mapping[str, str]], key: str, known: Sequence[str]) -> bool:
    seen: dict[tuple[Any, ...], Any] = {}
    return all(
        seen.setdefault(tuple(table.get(other) for other in known), table.get(key)) == table.get(key)
        for table in tables
    )


def show(value: Any) -> str:
    """A config value as text."""
    if isinstance(value, (bool, list, dict)) or value is None:
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return f"{value:g}" if isinstance(value, float) else str(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """key -> its last part, or the full key if another has the same last part."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: tail if last[tail := key.rpartition(".")[2]] == 1 else key for key in keys}


def _setting(run: RunRecord, keys: Sequence[str]) -> tuple[str, ...]:
    """The run's values of the varied keys."""
    values = _identity(run)
    return tuple(values.get(key, "unset") for key in keys)


def _configurations(runs: Sequence[RunRecord], lost: Sequence[RunRecord], keys: Sequence[str]) -> list[Configuration]:
    """Groups `runs` by their values of `keys`, and counts the `lost` runs with the same values."""
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    for run in runs:
        groups.setdefault(_setting(run, keys), []).append(run)
    lost_settings = [(run, _setting(run, keys)) for run in lost if run.config]
    configurations = []
    for values, members in groups.items():
        setting = dict(zip(keys, values, strict=True))
        members.sort(key=lambda run: (run.part, run.seed, run.name))
        name = ", ".join(f"{short}={clip(setting[key], 40)}" for key, short in short_names(keys).items())
        name = name or (members[0].name if len(members) == 1 else "all runs")
        replicates = {(run.seed, run.part) for run in members}
        num_lost = sum(other == values and (run.seed, run.part) not in replicates for run, other in lost_settings)
        configurations.append(Configuration(name, setting, members, num_lost))
    names = Counter(c.name for c in configurations)
    count: Counter[str] = Counter()
    for c in configurations:  # clipped values may look the same: number them
        if names[name := c.name] > 1:
            count[name] += 1
            c.name = f"{name} ({count[name]})"
    return configurations
