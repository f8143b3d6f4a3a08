"""Other libraries stay unpatched: nothing is assigned to their modules and classes except in the files named here."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.conftest import ROOT

THEIRS = {"torch", "transformers", "peft", "bitsandbytes", "lightning", "accelerate", "datasets", "huggingface_hub",
          "hydra", "omegaconf", "optuna", "wandb", "numpy", "scipy", "sys", "warnings", "tokenizers"}  # fmt: skip
KERNELS = "model/kernels/"
"""Replaces forwards of a model's own modules, and registers an attention."""
ALLOWED = {
    ("model/families.py", "modeling_falcon.FalconLinear"): "a mend: transformers does not quantise this subclass",
    ("training/session.py", "torch.utils.deterministic.fill_uninitialized_memory"): "a documented setting of torch",
}


def root_of(node: ast.expr) -> str | None:
    """The name that `a.b[c].d` or `a.b().c` starts with."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else None


def patches(source: str) -> Iterator[str]:
    """A file's assignments to other libraries' modules, and the forwards it replaces."""
    tree = ast.parse(source)
    theirs: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            theirs |= {(a.asname or a.name).partition(".")[0] for a in node.names if a.name.split(".")[0] in THEIRS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in THEIRS:
            theirs |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "unittest":
            yield "mock"
    for node in ast.walk(tree):
        targets: list[ast.expr] = []
        if isinstance(node, (ast.Assign, ast.Delete)):
            targets = list(node.targets)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            targets = [node.target]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("setattr", "delattr"):
            if root_of(node.args[0]) in theirs:
                yield ast.unparse(node.args[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("sys.meta_path"):
            yield ast.unparse(node.func)
        for target in targets:
            text = ast.unparse(target)
            if not isinstance(target, (ast.Attribute, ast.Subscript)) or text.startswith("sys.argv"):
                continue
            if root_of(target) in theirs or (isinstance(target, ast.Attribute) and target.attr == "forward"):
                yield text


def unguarded_filters(tree: ast.AST, guarded: bool = False) -> Iterator[int]:
    """Lines that change the filters of warnings outside `with warnings.catch_warnings()`."""
    for node in ast.iter_child_nodes(tree):
        inside = guarded or (
            isinstance(node, ast.With) and any("catch_warnings" in ast.unparse(i.context_expr) for i in node.items)
        )
        changes = isinstance(node, ast.Call) and ast.unparse(node.func).startswith(
            ("warnings.filter", "warnings.simplefilter", "warnings.resetwarnings", "logging.captureWarnings")
        )
        if changes and not inside:
            assert isinstance(node, ast.Call)
            yield node.lineno
        yield from unguarded_filters(node, inside)


def files() -> Iterator[tuple[str, str]]:
    """(path below llmft/, source) of every file."""
    for path in sorted((ROOT / "llmft").rglob("*.py")):
        yield str(path.relative_to(ROOT / "llmft")), path.read_text()


def test_nothing_is_assigned_to_a_module_or_class_of_others_but_where_it_is_named() -> None:
    assigned = {(name, patch) for name, source in files() if not name.startswith(KERNELS) for patch in patches(source)}
    assert not assigned - ALLOWED.keys()


def test_the_search_sees_patches() -> None:
    source = (
        "import torch.nn.init as init\nimport sys\nfrom peft import tuners\n"
        "init.normal_ = None\nsetattr(tuners.lora, 'x', 1)\nsys.modules['scipy'] = None\nlayer.forward = f\nown.x = 1\n"
        "tuners.session().timeout = 1\n"
    )
    assert set(patches(source)) == {
        "init.normal_",
        "tuners.lora",
        "sys.modules['scipy']",
        "layer.forward",
        "tuners.session().timeout",
    }
    assert list(unguarded_filters(ast.parse("import warnings\nwarnings.filterwarnings('ignore')"))) == [2]


def test_filters_of_warnings_are_changed_in_a_context_alone() -> None:
    assert not [(name, line) for name, source in files() for line in unguarded_filters(ast.parse(source))]


def test_a_training_leaves_the_functions_and_classes_of_others_as_they_were(tmp_path: Path) -> None:
    body = f"""
import sys, types, warnings
from llmft.core.imports import load_libraries
load_libraries()
import transformers.models.llama.modeling_llama, llmft.training.session
def state():
    found = {{}}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in ("torch", "transformers", "peft", "bitsandbytes", "lightning"):
            continue
        for key, value in list(vars(module).items()):
            if isinstance(value, (types.FunctionType, type)):
                found[name, key] = value
            if isinstance(value, type) and value.__module__ == name:
                own = [(k, v) for k, v in list(vars(value).items()) if isinstance(v, types.FunctionType)]
                found.update({{(name, key, k): v for k, v in own}})
    return found
before, filters = state(), list(warnings.filters)
from llmft.train import train
from tests.conftest import compose
train(compose("logger=none", "progress=false", "trainer.max_steps=1", "trainer.accelerator=cpu", "task.generate_rows=2",
              "data.rows={{train: 32, validation: 4, test: 0}}", r"output_dir={tmp_path}"), quiet=True)
after = state()
print(len(before) > 10_000, [key for key, value in before.items() if after.get(key) is not value])
print(warnings.filters == filters)
"""
    result = subprocess.run([sys.executable, "-c", body], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.stdout.splitlines()[-2:] == ["True []", "True"], result.stdout[-2000:] + result.stderr[-2000:]
