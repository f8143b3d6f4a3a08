"""Imports point one way: never in a circle, and never from a folder to one on its right in the map."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "llmft"
FOLDERS = re.findall(r"\w+", (PACKAGE / "README.md").read_text().split("```")[1].strip().splitlines()[0])
"""The folders in the order of the map."""


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    paths = {
        ".".join(("llmft", *path.relative_to(PACKAGE).with_suffix("").parts)): path for path in PACKAGE.rglob("*.py")
    }
    return {name.removesuffix(".__init__"): path for name, path in paths.items()}


def statements(node: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """The imports below `node`, those inside functions too, without those for type checkers alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        yield from statements(child)


@cache
def imports() -> dict[str, set[str]]:
    """The modules of llmft that each module imports."""
    paths = modules()
    graph: dict[str, set[str]] = {}
    for name, path in paths.items():
        targets: list[str] = []
        for statement in statements(ast.parse(path.read_text())):
            if isinstance(statement, ast.Import):
                targets += [alias.name for alias in statement.names]
            else:
                assert statement.level == 0, f"{path}: imports are absolute"
                inside = [f"{statement.module}.{alias.name}" for alias in statement.names]
                targets += [target if target in paths else str(statement.module) for target in inside]
        ours = {target for target in targets if target.split(".")[0] == "llmft"}
        assert ours <= {*paths, "llmft"}, f"{path}: no such modules, {ours - paths.keys()}"
        graph[name] = ours - {name, "llmft"}
    return graph


def level(module: str) -> int:
    """The rank of a module's folder in the order; then other folders, then the commands."""
    top, *inner = module.removeprefix("llmft").lstrip(".").split(".")
    if top in FOLDERS:
        return FOLDERS.index(top)
    return len(FOLDERS) + (not inner and not (PACKAGE / top).is_dir())


def test_no_module_imports_itself_by_way_of_others() -> None:
    assert len(imports()) > 100
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        raise AssertionError("a circle of imports: " + " <- ".join(error.args[1])) from None


def test_no_folder_imports_from_its_right() -> None:
    assert FOLDERS[0] == "core"
    assert all((PACKAGE / folder).is_dir() for folder in FOLDERS)
    upward = [f"{a} imports {b}" for a, others in imports().items() for b in sorted(others) if level(b) > level(a)]
    assert not upward, "\n".join(sorted(upward))
