"""pyproject.toml's version limits: every library has an upper bound, and a tight one where its internals are used."""

from __future__ import annotations

import tomllib

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from tests.conftest import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REQUIRED = {r.name: r for r in map(Requirement, PROJECT["dependencies"])}
OPTIONAL = {
    r.name: r
    for extra, names in PROJECT["optional-dependencies"].items()
    if extra != "dev"
    for r in map(Requirement, names)
}
INTERNALS = [
    "torch",
    "lightning",
    "hydra-core",
    "omegaconf",
    "transformers",
    "tokenizers",
    "accelerate",
    "peft",
    "bitsandbytes",
    "datasets",
    "huggingface-hub",
    "wandb",
    "optuna",
]
"""Internals of these are used, so a minor release can change numbers or disable a code path."""


def ceiling(requirement: Requirement) -> Version | None:
    return next((Version(s.version) for s in requirement.specifier if s.operator in ("<", "<=")), None)


@pytest.mark.parametrize("requirement", [*REQUIRED.values(), *OPTIONAL.values()], ids=lambda r: r.name)
def test_every_library_has_a_ceiling(requirement: Requirement) -> None:
    assert ceiling(requirement) is not None


@pytest.mark.parametrize("name", INTERNALS)
def test_a_library_whose_internals_are_used_has_its_next_minor_release_for_a_ceiling(name: str) -> None:
    allowed = ceiling({**OPTIONAL, **REQUIRED}[name])
    assert allowed is not None
    assert len(allowed.release) > 1, f"{name}: <{allowed} lets in minor releases that nobody tried"
