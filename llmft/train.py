"""config -> run directory: `python -m llmft.train`, or `python -m llmft` for short.

Validates, fine-tunes, validates again, and returns the monitored metric, which a sweep optimises.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmft.core.errors import DivergedError, Interrupted, Stopped, UserError
from llmft.sweeps.worker import reporter_of_environment

if TYPE_CHECKING:
    from llmft.config.sections import TrainConfig
    from llmft.training.trial_reporter import TrialReporter


def main() -> None:
    """The command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # The W&B service of a program around this one writes below that one's directory, and ends with it.
    os.environ.pop("WANDB_SERVICE", None)
    # A character that the terminal cannot show must not end a training.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    from llmft.config.hydra_app import run_verb
    from llmft.config.sections import TrainConfig

    run_verb("train", TrainConfig, _train_composed, multirun=True)


def _train_composed(composed: Any) -> float | None:
    from llmft.config.hydra_app import config_of_command
    from llmft.config.sections import TrainConfig
    from llmft.core.machine import die_with_parent

    config = config_of_command(composed, TrainConfig)
    overrides = [argument.lstrip("+") for argument in sys.argv[1:] if "=" in argument]
    reporter = reporter_of_environment()
    if reporter is not None:
        die_with_parent(signal.SIGTERM)  # a trial whose supervisor was killed saves and lets its devices go
    return train(config, reporter=reporter, overrides=overrides)


def train(
    config: TrainConfig,
    *,
    quiet: bool = False,
    reporter: TrialReporter | None = None,
    overrides: Sequence[str] = (),
) -> float | None:
    """Trains what `config` says, or finds that it is done; returns the monitored metric.

    `reporter` is told of steps and validations and may end the run after one; `overrides` is what the user wrote.

    Raises UserError for what the user can mend; everything else is a defect.
    """
    from rich.markup import escape

    from llmft.config.hydra_app import command_line
    from llmft.config.instantiate import trust
    from llmft.core.console import Screen
    from llmft.core.machine import die_with_parent
    from llmft.training.prepare import prepare, process_rank

    trust(config.trusted_packages)
    rank = process_rank(config)
    screen = Screen(quiet=quiet or rank > 0)
    prepared = prepare(config)
    run = prepared.run
    if rank > 0:
        die_with_parent()
        # Every process decides alike: a finished run needs nobody.
        return None if run.done and not config.force else _train(prepared, screen, None)
    if run.done and not config.force:
        return _tell_done(run, config, screen)
    run.lock()
    try:
        if run.done and not config.force:
            return _tell_done(run, config, screen)
        if config.force and run.status():
            run.clear()
        run.clear_requests()
        run.update(
            status="running",
            key=run.key,
            command=command_line(),
            overrides=list(overrides),
            notes=config.notes,
            tags=config.tags,
        )
        screen.open_log(run.log_file)
        if config.model.trust_remote_code:
            where = config.model.path or f"{config.model.id} at {config.model.revision}"
            screen.print(f"[bold red]This run executes the Python code of {escape(where)}.[/bold red]")
        try:
            return _train(prepared, screen, reporter)
        except BaseException as error:
            screen.log_error(error)
            _record_failure(run, error)
            raise
    finally:
        screen.close_log()
        run.unlock()


def _tell_done(run: Any, config: TrainConfig, screen: Any) -> float | None:
    from rich.markup import escape

    from llmft.config.sections import TrainOn

    status = run.status()

    result = status.get("result", {})
    if os.environ.get("WANDB_SWEEP_ID"):
        from llmft.training.tracking import tell_agent

        tell_agent(config, run, screen)
    screen.print(f"This run is done: [bold]{escape(str(run.directory))}[/bold] (force=true runs it again)")
    blank = config.data.train_on is TrainOn.all
    screen.summary(result.get("before", {}), result.get("after", {}), {}, result.get("chance"), blank=blank)
    return result.get("after", {}).get(config.trainer.monitor)


def _record_failure(run: Any, error: BaseException) -> None:
    stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
    line = str(error).splitlines()[0] if str(error) else type(error).__name__
    kind = "interrupted" if stopped else "diverged" if isinstance(error, DivergedError) else "failed"
    kind = error.status if isinstance(error, Stopped) else kind
    # The disk that failed the run may not take the note either; the error itself is on its way out.
    with contextlib.suppress(OSError):
        run.update(status=kind, error=f"{'' if isinstance(error, UserError) else type(error).__name__ + ': '}{line}")


def _train(prepared: Any, screen: Any, reporter: TrialReporter | None) -> float | None:
    """Everything that needs torch; again with smaller micro-batches where memory does not suffice."""
    from llmft.core.imports import load_libraries, quiet_warnings

    if prepared.config.model.architecture != "tfidf":
        load_libraries()
    from llmft.training.out_of_memory import OutOfMemory, free_memory

    while True:
        rejected = list(prepared.problems.rejected)
        try:
            with quiet_warnings():
                return _train_once(prepared, screen, reporter)
        except OutOfMemory as error:
            smaller = _smaller(prepared, error, screen)
        # Here the error is gone, and with it the frames that held its tensors.
        free_memory()
        prepared = replace(smaller, problems=replace(prepared.problems, rejected=rejected))


def _smaller(prepared: Any, error: Any, screen: Any) -> Any:
    from llmft.training.out_of_memory import smaller

    config, note = smaller(prepared.config, error)
    screen.warn(
        f"out of memory in {note['stage']}: going on with {note['key']}={note['to']}, the same effective batch."
    )
    prepared.run.update(out_of_memory=[*prepared.run.status().get("out_of_memory", []), note])
    return replace(prepared, config=config)


def _train_once(prepared: Any, screen: Any, reporter: TrialReporter | None) -> float | None:
    session: Any
    if prepared.config.model.architecture == "tfidf":
        from llmft.training.baseline import BaselineSession

        session = BaselineSession(prepared, screen)
    else:
        from llmft.training.session import Session

        session = Session(prepared, screen, reporter)
    try:
        return session.run()
    finally:
        session.close()


if __name__ == "__main__":
    main()
