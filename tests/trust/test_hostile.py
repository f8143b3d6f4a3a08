"""Untrusted run directories, configs, models and data: whatever might run code, hang, leak or escape a folder."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

import llmft.config.instantiate as builder
from llmft.config.commands import PredictConfig, PredictData, RefitConfig
from llmft.config.convert import to_plain
from llmft.config.instantiate import build, check_target, trust
from llmft.config.sections import TrainConfig
from llmft.config.task import TaskConfig
from llmft.config.untrusted import check_config_directories, check_inside, check_model, stored_config
from llmft.core.errors import ConfigError, DataError, UserError
from llmft.data.hub import fingerprint
from llmft.runs.directory import Run, finished_run, open_run, write_config
from llmft.train import train
from llmft.training.parts import check_parts
from llmft.training.prepare import prepare
from llmft.training.scoring import check_objective
from tests.conftest import SMALL, compose, llmft, run_directory

TINY = Path(builder.__file__).parents[1] / "assets" / "tiny"
TOUCH = "{_target_: pathlib.Path.touch, self: {_target_: pathlib.Path, _args_: [ran]}}"
QUESTIONS = [
    "${oc.create:{_target_: builtins.open, file: ran, mode: w}}",
    "${oc.env:PLANTED}",
    "${oc.env:PLANTED,x}",
    "${oc.decode:${oc.env:PLANTED}}",
    "${oc.select:seed}",
    "${oc.deprecated:seed}",
    "${oc.dict.keys:model}",
    "${hydra:runtime.cwd}",
    "before ${ oc.env:PLANTED } after",
    "\\\\${oc.env:PLANTED}",
    "${${oc.env:PLANTED}}",
]
NODES = {
    "optimizer.betas": lambda value: {"optimizer": {"_target_": "torch.optim.AdamW", "betas": value}},
    "trainer.callbacks": lambda value: {
        "trainer": {"callbacks": {"x": {"_target_": "lightning.pytorch.callbacks.Timer", "duration": value}}}
    },
    "logger.loggers": lambda value: {
        "logger": {"loggers": {"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": value}}}
    },
    "trainer.strategy": lambda value: {
        "trainer": {"strategy": {"_target_": "lightning.pytorch.strategies.DDPStrategy", "timeout": value}}
    },
    "model.overrides": lambda value: {"model": {"overrides": {"x": value}}},
    "task.objective": lambda value: {"task": {"objective": value}},
    "data.source": lambda value: {"data": {"source": value}},
    "output_dir": lambda value: {"output_dir": value},
    "notes": lambda value: {"notes": value},
}


def merged(plain: dict[str, Any], change: dict[str, Any]) -> dict[str, Any]:
    both = {key: merged(plain[key], value) if _both(plain.get(key), value) else value for key, value in change.items()}
    return {**plain, **both}


def _both(old: Any, new: Any) -> bool:
    return isinstance(old, dict) and isinstance(new, dict) and "_target_" not in new


@pytest.fixture(scope="module")
def small_config() -> TrainConfig:
    """A config composed once, for tests that change a copy."""
    return compose(*SMALL)


@pytest.fixture
def stored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_config: TrainConfig
) -> Callable[[dict[str, Any]], Path]:
    """Writes a run's config.yaml with a change."""
    monkeypatch.setenv("PLANTED", "planted-value")
    monkeypatch.chdir(tmp_path)
    plain = to_plain(small_config)

    def write(change: dict[str, Any]) -> Path:
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(merged(plain, change)))
        return path

    return write


@pytest.mark.parametrize("key", NODES)
def test_a_question_in_a_stored_config_is_refused_by_its_key(stored: Callable[..., Path], key: str) -> None:
    for question in QUESTIONS:
        with pytest.raises(ConfigError, match=r"config\.yaml: .*nothing is resolved") as refused:
            stored_config(stored(NODES[key](question)))
        assert key.rpartition(".")[2] in str(refused.value)
        assert "planted-value" not in str(refused.value)
        assert not Path("ran").exists()


@pytest.mark.parametrize("key", ["optimizer.betas", "trainer.callbacks", "logger.loggers", "trainer.strategy"])
@pytest.mark.parametrize(
    "value",
    [
        yaml.safe_load(TOUCH),
        [{"deep": [yaml.safe_load(TOUCH)]}],
        {"_target_": "torch.optim.AdamW"},
        {"_args_": [1]},
        {"x": {"_partial_": True}},
        {"_recursive_": False},
        {"_convert_": "all"},
        "${seed}",
        {"${seed}": 1},
    ],
    ids=str,
)
def test_the_arguments_of_a_target_are_plain_data(small_config: TrainConfig, key: str, value: Any) -> None:
    config = copy.deepcopy(small_config)
    change = NODES[key](value)
    config.optimizer = change.get("optimizer", config.optimizer)
    config.trainer.callbacks = change.get("trainer", {}).get("callbacks", {})
    config.trainer.strategy = change.get("trainer", {}).get("strategy", "auto")
    config.logger.loggers = change.get("logger", {}).get("loggers", {})
    with pytest.raises(ConfigError, match=r"plain data|nothing is resolved"):
        check_parts(config)
    assert not Path("ran").exists()


@pytest.mark.parametrize(
    ("key", "target"),
    [
        ("optimizer", "lightning.pytorch.callbacks.Timer"),
        ("callback", "torch.optim.AdamW"),
        ("callback", "lightning.pytorch.callbacks.callback.Any"),
        ("logger", "lightning.pytorch.loggers.logger.rank_zero_experiment"),
        ("strategy", "lightning.pytorch.loggers.CSVLogger"),
    ],
)
def test_a_target_is_of_the_kind_that_its_key_expects(key: str, target: str) -> None:
    with pytest.raises(ConfigError, match="key"):
        check_target({"_target_": target}, "key", key)


def test_what_is_allowed_is_still_built(tmp_path: Path) -> None:
    logger = build(
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "x"}, "key", "logger", save_dir=str(tmp_path)
    )
    assert logger.name == "x"


FILES = {
    "resolver": "notes: ${oc.env:PLANTED}",
    "resolver in a key": "task: {metric_options: {'${oc.env:PLANTED}': 1}}",
    "object": "notes: '${oc.create:{_target_: builtins.open, file: ran, mode: w}}'",
    "decode": "optimizer: '${oc.decode:\"{_target_: os.getcwd}\"}'",
    "nested": "notes: ${a.${oc.env:PLANTED}}",
    "hydra": "notes: ${hydra:runtime.cwd}",
    "callbacks": "hydra: {callbacks: {x: {_target_: builtins.open, file: ran, mode: w}}}",
    "job logging": "hydra: {job_logging: {version: 1, handlers: {h: {(): builtins.open, file: ran, mode: w}}}}",
    "hydra logging": "hydra: {hydra_logging: {version: 1, handlers: {h: {class: os.system}}}}",
    "environment": "hydra: {job: {env_set: {LD_PRELOAD: x}}}",
    "search path": "hydra: {searchpath: [/tmp]}",
    "directory": "hydra: {run: {dir: /tmp}}",
    "sweeper": "hydra: {sweeper: {_target_: os.system}}",
    "launcher": "hydra: {launcher: {_target_: os.system}}",
    "swept": "hydra: {sweeper: {params: {hydra.callbacks.x._target_: os.system}}}",
    "header": "x: {_target_: builtins.open, file: ran, mode: w}",
    "defaults": "defaults: [{other@hydra.callbacks: x}]",
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_of_a_config_directory_asks_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setenv("PLANTED", "planted-value")
    monkeypatch.chdir(tmp_path)
    package = "hydra.callbacks" if kind == "header" else "_global_"
    path = tmp_path / "c" / "experiment" / "evil.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package {package}\n{FILES[kind]}\n")
    with pytest.raises(ConfigError, match=r"evil\.yaml: ") as refused:
        check_config_directories(["--config-dir", str(tmp_path / "c"), "experiment=evil"])
    assert "planted-value" not in str(refused.value)
    assert not Path("ran").exists()


def test_a_group_of_hydras_in_a_config_directory_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "hydra" / "job_logging" / "x.yaml"
    path.parent.mkdir(parents=True)
    path.write_text("version: 1\n")
    with pytest.raises(ConfigError, match=r"hydra\.job_logging"):
        check_config_directories(["--config-dir", str(tmp_path)])


def test_the_command_refuses_such_a_file_before_hydra_acts(tmp_path: Path) -> None:
    (tmp_path / "c" / "experiment").mkdir(parents=True)
    (tmp_path / "c" / "experiment" / "evil.yaml").write_text(f"# @package _global_\n{FILES['callbacks']}\n")
    result = llmft("--config-dir", "c", "experiment=evil", cwd=tmp_path)
    assert result.returncode == 2
    assert "hydra.callbacks: a file may set" in result.stderr
    assert not (tmp_path / "ran").exists()


def test_a_file_of_a_config_directory_may_refer_to_other_keys_and_choose_a_search(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /data: writers\n  - override /hydra/launcher: local\n"
        "trainer: {epochs: '${data.epochs}'}\nnotes: 'as \\${it} is'\n"
        "optimizer: {_target_: torch.optim.SGD}\nhydra: {mode: MULTIRUN, sweeper: {params: {seed: '0,1'}}}\n"
    )
    check_config_directories(["--config-dir", str(tmp_path)])


# ---------------------------------------------------------------------------------------------------- run directories


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trained")
    train(compose(*SMALL, f"output_dir={root}"), quiet=True)
    return run_directory(root)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / trained.name
    shutil.copytree(trained, directory)
    return directory


def predict(directory: Path, rows: Path) -> None:
    from llmft.predict import predict as command

    rows.write_text('{"text": "a", "writer": "b"}\n')
    command(PredictConfig(run=str(directory), data=PredictData(files=str(rows)), accelerator="cpu"))


SPECIAL = {
    "run.json": os.mkfifo,
    "config.yaml": os.mkfifo,
    "environment.json": os.mkfifo,
    "adapter/adapter_model.safetensors": os.mkfifo,
    "adapter/tokenizer.json": os.mkfifo,
    "adapter/chat_template.jinja": os.mkfifo,
    "predictions": lambda path: os.symlink("/tmp", path),
    "metrics.jsonl": lambda path: os.symlink("/etc/hostname", path),
    ".lock": lambda path: os.symlink("/etc/hostname", path),
    "checkpoints": lambda path: os.symlink("..", path),
    "targets.json": lambda path: os.symlink("/dev/zero", path),
}


@pytest.mark.parametrize("name", SPECIAL)
def test_what_would_hang_or_lead_away_in_a_run_directory_is_one_sentence(run: Path, tmp_path: Path, name: str) -> None:
    path = run / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    SPECIAL[name](path)
    sentence = r"not a plain file|a link out of the directory"
    with pytest.raises(ConfigError, match=sentence):
        predict(run, tmp_path / "rows.jsonl")
    with pytest.raises(ConfigError, match=sentence):
        finished_run(run)
    if name != "run.json":
        assert Run(run, "").status()


def test_a_run_is_not_trained_on_through_a_link(run: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    shutil.rmtree(run / "checkpoints", ignore_errors=True)
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="a link out of the directory"):
        open_run(compose(*SMALL, f"output_dir={tmp_path}"), run.name.rpartition("-")[2])


@pytest.mark.parametrize("name", ["run.json", "config.yaml", "environment.json"])
def test_a_damaged_record_is_one_sentence(run: Path, tmp_path: Path, name: str) -> None:
    for content in (b"", b"[]", b"{}", b"[" * 5_000, b"\xff", b'{"data": 3, "model": []}'):
        (run / name).write_bytes(content)
        with pytest.raises(UserError):
            predict(run, tmp_path / "rows.jsonl")


def test_an_attention_of_a_repository_is_refused_wherever_it_is_named(stored: Callable[..., Path]) -> None:
    for value in ("stranger/kernel", {"": "stranger/kernel"}, ["x"]):
        with pytest.raises(ConfigError, match="third-party code"):
            stored_config(stored({"model": {"attn_implementation": value}}))
        config = compose(*SMALL)
        config.model.load_overrides = {"_attn_implementation": value}
        with pytest.raises(ConfigError, match="third-party code"):
            train(config, quiet=True)


@pytest.mark.parametrize("value", [{"text_config": "stranger/kernel"}, {"": "sdpa"}, ["sdpa"], 1])
def test_an_attention_is_a_name(tmp_path: Path, value: Any) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "attn_implementation": value}))
    with pytest.raises(ConfigError, match="third-party code"):
        check_model(tmp_path / "model")


def test_a_safetensors_header_is_read_within_bounds(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.write((30 * 2**30).to_bytes(8, "little"))
        file.truncate(31 * 2**30)  # sparse
    assert len(fingerprint(tmp_path)) == 64


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "chat_template.jinja", "extra"])
def test_a_pipe_in_a_model_directory_is_refused(tmp_path: Path, name: str) -> None:
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / "model" / name)
    with pytest.raises(ConfigError, match=r"not a plain file|no config\.json"):
        prepare(compose(*SMALL, "model=local", f"model.path={tmp_path}/model", f"output_dir={tmp_path}"))


def test_a_dataset_by_id_is_no_directory_with_a_script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("evil").mkdir()
    Path("evil/evil.py").write_text("open('ran', 'w')")
    config = compose(*SMALL)
    config.data.source, config.data.hub, config.data.rows = None, "evil", {}
    config.output_dir = str(tmp_path)
    with pytest.raises(ConfigError, match="that is a path"):
        prepare(config)
    assert not Path("ran").exists()


@pytest.mark.parametrize("suffix", [".pkl", ".pickle", ".pt", ".py", ".npy"])
def test_rows_are_not_unpickled(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"rows{suffix}").write_bytes(b"cposix\nsystem\n(S'touch ran'\ntR.")
    with pytest.raises((ConfigError, DataError)):
        prepare(
            compose(*SMALL, "data=prompt_response", f"data.files={tmp_path}/rows{suffix}", f"output_dir={tmp_path}")
        )


# ------------------------------------------------------------------------------------------------- objectives, trust

MINE = """
from llmft.training.objectives.classification import Classification
from llmft.training.objectives.language_modeling import LanguageModeling

class Focal(Classification):
    def __init__(self, targets=None, scores=None, label_smoothing=0.0, text_loss=0.0, gamma=2.0):
        Classification.__init__(self, targets)
        self.gamma = gamma

class Scaled(LanguageModeling):
    def __init__(self, scale=1.0):
        self.scale = scale

    def losses(self, model, batch):
        open('scaled', 'w').write(str(self.scale))
        return super().losses(model, batch)

def half(references, predictions):
    return 0.5
"""


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A user's package that is not trusted yet."""
    name = f"mine_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(MINE)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(builder, "_trusted", set())
    return name


def test_a_named_objective_is_used_with_its_options_and_recorded(mine: str, tmp_path: Path) -> None:
    ours = [*SMALL, f"task.objective={mine}.Scaled", "task.objective_options={scale: 3.5}", f"output_dir={tmp_path}/o"]
    with pytest.raises(ConfigError, match=rf"trusted_packages=\[{mine}\]"):
        train(compose(*ours), quiet=True)
    train(compose(*ours, f"trusted_packages=[{mine}]"), quiet=True)
    assert Path("scaled").read_text() == "3.5"
    recorded = yaml.safe_load((run_directory(tmp_path / "o") / "config.yaml").read_text())
    assert recorded["task"]["objective"] == f"{mine}.Scaled"
    assert recorded["task"]["objective_options"] == {"scale": 3.5}
    assert recorded["trusted_packages"] == [mine]


def test_opening_a_run_trusts_nobody_again(mine: str, tmp_path: Path) -> None:
    arguments = [*SMALL, f"task.objective={mine}.Scaled", f"trusted_packages=[{mine}]", f"output_dir={tmp_path}/o"]
    train(compose(*arguments), quiet=True)
    directory = run_directory(tmp_path / "o")
    builder._trusted.clear()
    assert stored_config(directory / "config.yaml").trusted_packages == []
    with pytest.raises(ConfigError, match=rf"trusted_packages=\[{mine}\]"):
        predict(directory, tmp_path / "rows.jsonl")
    trust([mine])
    predict(directory, tmp_path / "rows.jsonl")
    assert RefitConfig(runs="x", trusted_packages=[mine]).trusted_packages == [mine]


def test_a_file_cannot_say_whom_to_trust(tmp_path: Path) -> None:
    (tmp_path / "c" / "experiment").mkdir(parents=True)
    (tmp_path / "c" / "experiment" / "x.yaml").write_text("# @package _global_\ntrusted_packages: [this]\n")
    result = llmft("--config-dir", "c", "experiment=x", cwd=tmp_path)
    assert result.returncode == 2
    assert "trusted_packages: a file cannot grant trust" in result.stderr


@pytest.mark.parametrize(
    ("task", "sentence"),
    [
        ({"head": "linear", "objective": "{mine}.Focal"}, None),
        ({"head": "linear", "objective": "{mine}.Focal", "objective_options": {"gamma": 1.0}}, None),
        ({"head": "linear", "objective": "{mine}.Focal", "objective_options": {"gama": 1}}, r"did you mean gamma"),
        (
            {"head": "linear", "objective": "{mine}.Focal", "objective_options": {"label_smoothing": 1}},
            "the task sets it",
        ),
        ({"head": "linear", "objective": "{mine}.Scaled"}, "takes no targets"),
        ({"head": "linear", "objective": "{mine}.half"}, "was expected"),
        ({"objective": "{mine}.Focal"}, r"needs task\.head"),
        ({"objective": "llmft.training.objectives.classification.Classification"}, r"needs task\.head"),
        (
            {"objective": "llmft.training.objectives.language_modeling.LanguageModeling", "metrics": ["{mine}.half"]},
            None,
        ),
        (
            {
                "objective": "llmft.training.objectives.language_modeling.LanguageModeling",
                "metrics": ["llmft.metrics.classification.accuracy"],
            },
            r"need a task\.head",
        ),
    ],
)
def test_an_objective_goes_with_its_task_and_options_or_is_refused(
    mine: str, task: dict[str, Any], sentence: str | None
) -> None:
    from llmft.config.task import Head

    trust([mine])
    values = {k: v.format(mine=mine) if isinstance(v, str) else v for k, v in task.items()}
    values["metrics"] = [path.format(mine=mine) for path in task.get("metrics", [])]
    if "head" in values:
        values["head"] = Head(values["head"])
    config = TaskConfig(name="x", **values)
    assert config.objective == values["objective"]
    if sentence is None:
        check_objective(config)
    else:
        with pytest.raises(ConfigError, match=sentence):
            check_objective(config)


def test_options_that_are_not_set_leave_the_key_of_a_run_as_it_was(tmp_path: Path) -> None:
    from llmft.runs.key import run_key

    plain, more = compose(*SMALL), compose(*SMALL, "task.objective_options={a: 1}")
    assert run_key(plain, "d", "m") != run_key(more, "d", "m")
    assert run_key(plain, "d", "m") == run_key(compose(*SMALL, "trusted_packages=[x]"), "d", "m")


def test_a_stored_config_of_ours_is_read_back(tmp_path: Path) -> None:
    config = compose(*SMALL, "notes='a \\${b:c} d'", f"output_dir={tmp_path}")
    run = open_run(config, "0123456789")
    write_config(run, config)
    assert to_plain(stored_config(run.config_file)) == to_plain(config)


@pytest.mark.parametrize("value", ["/etc", "~/x", "../x", "http://stranger/x", "a/../../x"])
def test_a_refit_writes_and_sends_nowhere_of_a_files_choosing(value: str) -> None:
    with pytest.raises(ConfigError, match="does not choose where"):
        check_inside({"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": value}}, "logger.loggers")
    check_inside({"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "name": "a"}}, "logger.loggers")
