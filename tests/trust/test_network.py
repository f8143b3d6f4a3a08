"""W&B and the Hub refusing, silent, gone in the middle, or not installed: W1 to W4, W6 and W7 in a complete run."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmft.config.model import ModelConfig
from llmft.core.errors import ConfigError
from llmft.data.hub import locate
from llmft.train import train
from tests.conftest import SMALL, compose, run_directory
from tests.trust.helpers import adapter_bytes, fork, records, whole_run


@pytest.fixture(autouse=True)
def fresh_wandb() -> Iterator[None]:
    """wandb reads its environment once per process, and its service may have died with the server."""
    import wandb

    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """The same run without W&B."""
    return whole_run(tmp_path / "plain", base=SMALL)


def use(monkeypatch: pytest.MonkeyPatch, url: str, key: str | None = "0123456789" * 4) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", url)
    monkeypatch.setenv("NETRC", "/nonexistent")
    if key is None:
        monkeypatch.delenv("WANDB_API_KEY", raising=False)
    else:
        monkeypatch.setenv("WANDB_API_KEY", key)


def same_numbers(a: Path, b: Path) -> None:
    assert (a / "metrics.jsonl").read_bytes() == (b / "metrics.jsonl").read_bytes()
    assert adapter_bytes(a) == adapter_bytes(b)


def offline_within(root: Path, plain: Path, capsys: Any, why: str) -> None:
    """Trains with W&B; it is offline, says so once and how to upload, and costs at most 5 s at the start."""
    config = compose(*SMALL, "logger=wandb", f"output_dir={root}")
    import llmft.training.session as session

    began = time.monotonic()
    waited: list[float] = []
    original = session.make_loggers

    def timed(*arguments: Any) -> Any:
        start = time.monotonic()
        result = original(*arguments)
        waited.append(time.monotonic() - start)
        return result

    session.make_loggers = timed
    try:
        train(config)
    finally:
        session.make_loggers = original
    output = capsys.readouterr().out
    assert waited[0] < 5 + 6, "the limit, and importing and starting wandb on a slow machine"
    assert time.monotonic() - began < 60
    assert output.count("W&B is offline") == 1
    assert why in output
    assert "wandb sync " in output
    directory = run_directory(root)
    folder = output.split("wandb sync ")[1].split("\n")[0].strip()
    assert Path(folder).is_dir()
    same_numbers(plain, directory)


def test_w1_a_closed_port(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    use(monkeypatch, f"http://127.0.0.1:{port}")
    offline_within(tmp_path / "a", plain, capsys, "cannot be reached")


def test_w2_a_black_hole(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        use(monkeypatch, f"http://127.0.0.1:{hole.getsockname()[1]}")
        offline_within(tmp_path / "a", plain, capsys, "cannot be reached")


def test_w3_no_key(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    use(monkeypatch, "http://127.0.0.1:1", key=None)
    offline_within(tmp_path / "a", plain, capsys, "wandb login")


class Stub(BaseHTTPRequestHandler):
    """The part of a W&B server that a run needs to start; it stops answering when `silent` is set."""

    silent = threading.Event()
    seen: list[str] = []  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        if self.silent.is_set():
            time.sleep(300)
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length).decode("utf-8", "replace")
        self.seen.append(f"{self.command} {self.path} {body[:60]}")
        content = self.reply(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    do_GET = do_POST = do_PUT = answer

    def reply(self, body: str) -> str:
        if "UpsertBucket" in body or "upsertBucket" in body:
            run = '{"id":"UnVuOjE=","name":"r","displayName":"r","description":"","config":"{}","sweepName":"",'
            run += '"historyLineCount":0,"project":{"id":"p","name":"llmft","entity":{"id":"e","name":"me"}}}'
            return '{"data":{"upsertBucket":{"bucket":' + run + ',"inserted":true}}}'
        if "viewer" in body.lower():
            return '{"data":{"viewer":{"id":"v","entity":"me","username":"me","flags":"{}","teams":{"edges":[]}}}}'
        if "serverInfo" in body or "ServerInfo" in body:
            return '{"data":{"serverInfo":{"cliVersionInfo":{},"latestLocalVersionInfo":null,"features":[]}}}'
        return '{"data":{}}'

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def stub() -> Iterator[str]:
    Stub.silent.clear()
    Stub.seen.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Stub)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


@pytest.mark.slow
def test_w4_a_server_that_dies_in_mid_run_delays_the_end_by_its_limit_only(
    plain: Path, stub: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmft.training.callbacks import Recorder

    use(monkeypatch, stub)
    original = Recorder.on_train_batch_end

    def dying(self: Any, trainer: Any, module: Any, *arguments: Any) -> None:
        if module.step == 2:
            Stub.silent.set()
        original(self, trainer, module, *arguments)

    monkeypatch.setattr(Recorder, "on_train_batch_end", dying)
    began = time.monotonic()
    train(compose(*SMALL, "logger=wandb", "logger.wandb.finish_timeout_s=4", f"output_dir={tmp_path}/a"), quiet=True)
    assert time.monotonic() - began < 4 + 25
    assert any("graphql" in line for line in Stub.seen), "it had begun online"
    directory = run_directory(tmp_path / "a")
    same_numbers(plain, directory)
    assert list(directory.glob("wandb/run-*/*.wandb")), "what was not uploaded can be, with wandb sync"


def test_w6_without_wandb_installed_the_run_goes_on_without_it(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job() -> None:
        for name in [name for name in sys.modules if name.partition(".")[0] == "wandb"]:
            del sys.modules[name]
        sys.modules["wandb"] = None  # type: ignore[assignment]  # so that importing it fails
        train(compose(*SMALL, "logger=wandb", f"output_dir={tmp_path}/a"))

    child = fork(job, tmp_path / "output.txt")
    assert child.wait() == 0, child.text()
    assert "W&B cannot log" in child.text()
    same_numbers(plain, run_directory(tmp_path / "a"))


@pytest.mark.parametrize("method", ["log", "define_metric", "finish"])
def test_w6_a_call_that_raises_costs_only_what_wandb_would_have_shown(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, capsys: Any
) -> None:
    import wandb

    def broken(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("the service is down")

    target: Any = wandb.Run
    with monkeypatch.context() as patch:
        patch.setattr(target, method, broken)
        train(compose(*SMALL, "logger=wandb", f"output_dir={tmp_path}/a"))
    wandb.finish()
    assert "the service is down" in capsys.readouterr().out
    same_numbers(plain, run_directory(tmp_path / "a"))
    assert len(records(run_directory(tmp_path / "a"))) == 7


class TestW7Hub:
    """A model that is not cached, without a network: the error comes at once and says what to do."""

    MODEL = ModelConfig(name="m", id="mistralai/Mistral-7B-Instruct-v0.1", architecture="mistral")

    @pytest.fixture
    def cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        from huggingface_hub import constants

        for name in ("mistralai--Mistral-7B-Instruct-v0.2", "gpt2", "Qwen--Qwen3-8B"):
            (tmp_path / f"models--{name}").mkdir()
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        return tmp_path

    def refused(self, within: float) -> str:
        began = time.monotonic()
        with pytest.raises(ConfigError) as error:
            locate(self.MODEL)
        assert time.monotonic() - began < within
        return str(error.value)

    def test_w7_offline_names_the_cache_the_switch_and_the_nearest_id(self, cache: Path) -> None:
        message = self.refused(2)
        assert "HF_HUB_OFFLINE" in message
        assert str(cache) in message
        assert "it contains mistralai/Mistral-7B-Instruct-v0.2" in message
        assert "model.path=DIR" in message

    @pytest.mark.parametrize("kind", ["closed", "silent"])
    def test_w7_a_network_that_does_not_answer_costs_seconds(
        self, cache: Path, monkeypatch: pytest.MonkeyPatch, kind: str
    ) -> None:
        from huggingface_hub import constants

        import llmft.data.hub as hub

        monkeypatch.setattr(hub, "_offline", lambda: False)
        with socket.socket() as hole:
            hole.bind(("127.0.0.1", 0))
            if kind == "silent":
                hole.listen()
            monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hole.getsockname()[1]}")
            message = self.refused(8)
        assert "cannot be reached" in message
        assert str(cache) in message
        assert "it contains mistralai/Mistral-7B-Instruct-v0.2" in message
        assert "HF_ENDPOINT" in message
