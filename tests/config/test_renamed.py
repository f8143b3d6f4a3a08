"""Renamed keys: the old name works for a release with a warning, and gives the same run."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from llmft.config.convert import to_plain
from llmft.config.hydra_app import explain
from llmft.config.overrides import hydra_arguments
from llmft.config.renamed import RENAMED
from llmft.config.sections import TrainConfig
from llmft.config.untrusted import stored_config
from llmft.runs.key import run_key
from tests.conftest import compose


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_on_the_command_line_works_and_is_told(
    old: str, new: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert hydra_arguments([f"{old}=null"], TrainConfig, multirun=True) == [f"{new}=null"]
    assert f"{old} is now called {new}" in capsys.readouterr().err


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_in_a_file_is_answered_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(Exception) as raised:  # noqa: PT011 (Hydra's own)
        compose(f"{old}=7")
    assert str(explain(raised.value, TrainConfig)) == f"{old} is now called {new}."


def test_a_run_of_an_earlier_release_is_read_and_has_its_key(tmp_path: Path) -> None:
    config = compose("data.pseudo_min_confidence=0.75", "data.pseudo_max_per_class=3", "sweep.heartbeat_timeout=2h")
    stored = yaml.safe_dump(to_plain(config))
    for old, new in RENAMED.items():
        stored = stored.replace(f" {new.partition('.')[2]}:", f" {old.partition('.')[2]}:")
    assert "pseudo_floor" in stored
    assert "silence_limit" in stored
    assert "heartbeat_timeout" not in stored
    (tmp_path / "config.yaml").write_text(stored)
    assert stored_config(tmp_path / "config.yaml") == config
    assert run_key(config, "rows", "model") == "473c3fbfee"
