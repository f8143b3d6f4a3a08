"""runs -> OpenAI's API: `python -m llmft.serve run=DIR port=8000`; each run is a model with its name.

Meant for trying runs side by side. For many users, `with=vllm`, `llamacpp` or `transformers` merges the run if needed,
and runs or prints that engine's command.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import sys
from collections.abc import Sequence
from typing import Any

from llmft.config.commands import ServeConfig, ServedBy
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import arguments_of_process, split_off, with_lists
from llmft.core.errors import ConfigError

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def main(argv: Sequence[str]) -> None:
    engine, argv = split_off(with_lists(argv), "with=")
    argv = [*argv, *(f"engine={name}" for name in engine)]
    run_verb("serve", ServeConfig, lambda config, _: serve(config), argv)


def serve(config: ServeConfig) -> None:
    """Serves until a signal arrives.

    Raises ConfigError for runs that cannot be served, a port in use, or missing packages.
    """
    from llmft.core.console import Screen
    from llmft.core.imports import missing
    from llmft.export.targets import opened
    from llmft.runs.directory import open_directories
    from llmft.serving.engines import KEY, hand_over

    screen = Screen()
    if config.engine is ServedBy.llmft and missing("starlette", "uvicorn"):
        raise ConfigError('llmft.serve needs the packages starlette and uvicorn: pip install "llmft[serve]".')
    jobs, key = open_directories(config.run, "run", opened, screen.warn), os.environ.get(KEY)
    if config.host not in LOOPBACK and not key:
        screen.warn(f"host={config.host}: everybody who can reach this machine can send requests; set {KEY}.")
    if config.engine is ServedBy.llmft:
        _answer(jobs, config, key, screen)
    else:
        hand_over(jobs, config, key, screen)


def _bound(config: ServeConfig) -> socket.socket:
    """A socket bound to the address; raises ConfigError if it is in use, before weights load."""
    listening = socket.socket(socket.AF_INET6 if ":" in config.host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        where = f"host={config.host} port={config.port}"
        raise ConfigError(f"{where}: {error.strerror}; choose another, or port=0.") from None
    return listening


def _answer(jobs: Any, config: ServeConfig, key: str | None, screen: Any) -> None:
    from llmft.core.imports import load_libraries
    from llmft.serving.engines import KEY

    with _bound(config) as listening:
        screen.print("[dim]loading …[/dim]")
        load_libraries()
        import uvicorn
        from rich.markup import escape

        from llmft.serving.api import Api
        from llmft.serving.engine import Engine
        from llmft.serving.runs import open_runs

        runs = open_runs(jobs, config)
        engine = Engine(runs, config.batch_size)
        host = f"[{config.host}]" if ":" in config.host else config.host
        address = f"http://{host}:{listening.getsockname()[1]}/v1"
        screen.print(f"[bold]serving[/bold]  {escape(address)}", *(f"  model {escape(run.name)}" for run in runs))
        body = json.dumps({"model": runs[0].name, "messages": [{"role": "user", "content": "Hello"}]})
        bearer = f'-H "Authorization: Bearer ${KEY}" ' if key else ""
        screen.print(f"try it  {escape(f'curl {address}/chat/completions {bearer}-d {shlex.quote(body)}')}")
        screen.print(f"key: {'as in ' + KEY if key else 'none required; set ' + KEY + ' to require one'}; Ctrl-C stops")
        settings = uvicorn.Config(
            Api(engine, config, key).app,
            log_level="warning",
            lifespan="off",
            timeout_keep_alive=30,
            timeout_graceful_shutdown=5,
            h11_max_incomplete_event_size=64 * 1024,
            limit_concurrency=4 * config.max_requests + 16,
            server_header=False,
        )
        try:
            uvicorn.Server(settings).run(sockets=[listening])
        except KeyboardInterrupt:
            pass
        finally:
            engine.close()
    print("stopped", file=sys.stderr)


if __name__ == "__main__":
    main(arguments_of_process())
