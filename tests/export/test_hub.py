"""push and bundle: what leaves this machine, and what works on another."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llmft.bundle import bundle
from llmft.config.commands import BundleConfig, PushConfig, Pushed
from llmft.core.errors import ConfigError
from llmft.export.bundle import Wheel, reached
from llmft.export.hub import plan
from llmft.push import push


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
    with pytest.raises(ConfigError, match=r"what=gguf: not there yet; first `python -m llmft\.merge"):
        push(PushConfig(run=str(two_runs[0]), repo="me/writers", what=Pushed.gguf))


def test_what_a_target_has_and_what_only_that_needs_is_left_out() -> None:
    needs = {"a": ("b", "torch"), "b": (), "torch": ("cuda",), "cuda": ()}
    found = {name: Wheel(name, "1", f"https://x/{name}.whl", requires) for name, requires in needs.items()}
    assert [wheel.name for wheel in reached(found, ["a"], {"torch"})] == ["a", "b"]
    assert [wheel.name for wheel in reached(found, ["a"], set())] == ["a", "b", "cuda", "torch"]


@pytest.mark.slow
def test_a_bundle_predicts_in_another_place(two_runs: list[Path], tmp_path: Path) -> None:
    bundle(BundleConfig(run=str(two_runs[0]), to=str(tmp_path / "bundle"), wheels=False, accelerator="cpu"))
    assert json.loads((tmp_path / "bundle" / "bundle.json").read_text())["run"] == two_runs[0].name
    moved = (tmp_path / "bundle").rename(tmp_path / "another & place")
    command = ["sh", str(moved / "predict.sh"), str(tmp_path / "out"), "prompts=[Who?]", "name=a", "accelerator=cpu"]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "run" / "predictions" / "a" / "predictions.csv").is_file()
    with pytest.raises(ConfigError, match="there is something else already"):
        bundle(BundleConfig(run=str(two_runs[0]), to=str(tmp_path), wheels=False))
