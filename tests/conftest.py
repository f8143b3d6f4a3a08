"""Fixtures and helpers of all tests. Everything runs offline, on the CPU, with one thread."""

from __future__ import annotations

import copy
import functools
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

for name, value in {
    "HF_HUB_OFFLINE": "1",
    "WANDB_MODE": "offline",
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ[name] = value

# A shell that starts the tests in the background makes them ignore SIGINT, and `nohup` SIGHUP; signals are tested.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"

SMALL = [
    "logger=none",
    "progress=false",
    "data.rows={train: 48, validation: 12, test: 0}",
    "trainer.max_steps=4",
    "trainer.batch_size=8",
    "trainer.micro_batch=4",
    "trainer.validate_every=2",
    "trainer.threads=1",
    "task.generate_rows=4",
    "task.max_new_tokens=4",
    "lora.r=2",
]


def pytest_addoption(parser: pytest.Parser) -> None:
    """Adds --device, on which tests/gpu compute."""
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="of tests/gpu; cpu tries them out")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data, or a skip that says it is missing."""
    if not SHARED.is_dir():
        pytest.skip(f"real data is not here: {SHARED}")
    return SHARED


def compose(*overrides: str, schema: bool = True, verb: str = "train", kind: type | None = None) -> Any:
    """The config of a command line with `overrides`; of another verb with the dataclass `kind`.

    Composed once for all tests that write elsewhere alone.
    """
    from llmft.config.sections import TrainConfig

    places = [o for o in overrides if re.fullmatch(r"output_dir=[\w/.-]+", o)] if schema else []
    others = tuple(override for override in overrides if override not in places)
    config = copy.deepcopy(_composed(others, schema, verb, kind or TrainConfig))
    if places:
        config.output_dir = places[-1].partition("=")[2]
    return config


@functools.lru_cache(maxsize=512)
def _composed(overrides: tuple[str, ...], schema: bool, verb: str, kind: type) -> Any:
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    from llmft.config.convert import to_config
    from llmft.config.hydra_app import make_known
    from llmft.config.overrides import as_override, config_directory

    make_known(verb, kind)
    GlobalHydra.instance().clear()
    opened = [as_override(override, kind) for override in overrides]
    with hydra.initialize_config_dir(str(config_directory()), version_base="1.3"):
        composed = hydra.compose(verb, opened)
    return to_config(composed, kind) if schema else composed


@pytest.fixture
def small(tmp_path: Path) -> Callable[..., Any]:
    """Composes a run of four steps on the embedded task, written below tmp_path."""

    def make(*overrides: str) -> Any:
        return compose(*SMALL, f"output_dir={tmp_path}", *overrides)

    return make


def prompt_config(name: str) -> Any:
    """The config of one file of conf/prompt, with its defaults."""
    from omegaconf import OmegaConf

    from llmft.config.data import PromptConfig

    option = OmegaConf.load(ROOT / "conf" / "prompt" / f"{name}.yaml")
    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PromptConfig), option))


@pytest.fixture(scope="session")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two short runs on the embedded task, of different ranks and with other answers."""
    from llmft.train import train

    runs = []
    for rank in (2, 4):
        root = tmp_path_factory.mktemp("run")
        overrides = [f"output_dir={root}", f"lora.r={rank}", "trainer.precision=fp32", "trainer.accelerator=cpu"]
        overrides += ["trainer.max_steps=12", "trainer.validate_every=12", "task.max_new_tokens=12", f"seed={rank}"]
        train(compose(*SMALL, *overrides), quiet=True)
        runs.append(run_directory(root))
    return runs


def run_directory(root: Path) -> Path:
    """The one run directory below `root`."""
    (directory,) = (root / "runs").iterdir()
    return directory


def llmft(*arguments: str, cwd: Path, timeout: float = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "llmft", *arguments],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Caches tokens in a folder of this test run."""
    os.environ["HF_DATASETS_CACHE"] = str(tmp_path_factory.mktemp("cache"))
