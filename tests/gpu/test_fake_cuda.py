"""Devices and dtypes of a training step on a GPU, without one: see `tests.gpu.fake_cuda`."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT

CORE = [
    "llama/bf16/full",
    "llama/fp16/whole",  # embedding and head trained whole: GradScaler refuses weights of 16 bits
    "gemma3_text/fp16/dropout",
]
NOT = "mixtral/fp32/-"
"""torch's shape rule for grouped products supports bf16 alone, its kernel others too. Falcon is left out altogether:
it indexes with a list, which needs the GPU's own code; and DeBERTa, which moves a number from the CPU in every
forward."""
FAMILIES = ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi", "phi3", "opt", "gpt2", "mixtral")
HOW = ("bf16/-", "fp16/full", "fp32/-")
TASKS = ("dpo", "kto", "reward", "classify", "words", "grpo")
CORE += [f"llama/bf16/-/{task}" for task in TASKS]
MORE = ["gpt2/fp16/none", *(f"{family}/{how}" for family in FAMILIES for how in HOW if f"{family}/{how}" != NOT)]
MORE += [
    f"{family}/{how}/{task}" for family in ("gpt2", "gemma3_text") for how in ("bf16/-", "fp16/-") for task in TASKS
]
Step = Callable[[str], dict[str, Any]]


@pytest.fixture(scope="module")
def step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Step:
    """A function that gives the facts of a case's step; all selected cases run in one process."""
    if sys.platform != "linux" or torch.backends.cuda.is_built():
        pytest.skip("this torch has devices of its own")
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("fake_cuda.cpp")
    digest = hashlib.sha256(source.read_bytes() + torch.__version__.encode()).hexdigest()[:16]
    library = Path(request.config.cache.mkdir("fake_cuda")) / f"{digest}.so"  # compiling takes most of the time
    if not library.exists():
        built = tmp_path_factory.mktemp("device") / "made.so"
        options = [
            "-O0",
            "-shared",
            "-fPIC",
            "-std=c++20",
            f"-I{root}/include",
            f"-L{root}/lib",
            "-lc10",
            "-ltorch_cpu",
        ]
        subprocess.run([compiler, str(source), "-o", str(built), *options], check=True, timeout=300)
        shutil.copy(built, library.with_suffix(".new"))
        library.with_suffix(".new").replace(library)
    cases = [item.callspec.params["case"] for item in request.session.items if item.path == Path(__file__)]  # type: ignore[attr-defined]
    command = [sys.executable, "-m", "tests.gpu.fake_cuda", str(library), *cases]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr
    seen = {line["case"]: line for line in map(json.loads, result.stdout.splitlines())}
    return seen.__getitem__


@pytest.mark.parametrize("case", [*CORE, *(pytest.param(case, marks=pytest.mark.slow) for case in MORE)])
def test_a_step_stays_on_the_gpu_never_waits_for_it_and_keeps_no_scores(case: str, step: Step) -> None:
    seen = step(case)
    assert "error" not in seen, f"{seen['error']}\n{''.join(seen['trace'])}"
    assert not seen["mixed"]
    assert not seen["waits"]
    assert seen["trained"] == ["torch.float32"]
    assert not seen["without_gradient"]
    assert seen["devices"] == ["cuda:0"]
    assert not seen["attention"].get("math"), "plain products keep all scores in fp32"
    assert (seen["attention"]["varlen"] > 0) == (seen["packed"] and seen["varlen"])
    assert seen["varlen"] == ("/bf16/" in case and "gpt2" not in case), "Ampere's kernel, which has no dropout"
