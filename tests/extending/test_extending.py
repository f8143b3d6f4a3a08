"""Each extension in a user's package needs one file, with nothing installed and nothing registered."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from llmft.config import instantiate
from llmft.config.instantiate import trust
from llmft.core.errors import ConfigError, DataError, UserError
from llmft.data.readers import BadRows
from llmft.data.sources import load_rows
from tests.conftest import ROOT, compose, llmft, run_directory

HERE = Path(__file__).resolve().parent
SMALL = [
    *("trainer.max_steps=2", "trainer.validate_every=2", "trainer.batch_size=4", "task.generate_rows=4"),
    *("task.max_new_tokens=2", "lora.r=2", "logger=none", "progress=false", "quantization=none"),
]
ROWS = ["data=diary", f"data.source_options.path={HERE}/diary.txt"]


def test_model_prompt_rows_metric_objective_and_callback_of_ones_own_train_together(tmp_path: Path) -> None:
    callback = f"{{_target_: mylib.callbacks.LossDiary, path: {tmp_path}/losses.txt}}"
    overrides = ["model=mytiny", "prompt=interview", *ROWS, "task.metrics=[mylib.metrics.same_first_letter]"]
    overrides += ["task.objective=mylib.objectives.Focal", "task.objective_options={gamma: 2}"]
    overrides += [f"trainer.callbacks.diary={callback}", "trusted_packages=[mylib]"]
    folder = str(HERE / "mylib" / "conf")
    result = llmft("--config-dir", folder, *SMALL, *overrides, cwd=tmp_path, PYTHONPATH=f"{HERE}{os.pathsep}{ROOT}")
    assert result.returncode == 0, result.stderr
    directory = run_directory(tmp_path / "outputs")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    steps = [line["train/loss_nats"] for line in lines if "train/loss_nats" in line]
    before, after = [line for line in lines if "val/loss_nats" in line]
    # With random weights Focal's loss is (nats)^3, and validation's is in nats.
    assert steps[0] == pytest.approx(before["val/loss_nats"] ** 3, rel=0.1)
    assert 0 <= after["val/same_first_letter"] <= 1
    assert (tmp_path / "losses.txt").read_text().splitlines() == [f"{i + 1} {i} {s:.4f}" for i, s in enumerate(steps)]
    prompts = [json.loads(line)["prompt"] for line in (directory / "samples.jsonl").read_text().splitlines()]
    assert all("Q: day" in prompt and prompt.endswith("Who found it? A:") for prompt in prompts)
    assert "mytiny-diary" in directory.name


@pytest.mark.parametrize(
    ("options", "error", "sentence"),
    [
        ("{path: x, sep: y}", ConfigError, "data.source_options.sep: mylib.rows.diary takes no such argument"),
        ("{}", ConfigError, "data.source_options: mylib.rows.diary: missing a required argument: 'path'"),
        ("{path: none.txt}", DataError, "data.source=mylib.rows.diary: FileNotFoundError"),
    ],
)
def test_a_row_source_that_cannot_be_used_is_refused_in_one_sentence(
    options: str, error: type[UserError], sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(HERE))
    config = compose("data=prompt_response", "data.source=mylib.rows.diary", f"data.source_options={options}")
    trust(["mylib"])
    with pytest.raises(error) as raised:
        load_rows(config.data, BadRows())
    assert str(raised.value).startswith(sentence)


def test_code_of_ones_own_runs_only_where_the_command_line_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instantiate, "_trusted", set())  # of other tests of this process
    config = compose("data=prompt_response", "data.source=tests.extending.mylib.rows.diary")
    with pytest.raises(ConfigError, match=r"trusted_packages=\[tests\]"):
        load_rows(config.data, BadRows())


def test_options_without_a_source_are_refused() -> None:
    config = compose("data=alpaca", "data.files=x.csv", "data.source_options={path: x}")
    with pytest.raises(ConfigError, match=r"needs data\.source, which is not set"):
        load_rows(config.data, BadRows())
