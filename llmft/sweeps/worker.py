"""A process that trains trials one after another on one base: `python -m llmft.sweeps.worker EVENTS_FD [CORE…]`.

Orders from the supervisor arrive as JSON lines on standard input, already validated; events are written as JSON lines
to the given file descriptor. If the supervisor dies, standard input ends: the worker saves the current run and exits.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from typing import IO, Any

from llmft.config.convert import from_plain
from llmft.config.instantiate import trust
from llmft.config.invocation import Invocation, arguments_of_process
from llmft.config.sections import TrainConfig
from llmft.core.errors import Interrupted, RunBusy, Stopped, UserError, as_user_error, one_line
from llmft.core.imports import load_libraries

EVENTS_VARIABLE = "LLMFT_EVENTS_FD"
"""The environment variable with the file descriptor for the events of a distributed training."""
SAVE_S = 60.0
"""How long a worker may take to save after its supervisor has died."""


class PipeReporter:
    """A TrialReporter that sends events to a supervisor, and asks it after validations whether to stop."""

    def __init__(self, events: IO[str], orders: queue.Queue[dict[str, Any] | None] | None) -> None:
        self.events = events
        self.orders = orders

    def send(self, event: str, **content: Any) -> None:
        """Sends an event; errors are ignored, since a dead supervisor is noticed by the end of the orders."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.events.write(json.dumps({"event": event, **content}) + "\n")
            self.events.flush()

    def step(self, step: int, total: int, loss: float, tokens_per_s: float) -> None:
        self.send("step", step=step, total=total, loss=loss, tokens_per_s=tokens_per_s)

    def alive(self) -> None:
        self.send("alive")

    def validation(self, step: int, total: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """Sends the metrics; waits for the answer if there are orders."""
        self.send("validation", step=step, total=total, metrics=metrics, asks=self.orders is not None)
        if self.orders is None:
            return None
        answer = self.orders.get()
        if answer is None:  # the supervisor is gone: SIGTERM follows
            self.orders.put(None)
            return None
        return tuple(answer["stop"]) if answer["stop"] is not None else None


def reporter_of_environment() -> PipeReporter | None:
    """A reporter to the supervisor that started this process for a single trial, if there is one."""
    handle = os.environ.pop(EVENTS_VARIABLE, None)  # child processes must not inherit it
    return PipeReporter(os.fdopen(int(handle), "w"), None) if handle is not None else None


def main(argv: Sequence[str]) -> None:
    events, *cores = map(int, argv)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # for this thread and those it starts
    load_libraries()
    import llmft.training.session  # noqa: F401

    work(events)


def work(events: int) -> None:
    """Executes the orders from standard input; writes events to the file descriptor `events`."""
    faulthandler.enable()
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    reporter = PipeReporter(os.fdopen(events, "w"), orders)
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    reporter.send("ready")
    while (order := orders.get()) is not None:
        if order["do"] == "check":
            reporter.send("checked", wrong=_check(order["configs"]))
        else:
            outcome = _train(order, reporter)
            reporter.send("end", **outcome)
            if not outcome["sound"]:
                sys.exit(1)  # libraries may be in an undefined state: a new process takes the next trial


def _listen(orders: queue.Queue[dict[str, Any] | None]) -> None:
    with open(0, closefd=False) as stdin:
        for line in stdin:
            orders.put(json.loads(line))
    orders.put(None)
    # SIGTERM ends an idle process; a running trial saves first.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_S)
    os._exit(128 + signal.SIGTERM)


def _check(configs: dict[str, Any]) -> dict[str, str]:
    """number -> error of each config whose parts cannot be built."""
    from llmft.training.parts import check_parts

    wrong: dict[str, str] = {}
    for number, plain in configs.items():
        try:
            config = from_plain(plain, TrainConfig)
            trust(config.trusted_packages)
            check_parts(config)
        except UserError as error:
            wrong[number] = str(error)
    return wrong


def _train(order: dict[str, Any], reporter: PipeReporter) -> dict[str, Any]:
    """Trains one trial; returns how it ended, whatever it raised."""
    from llmft.training.run import train

    print(f"--- trial {order['number']}: {' '.join(order['arguments'])}", flush=True)
    ended: dict[str, Any] = {"sound": True, "value": None, "error": None, "cause": None}
    try:
        config: TrainConfig = from_plain(order["config"], TrainConfig)
        invocation = Invocation.of(order["arguments"], overrides=order["overrides"])
        return {**ended, "status": "done", "value": train(config, reporter=reporter, invocation=invocation)}
    except RunBusy as error:
        return {**ended, "status": "busy", "error": str(error)}
    except Stopped as error:
        return {**ended, "status": error.status, "error": str(error)}
    except (Interrupted, KeyboardInterrupt) as error:
        return {**ended, "status": "interrupted", "error": str(error) or "interrupted", "sound": False}
    except SystemExit as error:
        message = f"sys.exit({error.code}) before there was a result"
        return {**ended, "status": "failed", "error": message, "cause": "exit", "sound": False}
    except BaseException as raised:
        traceback.print_exception(raised)
        shown_error = as_user_error(raised)
        is_mistake = isinstance(shown_error, UserError)
        return {**ended, "status": "failed", "error": one_line(shown_error), "cause": "error", "sound": is_mistake}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main(arguments_of_process())
