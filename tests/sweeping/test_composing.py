"""Combinations that are composed from one before have what Hydra gives them, and Hydra's own errors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf, open_dict

from llmft.app import make_known
from llmft.config import TrainConfig
from llmft.overrides import config_directory
from llmft.sweeping.composing import Composer


class Counting:
    """Hydra's loader, which counts what is asked of it."""

    def __init__(self, loader: Any) -> None:
        self.loader, self.asked = loader, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, master: Any, overrides: list[str]) -> Any:
        self.asked += 1
        return self.loader.load_sweep_config(master, overrides)


@pytest.fixture
def composer() -> Iterator[Composer]:
    make_known("train", TrainConfig)
    with initialize_config_dir(str(config_directory()), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        master = loader.load_configuration("train", [], RunMode.MULTIRUN)
        with open_dict(master):
            master.hydra.job.config_name = "train"
        yield Composer(Counting(loader), master)


COMBINATIONS = (
    ["lora.r=4", "learning_rate=constant", "learning_rate.peak=0.1"],
    ["lora.r=8", "learning_rate=constant", "learning_rate.peak=0.2"],
    ["lora.r=8", "learning_rate=cosine", "learning_rate.peak=0.2"],
    ["lora.r=16", "learning_rate=cosine", "learning_rate.peak=1e-3"],
    ["lora.r=2"],
    ["lora.r=4", "tags=[a,b]"],
    ["lora.r=4", "tags=[c]"],
    ["lora.r=4", "tags=[]", "notes=null"],
    ["lora.r=4", "tags=[]", "notes='a, b'"],
    ["data.rows={train: 10, validation: 4}"],
    ["data.rows={train: 20}"],
    ["lora.targets=[q_proj]", "seed=1"],
    ["lora.targets=all-linear", "seed=2"],
    ["++model.overrides={hidden_size: 64}", "seed=1"],
    ["++model.overrides={hidden_size: 32}", "seed=1"],
    ["lora.r=1", "++lora.r=8"],
    ["lora.r=2", "++lora.r=8"],
    ["data.rows.train=10", "data.rows={train: 48}"],
    ["data.rows.train=20", "data.rows={train: 48}"],
    ["optimizer=adamw", "optimizer.weight_decay=0.1", "model=tiny"],
    ["optimizer=sgd", "optimizer.weight_decay=0.2", "model=tiny"],
)


def test_every_combination_is_what_hydra_makes_of_it(composer: Composer) -> None:
    for overrides in (*COMBINATIONS, *COMBINATIONS):
        wanted = composer._loader.loader.load_sweep_config(composer._master, list(overrides))
        with open_dict(wanted):
            del wanted["hydra"]
        found = composer(overrides)
        assert OmegaConf.to_container(found, resolve=True) == OmegaConf.to_container(wanted, resolve=True), overrides
        found.seed = 99  # of this one alone


def test_hydra_is_asked_once_for_all_values_of_the_same_keys(composer: Composer) -> None:
    for rank in range(1, 30):
        assert composer([f"lora.r={rank}", "learning_rate=constant"]).lora.r == rank
    assert composer._loader.asked == 1
    composer(["lora.r=1", "learning_rate=cosine"])
    composer(["lora.alpha=1", "learning_rate=cosine"])
    assert composer._loader.asked == 3
    for peak in (1e-3, 1e-4):
        assert composer(["learning_rate=cosine", f"learning_rate.peak={peak}"]).learning_rate.peak == peak
    assert composer._loader.asked == 4


@pytest.mark.parametrize("wrong", [["lora.r=many"], ["lora.rr=3"], ["learning_rate=never"]])
def test_what_cannot_be_set_is_told_by_hydra(composer: Composer, wrong: list[str]) -> None:
    composer(["lora.r=4"])
    with pytest.raises(HydraException) as known:
        composer(wrong)
    with pytest.raises(HydraException) as own:
        composer._loader.loader.load_sweep_config(composer._master, wrong)
    assert str(known.value) == str(own.value)
