"""OpenAI's own client against llmft.serve."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from llmft.config.commands import PredictConfig, ServeConfig
from llmft.core.imports import missing
from llmft.export.targets import opened
from llmft.predict import predict
from llmft.runs.predictions import Predictions
from llmft.serving.runs import open_runs

if missing("openai", "uvicorn", "starlette"):
    pytest.skip("openai, uvicorn and starlette are not installed", allow_module_level=True)

QUESTION = "Who wrote this text?\n\nThe fox was angry."
ASKED = [{"role": "user", "content": QUESTION}]


@pytest.fixture(scope="module")
def address(two_runs: list[Path]) -> Iterator[str]:
    import uvicorn

    from llmft.serving.api import Api
    from llmft.serving.engine import Engine

    config = ServeConfig(run=[str(run) for run in two_runs], accelerator="cpu", max_body_kib=64, max_requests=12)
    engine = Engine(open_runs([opened(run) for run in two_runs], config))
    server = uvicorn.Server(uvicorn.Config(Api(engine, config, "secret").app, log_level="warning", lifespan="off"))
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    thread = threading.Thread(target=lambda: server.run(sockets=[listening]), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join(10)
    engine.close()


@pytest.fixture
def client(address: str) -> Any:
    import openai

    return openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)


def said(client: Any, model: str, **options: Any) -> str:
    return str(client.chat.completions.create(model=model, messages=ASKED, **options).choices[0].message.content)


def test_every_run_answers_by_its_name_what_predict_says(client: Any, two_runs: list[Path]) -> None:
    assert [model.id for model in client.models.list()] == [run.name for run in two_runs]
    for run in two_runs:
        options = PredictConfig(run=str(run), prompts=[QUESTION], accelerator="cpu", name="served", force=True)
        (path,) = predict(options, quiet=True)
        (expected,) = Predictions.load(path).predicted
        assert said(client, run.name) == expected
        stream = client.chat.completions.create(
            model=run.name, messages=ASKED, stream=True, stream_options={"include_usage": True}
        )
        chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == expected
        assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens


def test_eight_at_a_time_are_answered_as_one(client: Any, two_runs: list[Path]) -> None:
    models = [two_runs[number % 2].name for number in range(8)]
    alone = {run.name: said(client, run.name) for run in two_runs}
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda model: said(client, model), models)) == [alone[model] for model in models]


def test_limits_and_stops_are_kept(client: Any, two_runs: list[Path]) -> None:
    name = two_runs[0].name
    options = {"model": name, "prompt": "The fox and", "temperature": 3.0, "seed": 5}
    answer = client.completions.create(**options, max_tokens=30)
    full_text = answer.choices[0].text
    assert answer.usage.completion_tokens <= 30
    stopped = client.completions.create(**options, max_tokens=30, stop=[full_text[3:5]]).choices[0]
    assert stopped.text == full_text[: full_text.find(full_text[3:5])]
    assert stopped.finish_reason == "stop"
    assert client.completions.create(**options, max_tokens=1).choices[0].finish_reason in ("length", "stop")
    assert len(client.completions.create(**options, max_tokens=4, n=3).choices) == 3


@pytest.mark.parametrize(
    ("options", "status", "message"),
    [
        ({"model": "nobody"}, 404, "no run called 'nobody'"),
        ({"temperature": -1}, 400, "temperature=-1: from 0 to 10"),
        ({"n": 99}, 400, "n=99: from 1 to 8"),
        ({"max_tokens": 0}, 400, "max_tokens=0"),
        ({"stop": ["a"] * 17}, 400, "stop: up to 16"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "tools: not supported"),
        ({"logprobs": True}, 400, "logprobs: not supported"),
        ({"max_tokens": -5}, 400, "max_tokens=-5: from 1 to"),
        ({"max_tokens": "5"}, 400, "max_tokens: a number is expected"),
        ({"max_tokens": 1.5}, 400, "max_tokens=1.5: an integer is expected"),
        ({"seed": 1e300}, 400, "seed=1e\\+300: from"),
        ({"stop": 7}, 400, "stop: up to 16"),
        ({"messages": "hello"}, 400, "messages"),
        ({"messages": [{"role": "user", "content": 7}]}, 400, "messages"),
        ({"messages": []}, 400, "contains no list of messages"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "no user message"),
        ({"messages": [{"role": "user", "content": "word " * 400}]}, 400, "the model 256 positions"),
        ({"messages": [{"role": "user", "content": "x" * 100_000}]}, 413, "larger than 65,536 bytes"),
    ],
)
def test_a_request_that_cannot_be_answered_is_told_why(
    client: Any, two_runs: list[Path], options: dict[str, Any], status: int, message: str
) -> None:
    import openai

    with pytest.raises(openai.APIStatusError, match=message) as refused:
        client.chat.completions.create(**{"model": two_runs[0].name, "messages": ASKED, **options})
    assert refused.value.status_code == status


def test_a_key_is_asked_for_and_bodies_that_are_no_json_are_refused(address: str) -> None:
    def status(path: str, body: bytes | None, key: str) -> int:
        request = urllib.request.Request(address + path, body, {"Authorization": f"Bearer {key}"})
        try:
            return int(urllib.request.urlopen(request, timeout=10).status)
        except urllib.error.HTTPError as error:
            return error.code

    assert status("/health", None, "") == 200
    assert status("/v1/models", None, "") == 401
    assert status("/v1/models", None, "secret!") == 401
    assert status("/v1/chat/completions", b"{", "secret") == 400
    assert status("/v1/chat/completions", b"[" * 10_000, "secret") == 400
    assert status("/v1/chat/completions", b"[1]", "secret") == 400
    assert status("/v1/chat/completions", b"\xff\xfe", "secret") == 400
    model = json.loads(urllib.request.urlopen(models_of(address)).read())["data"][0]["id"]
    for more in ('"max_tokens": 1e999', '"max_tokens": NaN', '"temperature": NaN', '"prompt": "\\ud800"'):
        body = f'{{"model": "{model}", "prompt": "a", {more}}}'
        assert status("/v1/completions", body.encode(), "secret") == 400, more
    assert status("/v1/nothing", b"{}", "secret") == 404


def models_of(address: str) -> urllib.request.Request:
    return urllib.request.Request(f"{address}/v1/models", headers={"Authorization": "Bearer secret"})


def test_a_client_that_goes_away_ends_its_request(address: str, two_runs: list[Path]) -> None:
    for stream in (True, False):
        body = {
            "model": two_runs[0].name,
            "prompt": "The fox",
            "max_tokens": 240,
            "temperature": 8,
            "n": 8,
            "stream": stream,
        }
        content = json.dumps(body).encode()
        head = "POST /v1/completions HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer secret\r\n"
        head += f"Content-Length: {len(content)}\r\n\r\n"
        with socket.create_connection(("127.0.0.1", int(address.rpartition(":")[2]))) as connection:
            connection.sendall(head.encode() + content)
            if stream:
                connection.recv(100)
        deadline = time.monotonic() + 30
        while json.load(urllib.request.urlopen(f"{address}/health"))["requests"]:
            assert time.monotonic() < deadline


def test_a_client_that_leaves_ends_a_request_that_waits_for_its_turn() -> None:
    """No piece of it is there yet, and none should be computed."""
    from llmft.serving.api import Api, ParsedRequest

    class Left:
        async def is_disconnected(self) -> bool:
            return True

    async def cancelled() -> bool:
        request: Any = SimpleNamespace(cancelled=False, error="", text="", finish="", ids=[], tokens=[])
        run, engine = (cast(Any, SimpleNamespace(name="a", submit=lambda request: None)) for _ in range(2))
        parsed = ParsedRequest(run, [request], asyncio.Queue(), stream=False, with_usage=False, chat=False)
        answering = asyncio.ensure_future(
            Api(engine, ServeConfig(run="a"), key=None)._answer(cast(Any, Left()), parsed)
        )
        await asyncio.sleep(0.2)
        was_cancelled: bool = request.cancelled
        parsed.pieces.put_nowait((0, None))
        await answering
        return was_cancelled

    assert asyncio.run(cancelled())
