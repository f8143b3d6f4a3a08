"""Trains a config to a finished run directory: called by notebooks, commands and sweep workers.

torch is imported only after config and rows are checked: a mistake, or a finished run, shows in about a second.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import replace
from typing import TYPE_CHECKING

from llmft.config.invocation import NO_COMMAND, Invocation
from llmft.core.errors import DivergedError, Interrupted, Stopped, one_line
from llmft.core.outcome import write_outcome

if TYPE_CHECKING:
    from llmft.config.sections import TrainConfig
    from llmft.core.console import Screen
    from llmft.runs.directory import Run
    from llmft.training.prepare import RunInputs
    from llmft.training.trial_reporter import TrialReporter


def train(
    config: TrainConfig,
    *,
    quiet: bool = False,
    reporter: TrialReporter | None = None,
    invocation: Invocation = NO_COMMAND,
) -> float | None:
    """Trains `config`, or finds its finished run; returns the monitored metric.

    `reporter` receives steps and validations and may end the run after a validation; `invocation` (the command that
    resumes the run, and its overrides) is kept in the run's record.

    Raises UserError for what the user can fix; any other exception is a defect.
    """
    from llmft.config.instantiate import trust
    from llmft.core.console import Screen
    from llmft.core.imports import restore_messages
    from llmft.core.machine import die_with_parent
    from llmft.training.prepare import prepare, process_rank

    trust(config.trusted_packages)
    rank = process_rank(config)
    screen = Screen(quiet=quiet or rank > 0)
    inputs = prepare(config)
    run = inputs.run
    if rank > 0:
        die_with_parent()
        # Every process decides alike: a finished run needs no process.
        return None if run.done and not config.force else _train(inputs, screen, None, invocation)
    if run.done and not config.force:
        return _report_done(run, config, screen)
    run.lock()
    try:
        if run.done and not config.force:
            return _report_done(run, config, screen)
        _begin(run, config, screen, invocation)
        try:
            value = _train(inputs, screen, reporter, invocation)
            write_outcome(run.directory)
            return value
        except BaseException as error:
            screen.log_error(error)
            _record_failure(run, error)
            raise
    finally:
        screen.close_log()
        run.unlock()
        if invocation is NO_COMMAND:  # a notebook goes on with these libraries
            restore_messages()


def _begin(run: Run, config: TrainConfig, screen: Screen, invocation: Invocation) -> None:
    """Opens the record and the log of a run that this process has locked."""
    from rich.markup import escape

    if config.force and run.status():
        run.clear()
    run.clear_requests()
    run.update(
        status="running",
        key=run.key,
        command=invocation.command,
        overrides=list(invocation.overrides),
        notes=config.notes,
        tags=config.tags,
    )
    screen.open_log(run.log_file)
    if config.model.trust_remote_code:
        origin = config.model.path or f"{config.model.id} at {config.model.revision}"
        screen.print(f"[bold red]This run executes the Python code of {escape(origin)}.[/bold red]")


def _report_done(run: Run, config: TrainConfig, screen: Screen) -> float | None:
    from rich.markup import escape

    from llmft.config.data import TrainOn
    from llmft.metrics.show import show_summary

    write_outcome(run.directory)
    result = run.status().get("result", {})
    if os.environ.get("WANDB_SWEEP_ID"):  # a W&B agent waits for the numbers
        from llmft.training.tracking import report_to_agent

        report_to_agent(config, run, screen)
    screen.print(f"This run is done: [bold]{escape(str(run.directory))}[/bold] (force=true runs it again)")
    blank = config.data.train_on is TrainOn.all
    show_summary(screen, result.get("before", {}), result.get("after", {}), {}, result.get("chance", {}), blank=blank)
    return result.get("after", {}).get(config.trainer.monitor)


def _record_failure(run: Run, error: BaseException) -> None:
    status = "failed"
    if isinstance(error, Stopped):
        status = error.status
    elif isinstance(error, DivergedError):
        status = "diverged"
    elif isinstance(error, (Interrupted, KeyboardInterrupt)):
        status = "interrupted"
    # A full disk may fail here again; the error itself is raised anyway.
    with contextlib.suppress(OSError):
        run.update(status=status, error=one_line(error))


def _train(inputs: RunInputs, screen: Screen, reporter: TrialReporter | None, invocation: Invocation) -> float | None:
    """Trains with torch; repeats with smaller micro-batches where memory runs out."""
    from llmft.core.imports import load_libraries, quiet_warnings
    from llmft.core.machine import free_memory

    if inputs.config.model.architecture == "tfidf":
        from llmft.training.baseline import run_baseline

        with quiet_warnings():
            return run_baseline(inputs, screen)
    load_libraries()
    from llmft.training.out_of_memory import OutOfMemory, halve_micro_batch
    from llmft.training.session import run_session

    while True:
        rejected = list(inputs.problems.rejected)
        try:
            with quiet_warnings():
                return run_session(inputs, screen, reporter, invocation.command)
        except OutOfMemory as error:
            config, note = halve_micro_batch(inputs.config, error)
        # Here the error is gone, and with it the frames that referenced its tensors.
        free_memory()
        screen.warn(
            f"out of memory in {note['stage']}: going on with {note['key']}={note['to']}, the same effective batch."
        )
        inputs.run.update(out_of_memory=[*inputs.run.status().get("out_of_memory", []), note])
        inputs = replace(inputs, config=config, problems=replace(inputs.problems, rejected=rejected))
