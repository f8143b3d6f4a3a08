"""A tested directory that predicts without network: run, base, wheels, this package, and one script."""

from __future__ import annotations

import json
import os
import platform as machine
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import venv
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from llmft.config.commands import BundleConfig
from llmft.config.overrides import shipped_directory
from llmft.core.console import Screen
from llmft.core.errors import ConfigError
from llmft.core.files import check_space, format_bytes, staged_directory
from llmft.core.redaction import redact
from llmft.data.hub import MODEL_FILES, PACKAGED, fingerprint, locate
from llmft.export.targets import NotProved
from llmft.runs.directory import Run, directories, finished_run
from llmft.runs.predictions import TEXT, Predictions

MARK = "@BUNDLE@"
PROMPT = "Is this a test?"
SCRIPT = """\
#!/bin/sh
# Predicts without network: predict.sh OUT data.files=test.csv [other arguments of `python -m llmft.predict`]
# OUT is a folder to write to; predictions are written to OUT/run/predictions. PYTHON sets the interpreter (python3).
set -eu
here=$(cd "$(dirname "$0")" && pwd)
out=$1; shift
mkdir -p "$out"; out=$(cd "$out" && pwd)
python=${PYTHON:-python3}
if [ -d "$here/wheels" ] && [ ! -f "$out/packages/.ready" ]; then
    rm -rf "$out/packages"
    "$python" -m pip install --quiet --no-index --no-deps --target "$out/packages" "$here"/wheels/*.whl
    touch "$out/packages/.ready"
fi
if [ ! -d "$out/run" ]; then
    cp -R "$here/run" "$out/run"
    chmod -R u+w "$out/run"
    escaped=$(printf '%s' "$here" | sed 's/[&|\\\\]/\\\\&/g')
    sed "s|@BUNDLE@|$escaped|" "$here/run/config.yaml" > "$out/run/config.yaml"
fi
export HF_HUB_OFFLINE=1 PYTHONPATH="$out/packages:$here/site${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" -m llmft.predict run="$out/run" "$@"
"""


@dataclass(frozen=True)
class Wheel:
    """A package to bundle."""

    name: str
    version: str
    url: str
    requires: tuple[str, ...]

    @property
    def size(self) -> int:
        """The file size in bytes; 0 if the server does not give it."""
        if self.url.startswith("file://"):
            return Path(urllib.request.url2pathname(self.url.removeprefix("file://"))).stat().st_size
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url, method="HEAD"), timeout=30) as answer:
                return int(answer.headers.get("Content-Length") or 0)
        except OSError:
            return 0


def make(config: BundleConfig, screen: Screen) -> Path:
    """Writes the bundle of a run and returns its directory; see `SCRIPT` for its use."""
    (directory,) = directories(config.run, "run")
    run, trained = finished_run(directory)
    target = Path(config.to).expanduser()
    if target.exists() and not (target / "bundle.json").is_file():
        raise ConfigError(f"to={config.to}: exists and is not a bundle; name a new directory.")
    base = None
    if trained.lora.enabled and not str(trained.model.path or "").startswith(PACKAGED):
        base = locate(trained.model).directory
    with tempfile.TemporaryDirectory(prefix="llmft-wheels-") as folder:
        built = Path(folder)
        wheels = _wheels(config, built) if config.wheels else []
        sizes = {
            "run": sum(path.stat().st_size for path in _run_files(run)),
            "base": sum(path.stat().st_size for path in _base_files(base)),
            "wheels": sum(ThreadPoolExecutor(8).map(lambda wheel: wheel.size, wheels)),
        }
        for name, size in sizes.items():
            count = f" ({len(wheels)} packages)" if name == "wheels" else ""
            screen.print(f"  {format_bytes(size):>10}  {name}{count}")
        screen.print(f"[bold]{format_bytes(sum(sizes.values()))}[/bold] in total")
        if not config.write:
            return target
        check_space(target.parent, sum(sizes.values()))
        with staged_directory(target) as staged:
            _write(staged, run, base, wheels, built, config)
            (staged / "bundle.json").write_text(json.dumps({"run": directory.name, "bytes": sizes}, indent=1))
            if _matches(config):
                _try(staged, directory, config, screen)
            else:
                screen.warn(f"not tested: this machine is not python {config.python} on {', '.join(config.platform)}.")
    screen.print(f"[bold]bundle[/bold]  {target}; use it there by: sh predict.sh OUT data.files=test.csv")
    return target


def _run_files(run: Run) -> list[Path]:
    files = [run.config_file, run.status_file, run.environment_file, run.targets_file]
    files += [path for folder in (run.adapter, run.model) for path in folder.glob("*")]
    return [path for path in files if path.is_file()]


def _base_files(base: Path | None) -> list[Path]:
    if base is None:
        return []
    return sorted({path for pattern in MODEL_FILES for path in base.glob(pattern) if path.suffix != ".py"})


def _write(staged: Path, run: Run, base: Path | None, wheels: list[Wheel], built: Path, config: BundleConfig) -> None:
    for path in _run_files(run):
        copy = staged / "run" / path.relative_to(run.directory)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    if base is not None:
        (staged / "base").mkdir()
        for path in _base_files(base):
            shutil.copyfile(path, staged / "base" / path.name)
        # The config gets the path of the bundle's base, the record its fingerprint.
        path = staged / "run" / "config.yaml"
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        content["model"]["path"] = f"{MARK}/base"
        path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
        path = staged / "run" / "environment.json"
        content = json.loads(path.read_text(encoding="utf-8"))
        content["model"]["fingerprint"] = fingerprint(staged / "base")
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
    site = staged / "site" / "llmft"
    shutil.copytree(Path(__file__).resolve().parents[1], site, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("conf", "sweeps"):
        if not (site / "assets" / name).is_dir():
            shutil.copytree(shipped_directory(name), site / "assets" / name)
    script = staged / "predict.sh"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    if wheels:
        pins = [f"{wheel.name}=={wheel.version}" for wheel in wheels]
        _pip("download", "--no-deps", "--dest", str(staged / "wheels"), *_target(config, built), *pins)


# ----------------------------------------------------------------------------------------------------------- wheels


def _target(config: BundleConfig, built: Path) -> list[str]:
    """pip's arguments for the target platform; wheels in `built` are used too."""
    words = ["--only-binary=:all:", "--find-links", str(built)]
    words += [] if config.python is None else ["--python-version", config.python]
    return words + [word for name in config.platform for tag in tags_of(name) for word in ("--platform", tag)]


def tags_of(platform: str) -> list[str]:
    """The wheel tags that a platform accepts, including older C libraries (PEP 600), which pip does not add."""
    match = re.fullmatch(r"manylinux_2_(\d+)_(\w+)", platform)
    if match is None:
        return [platform]
    older = {17: ["manylinux2014"], 12: ["manylinux2010"], 5: ["manylinux1"]}
    names = [name for minor in range(int(match[1]), 4, -1) for name in (f"manylinux_2_{minor}", *older.get(minor, []))]
    return [f"{name}_{match[2]}" for name in names]


def _pip(*arguments: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.splitlines() or ["no message"]
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1])
        raise ConfigError(f"wheels: pip failed ({redact(reason)}); wheels=false leaves them out.")
    return done.stdout


def _wheels(config: BundleConfig, built: Path) -> list[Wheel]:
    """llmft's requirements on the target in the versions of this environment, except packages `installed` there.

    Packages without a wheel are built in the folder `built`.
    """
    import importlib.metadata

    try:
        requirements = [Requirement(line) for line in importlib.metadata.requires("llmft") or []]
    except importlib.metadata.PackageNotFoundError:
        raise ConfigError(
            "wheels: llmft is not installed here (pip install -e .): its requirements are unknown."
        ) from None
    skip = {canonicalize_name(name) for name in config.installed}
    names = [
        canonicalize_name(requirement.name)
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    pins = {n: f"{n}=={importlib.metadata.version(n).partition('+')[0]}" for n in names if n not in skip}
    resolved = _resolved(pins.values(), []).values()
    sources = [f"{w.name}=={w.version}" for w in resolved if not w.url.partition("#")[0].endswith(".whl")]
    if sources:
        _pip("wheel", "--no-deps", "--wheel-dir", str(built), *sources)
    return reached(_resolved(pins.values(), _target(config, built)), list(pins), skip)


def _resolved(pins: Iterable[str], target: list[str]) -> dict[Any, Wheel]:
    """name -> wheel of all packages that pip would install for `pins`."""
    with tempfile.TemporaryDirectory() as folder:
        target = [*target, "--target", folder] if target else []
        report = _pip("install", "--dry-run", "--ignore-installed", "--report", "-", *target, *pins)
    wheels = {}
    for entry in json.loads(report)["install"]:
        metadata = entry["metadata"]
        requires = tuple(metadata.get("requires_dist") or ())
        wheel = Wheel(metadata["name"], metadata["version"], entry["download_info"]["url"], requires)
        wheels[canonicalize_name(wheel.name)] = wheel
    return wheels


def reached(wheels: dict[Any, Wheel], roots: list[Any], skip: set[Any]) -> list[Wheel]:
    """The packages that `roots` need, without those in `skip` and what only these need."""
    needed: set[Any] = set()
    waiting = list(roots)
    while waiting:
        name = waiting.pop()
        if name in wheels and name not in needed | skip:
            needed.add(name)
            waiting += [canonicalize_name(Requirement(line).name) for line in wheels[name].requires]
    return [wheels[name] for name in sorted(needed)]


# ------------------------------------------------------------------------------------------------------------ proof


def _matches(config: BundleConfig) -> bool:
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    fits = all(name.endswith(machine.machine()) and sys.platform.startswith("linux") for name in config.platform)
    return config.python in (None, here) and fits


def _try(bundle: Path, directory: Path, config: BundleConfig, screen: Screen) -> None:
    """Predicts with the bundle in a new environment without a package index; raises NotProved if the run differs."""
    expected = _expected(directory, config)
    with tempfile.TemporaryDirectory(prefix="llmft-bundle-") as name:
        folder = Path(name)
        python = sys.executable
        if config.wheels:
            venv.create(folder / "env", with_pip=True, system_site_packages=bool(config.installed))
            python = str(folder / "env" / "bin" / "python")
        environment = {"PATH": os.defpath, "HOME": name, "PYTHON": python}
        environment |= {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull}
        command = ["sh", str(bundle / "predict.sh"), str(folder / "out"), *_question(config, "proof")]
        done = subprocess.run(command, env=environment, cwd=name, capture_output=True, text=True)
        if done.returncode:
            lines = redact(done.stderr.strip().splitlines() or ["no message"])
            raise NotProved(f"the bundle does not predict: {lines[-1]}; nothing was written.")
        predictions = Predictions.load(folder / "out" / "run" / "predictions" / "proof")
    same = predictions.predicted == expected.predicted
    if expected.problem != TEXT:
        same = abs(predictions.values - expected.values).max() < 1e-3
    if not same:
        wrong, right = predictions.predicted, expected.predicted
        raise NotProved(f"the bundle predicts {wrong}, but the run {right}; nothing was written.")
    screen.print("  tested in a new environment without a package index: its predictions are the run's")


def _expected(directory: Path, config: BundleConfig) -> Predictions:
    """The run's own predictions here."""
    name = "bundle-proof"
    command = [sys.executable, "-m", "llmft.predict", f"run={directory}", *_question(config, name)]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise ConfigError(f"run={directory}: its prediction fails here: {(done.stderr.splitlines() or ['?'])[-1]}")
    path = directory / "predictions" / name
    predictions = Predictions.load(path)
    shutil.rmtree(path)
    return predictions


def _question(config: BundleConfig, name: str) -> list[str]:
    threads = [f"threads={config.threads}"] if config.threads else []
    return [f"prompts=[{PROMPT!r}]", f"name={name}", f"accelerator={config.accelerator}", *threads]
