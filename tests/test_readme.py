"""The door: every command in the README composes, and a built wheel works from any directory."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from llmft.config_verbs import BenchConfig, BlendConfig, EvaluateConfig, FoldsConfig, PredictConfig, RefitConfig
from llmft.schema import schema_keys
from tests.conftest import ROOT, compose

VERBS = {
    "llmft.predict": PredictConfig,
    "llmft.evaluate": EvaluateConfig,
    "llmft.folds": FoldsConfig,
    "llmft.blend": BlendConfig,
    "llmft.refit": RefitConfig,
    "llmft.bench": BenchConfig,
}
README = (ROOT / "README.md").read_text()
COMMANDS = sorted(
    {
        command.strip()
        for line in re.findall(r"```bash\n(.*?)\n```", README, re.S) + re.findall(r"`(python -m llmft[^`]*)`", README)
        for command in line.split("&&")
        if command.strip().startswith("python -m llmft")
    }
)


def test_the_two_set_up_commands_are_marked_and_alone_in_their_blocks() -> None:
    for name in ("main", "test"):
        found = re.findall(rf"<!-- fresh-machine: {name} -->\n```bash\n([^\n]+)\n```", README)
        assert len(found) == 1, name
        assert found[0].startswith("pip install -e")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_composes(command: str) -> None:
    _, _, module, *arguments = shlex.split(command)
    if module in VERBS:
        compose(*arguments, verb=module.partition(".")[2], kind=VERBS[module])
        return
    if module == "llmft.reporting.calibration":
        return  # no Hydra there
    if module == "llmft.report":
        from llmft.report import ReportConfig

        given = {argument.partition("=")[0] for argument in arguments if not argument.startswith("lb.")}
        assert given <= set(schema_keys(ReportConfig))
        return
    if "--config-dir" in arguments:
        folder = arguments[arguments.index("--config-dir") + 1]
        choice = next(a for a in arguments if a.startswith("+sweep="))
        grid = yaml.safe_load((ROOT / folder / "sweep" / f"{choice.partition('=')[2]}.yaml").read_text())
        arguments = [f"{key}={value}" for key, value in grid["hydra"]["sweeper"]["params"].items()]
    overrides = []
    for argument in arguments:
        if argument.startswith("-"):
            continue
        key, _, value = argument.partition("=")
        overrides.append(argument if value.startswith("[") else f"{key}={str(value).split(',')[0]}")
    verb = shlex.split(command)[2].partition(".")[2]
    if verb and verb != "train" and (ROOT / "conf" / f"{verb}.yaml").is_file():
        compose_verb(verb, overrides)
    else:
        compose(*overrides)


def compose_verb(name: str, overrides: list[str]) -> None:
    """Composes the config of another command than training."""
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from llmft.app import config_directory, make_known
    from llmft.schema import to_config

    schema = getattr(importlib.import_module(f"llmft.{name}"), f"{name.capitalize()}Config")
    make_known(name, schema)
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        to_config(hydra.compose(name, overrides), schema)


@pytest.mark.parametrize("path", sorted((ROOT / "sweeps" / "sweep").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_ready_sweep_names_keys_that_exist(path: Path) -> None:
    grid = yaml.safe_load(path.read_text())
    for key, values in grid["hydra"]["sweeper"]["params"].items():
        for value in str(values).split(","):
            compose(f"{key}={value}")


def test_every_folder_of_the_map_exists() -> None:
    map_of_folders = README.partition("## Map")[2]
    for folder in re.findall(r"^\| `(\w+/)` \|", map_of_folders, re.M):
        assert (ROOT / folder).is_dir(), folder


def test_a_built_wheel_finds_its_configs_from_any_directory(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / "bin" / "python"
    site = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    subprocess.run([sys.executable, "-m", "zipfile", "-e", str(wheel), str(site)], check=True, timeout=60)
    # The dependencies come from this environment; llmft itself must not.
    dependencies = next(path for path in sys.path if path.endswith("site-packages"))
    (site / "dependencies.pth").write_text(dependencies + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = subprocess.run(
        [python, "-c", "import llmft; print(llmft.__file__)"], cwd=elsewhere, capture_output=True, text=True
    )
    assert where.stdout.strip().startswith(str(site)), where.stdout + where.stderr
    done = subprocess.run(
        [python, "-m", "llmft", "logger=none", "trainer.max_steps=2", "data.rows={train: 32, validation: 8, test: 0}"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (elsewhere / "outputs" / "runs").is_dir()
