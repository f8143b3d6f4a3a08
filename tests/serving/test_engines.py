"""serve with=…: other engines get a merged run and are started by their own command."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from llmft.config.commands import ServeConfig, ServedBy
from llmft.core.errors import ConfigError
from llmft.export.targets import opened
from llmft.serve import serve
from llmft.serving import engines
from llmft.serving.engines import KEY


@pytest.fixture(autouse=True)
def nothing_is_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "prepared", lambda job, config: Path("/models/a b"))
    monkeypatch.delenv(KEY, raising=False)


def config(run: Path, engine: ServedBy, **options: Any) -> ServeConfig:
    return ServeConfig(run=str(run), engine=engine, accelerator="cpu", **options)


@pytest.mark.parametrize(
    ("engine", "command"),
    [
        (ServedBy.vllm, "vllm serve '/models/a b' --served-model-name NAME --host 127.0.0.1 --port 8000"),
        (ServedBy.llamacpp, "llama-server --model '/models/a b' --alias NAME --jinja --host 127.0.0.1 --port 8000"),
        (ServedBy.transformers, "transformers serve '/models/a b' --host 127.0.0.1 --port 8000"),
    ],
)
def test_an_engine_that_is_not_installed_is_told_with_its_command(
    two_runs: list[Path], engine: ServedBy, command: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    serve(config(two_runs[0], engine))
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == command.replace("NAME", two_runs[0].name)
    assert "not installed here" in lines[0]


def test_an_engine_that_is_installed_takes_over_with_the_key_in_its_environment(
    two_runs: list[Path], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "llama-server"
    program.write_text('#!/bin/sh\necho "$LLAMA_API_KEY $@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv(KEY, "a-secret-of-1-user")
    if (child := os.fork()) == 0:
        try:
            serve(config(two_runs[0], ServedBy.llamacpp, port=1234))
        finally:
            os._exit(9)
    assert os.waitpid(child, 0)[1] == 0
    printed = capfd.readouterr().out.splitlines()
    name = two_runs[0].name
    line = f"--alias {name} --jinja --host 127.0.0.1 --port 1234"
    assert printed == [
        f"LLAMA_API_KEY=\"$LLMFT_API_KEY\" llama-server --model '/models/a b' {line}",
        f"a-secret-of-1-user --model /models/a b {line}",
    ]


def test_what_an_engine_cannot_do_is_said_before_anything_is_merged(
    two_runs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "prepared", lambda job, config: pytest.fail("merged"))
    jobs = [opened(run) for run in two_runs]
    with pytest.raises(ConfigError, match="with=vllm: one run at a time"):
        engines.hand_over(jobs, config(two_runs[0], ServedBy.vllm), None, screen=None)  # type: ignore[arg-type]
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(ConfigError, match="with=transformers: it supports no API key"):
        serve(config(two_runs[0], ServedBy.transformers))


def test_a_missing_package_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'starlette and uvicorn: pip install "llmft\[serve\]"'):
        serve(ServeConfig(run="outputs/runs/any"))


def test_the_command_of_transformers_is_one_that_it_takes() -> None:
    """transformers' own parser accepts its arguments."""
    from transformers.cli.transformers import app

    name, *options = engines.PROGRAMS[ServedBy.transformers].command[1:]
    command = app.commands[name]
    parsed = command.make_context(name, [*options, "--host", "127.0.0.1", "--port", "8000"]).params
    assert (parsed["force_model"], parsed["host"], parsed["port"]) == ("{model}", "127.0.0.1", 8000)
