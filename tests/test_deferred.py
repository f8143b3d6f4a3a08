"""Modules that are put off until they are used."""

from __future__ import annotations

import importlib
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from llmft.deferred import Deferred, defer, settle
from tests.conftest import ROOT

INNER = """
from . import told
import upper
executed = getattr(upper, "executed", 0) + 1
upper.executed = executed
known = "real"
def late(): return known
"""


@pytest.fixture
def inner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package `upper.inner` that can be imported."""
    package = tmp_path / "upper" / "inner"
    package.mkdir(parents=True)
    (tmp_path / "upper" / "__init__.py").write_text("")
    (package / "__init__.py").write_text(INNER)
    (package / "told.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.import_module("upper")
    yield package / "__init__.py"
    for name in [name for name in sys.modules if name.split(".")[0] == "upper"]:
        del sys.modules[name]


def test_a_deferred_module_answers_what_it_was_told_and_runs_once_for_the_rest(inner: Path) -> None:
    heard: list[ModuleType] = []
    defer("upper.inner", {"known": "told"}, heard.append)
    import upper.inner  # type: ignore[import-not-found]
    from upper.inner import known  # type: ignore[import-not-found]
    from upper.inner.told import value  # type: ignore[import-not-found]

    assert (known, value, isinstance(upper.inner, Deferred)) == ("told", 3, True)
    with pytest.raises(AttributeError):
        upper.inner.__warningregistry__  # noqa: B018
    assert not hasattr(upper, "executed")
    before = upper.inner
    assert upper.inner.late() == "real"
    assert (upper.inner is before, type(before), before.known, heard) == (True, ModuleType, "real", [before])
    assert (upper.executed, upper.inner.told.value) == (1, 3)
    with pytest.raises(AttributeError, match="nothing"):
        upper.inner.nothing  # noqa: B018


def test_after_it_is_settled_an_import_from_it_runs_it_before(inner: Path) -> None:
    defer("upper.inner", {"known": "told"})
    settle("upper.inner")
    from upper.inner.told import value

    assert value == 3
    assert sys.modules["upper.inner"].known == "real"


def test_a_module_that_fails_says_so_every_time(inner: Path) -> None:
    inner.write_text("raise OSError('no such library')")
    defer("upper.inner")
    for _ in range(2):
        with pytest.raises(OSError, match="no such library"):
            sys.modules["upper.inner"].late  # noqa: B018


def test_of_two_threads_one_runs_it_and_the_other_waits(inner: Path) -> None:
    inner.write_text(f"import time\ntime.sleep(0.2)\n{INNER}")
    defer("upper.inner")
    found: list[Any] = []
    threads = [threading.Thread(target=lambda: found.append(sys.modules["upper.inner"].late())) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["real", "real"]
    assert sys.modules["upper"].executed == 1


def test_a_training_leaves_the_compiler_alone_and_it_can_be_had_afterwards(tmp_path: Path) -> None:
    body = f"""
import sys
from llmft.train import train
from tests.conftest import compose
small = ["logger=none", "progress=false", "trainer.max_steps=2", "data.rows={{train: 32, validation: 4, test: 0}}"]
train(compose("quantization=nf4", "trainer.accelerator=cpu", r"output_dir={tmp_path}", *small), quiet=True)
late = ("torch._dynamo.convert_frame", "torch._inductor.standalone_compile", "sympy", "torch.distributed.tensor")
print([name for name in late if name in sys.modules])

import torch
from lightning.fabric.wrappers import OptimizedModule
from transformers.integrations import finegrained_fp8
linear = torch.nn.Linear(2, 2)
constant = torch._dynamo.assume_constant_result(lambda: 1)
print(isinstance(linear, OptimizedModule), hasattr(constant, "_dynamo_marked_constant"))
calls = []
def backend(graph, inputs):
    calls.append(1)
    return graph.forward
compiled = torch.compile(linear, backend=backend)
x = torch.ones(1, 2)
print(torch.equal(compiled(x), linear(x)), calls, isinstance(compiled, OptimizedModule), type(torch._dynamo).__name__)
optimizer = torch.optim.AdamW(linear.parameters())
linear(x).sum().backward()
optimizer.step()
optimizer.zero_grad()
asked = torch.optim.Optimizer.add_param_group.__wrapped__
print(asked.__dynamo_disable is not asked, linear.weight.grad, constant._dynamo_marked_constant)
from torch.distributed.tensor import DTensor
print(DTensor.__module__)
"""
    done = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == [
        "[]",
        "False False",
        "True [1] True module",
        "True None True",
        "torch.distributed.tensor",
    ], done.stdout + done.stderr
