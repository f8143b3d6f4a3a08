"""Several trainings at once on one base: each a thread that runs as if it were alone, one at a time.

A lane is a whole session with its own adapter, data order, optimizer, records and checkpoints. It gives its turn away
in two places only: where its model's body is to be computed with gradients, and where these go back. Once all lanes
wait there, the main thread computes all bodies in one joint forward, or all gradients in one joint backward. A lane's
head and loss, its validations and everything else it does by itself, in its own thread and with its own random numbers.
So nothing in a session knows of other lanes, and lanes may be of different lengths, stop early, fail or leave.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llmft.model.families import body_of
from llmft.model.kernels.lora import lora_layers
from llmft.model.stacked import Joint, Part, share, why_alone
from llmft.training.out_of_memory import free_memory, is_out_of_memory
from llmft.training.stopping import Signals

ANSWER_S = 2.0
"""How long the others wait for a lane that has asked something outside, so that all go on in step."""
POLL_S = 0.005

Job = Callable[["Lane"], Any]


class Lane:
    """One training among several.

    Attributes:
        signals: of the process, heard for all lanes by the main thread.
        alone: why it is not computed with the others; None while it is.
    """

    def __init__(self, stack: Stack, arguments: Sequence[str]) -> None:
        self.stack = stack
        self.signals = stack.signals
        self.alone: str | None = "it has not begun"
        self._arguments = list(arguments)
        self._random = _random_state()
        self._layers: dict[str, Any] = {}
        self._threads = 1
        self._waits: str | None = None  # forward, backward or answer
        self._part: Part | None = None
        self._autocast: tuple[bool, torch.dtype] = (False, torch.float32)
        self._output: Any = None
        self._error: BaseException | None = None
        self._open: list[tuple[torch.Tensor, torch.Tensor]] = []  # (the joint graph's states, the lane's own leaf)
        self._answered: Callable[[], bool] = lambda: True
        self._asked_at = 0.0
        self._turn = threading.Event()
        self._thread: threading.Thread | None = None

    # ------------------------------------------------------------------------------------------- for the session

    def own(self, base: Any) -> Any:
        """The kept base as this lane may adapt it: its own modules around the same weights."""
        self.stack.meet(base)
        return share(base)

    def join(self, model: Any, base: Any) -> None:
        """From now on the body of the adapted `model` is computed with those of the other lanes on `base`."""
        self._open = []  # of a training before this one that ended between a forward and its backward
        body = body_of(model)
        self.alone = why_alone(model) or ("its base is another" if base is not self.stack.base else None)
        if self.alone is not None:
            return
        self._layers, self._threads = lora_layers(body), torch.get_num_threads()
        original = body.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if args or not torch.is_grad_enabled() or "llmft_blocks" not in kwargs:
                return original(*args, **kwargs)
            return self._forward(kwargs)

        body.forward = forward

    def backward(self) -> None:
        """Takes the gradients on to where the joint forward began; call after the loss's own backward."""
        if self._open:
            self._wait("backward")

    def wait_for(self, answered: Callable[[], bool]) -> None:
        """Lets the other lanes go on until `answered`."""
        self._answered, self._asked_at = answered, time.monotonic()
        if not answered():
            self._wait("answer")

    def _forward(self, arguments: dict[str, Any]) -> Any:
        kind = arguments["input_ids"].device.type
        self._autocast = (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind))
        self._part = Part(arguments, self._layers, self._own_random)
        self._wait("forward")
        output, self._output = self._output, None
        leaf = output.last_hidden_state.detach().requires_grad_()
        self._open.append((output.last_hidden_state, leaf))
        return type(output)(**{**output, "last_hidden_state": leaf})

    @contextlib.contextmanager
    def _own_random(self) -> Iterator[None]:
        """Torch's generators as the lane alone would have them here."""
        others = _random_state()
        _set_random_state(self._random)
        try:
            yield
        finally:
            self._random = _random_state()
            _set_random_state(others)

    def _wait(self, what: str) -> None:
        self._waits = what
        self.stack.turn_over.set()
        self._turn.wait()
        self._turn.clear()
        error, self._error = self._error, None
        if error is not None:
            raise error

    # ------------------------------------------------------------------------------------------- for the stack

    @property
    def live(self) -> bool:
        """Whether it has more to do."""
        return self._thread is not None

    def start(self, job: Job) -> None:
        """Makes its thread, which waits for its first turn."""

        def run() -> None:
            self._turn.wait()
            self._turn.clear()
            try:
                job(self)
            finally:
                self._thread, self._waits, self._part, self._open = None, None, None, []
                self.stack.turn_over.set()

        self._thread = threading.Thread(target=run, daemon=True, name="lane")
        self._thread.start()

    def take_turn(self) -> None:
        """Lets the lane run until it waits or ends; called by the main thread, which waits meanwhile."""
        self._waits = None
        _set_random_state(self._random)
        before, sys.argv[1:] = sys.argv[1:], self._arguments
        self._turn.set()
        self.stack.turn_over.wait()
        self.stack.turn_over.clear()
        sys.argv[1:] = before
        self._random = _random_state()


class Stack:
    """Runs lanes in turns, and what they have in common at once.

    Attributes:
        base: what the lanes stand on: the first lane's base.
    """

    def __init__(self) -> None:
        self.signals = Signals()
        self.turn_over = threading.Event()
        self.base: Any = None
        self._joint: Joint | None = None
        self._lanes: list[Lane] = []
        self._most = 1  # lanes whose forward may wait for its backward, as memory allows

    def run(self, jobs: Sequence[tuple[Sequence[str], Job]]) -> None:
        """Runs each job, with its command line, in a lane of its own, until all have ended.

        A job answers for its own errors; what it raises all the same ends its lane alone.
        """
        self._lanes = [Lane(self, arguments) for arguments, _ in jobs]
        self._most = len(self._lanes)
        for lane, (_, job) in zip(self._lanes, jobs, strict=True):
            lane.start(job)
        self.signals.take()
        try:
            while any(lane.live for lane in self._lanes):
                self._round()
        finally:
            self.signals.release()

    def meet(self, base: Any) -> None:
        """A lane has loaded its base; the first one's is the one they share."""
        if self.base is None:
            self.base = base
            self._joint = Joint(base)

    def _round(self) -> None:
        """Every lane that can run runs; then what they wait for is computed."""
        for lane in self._lanes:
            if lane.live and (lane._waits is None or (lane._waits == "answer" and self._heard(lane))):
                lane.take_turn()
        live = [lane for lane in self._lanes if lane.live]
        if any(lane._waits is None for lane in live):
            return
        asking = [lane for lane in live if lane._waits == "answer"]
        late = [lane for lane in asking if time.monotonic() - lane._asked_at > ANSWER_S]
        forward = [lane for lane in live if lane._waits == "forward"]
        backward = [lane for lane in live if lane._waits == "backward"]
        if asking and (len(asking) > len(late) or not (forward or backward)):
            time.sleep(POLL_S)
        elif forward and len(backward) < self._most:
            self._forward(forward[: self._most - len(backward)])
        elif backward:
            self._backward(backward)

    def _heard(self, lane: Lane) -> bool:
        return lane._answered() or bool(self.signals.received)

    def _forward(self, lanes: list[Lane]) -> None:
        """One forward for all; where memory does not suffice for that, fewer lanes at once from then on."""
        assert self._joint is not None
        held = sum(bool(lane._open) for lane in self._lanes if lane not in lanes) + len(lanes)
        # A lane sets the number of its own thread's; this one has another.
        torch.set_num_threads(lanes[0]._threads)
        try:
            parts = [lane._part for lane in lanes if lane._part is not None]
            enabled, dtype = lanes[0]._autocast
            with torch.autocast(parts[0].arguments["input_ids"].device.type, dtype, enabled=enabled):
                outputs = self._joint.forward(parts)
        except Exception as error:
            if not is_out_of_memory(error) or min(held, self._most) == 1:
                self._fail(lanes, error)
                return
        else:
            for lane, output in zip(lanes, outputs, strict=True):
                lane._output, lane._part, lane._waits = output, None, None
            return
        # Here the error is gone, and with it the frames that held what the forward had made.
        free_memory()
        self._most = min(held, self._most) // 2

    def _backward(self, lanes: list[Lane]) -> None:
        """One backward for all that the lanes' losses have left."""
        states = [state for lane in lanes for state, leaf in lane._open if leaf.grad is not None]
        gradients = [leaf.grad for lane in lanes for _, leaf in lane._open if leaf.grad is not None]
        for lane in lanes:
            lane._open = []
        torch.set_num_threads(lanes[0]._threads)
        try:
            if states:
                _Left.apply(gradients, *states).backward()
        except Exception as error:
            if is_out_of_memory(error):  # each begins anew with less at once, and so do all
                self._most = max(1, min(len(lanes), self._most) // 2)
            self._fail(lanes, error)
            return
        for lane in lanes:
            lane._waits = None

    @staticmethod
    def _fail(lanes: list[Lane], error: Exception) -> None:
        for lane in lanes:
            lane._error, lane._open, lane._waits = error, [], None


class _Left(torch.autograd.Function):
    """A number whose gradient with regard to every state is one that is known already.

    `torch.autograd.backward(states, gradients)` does the same and imports sympy, 0.3 s, to compare their shapes.
    """

    @staticmethod
    def forward(ctx: Any, gradients: list[torch.Tensor], *states: torch.Tensor) -> Any:
        ctx.gradients = gradients
        return states[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: torch.Tensor) -> Any:
        return (None, *ctx.gradients)


def _random_state() -> Any:
    """The state of torch's own generators."""
    device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return torch.get_rng_state(), device


def _set_random_state(state: Any) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1])
