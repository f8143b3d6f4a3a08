"""The trials of a sweep, planned before the first starts, and their record in the sweep's directory."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from llmft.config.convert import canonical, digest_of, to_plain
from llmft.config.invocation import Invocation
from llmft.config.sections import TrainConfig
from llmft.core.errors import ConfigError, DataError, UserError
from llmft.core.files import write_json
from llmft.core.machine import sensible_threads
from llmft.core.redaction import redact
from llmft.data.hub import Located, weight_bytes
from llmft.metrics.monitor import with_mode
from llmft.reports.read import read_dictionary
from llmft.runs.directory import Run, existing_run, unwritable
from llmft.runs.key import run_key
from llmft.runs.naming import slug
from llmft.training.prepare import prepare

FINISHED = ("done", "twin", "pruned")
"""Statuses of a trial that its sweep does not run again ("twin": ended by sweep.early_stop_if_same_as)."""


@dataclass
class Trial:
    """One combination of a sweep: its config and its run.

    Attributes:
        overrides: those in which it differs from the sweep's other trials.
        arguments: its complete command line after `python -m llmft`.
        status: pending, running, done, failed, interrupted, pruned, twin or busy (another process is training it).
        cause: what ended a trial that failed: error, exit, signal, time, silence.
        num_labels: number of classes in its data, for a base with a head.
        weight_bytes: size of its model's files; None if there are none.
    """

    number: int
    overrides: list[str]
    arguments: list[str]
    config: TrainConfig
    key: str
    run: Run
    status: str = "pending"
    error: str | None = None
    cause: str | None = None
    value: float | None = None
    seconds: float | None = None
    log: Path | None = None
    num_labels: int = 0
    weight_bytes: int | None = None

    @property
    def command(self) -> str:
        """The command that runs this trial alone."""
        arguments = [argument.removeprefix("++") for argument in self.arguments]
        return shlex.join(["python", "-m", "llmft", *redact(arguments)])

    @property
    def label(self) -> str:
        """Its overrides, or the name of its run."""
        return " ".join(self.overrides) or self.run.directory.name

    @property
    def base(self) -> str:
        """Equal for trials that share a loaded, quantised base."""
        config = self.config
        labels = self.num_labels if config.task.auto_class == "sequence_classification" else 0
        return canonical(
            to_plain([config.model, config.quantization, config.trainer.precision, config.task.auto_class, labels])
        )

    @property
    def single_threaded(self) -> bool:
        """Whether it computes on a single CPU thread."""
        trainer = self.config.trainer
        if trainer.accelerator not in ("auto", "cpu"):
            return False
        if trainer.threads is not None or self.weight_bytes is None:
            return trainer.threads == 1
        # Files have at least two bytes per weight, so the number of weights is never underestimated.
        return sensible_threads(self.weight_bytes // 2) == 1

    @property
    def distributed(self) -> bool:
        """Whether the trial itself needs several processes."""
        trainer = self.config.trainer
        return trainer.devices != 1 or trainer.num_nodes != 1

    def finished_before(self) -> bool:
        """Whether an earlier run finished this trial; sets its status and value then."""
        if self.config.force:
            return False
        status = self.run.status()
        if self.run.done:
            self.status, self.value = "done", value_of(status, self.config.trainer.monitor)
            self.seconds = status.get("result", {}).get("seconds")
        elif status.get("status") == "twin" and self.config.sweep.early_stop_if_same_as is not None:
            self.status, self.error = "twin", status.get("error")
        return self.status in FINISHED

    def mark(self, status: str, error: str | None, cause: str | None = None) -> None:
        self.status, self.error, self.cause = status, error, cause


def value_of(status: dict[str, Any], monitor: str) -> float | None:
    """The monitored metric in a run's status; None for a run without a result."""
    return status.get("result", {}).get("after", {}).get(monitor)


class Planner:
    """Composes combinations into trials; reads each dataset and locates each model once."""

    def __init__(
        self,
        compose: Callable[[Sequence[str]], TrainConfig],
        explain: Callable[[Exception], Exception],
        invocation: Invocation,
    ) -> None:
        self.compose = compose
        self.explain = explain
        self.invocation = invocation
        self._prepared: dict[str, tuple[str, Located, int, int | None]] = {}

    def plan(self, jobs: Sequence[Sequence[str]]) -> list[Trial]:
        """One trial for each list of overrides, all of them checked.

        Raises ConfigError (or DataError) naming every combination that cannot run.
        """
        keys = varying(jobs)
        varied = [[override for override in job if override.partition("=")[0] in keys] for job in jobs]
        return plan_all(varied, lambda index: self.trial(index, jobs[index], varied[index]))

    def trial(self, number: int, overrides: Sequence[str], varied: Sequence[str]) -> Trial:
        """The trial of one combination; raises UserError for one that cannot run."""
        try:
            config = with_mode(self.compose(overrides))
        except Exception as error:
            raise self.explain(error) from None
        key = canonical(to_plain([config.data, config.model, config.task]))
        if key not in self._prepared:
            try:
                prepared = prepare(config, open_directory=False)
            except SystemExit as error:  # else the whole sweep would exit here
                raise DataError(f"something called sys.exit({error.code}) while the data was read.") from None
            size = weight_bytes(prepared.located)
            self._prepared[key] = (prepared.data_fingerprint, prepared.located, len(prepared.labels), size)
        fingerprint, located, num_labels, size = self._prepared[key]
        run = existing_run(config, run_key(config, fingerprint, located.fingerprint))
        # Options with their values, such as --config-dir DIR, except those for a multirun.
        options = [a for a in self.invocation.argv if a.startswith("-") or "=" not in a]
        arguments = [a for a in options if a not in ("-m", "--multirun")] + [*overrides]
        if any(o.startswith(("+sweep=", "+optuna=")) for o in overrides):
            arguments.append("hydra.mode=RUN")  # else the file in sweeps/ would start a sweep again
        shown = [override.lstrip("+") for override in varied]
        return Trial(number, shown, arguments, config, run.key, run, num_labels=num_labels, weight_bytes=size)


def plan_all(combinations: Sequence[Sequence[str]], make: Callable[[int], Trial]) -> list[Trial]:
    """`make(number)` for each combination; raises one UserError that names all combinations that cannot run."""
    trials: list[Trial] = []
    wrong: list[tuple[Sequence[str], UserError]] = []
    for number, overrides in enumerate(combinations):
        try:
            trials.append(make(number))
        except UserError as error:
            wrong.append((overrides, error))
    refuse(wrong, len(combinations))
    return trials


def refuse(wrong: Sequence[tuple[Sequence[str], UserError]], count: int) -> None:
    """Raises one error for all combinations that cannot run, if there are any."""
    if not wrong:
        return
    kind = type(wrong[0][1])
    by_message: dict[str, list[str]] = {}
    for overrides, error in wrong:
        by_message.setdefault(str(error), []).append(" ".join(overrides) or "every combination")
    lines = [
        f"  {labels[0]}{f' and {len(labels) - 1} more' if labels[1:] else ''}: {m}" for m, labels in by_message.items()
    ]
    more = [f"  and {len(lines) - 10} other errors"] if len(lines) > 10 else []
    text = f"{len(wrong)} of {count} combinations cannot run, so none was started:"
    raise kind("\n".join([text, *lines[:10], *more]))


def varying(jobs: Sequence[Sequence[str]]) -> set[str]:
    """The keys that do not have the same value in all jobs."""
    values: dict[str, set[str]] = {}
    for overrides in jobs:
        for override in overrides:
            key, _, value = override.partition("=")
            values.setdefault(key, set()).add(value)
    everywhere = {key for key in values if all(any(o.startswith(f"{key}=") for o in job) for job in jobs)}
    return {key for key, texts in values.items() if len(texts) > 1 or key not in everywhere}


@dataclass
class Sweep:
    """A sweep's directory and record; `extra` are further entries of the record."""

    directory: Path
    identity: str
    trials: list[Trial]
    swept: dict[str, list[str]]
    command: str
    created: str = field(default_factory=lambda: time.strftime("%Y-%m-%d %H:%M:%S"))
    finished: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    sample: Trial | None = None

    @property
    def name(self) -> str:
        """The name of its directory, also its group in Weights & Biases."""
        return self.directory.name

    @property
    def config(self) -> TrainConfig:
        """A config with the settings common to all trials: of `sample` if there is one, else of the first trial."""
        return (self.sample or self.trials[0]).config

    @property
    def record_file(self) -> Path:
        """The record of all trials and their results."""
        return self.directory / "sweep.json"

    def add(self, trial: Trial) -> None:
        """Adds a trial, also to the sweep's group in Weights & Biases."""
        trial.config.logger.wandb.group = trial.config.logger.wandb.group or self.name
        self.trials.append(trial)

    def write(self) -> None:
        config = self.config
        record = {
            "name": self.name,
            "identity": self.identity,
            "question": config.sweep.question,
            "notes": config.notes,
            "command": self.command,
            "created": self.created,
            "finished": self.finished,
            "output_dir": config.output_dir,
            "monitor": config.trainer.monitor,
            "mode": config.trainer.mode.value,
            "looks": config.sweep.declared_looks,
            "smallest_difference": config.sweep.smallest_difference,
            "swept": self.swept,
            **self.extra,
            "trials": [self._trial_record(trial) for trial in self.trials],
        }
        write_json(self.record_file, redact(record))

    def _trial_record(self, trial: Trial) -> dict[str, Any]:
        return {
            "number": trial.number,
            "overrides": trial.overrides,
            "key": trial.key,
            "run": str(trial.run.directory.relative_to(trial.config.output_dir)),
            "status": "interrupted" if trial.status == "running" else trial.status,
            "error": trial.error,
            "cause": trial.cause,
            "value": trial.value,
            "seconds": trial.seconds,
            "command": trial.command,
            "log": str(trial.log) if trial.log else None,
        }


def open_sweep(trials: list[Trial], swept: dict[str, list[str]], fixed: Sequence[str], command: str) -> Sweep:
    """The sweep with these trials; the same command always gives the same directory.

    Raises ConfigError if sweep.name belongs to another sweep already.
    """
    config = trials[0].config
    identity = identity_of(swept, fixed)
    root = Path(config.output_dir) / "sweeps"
    if config.sweep.name:
        directory = root / slug(redact(config.sweep.name))[:80]
    else:
        directory = root / f"{slug('_x_'.join(key.rpartition('.')[2] for key in swept) or 'runs')[:60]}-{identity}"
    sweep = Sweep(directory, identity, [], swept, command)
    for trial in trials:
        sweep.add(trial)
    record = read_dictionary(sweep.record_file, [])
    if record and record.get("identity") != identity:
        other, this = (
            f"{' x '.join(keys) or 'no varied keys'}, {count} trials"
            for keys, count in ((record.get("swept", {}), len(record.get("trials", []))), (swept, len(trials)))
        )
        raise ConfigError(
            f"{directory} contains another sweep ({other}), not this one ({this}): set another sweep.name."
        )
    sweep.created = record.get("created", sweep.created)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise unwritable(f"output_dir={config.output_dir}", error) from None
    return sweep


def identity_of(swept: dict[str, list[str]], fixed: Sequence[str]) -> str:
    """Eight hex digits that identify a sweep; settings that do not change its numbers are left out."""
    names = [entry.name for entry in fields(TrainConfig) if entry.metadata.get("not_in_key")]
    ignored = tuple(f"{name}{end}" for name in names for end in ".=")
    identifying = sorted(o for o in (override.lstrip("+") for override in fixed) if not o.startswith(ignored))
    return digest_of([{key: sorted(values) for key, values in swept.items()}, identifying])[:8]
