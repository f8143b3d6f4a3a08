"""Weights & Biases: offline at once without key or network, complete records, one run per job, no secrets."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from llmft.config.convert import flatten
from llmft.config.trainer import WandbConfig
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.train import train
from llmft.training.tracking import SafeWandbLogger, open_wandb, wandb_mode
from tests.conftest import SMALL, compose, run_directory
from tests.servers import BAD, server


def read_offline(path: Path) -> Iterator[Any]:
    """The records of a .wandb file: 32 KiB blocks of (crc, length, type) headers and payloads."""
    from wandb.proto import wandb_internal_pb2

    content = path.read_bytes()
    position, parts = 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        payload = content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 2):
            parts = b""
        parts += payload
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def offline_files(root: Path) -> list[Path]:
    return sorted(root.glob("runs/*/wandb/offline-run-*/*.wandb"))


def collect(path: Path) -> dict[str, Any]:
    records: dict[str, Any] = {"history": [], "config": {}, "summary": {}, "run": None}
    for record in read_offline(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            records["run"] = record.run
            records["config"].update({item.key: json.loads(item.value_json) for item in record.run.config.update})
        elif kind == "history":
            keys = {".".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            records["history"].append({key: json.loads(value) for key, value in keys.items()})
        elif kind == "summary":
            for item in record.summary.update:
                records["summary"][".".join(item.nested_key) or item.key] = item.value_json
    return records


def test_the_offline_file_holds_config_history_summary_and_group(tmp_path: Path) -> None:
    train(
        compose(*SMALL, "logger=wandb", f"output_dir={tmp_path}", "tags=[a,b]", "logger.wandb.group=night"), quiet=True
    )
    train(compose(*SMALL, "logger=wandb", f"output_dir={tmp_path}", "seed=1"), quiet=True)
    files = offline_files(tmp_path)
    assert len(files) == 2, "each job has a run of its own"
    run = next(f for f in map(collect, files) if f["run"].run_group == "night")
    directory = next(d for d in (tmp_path / "runs").iterdir() if run["run"].run_id.startswith(f"{d.name[-10:]}-"))
    assert run["run"].job_type == "train"
    assert list(run["run"].tags) == ["a", "b"]
    assert run["run"].project == "llmft"
    assert run["config"]["lora.r"] == 2
    assert run["config"]["model.id"] == "llmft/tiny"
    assert "git.commit" in run["config"]
    local = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    logged = [h for h in run["history"] if "val/loss_nats" in h]
    assert [h["val/loss_nats"] for h in logged] == [r["val/loss_nats"] for r in local if "val/loss_nats" in r]
    assert [h["step"] for h in logged] == [0, 2, 4]
    assert sum("train/loss_nats" in h for h in run["history"]) == 4
    assert any(key.startswith("samples") for h in run["history"] for key in h)
    assert any("train/tokens_per_s" in h for h in run["history"])
    assert "best/val/loss_nats" in run["summary"] or "best" in json.dumps(run["summary"])


def log_to(url: str, root: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> tuple[list[float], float]:
    """Logs ten numbers to the server at `url`; returns the offline file's numbers and the seconds of finishing."""
    import wandb

    wandb.teardown()  # it reads its environment once
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for name, value in {"WANDB_BASE_URL": url, "WANDB_API_KEY": "0123456789" * 4, "NETRC": "/nonexistent"}.items():
        monkeypatch.setenv(name, value)
    options = WandbConfig(enabled=True, **{"start_timeout_s": 1.5, "finish_timeout_s": 5.0, **settings})
    facts = {"name": "n", "group": "g" * 200, "job_type": "j", "notes": None, "config": {"lr": 1.0}}
    began = time.monotonic()
    logger = open_wandb(options, Screen(), id=lambda: "k", dir=root, tags=["t" * 65, "t" * 70, "", "u"], **facts)
    assert logger is not None
    assert time.monotonic() - began < 0.5, "nobody waits for the start"
    for number in range(10):
        logger.log_metrics({"loss": number / 3}, step=number)
    logger.summarise({"best": 1.0})
    began = time.monotonic()
    logger.finish(0)
    took = time.monotonic() - began
    wandb.teardown()
    runs = [collect(path) for path in root.glob("wandb/offline-run-*/*.wandb")]
    if not runs:
        return [], took
    (run,) = runs
    assert "best" in run["summary"]
    assert list(run["run"].tags) == ["t" * 63 + "…", "u"]
    assert run["run"].run_group == "g" * 127 + "…"
    return [numbers["loss"] for numbers in run["history"]], took


@pytest.mark.parametrize(
    "kind",
    [
        kind if kind in ("not http", "healthy then hanging") else pytest.param(kind, marks=pytest.mark.slow)
        for kind in BAD
    ],
)
def test_whatever_the_server_does_nothing_waits_and_every_number_is_in_the_offline_file(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from wandb.analytics.opentelemetry.opentelemetry_proxy import get_open_telemetry_proxy

    with server(kind) as url:
        logged, took = log_to(url, tmp_path, monkeypatch)
        assert get_open_telemetry_proxy() is None, "it would hold the end of the process"
        output = capsys.readouterr().out
        assert url in output
    assert logged == [number / 3 for number in range(10)]
    assert took < 1.5 + 5 + 10, "limits, and starting wandb on a busy machine"
    assert output.count("W&B is offline") == output.count("wandb sync ") == 1
    assert output.count("characters") == 1, "tags that are cut are told"


@pytest.mark.parametrize("name", ["WANDB_BASE_URL", "WANDB_MODE", "WANDB_HTTP_PROXY", "WANDB_RESUME"])
def test_a_variable_that_wandb_refuses_does_not_keep_it_from_writing_offline(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with server("refused") as url:
        monkeypatch.setenv(name, "no such thing")
        if name == "WANDB_MODE":
            monkeypatch.setattr(monkeypatch, "delenv", lambda *arguments, **named: None)
        logged, _ = log_to("no such thing" if name == "WANDB_BASE_URL" else url, tmp_path, monkeypatch)
    assert len(logged) == 10
    assert "wandb sync" in capsys.readouterr().out


@pytest.mark.parametrize(
    "key", ["project=a/b", "project=''", f"project={'p' * 129}", "entity=a:b", "start_timeout_s=0"]
)
def test_names_that_wandb_refuses_are_refused_before_the_run(small: Callable[..., Any], key: str) -> None:
    with pytest.raises(ConfigError, match=rf"^logger\.wandb\.{key.split('=')[0]}="):
        small(f"logger.wandb.{key}")


def test_a_call_that_hangs_does_not_hold_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    screen, never = Screen(quiet=True), threading.Event()

    class Hanging:
        def define_metric(self, *arguments: Any, **named: Any) -> None:
            never.wait(60)

    logger = SafeWandbLogger(Hanging, screen, 0.3)
    began = time.monotonic()
    assert hasattr(logger, "experiment")  # as Lightning asks when a training begins
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.finish(0)
    assert time.monotonic() - began < 2
    never.set()


def mode(monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[str, str | None, float]:
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", "/nonexistent")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    chosen, why = wandb_mode(WandbConfig(enabled=True, start_timeout_s=1.0))
    return chosen, why, time.monotonic() - began


def test_w3_without_a_key_it_is_offline_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen, why, seconds = mode(monkeypatch)
    assert (chosen, seconds < 0.5) == ("offline", True)
    assert "wandb login" in str(why)


def test_w1_a_refused_connection_means_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    chosen, why, seconds = mode(monkeypatch, WANDB_API_KEY="x" * 40, WANDB_BASE_URL=f"http://127.0.0.1:{port}")
    assert (chosen, seconds < 3) == ("offline", True)
    assert "cannot be reached" in str(why)


def test_w2_a_server_that_never_answers_delays_the_start_by_its_limit_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()
        url = f"http://127.0.0.1:{hole.getsockname()[1]}"
        chosen, why, seconds = mode(monkeypatch, WANDB_API_KEY="x" * 40, WANDB_BASE_URL=url)
    assert (chosen, seconds < 3) == ("offline", True)
    assert "cannot be reached" in str(why)


def test_any_answer_means_online(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()

        def answer() -> None:
            connection, _ = server.accept()
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")
            connection.close()

        thread = threading.Thread(target=answer)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert mode(monkeypatch, WANDB_API_KEY="x" * 40, WANDB_BASE_URL=url)[0] == "online"
        thread.join()


def test_the_users_own_mode_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    assert mode(monkeypatch, WANDB_MODE="disabled")[0] == "disabled"
    assert mode(monkeypatch, WANDB_MODE="offline", WANDB_API_KEY="x" * 40)[0] == "offline"


def test_w6_a_logger_that_raises_on_every_call_does_not_touch_the_training(
    small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    plain = train(small(), quiet=True)

    def broken(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("the service is down")

    monkeypatch.setattr(wandb.Run, "log", broken)
    assert train(small("logger=wandb", "force=true"), quiet=True) == plain
    assert len((run_directory(tmp_path) / "metrics.jsonl").read_text().splitlines()) == 7


def test_w6_wandb_that_cannot_start_is_said_once_and_done_without(
    small: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(*arguments: Any, **keywords: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(wandb, "init", broken)
    train(small("logger=wandb"))
    assert capsys.readouterr().out.count("W&B cannot log") == 1


def test_the_flat_config_has_one_level_of_dotted_keys() -> None:
    assert flatten({"a": {"b": 1, "c": {"d": [1, 2]}}, "e": {}}) == {"a.b": 1, "a.c.d": [1, 2], "e": {}}


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_other_loggers_write_into_the_run_directory(small: Callable[..., Any], tmp_path: Path, logger: str) -> None:
    if logger == "tensorboard":
        pytest.importorskip("tensorboard")
    train(small(f"logger={logger}"), quiet=True)
    written = [path for path in (run_directory(tmp_path) / logger).rglob("*") if path.is_file()]
    assert written
    if logger == "csv":
        assert "val/loss_nats" in next(path for path in written if path.name == "metrics.csv").read_text()
