"""Generates answers: requests of one run are batched, and runs take turns.

A request that arrives during generation joins the batch at the next token: the tokens generated so far become part of
the others' prompts, and all continue together. So no request waits for another's long answer.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llmft.serving.runs import OpenRun

TURN_TOKENS = 16
"""Tokens generated for one run before another run gets its turn."""


@dataclass(eq=False)
class Request:
    """A prompt with generation settings; the engine fills in the answer.

    Attributes:
        listen: called in the engine's thread with each new piece of text, and with None at the end.
        deadline: time (of `time.monotonic()`) at which generation stops.
        text: the answer so far. finish: "stop", "length", "cancelled" or "error".
    """

    run: OpenRun
    ids: list[int]
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: Sequence[str] = ()
    listen: Callable[[str | None], None] = lambda piece: None
    deadline: float = math.inf
    cancelled: bool = False
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    error: str = ""
    first_token_s: float = 0.0
    seconds: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.stops = [*self.run.stop, *self.stop]
        self.done = threading.Event()
        self._num_sent = 0

    @property
    def is_given_up(self) -> bool:
        """Whether the answer was cancelled or its deadline has passed."""
        return self.cancelled or time.monotonic() > self.deadline

    def accept(self, token: int) -> None:
        """Appends the next token, which may end the answer."""
        ends = self.run.predictor.encoder.ends
        self.first_token_s = self.first_token_s or time.monotonic() - self.started
        if self.is_given_up:
            return self.end("cancelled")
        if token in ends.ids:
            return self.end("stop")
        self.tokens.append(token)
        text = self.run.decode(ends.cut(self.tokens))
        begin = min((index for index in map(text.find, self.stops) if index >= 0), default=-1)
        if begin >= 0 or ends.reached(self.tokens):
            self.text = text[:begin] if begin >= 0 else text
            return self.end("stop")
        self.text = text
        if len(self.tokens) >= self.max_new_tokens:
            return self.end("length")
        return self._send_up_to(len(text) - self._num_undecided(text))

    def _num_undecided(self, text: str) -> int:
        """Number of final characters that may still change: an incomplete character, or the start of a stop string."""
        if text.endswith("\ufffd"):
            return len(text) - len(text.rstrip("\ufffd"))
        longest = max(map(len, self.stops), default=0)
        return max(
            (n for n in range(1, min(longest, len(text)) + 1) if any(s.startswith(text[-n:]) for s in self.stops)),
            default=0,
        )

    def _send_up_to(self, upto: int) -> None:
        if upto > self._num_sent:
            self.listen(self.text[self._num_sent : upto])
            self._num_sent = upto

    def end(self, finish: str, error: str = "") -> None:
        """Ends the answer."""
        self.finish, self.error = finish, error
        self.seconds = time.monotonic() - self.started
        self._send_up_to(len(self.text))
        self.listen(None)
        self.done.set()


class Engine:
    """Runs the generation in one thread; requests may come from any other."""

    def __init__(self, runs: Sequence[OpenRun], batch_size: int = 16) -> None:
        self.runs = {run.name: run for run in runs}
        self.batch_size = batch_size
        self._waiting: list[Request] = []
        self._changed = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="llmft-engine", daemon=True)
        self._thread.start()

    @property
    def load(self) -> int:
        """The number of unfinished requests."""
        return len(self._waiting)

    def submit(self, request: Request) -> None:
        """Queues a request."""
        with self._changed:
            if self._closing:
                request.end("error", "the server is closing")
            else:
                self._waiting.append(request)
            self._changed.notify()

    def close(self) -> None:
        """Ends all requests and the thread."""
        with self._changed:
            self._closing = True
            for request in self._waiting:
                request.cancelled = True
            self._changed.notify()
        self._thread.join(timeout=30)

    def _work(self) -> None:
        last: OpenRun | None = None
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing and not self._waiting:
                    return
                runs = list(dict.fromkeys(request.run for request in self._waiting))
                last = runs[(runs.index(last) + 1) % len(runs)] if last in runs else runs[0]
                turn = [request for request in self._waiting if request.run is last][: self.batch_size]
            try:
                self._answer(last, turn)
            except Exception as error:
                for request in turn:
                    if not request.done.is_set():
                        request.end("error", f"{type(error).__name__}: {error}")
            with self._changed:
                self._waiting = [request for request in self._waiting if not request.done.is_set()]

    @torch.no_grad()
    def _answer(self, run: OpenRun, requests: list[Request]) -> None:
        """Generates until all of `requests` are answered, or it is the turn of others."""
        for request in requests:
            if request.is_given_up:
                request.end("cancelled")
        requests = [request for request in requests if not request.done.is_set()]
        if not requests:
            return
        prompts = [[*request.ids, *request.tokens] for request in requests]
        width, pad = max(map(len, prompts)), run.predictor.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        device = run.predictor.device
        with run.active() as model:
            model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                max_new_tokens=max(request.max_new_tokens - len(request.tokens) for request in requests),
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=None,
                pad_token_id=pad,
                use_cache=True,
                logits_processor=[_Sampling(requests)],
                stopping_criteria=[_Turn(self, run, requests)],
            )

    def wanted_by_others(self, run: OpenRun, requests: list[Request], steps: int) -> bool:
        """Whether generation should pause: for a request that can join the batch, or for another run."""
        waiting = [request for request in self._waiting if not request.done.is_set() and request not in requests]
        joins = any(request.run is run for request in waiting) and len(requests) < self.batch_size
        return joins or (steps >= TURN_TOKENS and bool(waiting))


class _Turn:
    """Passes each new token to its request; stops if all are answered, or if it is the turn of others."""

    def __init__(self, engine: Engine, run: OpenRun, requests: list[Request]) -> None:
        self.engine, self.run, self.requests = engine, run, requests
        self.steps = 0
        self.longest = max(len(request.ids) + len(request.tokens) for request in requests)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.steps += 1
        for request, token in zip(self.requests, input_ids[:, -1].tolist(), strict=True):
            if not request.done.is_set():
                request.accept(token)
        left = [request for request in self.requests if not request.done.is_set()]
        over = not left or self.engine.wanted_by_others(self.run, left, self.steps)
        # Finished rows continue to be computed, but not beyond the model's last position.
        over = over or self.longest + self.steps >= (self.run.predictor.context_tokens or 2**31)
        return torch.full((len(self.requests),), over, dtype=torch.bool, device=input_ids.device)


class _Sampling:
    """Samples the next token of each request with a temperature, by its own seed; the others stay greedy."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        for row, request in enumerate(self.requests):
            if request.temperature <= 0 or request.done.is_set():
                continue
            p = torch.softmax(scores[row].float().cpu() / request.temperature, -1)
            ordered, order = p.sort(descending=True)
            ordered[ordered.cumsum(0) - ordered > request.top_p] = 0
            token = order[torch.multinomial(ordered, 1, generator=request.generator)]
            scores[row] = -torch.inf
            scores[row, token] = 0
        return scores
