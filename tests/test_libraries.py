"""Loading torch and its kin: what nobody calls here stays out, and nothing is missing afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

from tests.conftest import ROOT


def test_libraries_load_without_what_nobody_calls_and_all_of_it_can_be_had_later() -> None:
    body = """
import gc, sys
from llmft.libraries import load_libraries
load_libraries()
late = ("scipy.signal", "scipy.optimize", "torch._inductor.compile_fx")
print([name for name in late if name in sys.modules], gc.isenabled(), gc.get_freeze_count() > 100_000)
import bitsandbytes, lightning, peft, torch, torchmetrics, transformers
import scipy.optimize, scipy.signal
print(scipy.signal.windows.hann(3)[1], scipy.optimize.linear_sum_assignment([[2.0]])[0], torch.compile.__module__)
print(transformers.utils.is_scipy_available(), float(torchmetrics.Accuracy("binary")(torch.ones(2), torch.ones(2))))
parameter = torch.nn.Parameter(torch.full((64, 64), 2.0))
optimizer = bitsandbytes.optim.AdamW8bit([parameter], lr=0.5, weight_decay=0.0)
parameter.grad = torch.ones_like(parameter)
optimizer.step()
print(round(float(parameter.mean()), 3))
"""
    done = subprocess.run(
        [sys.executable, "-c", body], cwd=ROOT, env={**os.environ}, capture_output=True, text=True, timeout=300
    )
    assert done.stdout.splitlines() == ["[] True True", "1.0 [0] torch", "True 1.0", "1.5"], done.stdout + done.stderr


def test_transformers_finds_the_names_that_it_would_find_by_itself() -> None:
    body = """
from llmft.libraries import load_libraries
load_libraries()
import transformers.models
import transformers.utils.import_utils as reader
before = reader.define_import_structure.cache_info().hits
found = reader.define_import_structure(transformers.models.__file__)
assert reader.define_import_structure.cache_info().hits == before + 1, "not what transformers has found before"
print(reader.fetch__all__.__module__, reader.fetch__all__.__name__)
reader.create_import_structure_from_path.cache_clear()
again = reader.define_import_structure.__wrapped__(transformers.models.__file__)
print(again == found, sum(map(len, found.values())) > 1000)
"""
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["transformers.utils.import_utils fetch__all__", "True True"], done.stderr


def test_libraries_load_also_where_a_program_has_imported_transformers_before() -> None:
    body = """
import transformers
from llmft.libraries import load_libraries
load_libraries()
from transformers.loss.loss_for_object_detection import linear_sum_assignment
print(linear_sum_assignment.__module__.partition(".")[0], transformers.LlamaForCausalLM.__name__)
"""
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["scipy", "LlamaForCausalLM"], done.stderr
