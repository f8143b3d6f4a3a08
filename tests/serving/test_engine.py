"""The engine: many requests at once, each with the same answer as alone."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmft.chat import chat
from llmft.config.commands import ChatConfig, PredictConfig
from llmft.core.errors import ConfigError, DataError
from llmft.export.targets import opened
from llmft.predict import predict
from llmft.runs.predictions import Predictions
from llmft.serving.engine import Engine, Request
from llmft.serving.runs import OpenRun, open_runs

QUESTIONS = [
    f"Who wrote this text?\n\n{text}" for text in ("The fox was angry.", "Sue", "A dog, a cat and a long walk.", "x")
]


@pytest.fixture(scope="module")
def runs(two_runs: list[Path]) -> list[OpenRun]:
    config = ChatConfig(run=[str(run) for run in two_runs], accelerator="cpu")
    return open_runs([opened(run) for run in two_runs], config)


@pytest.fixture
def engine(runs: list[OpenRun]) -> Iterator[Engine]:
    started = Engine(runs)
    yield started
    started.close()


def request_of(run: OpenRun, text: str, count: int = 12, **options: Any) -> Request:
    return Request(run, run.prompt([{"role": "user", "content": text}]), count, **options)


def answers(engine: Engine, requests: list[Request]) -> list[str]:
    for request in requests:
        engine.submit(request)
    for request in requests:
        assert request.done.wait(60)
        assert not request.error
    return [request.text for request in requests]


def test_runs_of_one_base_answer_as_predict_does(runs: list[OpenRun], engine: Engine, two_runs: list[Path]) -> None:
    one, two = (run.predictor.model for run in runs)
    assert one is two
    texts = answers(engine, [request_of(run, text) for text in QUESTIONS for run in runs])
    for number, directory in enumerate(two_runs):
        options = PredictConfig(run=str(directory), prompts=QUESTIONS, accelerator="cpu", name="alone", force=True)
        (path,) = predict(options, quiet=True)
        assert texts[number::2] == Predictions.load(path).predicted
    assert texts[::2] != texts[1::2], "they are different runs"


def test_drawn_texts_depend_on_their_seed_and_not_on_their_company(runs: list[OpenRun], engine: Engine) -> None:
    def drawn(seed: int) -> Request:
        return request_of(runs[0], QUESTIONS[0], temperature=2.0, seed=seed)

    alone = [answers(engine, [drawn(seed)])[0] for seed in range(4)]
    assert answers(engine, [drawn(seed) for seed in range(4)]) == alone
    assert len(set(alone)) > 1
    greedy = answers(engine, [request_of(runs[0], QUESTIONS[0])])
    assert answers(engine, [request_of(runs[0], QUESTIONS[0], temperature=2.0, top_p=1e-6)]) == greedy


def test_pieces_make_the_text_and_a_stop_string_is_never_shown(runs: list[OpenRun], engine: Engine) -> None:
    full_text = answers(engine, [request_of(runs[0], QUESTIONS[0], 40, temperature=3.0, seed=5)])[0]
    assert len(full_text) > 8
    pieces: list[str | None] = []
    stop = full_text[4:7]
    request = request_of(runs[0], QUESTIONS[0], 40, temperature=3.0, seed=5, stop=[stop], listen=pieces.append)
    (text,) = answers(engine, [request])
    assert text == full_text[: full_text.find(stop)]
    assert request.finish == "stop"
    assert pieces[-1] is None
    assert "".join(piece or "" for piece in pieces) == text


def test_a_request_joins_others_and_one_that_is_cancelled_ends(runs: list[OpenRun], engine: Engine) -> None:
    long = [request_of(run, QUESTIONS[0], 150, temperature=8.0) for run in runs]
    for request in long:
        engine.submit(request)
    short = request_of(runs[0], QUESTIONS[1], 2)
    expected = short.run.decode(short.tokens)
    answers(engine, [short])
    assert expected == ""
    assert any(not request.done.is_set() for request in long), "the short one did not wait for the long ones"
    long[0].cancelled = True
    assert long[0].done.wait(60)
    assert long[0].finish in ("cancelled", "stop")
    assert long[1].done.wait(60)


def test_a_request_past_its_deadline_ends_at_once(runs: list[OpenRun], engine: Engine) -> None:
    pieces: list[str | None] = []
    over = request_of(runs[0], QUESTIONS[0], 150, temperature=8.0, deadline=time.monotonic(), listen=pieces.append)
    (text,) = answers(engine, [over])
    assert (over.finish, text, pieces) == ("cancelled", "", [None])


def test_chat_for_scripts_prints_the_text_alone(two_runs: list[Path], tmp_path: Path, capsys: Any) -> None:
    names = [str(run) for run in two_runs]
    replies = chat(ChatConfig(run=names[0], message=QUESTIONS[0], accelerator="cpu", save=str(tmp_path / "a.jsonl")))
    assert replies is not None
    assert capsys.readouterr().out == f"{replies[two_runs[0].name]}\n"
    assert '"role": "assistant"' in (tmp_path / "a.jsonl").read_text()
    with pytest.raises(DataError, match="the model 256 positions"):
        chat(ChatConfig(run=names[0], message="word " * 300, accelerator="cpu"), quiet=True)
    with pytest.raises(ConfigError, match="no such directory"):
        chat(ChatConfig(run=str(tmp_path / "nowhere"), message="a"), quiet=True)
