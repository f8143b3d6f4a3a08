"""What a process asks of the system it runs on."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from llmft.environment import prepare_for_torch
from tests.conftest import ROOT

SETTINGS = ("GOMP_SPINCOUNT", "MKL_DISABLE_FAST_MM", "OMP_WAIT_POLICY")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def test_what_the_user_says_to_torchs_libraries_goes_first() -> None:
    def found(**own: str) -> list[str | None]:
        with mock.patch.dict(os.environ):
            for name in SETTINGS:
                os.environ.pop(name, None)
            os.environ.update(own)
            prepare_for_torch()
            return [os.environ.get(name) for name in SETTINGS]

    assert found() == ["5000", "1", None]
    assert found(MKL_DISABLE_FAST_MM="0", OMP_WAIT_POLICY="passive") == [None, "0", "passive"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library allocates memory here")
@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="perhaps another library allocates memory here")
@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[always]" in HUGE_PAGES.read_text(), reason="pages are too large to be counted here"
)
def test_memory_that_a_step_on_the_cpu_frees_serves_the_next_one() -> None:
    """In pages that the system hands out: 8 blocks of 16 MiB are 32,768 of them."""
    body = """
import resource, torch
from llmft.config import ModelConfig, ModelInit, QuantizationConfig, QuantizationFormat
from llmft.model.hub import Located
from llmft.model.load import load_base
sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
load_base(
    ModelConfig(name="llama", architecture="llama", init=ModelInit.random, config=sizes),
    Located(None, "random"), QuantizationConfig(QuantizationFormat.none), auto_class="causal_lm", num_labels=0,
    dtype=torch.float32, device=torch.device("cpu"), seed=0,
)
def step():
    held = [torch.ones(4 * 2**20) for _ in range(8)]
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    done = subprocess.run(
        [sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True
    )
    assert int(done.stdout) < 300
