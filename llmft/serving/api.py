"""OpenAI's API for runs: models, chat completions and completions, complete or streamed.

Requests are limited in size, number and time; a client that disconnects cancels its request.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from llmft.config.commands import ServeConfig
from llmft.config.fields import seconds_of
from llmft.core.errors import did_you_mean
from llmft.data.messages import Keys, read_messages
from llmft.serving.engine import Engine, Request
from llmft.serving.runs import OpenRun

BODY_TIMEOUT_S = 30.0
MOST_CHOICES = 8
"""Maximum of `n`, and of prompts per request."""
KNOWN = ("max_tokens", "max_completion_tokens", "temperature", "top_p", "seed", "stop", "stream", "n")
IGNORED = ("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "stream_options",
           "model")  # fmt: skip
"""Accepted keys that do not change the text."""


class Refused(Exception):
    """A request is refused; the message says why."""

    def __init__(self, message: str, status: int = 400, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param = status, param

    def response(self) -> Response:
        """The error in OpenAI's format."""
        kind = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        error = {"message": str(self), "type": kind.get(self.status, "invalid_request_error"), "param": self.param}
        headers = {"Retry-After": "1"} if self.status in (429, 503) else {}
        return JSONResponse({"error": {**error, "code": None}}, self.status, headers)


@dataclass
class ParsedRequest:
    """A parsed request of the API.

    Attributes:
        requests: to the engine, one per choice.
        pieces: (index of the choice, its next piece of text, or None at its end).
    """

    run: OpenRun
    requests: list[Request]
    pieces: asyncio.Queue[tuple[int, str | None]]
    stream: bool
    with_usage: bool
    chat: bool

    async def written(self) -> AsyncIterator[tuple[int, str | None]]:
        """Yields pieces as they arrive, until each choice has ended."""
        left = len(self.requests)
        while left:
            number, piece = await self.pieces.get()
            left -= piece is None
            yield number, piece

    def cancel(self) -> None:
        """Cancels unfinished answers."""
        for request in self.requests:
            request.cancelled = True

    def head(self, kind: str) -> dict[str, Any]:
        """The common fields of a response, or of each of its events."""
        identity = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        return {"id": identity, "object": kind, "created": int(time.time()), "model": self.run.name}

    def choice(self, number: int, content: dict[str, Any], *, ended: bool = True) -> dict[str, Any]:
        """A choice, or a piece of it while it has not `ended`."""
        reason = "stop" if self.requests[number].finish == "stop" else "length"
        return {"index": number, **content, "finish_reason": reason if ended else None, "logprobs": None}

    def usage(self) -> dict[str, int]:
        """Token counts."""
        prompt = sum(len(request.ids) for request in self.requests)
        written = sum(len(request.tokens) for request in self.requests)
        return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


class Api:
    """The HTTP endpoints; `key` is the API key that clients must send, if any."""

    def __init__(self, engine: Engine, config: ServeConfig, key: str | None) -> None:
        self.engine, self.config, self.key = engine, config, key
        self.started = int(time.time())
        self.timeout_s = seconds_of(config.timeout, "timeout")
        self.app = Starlette(
            routes=[
                Route("/health", self._guarded(self._health, open_to_all=True)),
                Route("/v1/models", self._guarded(self._models)),
                Route("/v1/models/{name:path}", self._guarded(self._model)),
                Route("/v1/chat/completions", self._guarded(self._chat), methods=["POST"]),
                Route("/v1/completions", self._guarded(self._complete), methods=["POST"]),
            ]
        )

    def _guarded(self, endpoint: Callable[..., Any], *, open_to_all: bool = False) -> Callable[..., Any]:
        async def answer(http: HttpRequest) -> Response:
            try:
                key = http.headers.get("authorization", "").removeprefix("Bearer ").encode()
                if self.key and not open_to_all and not hmac.compare_digest(key, self.key.encode()):
                    raise Refused("a valid key is required: Authorization: Bearer KEY", 401)
                response: Response = await endpoint(http)
                return response
            except Refused as refused:
                return refused.response()
            except ClientDisconnect:
                return Response(status_code=499)

        return answer

    async def _health(self, http: HttpRequest) -> Response:
        return JSONResponse({"status": "ok", "requests": self.engine.load})

    def _described(self, run: OpenRun) -> dict[str, Any]:
        return {"id": run.name, "object": "model", "created": self.started, "owned_by": "llmft"}

    async def _models(self, http: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self._described(run) for run in self.engine.runs.values()]})

    async def _model(self, http: HttpRequest) -> Response:
        return JSONResponse(self._described(self._run(http.path_params["name"])))

    def _run(self, name: Any) -> OpenRun:
        runs = self.engine.runs
        if not isinstance(name, str) or name not in runs:
            shown = str(name)[:200]
            raise Refused(f"model: no run called {shown!r}{did_you_mean(shown, runs)}", 404, "model")
        return runs[name]

    async def _chat(self, http: HttpRequest) -> Response:
        body = await self._body(http)
        run = self._run(body.get("model"))
        try:
            messages = read_messages(body.get("messages"), "messages", Keys())
            if not any(turn["role"] == "user" for turn in messages):
                raise ValueError("no user message")
        except ValueError as error:
            raise Refused(f"messages: {error}", param="messages") from None
        ids = await self._encoded(run.prompt, messages, "messages")
        return await self._answer(http, self._parse(body, run, [ids], chat=True))

    @staticmethod
    async def _encoded(encode: Callable[[Any], list[int]], content: Any, key: str) -> list[int]:
        """Token ids, computed in a thread outside the event loop."""
        try:
            return await asyncio.to_thread(encode, content)
        except (ValueError, TypeError) as error:  # the tokenizer's own errors, as for half a surrogate pair
            raise Refused(f"{key}: {error}", param=key) from None

    async def _complete(self, http: HttpRequest) -> Response:
        body = await self._body(http)
        run = self._run(body.get("model"))
        prompt = body.get("prompt")
        several = prompt if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else [prompt]
        if len(several) > MOST_CHOICES:
            raise Refused(f"prompt: {len(several)} of them, {MOST_CHOICES} at most", param="prompt")
        size = run.predictor.model.get_input_embeddings().weight.shape[0]
        ids = []
        for prompt in several:
            if isinstance(prompt, str):
                ids.append(await self._encoded(run.tokens, prompt, "prompt"))
            elif isinstance(prompt, list) and all(type(token) is int and 0 <= token < size for token in prompt):
                ids.append(prompt)
            else:
                raise Refused("prompt: a text, token ids, or a list of them is expected", param="prompt")
        return await self._answer(http, self._parse(body, run, ids, chat=False))

    # --------------------------------------------------------------------------------------------------- requests

    async def _body(self, http: HttpRequest) -> dict[str, Any]:
        maximum = self.config.max_body_kib * 1024
        content = bytearray()

        async def read() -> None:
            async for chunk in http.stream():
                content.extend(chunk)
                if len(content) > maximum:
                    raise Refused(f"the request is larger than {maximum:,} bytes (max_body_kib)", 413)

        try:
            await asyncio.wait_for(read(), BODY_TIMEOUT_S)
            body = json.loads(bytes(content))
        except TimeoutError:
            raise Refused("the request did not arrive in time", 408) from None
        except (ValueError, RecursionError):
            raise Refused("the request is not JSON") from None
        if not isinstance(body, dict):
            raise Refused("a JSON object is expected")
        return body

    def _parse(self, body: dict[str, Any], run: OpenRun, prompts: list[list[int]], *, chat: bool) -> ParsedRequest:
        """Parses a body into requests to the engine; unknown keys that could change the text are refused."""
        known = {"messages" if chat else "prompt", *KNOWN}
        for key, value in body.items():
            if key not in known and key not in IGNORED and value not in (None, False, 0, [], {}, "auto", "none"):
                if (key == "best_of" and value == 1) or (key == "response_format" and value == {"type": "text"}):
                    continue
                raise Refused(f"{key}: not supported", param=key)
        config, loop = self.config, asyncio.get_running_loop()
        wanted = self._number(body, "max_completion_tokens", 1, 2**20, int, None)
        wanted = wanted or self._number(body, "max_tokens", 1, 2**20, int, config.max_new_tokens)
        temperature = self._number(body, "temperature", 0, 10, float, config.temperature)
        top_p = self._number(body, "top_p", 1e-6, 1, float, config.top_p)
        seed = self._number(body, "seed", -(2**63), 2**63 - 1, int, config.seed)
        choices = self._number(body, "n", 1, MOST_CHOICES, int, 1)
        stop = body.get("stop") or []
        stop = [stop] if isinstance(stop, str) else stop
        are_texts = isinstance(stop, list) and all(isinstance(text, str) and 0 < len(text) <= 200 for text in stop)
        if not are_texts or len(stop) > 16:
            raise Refused("stop: up to 16 short texts are expected", param="stop")
        if self.engine.load + len(prompts) * choices > config.max_requests:
            raise Refused("too many requests at a time; try again later", 429)
        pieces: asyncio.Queue[tuple[int, str | None]] = asyncio.Queue()
        requests: list[Request] = []
        deadline = time.monotonic() + self.timeout_s
        for ids in prompts:
            try:
                room = run.check_length(ids, wanted)
            except ValueError as error:
                raise Refused(str(error), param="messages" if chat else "prompt") from None
            for number in range(choices):

                def listen(piece: str | None, index: int = len(requests)) -> None:
                    with contextlib.suppress(RuntimeError):  # the loop is closed
                        loop.call_soon_threadsafe(pieces.put_nowait, (index, piece))

                requests.append(Request(run, ids, room, temperature, top_p, seed + number, stop, listen, deadline))
        options = body.get("stream_options")
        with_usage = isinstance(options, dict) and bool(options.get("include_usage"))
        return ParsedRequest(run, requests, pieces, bool(body.get("stream")), with_usage, chat)

    @staticmethod
    def _number(body: dict[str, Any], key: str, minimum: float, maximum: float, kind: type, default: Any) -> Any:
        value = body.get(key)
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise Refused(f"{key}: a number is expected", param=key)
        if not minimum <= value <= maximum:  # also refuses inf and nan
            raise Refused(f"{key}={value}: from {minimum} to {maximum}", param=key)
        if kind is int and value != int(value):
            raise Refused(f"{key}={value}: an integer is expected", param=key)
        return kind(value)

    # ---------------------------------------------------------------------------------------------------- answers

    async def _answer(self, http: HttpRequest, parsed: ParsedRequest) -> Response:
        for request in parsed.requests:
            self.engine.submit(request)
        if parsed.stream:
            return StreamingResponse(
                self._events(parsed), media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
            )
        gone = asyncio.ensure_future(self._cancel_when_gone(http, parsed))
        try:
            async for _ in parsed.written():
                pass
        finally:
            parsed.cancel()
            gone.cancel()
        if failed := next((request for request in parsed.requests if request.error), None):
            raise Refused(failed.error, 500)
        choices = []
        for number, request in enumerate(parsed.requests):
            message = {"role": "assistant", "content": request.text, "refusal": None}
            choices.append(parsed.choice(number, {"message": message} if parsed.chat else {"text": request.text}))
        head = parsed.head("chat.completion" if parsed.chat else "text_completion")
        return JSONResponse({**head, "choices": choices, "usage": parsed.usage()})

    @staticmethod
    async def _cancel_when_gone(http: HttpRequest, parsed: ParsedRequest) -> None:
        """Ends an answer whose client has left, also one that waits for its turn, before it costs anything."""
        while not await http.is_disconnected():
            await asyncio.sleep(0.25)
        parsed.cancel()

    async def _events(self, parsed: ParsedRequest) -> AsyncIterator[str]:
        head = parsed.head("chat.completion.chunk" if parsed.chat else "text_completion")

        def event(choices: list[dict[str, Any]], **more: Any) -> str:
            return f"data: {json.dumps({**head, 'choices': choices, **more}, ensure_ascii=False)}\n\n"

        try:
            for number in range(len(parsed.requests) if parsed.chat else 0):
                yield event([parsed.choice(number, {"delta": {"role": "assistant", "content": ""}}, ended=False)])
            async for number, piece in parsed.written():
                if piece is None and (error := parsed.requests[number].error):
                    yield f"data: {json.dumps({'error': {'message': error, 'type': 'server_error'}})}\n\n"
                    continue
                content = {"delta": {"content": piece} if piece else {}} if parsed.chat else {"text": piece or ""}
                yield event([parsed.choice(number, content, ended=piece is None)])
            if parsed.with_usage:
                yield event([], usage=parsed.usage())
            yield "data: [DONE]\n\n"
        finally:
            parsed.cancel()  # also if the client disconnects
