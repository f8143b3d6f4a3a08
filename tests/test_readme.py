"""The README: set-up, ready sweeps, and a built wheel that works from any directory."""

from __future__ import annotations

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.conftest import ROOT

README = (ROOT / "README.md").read_text()
FOLDERS = ("conf", "sweeps", "llmft", "llmft/model/kernels", "tests/bench")
DOORS = ["README.md", *(f"{folder}/README.md" for folder in FOLDERS)]


def test_the_two_set_up_commands_are_marked_and_alone_in_their_blocks() -> None:
    for name in ("main", "test"):
        commands = re.findall(rf"<!-- fresh-machine: {name} -->\n```bash\n([^\n]+)\n```", README)
        assert len(commands) == 1, name
        assert commands[0].startswith("pip install -e")


def test_the_readme_is_a_door() -> None:
    assert len(README.splitlines()) < 150


@pytest.mark.parametrize("path", sorted(ROOT / name for name in DOORS), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_of_a_readme_leads_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert link.startswith("https://") or (path.parent / link).exists(), link


def test_a_built_wheel_finds_its_configs_from_any_directory(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    result = subprocess.run(build, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
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
    result = subprocess.run(
        [python, "-m", "llmft", "logger=none", "trainer.max_steps=2", "data.rows={train: 32, validation: 8, test: 0}"],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert (elsewhere / "outputs" / "runs").is_dir()
