"""The systems that are compared, each in a process of its own that takes steps on demand."""

from __future__ import annotations

import compileall
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT

HERE = Path(__file__).resolve().parent / "peers"
ENVIRONMENTS = Path(os.environ.get("LLMFT_PEERS", ROOT / ".peers"))
"""The folder in which `python -m tests.bench.peers` makes the peers' environments."""


@dataclass(frozen=True)
class System:
    """One row of a table.

    Attributes:
        runner: tests/bench/peers/run_<runner>.py
        environment: folder of ENVIRONMENTS; None for this very Python.
        settings: keys of its work's JSON besides the work itself.
        whole_batch: whether it must take all rows of a step at once for the same training.
    """

    name: str
    runner: str
    environment: str | None
    settings: dict[str, Any] = field(default_factory=dict)
    whole_batch: bool = False

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return Path(sys.executable) if self.environment is None else ENVIRONMENTS / self.environment / "bin" / "python"

    @property
    def installed(self) -> bool:
        """Whether its environment has been made."""
        return self.python.exists()


class Runner:
    """A runner's process."""

    def __init__(self, system: System, work: Path, *, threads: int | None = None) -> None:
        self.system = system
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # closed in close()
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(work.parent / "cache"),
        }
        for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "MKL_DISABLE_FAST_MM", "PYTHONPATH"):
            environment.pop(name, None)
        if threads:
            environment["OMP_NUM_THREADS"] = str(threads)
        self.began = time.time()
        command = [str(system.python), str(HERE / f"run_{system.runner}.py"), str(work)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment
        )

    def steps(self, count: int) -> dict[str, Any]:
        """Takes `count` steps; raises RuntimeError with the process's last output when it has exited."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(f"{count}\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self.process.wait()
            self.log.seek(0)
            raise RuntimeError(f"{self.system.name}: {' | '.join(self.log.read().strip().splitlines()[-3:])[-600:]}")
        answer: dict[str, Any] = json.loads(line)
        answer["to_first_s"] = answer["first_at"] - self.began
        return answer

    def close(self) -> None:
        """Ends it."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            assert pipe is not None
            pipe.close()


def compile_package() -> None:
    """Writes llmft's bytecode, as an installation does: the peers' packages were installed with theirs."""
    compileall.compile_dir(ROOT / "llmft", quiet=1)


def machine() -> str:
    """A description of the machine."""
    model = platform.processor() or platform.machine()
    try:
        names = [
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ]
        model = names[0] if names else model
    except OSError:
        pass
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def versions(system: System) -> str:
    """The versions that matter in a system's environment."""
    names = ("torch", "transformers", "peft", "trl", "litgpt", "llamafactory", "accelerate", "lightning")
    if system.environment is not None:
        names = tuple(name for name in names if name != "lightning")
    code = (
        "import importlib.metadata as m, json\nfound = {}\n"
        f"for name in {names!r}:\n    try: found[name] = m.version(name)\n    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    result = subprocess.run([str(system.python), "-c", code], capture_output=True, text=True, check=True)
    return " ".join(f"{name} {version}" for name, version in json.loads(result.stdout).items())
