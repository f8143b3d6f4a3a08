"""A process that trains one trial after another on one base: `python -m llmft.sweeping.worker EVENTS_FD [CORE…]`.

Orders come as JSON lines on the standard input, from the supervisor, which has checked what they hold; events leave as
JSON lines by the given file descriptor. When the supervisor is gone, the input ends: the worker saves the run under
way and leaves.
"""

from __future__ import annotations

import faulthandler
import json
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from functools import partial
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmft.training.lanes import Lane

EVENTS_VARIABLE = "LLMFT_EVENTS_FD"
"""Where a training that is a process of its own tells its events."""
ANSWER_POLL_S = 0.002
LAST_WORDS_S = 60.0
"""How long a worker whose supervisor is gone may take to save."""


class Teller:
    """Tells a supervisor what happens, and asks it after validations."""

    def __init__(
        self,
        events: IO[str],
        orders: queue.Queue[dict[str, Any] | None] | None,
        number: int | None = None,
        wait: Callable[[Callable[[], bool]], None] | None = None,
    ) -> None:
        """Of trial `number`; `wait` returns once a condition holds, None for the plain way."""
        self.events = events
        self.orders = orders
        self.number = number
        self.wait = wait or _wait

    def of(self, number: int, wait: Callable[[Callable[[], bool]], None] | None = None) -> Teller:
        """The same for one trial."""
        return Teller(self.events, self.orders, number, wait)

    def tell(self, event: str, **facts: Any) -> None:
        """One event; a supervisor that is gone hears nothing, and the end of the orders says so."""
        try:
            self.events.write(json.dumps({"event": event, "number": self.number, **facts}) + "\n")
            self.events.flush()
        except (BrokenPipeError, ValueError):
            pass

    def step(self, step: int, total: int, loss: float, tokens_per_s: float) -> None:
        """See Watch."""
        self.tell("step", step=step, total=total, loss=loss, tokens_per_s=tokens_per_s)

    def alive(self) -> None:
        """See Watch."""
        self.tell("alive")

    def validation(self, step: int, total: int, metrics: dict[str, float]) -> tuple[str, str] | None:
        """See Watch; waits for the supervisor's answer where there is a way for one."""
        self.tell("validation", step=step, total=total, metrics=metrics, asks=self.orders is not None)
        if self.orders is None:
            return None
        # Lanes ask in turns, and nothing but answers comes while they train: the next one may be another lane's.
        self.wait(self._answered)
        answer = self._take_answer()
        if answer is None or answer["stop"] is None:
            return None
        status, reason = answer["stop"]
        return status, reason

    def _answered(self) -> bool:
        assert self.orders is not None
        waiting = list(self.orders.queue)
        return any(order is None or order.get("number") == self.number for order in waiting)

    def _take_answer(self) -> dict[str, Any] | None:
        assert self.orders is not None
        with self.orders.mutex:
            found = next((o for o in self.orders.queue if o is not None and o.get("number") == self.number), None)
            if found is not None:
                self.orders.queue.remove(found)
        return found


def _wait(answered: Callable[[], bool]) -> None:
    while not answered():
        time.sleep(ANSWER_POLL_S)


def watch_of_environment() -> Teller | None:
    """The supervisor that started this very process for one trial, if one did."""
    handle = os.environ.pop(EVENTS_VARIABLE, None)  # not for the processes that this one starts
    return Teller(os.fdopen(int(handle), "w"), None) if handle is not None else None


def main() -> None:
    """The process."""
    if cores := [int(core) for core in sys.argv[2:]]:
        take_cores(cores)
    from llmft.libraries import load_libraries

    load_libraries()
    import llmft.training.session  # noqa: F401

    work(int(sys.argv[1]))


def take_cores(cores: list[int]) -> None:
    """This thread, and those that it starts, computes on these cores only, where the system can be told."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)


def work(events: int) -> None:
    """Does what it is ordered to by the standard input, and tells it by the file descriptor `events`."""
    faulthandler.enable()
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    teller = Teller(os.fdopen(events, "w"), orders)
    threading.Thread(target=_listen, args=(orders,), daemon=True).start()
    teller.tell("ready")
    while (order := orders.get()) is not None:
        if order["do"] == "check":
            teller.tell("checked", wrong=_check(order["configs"]))
        elif order["do"] == "train" and not _train_all(order["trials"], teller):
            sys.exit(1)  # a library may be left in any state: a new process takes the next trial


def _listen(orders: queue.Queue[dict[str, Any] | None]) -> None:
    with open(0, closefd=False) as given:
        for line in given:
            orders.put(json.loads(line))
    orders.put(None)
    # Between trials the end of the orders ends the process; a run under way saves first.
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(LAST_WORDS_S)
    os._exit(128 + signal.SIGTERM)


def _check(configs: dict[str, Any]) -> dict[str, tuple[str, int]]:
    """(message, exit code) for every config of which some part cannot be built."""
    from llmft.build import trust
    from llmft.config import TrainConfig
    from llmft.errors import UserError
    from llmft.schema import restored
    from llmft.training.session import check_parts

    wrong: dict[str, tuple[str, int]] = {}
    for number, plain in configs.items():
        try:
            config = restored(plain, TrainConfig)
            trust(config.trusted_packages)
            check_parts(config)
        except UserError as error:
            wrong[number] = (str(error), error.exit_code)
    return wrong


def _train_all(orders: list[dict[str, Any]], teller: Teller) -> bool:
    """Trains one trial, or several at once; whether the process is fit for more."""
    if len(orders) == 1:
        sys.argv[1:] = orders[0]["arguments"]
        own = teller.of(orders[0]["number"])
        outcome = _train(orders[0], own)
        own.tell("end", **outcome)
        return bool(outcome["sound"])
    from llmft.training.lanes import Stack

    sound: list[bool] = []

    def job(order: dict[str, Any], lane: Lane) -> None:
        own = teller.of(order["number"], lane.wait_for)
        outcome = _train(order, own, lane)
        own.tell("end", **outcome)
        sound.append(outcome["sound"])

    Stack().run([(order["arguments"], partial(job, order)) for order in orders])
    return len(sound) == len(orders) and all(sound)


def _train(order: dict[str, Any], teller: Teller, lane: Lane | None = None) -> dict[str, Any]:
    """Trains one trial; says how it ended, whatever it ended by, unless it takes the process along."""
    from llmft.config import TrainConfig
    from llmft.errors import Interrupted, RunBusy, Stopped, UserError, as_user_error
    from llmft.schema import restored
    from llmft.train import train

    print(f"--- trial {order['number']}: {' '.join(order['arguments'])}", flush=True)
    ended: dict[str, Any] = {"number": order["number"], "sound": True, "value": None, "error": None, "cause": None}
    try:
        config: TrainConfig = restored(order["config"], TrainConfig)
        value = train(config, watch=teller, overrides=order["overrides"], lane=lane)
        return {**ended, "status": "done", "value": value}
    except RunBusy as error:
        return {**ended, "status": "busy", "error": str(error)}
    except Stopped as error:
        return {**ended, "status": error.status, "error": str(error)}
    except (Interrupted, KeyboardInterrupt) as error:
        return {**ended, "status": "interrupted", "error": str(error) or "interrupted", "sound": False}
    except SystemExit as error:
        told = f"sys.exit({error.code}) before there was a result"
        return {**ended, "status": "failed", "error": told, "cause": "exit", "sound": False}
    except BaseException as raised:
        traceback.print_exception(raised)
        known = as_user_error(raised)
        told = str(known).splitlines()[0] if str(known) else type(known).__name__
        user = isinstance(known, UserError)
        text = told if user else f"{type(known).__name__}: {told}"
        return {**ended, "status": "failed", "error": text, "cause": "error", "sound": user}
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
