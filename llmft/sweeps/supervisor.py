"""Runs trials in worker processes, so that a crash costs one trial only."""

from __future__ import annotations

import json
import os
import re
import select
import signal
import threading
import time
from collections import Counter
from typing import Any, Protocol

from llmft.config.convert import to_plain
from llmft.config.fields import seconds_of
from llmft.core.errors import ConfigError, Interrupted
from llmft.core.machine import allotted_cores, available_memory, visible_gpus
from llmft.sweeps.process import WorkerProcess, WorkerResources, divide_machine, how_it_died
from llmft.sweeps.progress import SweepProgress
from llmft.sweeps.remote import LOST, NO_CLUSTER, answers, cluster_workers
from llmft.sweeps.trials import FINISHED, Sweep, Trial, refuse, value_of

START_S = 600.0
"""How long a worker may take to import its libraries (slow from a cold network disk)."""
GRACE_S = 60.0
"""How long a worker may take to save when asked to stop."""
EXIT_S = 20.0
"""How long a worker may take to exit by itself."""
WORKER_BYTES = 2 * 2**30
"""Memory needed for each of several workers; their libraries take a quarter of it."""
BUSY_AGAIN_S = 3.0
"""After how long a trial that another process is training is checked again."""


class Source(Protocol):
    """A source of trials: a grid or a search."""

    def next(self) -> Trial | None:
        """A trial to run now; None if there is none yet."""

    def over(self) -> bool:
        """Whether no more trials will follow once the running ones have ended."""

    def ended(self, trial: Trial) -> None:
        """Called when a trial has ended, whatever its status."""

    def decide(self, trial: Trial, step: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """Called after a validation; (status, reason) to end the trial here, else None."""


class BusyTrials:
    """Trials that another process is training; each is checked again after `BUSY_AGAIN_S`."""

    def __init__(self) -> None:
        self._not_before: dict[int, float] = {}

    def has(self, trial: Trial) -> bool:
        """Whether another process is training the trial, or was at the last check."""
        if self._not_before.get(trial.number, 0.0) > time.monotonic():
            return True
        if trial.run.busy:
            trial.status = "busy"
            self.add(trial)
            return True
        return False

    def add(self, trial: Trial) -> None:
        """Postpones a trial that another process is training."""
        self._not_before[trial.number] = time.monotonic() + BUSY_AGAIN_S


class Supervisor:
    """Assigns trials to workers and monitors them.

    Attributes:
        stopped_because: why the sweep ended early; None for a complete one.
    """

    def __init__(self, sweep: Sweep, progress: SweepProgress) -> None:
        self.sweep = sweep
        self.settings = sweep.config.sweep
        self.progress = progress
        self.stopped_because: str | None = None
        self.pending_signal = 0
        self._processes: list[WorkerProcess] = []
        self._same_error: tuple[str, int] = ("", 0)
        self._reported_busy: set[int] = set()
        self._lost: Counter[int] = Counter()
        self._remote: tuple[str, ...] | None = None
        limits = (self.settings.time_limit, self.settings.heartbeat_timeout)
        self._longest_s, self._silence_s = (None if each is None else seconds_of(each, "sweep") for each in limits)

    # ------------------------------------------------------------------------------------------------ the loop

    def run(self, source: Source, *, check: list[Trial], workers: int) -> None:
        """Runs the trials of `source` on `workers` processes, after one of them has checked the trials in `check`.

        Raises ConfigError, before any trial starts, if one cannot run; Interrupted when a signal ends the sweep.
        """
        if os.name == "nt":
            raise ConfigError("-m: Windows has no signals to stop a trial with; run sweeps in WSL2.")
        remote = self._remote is not None
        resources = [WorkerResources(remote=self._remote)] * workers if remote else divide_machine(workers)
        if workers > 1 and self.settings.workers == "auto":
            self.progress.say(f"{workers} trials at a time (sweep.workers=1 for one).")
        before = self._take_signals()
        self.progress.start()
        try:
            for slot, allotted in enumerate(resources):
                self._processes.append(self._start(slot, allotted))
            self._check(check)
            while any(p.trial for p in self._processes) or not (self._ending or source.over()):
                self._assign_trials(source, resources)
                self._read_events(source)
                self._enforce_timeouts()
        finally:
            for process in self._processes:
                process.close()
            self._wait_for_exits()
            self.progress.stop()
            for signum, handler in before.items():
                signal.signal(signum, handler)
            self.sweep.write()
        if self.pending_signal:
            raise Interrupted("interrupted; the same command runs the missing trials.", self.pending_signal)

    @property
    def _ending(self) -> bool:
        """Whether no more trials are started."""
        return self.stopped_because is not None or self.pending_signal > 0

    def count_workers(self, trials: list[Trial], at_most: int, *, grid: bool = False) -> int:
        """The number of worker processes to start.

        The suggestions of a search depend on it, so only a grid uses all available cores by default.
        """
        wanted, ray = self.settings.workers, self.settings.ray
        if ray.address is not None:
            if any(trial.distributed for trial in trials):
                raise ConfigError("hydra/launcher=ray: a trial on several devices is started by torchrun or SLURM.")
            room, gpus, head = cluster_workers(ray.address, ray.gpus_per_worker, wanted)
            self._remote = (head, f"{gpus}", self.sweep.config.output_dir, json.dumps(ray.shared_files))
            return max(1, min(room, at_most))
        count = (
            int(wanted) if wanted != "auto" else len(visible_gpus()) or (self._parallel_workers(trials) if grid else 1)
        )
        if count > 1 and any(trial.distributed for trial in trials):
            self.progress.say("trials on several devices run one at a time.")
            return 1
        return max(1, min(count, at_most))

    def _parallel_workers(self, trials: list[Trial]) -> int:
        """Workers on a machine without GPUs: one per core if trials are single-threaded, as far as memory allows."""
        if not all(trial.single_threaded for trial in trials):
            return 1
        memory, cores = available_memory(), allotted_cores()
        return cores if memory is None else max(1, min(cores, memory // WORKER_BYTES))

    def _check(self, trials: list[Trial]) -> None:
        """Lets a worker build every trial's parts that need no weights; raises ConfigError if one cannot be built."""
        worker = self._processes[0]
        # If the check hangs it is skipped; the trial's own timeout applies then.
        limit = max(START_S, self._silence_s or 0.0)
        while not worker.ready and worker.process.poll() is None and not self.pending_signal:
            self._wait([worker])
            worker.ready = any(event["event"] == "ready" for event in worker.events())
            if time.monotonic() - worker.since > limit:
                worker.signal(signal.SIGKILL)
        started = time.monotonic()
        worker.order(do="check", configs={trial.number: to_plain(trial.config) for trial in trials})
        while worker.process.poll() is None and not self.pending_signal:
            self._wait([worker])
            if self._silence_s is not None and time.monotonic() - started > self._silence_s:
                worker.signal(signal.SIGKILL)
            for event in worker.events():
                if event["event"] == "checked":
                    by_number = {trial.number: trial for trial in trials}
                    wrong = event["wrong"].items()
                    refuse([(by_number[int(n)].overrides, ConfigError(message)) for n, message in wrong], len(trials))
                    return

    # ------------------------------------------------------------------------------------------------ its parts

    def _start(self, slot: int, resources: WorkerResources, trial: Trial | None = None) -> WorkerProcess:
        return WorkerProcess.start(self.sweep.directory / f"worker-{slot}.log", resources, trial)

    def _assign_trials(self, source: Source, resources: list[WorkerResources]) -> None:
        """Gives each free worker a trial."""
        for slot, allotted in enumerate(resources):
            worker = self._processes[slot]
            if self._ending or not self._free(worker) or (trial := self._next(source)) is None:
                continue
            trial.status, trial.log = "running", trial.run.log_file
            self.progress.begins(trial)
            self.sweep.write()
            if trial.distributed or worker.process.poll() is not None:
                worker.close()
                worker.process.wait()
                self._processes[slot] = self._start(slot, allotted, trial)
            else:
                worker.train(trial)

    def _free(self, worker: WorkerProcess) -> bool:
        """Whether a worker, or its replacement if it has exited, can take a trial."""
        code = worker.process.poll()
        if code == LOST and any(other.process.poll() is None for other in self._processes):
            return False  # the cluster is smaller now: a replacement might wait forever for room
        return worker.idle if code is None else worker.trial is None  # else its exit is still to be handled

    def _next(self, source: Source) -> Trial | None:
        """The next unfinished trial."""
        while (trial := source.next()) is not None:
            if not trial.finished_before():
                return trial
            self.progress.finished_before(trial)
            source.ended(trial)
        for busy in self.sweep.trials:
            if busy.status == "busy" and busy.number not in self._reported_busy:
                self._reported_busy.add(busy.number)
                self.progress.waits(busy)
        return None

    def _wait(self, processes: list[WorkerProcess]) -> None:
        handles = [process.events_fd for process in processes if process.process.poll() is None]
        if handles:
            select.select(handles, [], [], 0.25)
            # A pipe whose writer has exited stays readable until the process is reaped.
            time.sleep(0.002)
        else:
            time.sleep(0.05)

    def _read_events(self, source: Source) -> None:
        self._wait(self._processes)
        for worker in self._processes:
            code = worker.process.poll()  # before reading, so that no event sent before the exit is missed
            for event in worker.events():
                self._handle_event(worker, event, source)
            if code is not None and worker.trial is not None:
                self._died(worker, worker.trial, code, source)

    def _handle_event(self, worker: WorkerProcess, event: dict[str, Any], source: Source) -> None:
        kind = event["event"]
        if kind == "ready":
            worker.ready = True
            if worker.trial is not None:
                worker.train(worker.trial)
            return
        trial = worker.trial
        if trial is None:
            return
        if kind == "step":
            self.progress.step(trial, event)
        elif kind == "validation":
            self.progress.validation(trial, event)
            if event["asks"]:
                worker.order(do="answer", stop=source.decide(trial, event["step"], event["metrics"]))
        elif kind == "end":
            trial.value = event["value"]
            trial.mark(event["status"], event["error"], event["cause"])
            if event["status"] == "interrupted" and worker.stopping not in (None, "signal"):
                self._overdue(worker, trial)
            worker.exiting, worker.exiting_since = worker.exiting or not event["sound"], time.monotonic()
            if worker.stopping is not None:
                # The trial ended before the signal arrived: the worker would wait for orders forever.
                worker.exiting = True
                worker.signal(signal.SIGKILL)
            self._ended(worker, trial, source)

    def _died(self, worker: WorkerProcess, trial: Trial, code: int, source: Source) -> None:
        """Handles a process that exited during its trial, or after a distributed one."""
        status = trial.run.status()
        if trial.distributed and code == 0 and trial.run.done:
            trial.status = "done"
            trial.value = value_of(status, trial.config.trainer.monitor)
        elif worker.stopping == "signal":
            trial.mark("interrupted", "the sweep was interrupted")
        elif worker.stopping is not None:
            self._overdue(worker, trial)
        elif code == NO_CLUSTER or (self._remote is not None and not answers(self._remote[0])):
            self.stopped_because = "the Ray cluster no longer responds"
            trial.mark("interrupted", self.stopped_because)
        elif code == LOST and self._lost[trial.number] < self.settings.ray.retries:
            self._lost[trial.number] += 1
            self.progress.say(f"{trial.label}: its machine was lost; resuming elsewhere from the checkpoint.")
            trial.status = "pending"
        elif trial.distributed and status.get("status") in ("failed", "diverged") and status.get("error"):
            trial.mark("failed", status["error"], "error")
        else:
            trial.mark("failed", *how_it_died(code))
        if trial.status == "failed" and trial.run.directory.is_dir() and not trial.run.busy:
            trial.run.update(status="failed", error=trial.error)  # its own process could not
        self._ended(worker, trial, source)

    def _overdue(self, worker: WorkerProcess, trial: Trial) -> None:
        why = str(worker.stopping)
        trial.mark("failed", why, "time" if "sweep.time_limit" in why else "silence")

    def _ended(self, worker: WorkerProcess, trial: Trial, source: Source) -> None:
        worker.trial = None
        if trial.log is None or not trial.log.exists():
            trial.log = worker.log
        trial.seconds = round(time.monotonic() - worker.since, 1)
        self.progress.ended(trial)
        self.count_errors(trial)
        source.ended(trial)
        self.sweep.write()

    def count_errors(self, trial: Trial) -> None:
        if trial.status != "failed" or self.settings.stop_after_same_error is None:
            return
        if any(other.status in FINISHED for other in self.sweep.trials):  # now or in an earlier sweep
            return
        # The same error contains other numbers and paths in each trial.
        form = re.sub(r"[0-9a-f]{10}|\d+(\.\d+)?(e-?\d+)?", "#", str(trial.error))
        known, count = self._same_error
        count = count + 1 if form == known else 1
        self._same_error = (form, count)
        if count >= self.settings.stop_after_same_error:
            self.stopped_because = (
                f"{count} trials in a row failed with the same error and none succeeded, so the rest was not started "
                "(sweep.stop_after_same_error)"
            )

    def _enforce_timeouts(self) -> None:
        """Stops workers that take too long, and all workers after a signal."""
        now, longest, silence = time.monotonic(), self._longest_s, self._silence_s
        grace = min([GRACE_S, *(limit for limit in (longest, silence) if limit is not None)])
        for worker in self._processes:
            if worker.process.poll() is not None:
                continue
            if worker.trial is None:
                if worker.exiting and now - worker.exiting_since > EXIT_S:
                    worker.signal(signal.SIGKILL)  # a library's thread keeps it alive
                continue
            if self.pending_signal:
                worker.stop("signal")
            elif longest is not None and now - worker.since > longest:
                worker.stop(f"took longer than sweep.time_limit={self.settings.time_limit}")
            elif silence is not None and now - worker.last_sign > (silence if worker.ready else max(silence, START_S)):
                worker.stop(f"no sign of life for sweep.heartbeat_timeout={self.settings.heartbeat_timeout}")
            if worker.stopping is not None and now - worker.stopping_since > grace:
                worker.signal(signal.SIGKILL)

    # ------------------------------------------------------------------------------------------------ signals, end

    def _take_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        kinds = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        # Signals that the caller ignores stay ignored, as under `nohup`.
        handled = [signum for signum in kinds if signal.getsignal(signum) is not signal.SIG_IGN]
        return {signum: signal.signal(signum, self._on_signal) for signum in handled}

    def _on_signal(self, signum: int, frame: Any) -> None:
        if self.pending_signal:  # the second signal stops at once
            for process in self._processes:
                process.signal(signal.SIGKILL)
            return
        self.pending_signal = signum
        self.progress.say("stopping: running trials save first (a second signal stops at once).")

    def _wait_for_exits(self) -> None:
        """Waits for idle workers, which exit when their orders are closed; kills those that do not."""
        deadline = time.monotonic() + GRACE_S
        for worker in self._processes:
            while worker.process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.02)
            if worker.process.poll() is None:
                worker.signal(signal.SIGKILL)
                worker.process.wait()
