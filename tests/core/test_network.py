"""Every wait for a network has a limit in total, not per byte."""

from __future__ import annotations

import socket
import time
from pathlib import Path
from threading import Thread

import pytest

from llmft.checks.machine import network
from llmft.core.errors import ConfigError
from llmft.core.network import NoAnswer, ask, download
from llmft.data.hub import ask_hub
from llmft.training.tracking import probe_wandb
from tests.servers import BAD, server


@pytest.mark.parametrize("kind", BAD)
def test_the_probe_wandb_ends_in_its_time_and_names_what_is_there(kind: str) -> None:
    with server(kind) as url:
        began = time.monotonic()
        cause = probe_wandb(url, 0.5)
        assert time.monotonic() - began < 0.5 + 1
    assert (cause is None) == (kind == "healthy then hanging")
    if cause is not None:
        assert url in cause
        assert "\n" not in cause


@pytest.mark.parametrize("kind", BAD)
def test_the_hub_is_asked_once_and_for_seconds(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    import llmft.data.hub as hub

    monkeypatch.setattr(hub, "_offline", lambda: False)
    monkeypatch.setattr(hub, "PROBE_TIMEOUT_S", 0.5)
    with server(kind) as url:
        monkeypatch.setattr(constants, "ENDPOINT", url)
        began = time.monotonic()
        if kind == "healthy then hanging":
            ask_hub("model.id=a/b", "a/b", "model", "do without")
        else:
            with pytest.raises(ConfigError, match=r"^model.id=a/b: .*do without\.$"):
                ask_hub("model.id=a/b", "a/b", "model", "do without")
        assert time.monotonic() - began < 0.5 + 1


@pytest.mark.parametrize("kind", ["dripping", "not http", "html", "status 500", "closed mid-stream"])
def test_the_doctor_says_what_answers_in_place_of_the_hub_and_wandb(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmft.checks.machine.NETWORK_TIMEOUT_S", 0.5)
    with server(kind) as url:
        monkeypatch.setenv("HF_ENDPOINT", url)
        monkeypatch.setenv("WANDB_BASE_URL", url)
        began = time.monotonic()
        verdicts = list(network())
        assert time.monotonic() - began < 2 * 0.5 + 1
    assert [(verdict.part, verdict.level) for verdict in verdicts] == [("Hub", "warning"), ("W&B", "warning")]
    assert all(url in verdict.found for verdict in verdicts)


@pytest.mark.parametrize("url", ["file:///etc/passwd", "foo", "", "ftp://x", "http://", "http://[", "http://a..b"])
def test_what_is_no_address_is_no_answer(url: str) -> None:
    with pytest.raises(NoAnswer):
        ask(url, 2)


def test_a_proxy_that_is_not_there_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free.getsockname()[1]}")
        monkeypatch.delenv("no_proxy", raising=False)
        assert "cannot be reached" in str(probe_wandb("http://wandb.example", 2))


def test_a_token_stays_with_the_server_that_it_is_for(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other, socket.socket() as first:
        for listening in (other, first):
            listening.bind(("127.0.0.1", 0))
            listening.listen()
        to = f"http://127.0.0.1:{other.getsockname()[1]}/"
        heard: list[bytes] = []

        def serve(listening: socket.socket, head: str) -> None:
            connection, _ = listening.accept()
            with connection:
                heard.append(connection.recv(2**16))
                connection.sendall(f"HTTP/1.1 {head}\r\nContent-Length: 0\r\n\r\n".encode())

        Thread(target=serve, args=(first, f"302 Found\r\nLocation: {to}"), daemon=True).start()
        Thread(target=serve, args=(other, "200 OK"), daemon=True).start()
        status, _ = ask(f"http://127.0.0.1:{first.getsockname()[1]}", 3, headers={"Authorization": "Bearer mine"})
    assert status == 200
    assert [b"Bearer mine" in request for request in heard] == [True, False]


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder into which library.fetch writes a file every 0.2 s; with `hang` it stops for a minute."""
    (tmp_path / "library.py").write_text(
        "import pathlib, time\n"
        "def fetch(folder, hang):\n"
        "    for number in range(6):\n"
        "        (pathlib.Path(folder) / str(number)).write_bytes(b'1')\n"
        "        time.sleep(60 if hang and number == 2 else 0.2)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "folder").mkdir()
    return tmp_path / "folder"


def test_a_download_ends_when_nothing_more_comes_and_not_before(slow: Path) -> None:
    download("library.fetch", {"folder": str(slow), "hang": False}, slow, 0.8)
    assert len(list(slow.iterdir())) == 6
    with pytest.raises(NoAnswer, match="nothing more came"):
        download("library.fetch", {"folder": str(slow), "hang": True}, slow, 0.8)


def test_a_download_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(NoAnswer, match="No such file or directory: '/no/such'"):
        download("os.listdir", {"path": "/no/such"}, tmp_path)


@pytest.mark.parametrize("gated", [True, False])
def test_a_gated_model_that_the_hub_refuses_names_its_licence(gated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmft.data.hub as hub

    monkeypatch.setattr(hub, "_offline", lambda: False)
    monkeypatch.setattr(hub, "ask", lambda *arguments, **options: (403, b""))
    with pytest.raises(ConfigError, match=r"do without\.$") as refused:
        ask_hub("model.id=a/b", "a/b", "model", "do without", gated=gated)
    sentence = "it is gated: accept the licence at https://huggingface.co/a/b and set HF_TOKEN"
    assert (sentence in str(refused.value)) == gated
