"""push and bundle: what is sent from this machine, and what works on another."""

from __future__ import annotations

import json
import os
import platform as machine
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from llmft.bundle import bundle
from llmft.config.commands import BundleConfig, PredictConfig, PushConfig, Pushed
from llmft.core.errors import ConfigError
from llmft.export.bundle import Wheel, reached, tags_of
from llmft.export.hub import plan, send
from llmft.predict import predict
from llmft.push import push
from llmft.runs.predictions import Predictions
from tests.conftest import ROOT
from tests.servers import hub
from tests.servers import server as broken


def test_what_is_sent_is_shown_and_names_no_place_here(two_runs: list[Path], capsys: Any) -> None:
    config = PushConfig(run=str(two_runs[0]), repo="me/writers")
    with plan(config) as folder:
        names = {path.name for path in folder.iterdir()}
        assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
        assert "generation" not in (folder / "chat_template.jinja").read_text()
        texts = "".join(path.read_text() for path in folder.iterdir() if path.suffix in (".md", ".json", ".jinja"))
        assert str(Path.home()) not in texts
        assert str(two_runs[0].parent) not in texts
        assert "| data | writers |" in (folder / "README.md").read_text()
    assert not folder.exists()
    push(config)
    shown = capsys.readouterr().out
    assert "adapter_model.safetensors" in shown
    assert "nothing was sent" in shown
    with pytest.raises(ConfigError, match="HF_HUB_OFFLINE is set"):
        push(PushConfig(run=str(two_runs[0]), repo="me/writers", send=True))
    with pytest.raises(ConfigError, match=r"what=gguf: does not exist yet; first `python -m llmft\.merge"):
        push(PushConfig(run=str(two_runs[0]), repo="me/writers", what=Pushed.gguf))


def test_an_upload_leaves_the_timeout_of_the_shared_client_as_it_was(monkeypatch: Any, tmp_path: Path) -> None:
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr("llmft.export.hub._check_token", lambda *_: None)
    during: list[Any] = []

    def refuse(*_: Any, **__: Any) -> None:
        during.append(huggingface_hub.get_session().timeout)
        raise OSError("no")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    before = huggingface_hub.get_session().timeout
    with pytest.raises(ConfigError, match="did not accept it"):
        send(PushConfig(run="run", repo="me/writers", send=True), tmp_path)
    assert during[0] != before
    assert huggingface_hub.get_session().timeout == before


PIP = [sys.executable, "-m", "pip"]
TOKEN = "hf_" + "abcDEF123" * 4


def test_a_run_is_sent_whole_private_and_without_the_token(two_runs: list[Path]) -> None:
    config = PushConfig(run=str(two_runs[0]), repo="me/writers")
    with hub() as server, plan(config) as folder:
        command = [sys.executable, "-m", "llmft.push", f"run={two_runs[0]}", "repo=me/writers", "send=true"]
        settings = {"HF_ENDPOINT": server.address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN}
        result = subprocess.run(command, env={**os.environ, **settings}, capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 0, result.stderr
        assert server.files == {path.name: path.read_bytes() for path in folder.iterdir()}
        assert server.created["name"] == "writers"
        assert (server.created.get("private") is True) or server.created.get("visibility") == "private"
        assert server.tokens == {f"Bearer {TOKEN}"} | server.tokens & {""}  # signed addresses need none
        assert f"sent  {server.address}/me/writers (private)" in result.stdout
    assert TOKEN not in result.stdout + result.stderr
    assert not any(TOKEN.encode() in content for content in server.files.values())


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pushes to an address with a token and short timeouts; returns the error's message."""
    import huggingface_hub
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("llmft.export.hub.PROBE_TIMEOUT_S", 1.0)
    monkeypatch.setattr("llmft.export.hub.STALLED_S", 0.5)
    huggingface_hub.close_session()

    def attempt(run: Path, address: str, **options: Any) -> str:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(ConfigError) as refused:
            push(PushConfig(run=str(run), repo="me/writers", send=True, **options))
        assert TOKEN not in str(refused.value)
        return str(refused.value)

    yield attempt
    huggingface_hub.close_session()


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [
        ("refused", "cannot be reached"),
        ("silent", "cannot be reached (no complete answer within 1 s)"),
        ("status 500", "does not answer like a Hub (status 500); nothing was sent."),
        ("html", "does not answer like a Hub (status 200); nothing was sent."),
        ("not http", "cannot be reached (its answer is not HTTP"),
    ],
)
def test_a_broken_hub_is_one_sentence(two_runs: list[Path], online: Any, kind: str, sentence: str) -> None:
    with broken(kind) as address:
        assert sentence in online(two_runs[0], address)


def test_a_hub_that_refuses_or_falls_silent_half_way_is_one_sentence(two_runs: list[Path], online: Any) -> None:
    with hub() as server:
        server.refusing = "/whoami"
        assert "does not accept this token; `hf auth login` with one for writing." in online(
            two_runs[0], server.address
        )
        server.refusing = "/commit/"
        assert "did not accept it (" in online(two_runs[0], server.address)
        server.refusing, server.silent = "nothing", "/repos/create"
        assert "did not accept it (" in online(two_runs[0], server.address)
        server.silent, server.public = "nothing", True
        assert "the repository exists and is public; private=false" in online(two_runs[0], server.address)
        assert server.files == {}


def test_what_a_target_has_and_what_only_that_needs_is_left_out() -> None:
    needs = {"a": ("b", "torch"), "b": (), "torch": ("cuda",), "cuda": ()}
    wheels = {name: Wheel(name, "1", f"https://x/{name}.whl", requires) for name, requires in needs.items()}
    assert [wheel.name for wheel in reached(wheels, ["a"], {"torch"})] == ["a", "b"]
    assert [wheel.name for wheel in reached(wheels, ["a"], set())] == ["a", "b", "cuda", "torch"]


@pytest.mark.slow
def test_a_bundle_predicts_in_another_place(two_runs: list[Path], tmp_path: Path) -> None:
    bundle(BundleConfig(run=str(two_runs[0]), to=str(tmp_path / "bundle"), wheels=False, accelerator="cpu"))
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["run"] == two_runs[0].name
    moved = (tmp_path / "bundle").rename(tmp_path / "another & place")
    command = ["sh", str(moved / "predict.sh"), str(tmp_path / "out"), "prompts=[Who?]", "name=a", "accelerator=cpu"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "out" / "run" / "predictions" / "a" / "predictions.csv").is_file()
    with pytest.raises(ConfigError, match="exists and is not a bundle"):
        bundle(BundleConfig(run=str(two_runs[0]), to=str(tmp_path), wheels=False))


def test_the_size_is_told_and_nothing_written_where_that_is_asked(
    two_runs: list[Path], tmp_path: Path, capsys: Any
) -> None:
    bundle(BundleConfig(run=str(two_runs[0]), to=str(tmp_path / "bundle"), wheels=False, write=False))
    assert "KiB in total" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_platform_takes_the_wheels_of_older_c_libraries() -> None:
    names = tags_of("manylinux_2_17_x86_64")
    assert names[:3] == ["manylinux_2_17_x86_64", "manylinux2014_x86_64", "manylinux_2_16_x86_64"]
    assert names[-2:] == ["manylinux_2_5_x86_64", "manylinux1_x86_64"]
    assert tags_of("macosx_11_0_arm64") == ["macosx_11_0_arm64"]


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="names a platform of Linux")
def test_a_bundle_with_its_wheels_predicts_in_an_empty_environment_without_network(
    two_runs: list[Path], tmp_path: Path, capsys: Any
) -> None:
    probe = [*PIP, "download", "--quiet", "--no-deps", "--dest", str(tmp_path / "x"), "packaging"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no package index can be reached")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    options = {"python": version, "platform": [f"manylinux_2_28_{machine.machine()}"], "accelerator": "cpu"}
    folder = tmp_path / "bundle"
    bundle(BundleConfig(run=str(two_runs[0]), to=str(folder), **options))
    assert "its predictions are the run's" in capsys.readouterr().out
    sizes = json.loads((folder / "bundle.json").read_text())["bytes"]
    written = sum(path.stat().st_size for path in (folder / "wheels").iterdir())
    assert written == pytest.approx(sizes["wheels"], rel=0.01)

    (directory,) = predict(PredictConfig(run=str(two_runs[0]), prompts=["Who?", "Why?"], accelerator="cpu"), quiet=True)
    moved = folder.rename(tmp_path / "another & place")
    venv.create(tmp_path / "empty", with_pip=True)
    cut_off = ["unshare", "--net"]
    alone = cut_off if subprocess.run([*cut_off, "true"], capture_output=True).returncode == 0 else []
    command = ["sh", str(moved / "predict.sh"), str(tmp_path / "out")]
    command += ["prompts=[Who?,Why?]", "name=a", "accelerator=cpu"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "empty" / "bin" / "python"), "PIP_NO_INDEX": "1"}
    result = subprocess.run([*alone, *command], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    answers = Predictions.load(tmp_path / "out" / "run" / "predictions" / "a")
    assert answers.predicted == Predictions.load(directory).predicted
