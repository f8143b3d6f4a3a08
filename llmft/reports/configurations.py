"""Runs that belong together: their configurations, what was varied, and what failed.

A configuration is a set of runs that are equal but for replications (seed, fold, seed of the split). Which keys were
varied comes from comparing the resolved configs, so that runs without a sweep and runs of several sweeps work alike.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmft.config.sections import Mode
from llmft.core.redaction import redact
from llmft.metrics.monitor import declared, mode_of, named_metric
from llmft.reports.read import RunRecord, _object, read_run
from llmft.reports.statistics import Looks, Replicate, Sample

REPLICATIONS = ("seed", "data.fold", "data.split_seed")
NAMED = ("model", "prompt", "data", "task")
"""Groups whose `name` stands for all that they set."""
CONTENT = {"data": ("data.files", "data.source", "data.hub"), "model": ("model.path", "model.id")}
"""Where files lie says nothing; their fingerprint decides whether two runs had the same ones."""
UNFINISHED = {
    "running": "still running, or killed without a word",
    "not started": "was never started",
    "pending": "was not started",
}


@dataclass
class Failure:
    """A trial without a result: what happened to it and the command that runs it alone."""

    name: str
    status: str
    cause: str
    command: str
    log: str | None = None


@dataclass
class Configuration:
    """Runs that are equal but for replications."""

    name: str
    values: dict[str, str]
    runs: list[RunRecord]
    lost: int = 0
    """Runs of it that diverged or failed."""

    def sample(self, metric: str, *, rows: bool = False) -> Sample:
        """The metric of each run; with `rows`, which takes longer, what each validation row adds to it."""
        replicates: dict[tuple[str, str], Replicate] = {}
        for run in self.runs:
            value = run.value(metric)
            if value is not None and (run.seed, run.part) not in replicates:  # a copy is no new draw
                of_rows = run.row_scores(metric) if rows else None
                replicates[run.seed, run.part] = Replicate(run.seed, run.part, value, of_rows)
        parts = {part for _, part in replicates}
        return Sample(self.name, tuple(replicates.values()), self._overlap() if len(parts) > 1 else 0.0, self.lost)

    def _overlap(self) -> float:
        """Validation rows over training rows."""
        run = self.runs[0]
        if run.config.get("data.fold") is not None:
            return 1.0 / max(run.setting("data.num_folds", 5.0) - 1.0, 1.0)
        held = min(max(run.setting("data.validation_fraction", 0.1), 0.0), 1.0)
        return held / max(1.0 - held - run.setting("data.test_fraction", 0.0), held, 1e-9)


@dataclass
class Study:
    """What a report is about."""

    title: str
    monitor: str
    lower_is_better: bool
    keys: list[str] = field(default_factory=list)
    """What was varied, without replications."""
    follows: dict[str, str] = field(default_factory=dict)
    """Keys that changed with one of `keys` and say nothing of their own."""
    configurations: list[Configuration] = field(default_factory=list)
    """With a result, the best mean first."""
    others: list[RunRecord] = field(default_factory=list)
    """Done, but without the monitored metric."""
    failures: list[Failure] = field(default_factory=list)
    runs: list[RunRecord] = field(default_factory=list)
    question: str | None = None
    notes: str | None = None
    command: str | None = None
    created: str | None = None
    finished: str | None = None
    stopped: list[str] = field(default_factory=list)
    """Trials that were ended on purpose: pruned, or the twin of another run."""
    looks: Looks = 1
    """How often the sweep's results were to be looked at."""
    smallest_difference: float | None = None


def make_study(runs: Sequence[Path], sweep: Path | None = None, mode: Mode = Mode.auto) -> Study:
    """Reads run directories, and the sweep's record where there is one.

    Raises ConfigError where neither the metric, nor the records, nor `mode` says which direction is better.
    """
    record = read_sweep(sweep) if sweep is not None else {}
    trials = trials_of(record)
    records = _read_all([*runs, *_trial_directories(record, trials, sweep)])
    monitor, lower = _monitor(records, record, mode)
    by_path = {run.directory.resolve(): run for run in records}
    _own_commands(trials, record, sweep, by_path)
    ended = _ended(trials, record, sweep, by_path)
    done = [run for run in records if run.status == "done" and run.directory.resolve() not in ended]
    with_value = [run for run in done if run.value(monitor) is not None]
    keys, follows = varied_keys(with_value or records, swept if isinstance(swept := record.get("swept"), dict) else {})
    study = Study(_title(record, records, sweep), monitor, lower, keys, follows, runs=records)
    study.configurations = _configurations(with_value, keys, monitor, lower)
    _count_lost(study.configurations, keys, [run for run in records if run.status in ("diverged", "failed")])
    _count_lost(study.configurations, keys, [run for run in done if run.value(monitor) is None])
    looks, smallest = record.get("looks"), record.get("smallest_difference")
    study.looks = "any" if looks == "any" else looks if isinstance(looks, int) and looks > 0 else 1
    study.smallest_difference = float(smallest) if isinstance(smallest, (int, float)) and smallest > 0 else None
    study.others = [run for run in done if run.value(monitor) is None]
    study.stopped = sorted(ended.values())
    study.failures = _failures(trials, record, sweep, records, by_path, ended)
    for name in ("question", "notes", "command", "created", "finished"):
        setattr(study, name, redact(str(record[name])) if record.get(name) else None)
    return study


def read_sweep(directory: Path) -> dict[str, Any]:
    """The content of sweep.json, or nothing."""
    return _object(directory / "sweep.json", [])


def trials_of(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trials of a sweep's record."""
    found = record.get("trials")
    return [trial for trial in found if isinstance(trial, dict)] if isinstance(found, list) else []


def _read_all(paths: Iterable[Path]) -> list[RunRecord]:
    seen: dict[Path, RunRecord] = {}
    for path in paths:
        place = path.resolve()
        if place not in seen and path.is_dir():
            seen[place] = read_run(path)
    return sorted(seen.values(), key=lambda run: run.name)


def trial_directory(trial: Mapping[str, Any], record: Mapping[str, Any], sweep: Path) -> Path | None:
    """Where a trial's run lies: below the output_dir that the sweep recorded, or the one that it lies in now."""
    run = trial.get("run")
    if not isinstance(run, str) or not run or "\0" in run or Path(run).is_absolute() or ".." in Path(run).parts:
        return None
    roots = [Path(str(record.get("output_dir") or ".")), sweep.parent.parent]
    return next((root / run for root in roots if (root / run).is_dir()), roots[-1] / run)


def _trial_directories(record: Mapping[str, Any], trials: Sequence[Any], sweep: Path | None) -> list[Path]:
    found = [trial_directory(trial, record, sweep) for trial in trials] if sweep is not None else []
    return [path for path in found if path is not None]


def _monitor(records: Sequence[RunRecord], record: Mapping[str, Any], asked: Mode) -> tuple[str, bool]:
    """(metric, whether less is better): as the metric declares, else as the records say that it was taken."""
    named = Counter(r.monitor for r in records if r.config)
    monitor = str(record.get("monitor") or next(iter(named.most_common(1)), ("val/loss_nats",))[0])
    own = [r for r in records if r.monitor == monitor]
    lists = [listed for r in own if isinstance(listed := r.config.get("task.metrics"), list)]
    paths = [str(path) for listed in lists for path in listed]
    metric = named_metric(monitor, paths)
    told = {str(mode) for mode in (record.get("mode"), *(r.config.get("trainer.mode") for r in own))} & {"min", "max"}
    if asked is Mode.auto and declared(metric) is None and len(told) == 1:
        asked = Mode(told.pop())
    lower = mode_of(metric, monitor, asked, key="mode") is Mode.min
    for run in own:  # runs of a version that took trainer.mode=min for granted
        if run.config.get("trainer.mode") == ("max" if lower else "min"):
            worst = "lowest" if run.config["trainer.mode"] == "min" else "highest"
            run.faults.append(
                f"its trainer.mode={run.config['trainer.mode']} is the wrong way round for {monitor}: what it hands "
                f"over is of its {worst} validation, not of its best; train it again"
            )
    return monitor, lower


def _title(record: Mapping[str, Any], records: Sequence[RunRecord], sweep: Path | None) -> str:
    if record.get("name") or sweep is not None:
        return str(redact(str(record.get("name") or sweep.name if sweep else record.get("name"))))
    return records[0].name if len(records) == 1 else f"{len(records)} runs"


def _ended(
    trials: Sequence[Any], record: Mapping[str, Any], sweep: Path | None, by_path: Mapping[Path, RunRecord]
) -> dict[Path, str]:
    """Runs that were stopped on purpose, with a word on why: their metric is not that of a whole run."""
    found = {}
    for trial in trials:
        if trial.get("status") in ("pruned", "twin", "stopped") and sweep is not None:
            path = trial_directory(trial, record, sweep)
            if path is not None:
                why = f": {trial['error']}" if trial.get("error") else ""
                found[path.resolve()] = str(redact(f"{_trial_name(trial)} ({trial['status']}{why})"))
    for place, run in by_path.items():
        if run.status in ("stopped", "pruned", "twin"):
            found.setdefault(place, f"{run.name} ({run.status})")
    return found


def _own_commands(
    trials: Sequence[Any], record: Mapping[str, Any], sweep: Path | None, by_path: Mapping[Path, RunRecord]
) -> None:
    """A run's record may hold the command of the whole sweep; the sweep's holds that of the trial alone."""
    for trial in trials:
        path = trial_directory(trial, record, sweep) if sweep is not None else None
        run = by_path.get(path.resolve()) if path is not None else None
        if run is not None and trial.get("command"):
            run.command = str(redact(str(trial["command"])))


def _trial_name(trial: Mapping[str, Any]) -> str:
    overrides = trial.get("overrides")
    if isinstance(overrides, list) and overrides:
        return " ".join(str(override) for override in overrides)
    return Path(str(trial.get("run") or f"trial {trial.get('number', '?')}")).name


def _failures(
    trials: Sequence[Any],
    record: Mapping[str, Any],
    sweep: Path | None,
    records: Sequence[RunRecord],
    by_path: Mapping[Path, RunRecord],
    ended: Mapping[Path, str],
) -> list[Failure]:
    found, told = [], set()
    for trial in trials:
        path = trial_directory(trial, record, sweep) if sweep is not None else None
        place = path.resolve() if path is not None else None
        status = str(trial.get("status") or "unknown")
        run = by_path.get(place) if place is not None else None
        if status == "done" and (run is None or run.status == "done"):
            if run is None:
                found.append(_failure(trial, "missing", f"{trial.get('run')} is not there any more", run))
            continue
        if place is not None:
            told.add(place)
        if place in ended or (run is not None and run.status == "done"):
            continue  # finished since, by another sweep or by hand
        found.append(_failure(trial, status, None, run))
    for run in records:
        place = run.directory.resolve()
        if place not in told and place not in ended and run.status != "done":
            found.append(_failure({}, run.status, None, run))
    return found


def _failure(trial: Mapping[str, Any], status: str, cause: str | None, run: RunRecord | None) -> Failure:
    told = cause or trial.get("error") or (run.error if run is not None else None)
    told = told or trial.get("cause") or UNFINISHED.get(run.status if run is not None else status)
    told = told or ("; ".join(run.faults) if run is not None and run.faults else "no cause was recorded")
    command = str(trial.get("command") or (run.command if run is not None else ""))
    name = _trial_name(trial) if trial else (run.name if run is not None else "?")
    log = trial.get("log") or (str(run.directory / "log.txt") if run is not None else None)
    name, status, told, command = redact([name, status, str(told), command])
    return Failure(name, status, told, command, str(redact(str(log))) if log else None)


# What was varied.


@functools.cache
def fields_not_in_key() -> frozenset[str]:
    """Dotted keys of fields that cannot change a run's numbers; below a group that is one, all of them."""
    from llmft.config.convert import dataclass_of
    from llmft.config.sections import TrainConfig

    found: set[str] = set()

    def walk(schema: type, prefix: str) -> None:
        for entry in dataclasses.fields(schema):
            kind = dataclass_of(entry.type, schema)
            if entry.metadata.get("not_in_key"):
                found.add(f"{prefix}{entry.name}")
            elif kind is not None:
                walk(kind, f"{prefix}{entry.name}.")

    walk(TrainConfig, "")
    return frozenset(found)


def _is_aside(key: str) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:end]) in fields_not_in_key() for end in range(1, len(parts) + 1))


def _identity(run: RunRecord) -> dict[str, str]:
    """All that can change the run's numbers, replications included, and the names of its groups."""
    values = {key: show(value) for key, value in run.config.items() if not _is_aside(key)}
    for names in CONTENT.values():
        for name in names:
            values.pop(name, None)
    for group in NAMED:
        if f"{group}.name" in run.config:
            values[group] = show(run.config[f"{group}.name"])
    for group, fingerprint in zip(CONTENT, run.content, strict=True):
        if fingerprint:
            values[f"{group} content"] = fingerprint[:8]
    return values


def varied_keys(runs: Sequence[RunRecord], swept: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """(keys that were varied, replications left out; what follows from them: key -> the one it follows).

    A group with a name stands for its keys as long as these say no more; of keys that change together, those that the
    sweep names come first, then names of groups, then single values in the config's order.
    """
    tables = [_identity(run) for run in runs]
    every = list(dict.fromkeys(key for table in tables for key in table))
    differ = [key for key in every if len({table.get(key) for table in tables}) > 1 and key not in REPLICATIONS]
    order = [key for key in swept if key in differ]
    order += [key for key in NAMED if key in differ and key not in order]
    order += [key for key in differ if key not in order and not key.endswith(" content")]
    order += [key for key in differ if key not in order]
    kept: list[str] = []
    follows: dict[str, str] = {}
    for key in order:
        told = [*kept, *REPLICATIONS] if key.endswith(" content") else kept
        if _follows(tables, key, told):
            single = next((other for other in kept if _follows(tables, key, [other])), "several")
            follows[key] = single
        else:
            kept.append(key)
    return kept, follows


def _follows(tables: Sequence[Mapping[str, str]], key: str, known: Sequence[str]) -> bool:
    seen: dict[tuple[Any, ...], Any] = {}
    return all(
        seen.setdefault(tuple(table.get(other) for other in known), table.get(key)) == table.get(key)
        for table in tables
    )


def show(value: Any) -> str:
    """A config's value as a person writes it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}" if abs(value) < 1e6 else f"{value:.6g}"
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False, sort_keys=True)
    return str(value)


def sorted_values(values: set[str]) -> list[str]:
    """Numbers by size, then words by letter."""

    def place(value: str) -> tuple[int, float, str]:
        try:
            return 0, float(value), value
        except ValueError:
            return 1, 0.0, value

    return sorted(values, key=place)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last part, or whole where two end alike."""
    last = Counter(key.rpartition(".")[2] for key in keys)
    return {key: tail if last[tail := key.rpartition(".")[2]] == 1 else key for key in keys}


def _configurations(runs: Sequence[RunRecord], keys: Sequence[str], monitor: str, lower: bool) -> list[Configuration]:
    short = short_names(keys)
    groups: dict[tuple[str, ...], list[RunRecord]] = {}
    tables = {id(run): _identity(run) for run in runs}
    for run in runs:
        groups.setdefault(tuple(tables[id(run)].get(key, "unset") for key in keys), []).append(run)
    made = []
    for values, members in groups.items():
        name = ", ".join(f"{short[key]}={_clip(value)}" for key, value in zip(keys, values, strict=True))
        members.sort(key=lambda run: (run.part, run.seed, run.name))
        name = name or (members[0].name if len(members) == 1 else "all runs")
        made.append(Configuration(name, dict(zip(keys, values, strict=True)), members))
    _tell_apart(made)
    made.sort(key=lambda c: c.sample(monitor).mean * (1 if lower else -1))
    return made


def _count_lost(found: Sequence[Configuration], keys: Sequence[str], runs: Sequence[RunRecord]) -> None:
    of_values = {tuple(c.values.values()): c for c in found}
    for run in runs:
        table = _identity(run)
        owner = of_values.get(tuple(table.get(key, "unset") for key in keys))
        done = owner is not None and any((own.seed, own.part) == (run.seed, run.part) for own in owner.runs)
        if owner is not None and run.config and not done:
            owner.lost += 1


def _tell_apart(made: Sequence[Configuration]) -> None:
    """Clipped values may read alike: a number tells them apart."""
    seen = Counter(c.name for c in made)
    count: Counter[str] = Counter()
    for configuration in made:
        if seen[name := configuration.name] > 1:
            count[name] += 1
            configuration.name = f"{name} ({count[name]})"


def _clip(value: str, most: int = 40) -> str:
    line = " ".join(value.split())
    return line if len(line) <= most else f"{line[: most - 1]}…"
