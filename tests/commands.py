"""Runs commands in separate processes that have already imported the libraries: `command`.

Starting Python, torch and transformers takes most of a short command's time. One process imports them and forks
for each command, which then runs as under `python -m`.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LONGEST_S = 120
"""Time limit of a command in seconds, including the first one's imports."""


class Commands:
    """The process that commands are forked from; it ends with this one."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def run(self, module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        """See `command`."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tests.commands"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                cwd=ROOT,
                start_new_session=True,
            )
            atexit.register(self.process.kill)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            printed = [Path(folder) / name for name in ("stdout", "stderr")]
            order = {"module": module, "arguments": arguments, "cwd": str(cwd), "printed": [str(p) for p in printed]}
            self.process.stdin.write(json.dumps({**order, "environment": dict(os.environ)}) + "\n")
            self.process.stdin.flush()
            if not select.select([self.process.stdout], [], [], LONGEST_S)[0]:
                os.killpg(self.process.pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired([module, *arguments], LONGEST_S)
            code = int(self.process.stdout.readline())
            return subprocess.CompletedProcess([module, *arguments], code, *(p.read_text() for p in printed))


COMMANDS = Commands()


def command(module: str, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Runs `python -m MODULE ARGUMENTS` in `cwd`, with this environment, in a process that has trained nothing.

    What Python or a library reads while it starts (PYTHON…, HF_…) is that of the first command.

    Raises subprocess.TimeoutExpired after `LONGEST_S`.
    """
    return COMMANDS.run(module, *arguments, cwd=cwd)


def main() -> None:
    """The process's loop: reads one command a line, writes one exit code a line."""
    from llmft.core.imports import load_libraries

    load_libraries()
    import llmft.training.session  # noqa: F401

    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)


def _run(module: str, arguments: list[str], cwd: str, printed: list[str], environment: dict[str, str]) -> None:
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = [module, *arguments]
    code = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
