"""A process that trains one trial after another on one base: `python -m llmft.sweeps.worker EVENTS_FD [CORE…]`.

Orders come as JSON lines on the standard input, from the supervisor, which has checked what they hold; events leave as
JSON lines by the given file descriptor. When the supervisor is gone, the input ends: the worker saves the run under
way and leaves.
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
from llmft.core.errors import Interrupted, RunBusy, Stopped, UserError, as_user_error, first_line
from llmft.core.imports import load_libraries

EVENTS_VARIABLE = "LLMFT_EVENTS_FD"
"""Where a training that is a process of its own tells its events."""
SAVE_S = 60.0
"""How long a worker whose supervisor is gone may take to save."""


class PipeReporter:
    """A TrialReporter that tells a supervisor what happens, and asks it after validations."""

    def __init__(self, events: IO[str], orders: queue.Queue[dict[str, Any] | None] | None) -> None:
        self.events = events
        self.orders = orders

    def tell(self, event: str, **facts: Any) -> None:
        """One event; a supervisor that is gone hears nothing, and the end of the orders says so."""
        with contextlib.suppress(BrokenPipeError, ValueError):
            self.events.write(json.dumps({"event": event, **facts}) + "\n")
            self.events.flush()

    def step(self, step: int, total: int, loss: float, tokens_per_s: float) -> None:
        self.tell("step", step=step, total=total, loss=loss, tokens_per_s=tokens_per_s)

    def alive(self) -> None:
        self.tell("alive")

    def validation(self, step: int, total: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """Waits for the supervisor's answer where there is a way for one."""
        self.tell("validation", step=step, total=total, metrics=metrics, asks=self.orders is not None)
        if self.orders is None:
            return None
        answer = self.orders.get()
        if answer is None:  # the supervisor is gone: SIGTERM is on its way
            self.orders.put(None)
            return None
        return tuple(answer["stop"]) if answer["stop"] is not None else None


def reporter_of_environment() -> PipeReporter | None:
    """The supervisor that started this very process for one trial, if one did."""
    handle = os.environ.pop(EVENTS_VARIABLE, None)  # not for the processes that this one starts
    return PipeReporter(os.fdopen(int(handle), "w"), None) if handle is not None else None


def main(argv: Sequence[str]) -> None:
    events, *cores = map(int, argv)
    if cores and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)  # of this thread and of those that it starts
    load_libraries()
    import llmft.training.session  # noqa: F401

    work(events)


def work(events: int) -> None:
    """Does what it is ordered to by the standard input, and tells it by the file descriptor `events`."""
    faulthandler.enable()
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    reporter = PipeReporter(os.fdopen(events, "w"), orders)
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    reporter.tell("ready")
    while (order := orders.get()) is not None:
        if order["do"] == "check":
            reporter.tell("checked", wrong=_check(order["configs"]))
        else:
            outcome = _train(order, reporter)
            reporter.tell("end", **outcome)
            if not outcome["sound"]:
                sys.exit(1)  # a library may be left in any state: a new process takes the next trial


def _listen(orders: queue.Queue[dict[str, Any] | None]) -> None:
    with open(0, closefd=False) as stdin:
        for line in stdin:
            orders.put(json.loads(line))
    orders.put(None)
    # Between trials the end of the orders ends the process; a run under way saves first.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SAVE_S)
    os._exit(128 + signal.SIGTERM)


def _check(configs: dict[str, Any]) -> dict[str, str]:
    """What is wrong with every config of which some part cannot be built."""
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
    """Trains one trial; says how it ended, whatever it ended by, unless it takes the process along."""
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
        shown_error, kind = as_user_error(raised), type(raised).__name__
        message = first_line(shown_error)
        is_mistake = isinstance(shown_error, UserError)
        text = message if is_mistake else f"{kind}: {message}"
        return {**ended, "status": "failed", "error": text, "cause": "error", "sound": is_mistake}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main(arguments_of_process())
