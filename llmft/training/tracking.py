"""Loggers: Weights & Biases, whose failures never stop or delay a run, and Lightning's others.

W&B never prompts; it waits at most finish_timeout_s at the end (plus start_timeout_s where it has not started yet).
Without an API key or a connection it logs offline. The run's own files (`metrics.jsonl`, …) are complete in any case.
"""

from __future__ import annotations

import json
import netrc
import os
import queue
import secrets
import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from rich.markup import escape

from llmft.config.convert import flatten, to_plain
from llmft.config.instantiate import build
from llmft.config.sections import TrainConfig
from llmft.config.trainer import WandbConfig
from llmft.core.console import Screen
from llmft.core.network import NoAnswer, ask, host_of, in_thread
from llmft.core.redaction import redact
from llmft.runs.directory import Run
from llmft.runs.naming import run_name

ANSWER_S = 2.5
"""Seconds that the server may take to answer."""
GRACE_S = 2.0
"""Seconds after wandb's own time limits at which it is given up."""
OFFLINE_START_S = 20.0
"""Seconds to wait for wandb's own process to start offline, on a machine that may be busy."""
LONGEST_TAG, LONGEST_NAME = 64, 128
"""W&B's limits, in characters."""


def wandb_mode(config: WandbConfig) -> tuple[str, str | None]:
    """(mode, why it is offline or None), found within `start_timeout_s` without importing wandb."""
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("offline", "disabled", "dryrun"):
        return ("offline" if wanted == "dryrun" else wanted), None
    url = wandb_url()
    if not has_key(host_of(url)):
        return "offline", "no API key found (run `wandb login` to log online)"
    cause = probe_wandb(url, min(ANSWER_S, config.start_timeout_s))
    return ("online", None) if cause is None else ("offline", cause)


def wandb_url() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").rstrip("/")


def probe_wandb(url: str, seconds: float) -> str | None:
    """None where a W&B server seems to answer at `url`, else the problem in one phrase.

    A refusal (4xx) counts as an answer: wandb itself explains it.
    """
    question = {"Content-Type": "application/json"}
    try:
        status, content = ask(f"{url}/graphql", seconds, headers=question, body=b'{"query": "{__typename}"}')
        if 400 <= status < 500 or (status < 300 and isinstance(json.loads(content), dict)):
            return None
        return f"{url} answers with status {status}"
    except NoAnswer as error:
        # wandb brings its own certificates.
        return None if "CERTIFICATE_VERIFY_FAILED" in str(error) else f"{url} cannot be reached ({error})"
    except ValueError:
        return f"{url} cannot be reached (the server there is not W&B)"


def has_key(host: str) -> bool:
    """Whether wandb would find an API key for `host`, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


class SafeWandbLogger(Logger):
    """W&B's logger, which may fail and blocks nothing: its own thread starts and writes its run.

    Its first error is shown once; after it nothing is sent.
    """

    def __init__(self, start: Callable[[], Any], screen: Screen, longest_end_s: float, id: str = "") -> None:
        """`start` makes the W&B run, or None."""
        super().__init__()
        self._screen = screen
        self._longest_end_s = longest_end_s
        self._exit_code = 0
        self._id = id
        self._broken = False
        self._actions: queue.SimpleQueue[Callable[[Any], object] | None] = queue.SimpleQueue()
        self._run: Future[Any] = Future()
        self._done = in_thread(lambda: self._work(start))
        self.attempt(lambda run: (run.define_metric("step", hidden=True), run.define_metric("*", step_metric="step")))

    def _work(self, start: Callable[[], Any]) -> None:
        run: Any = None
        try:
            run = start()
        except Exception as error:
            self._screen.warn(f"W&B cannot log ({_message_of(error)}); the local records go on.")
        self._run.set_result(run)
        while (action := self._actions.get()) is not None:
            if run is not None and not self._broken:
                self._try(partial(action, run))
        if run is not None:
            self._try(lambda: run.finish(exit_code=self._exit_code))

    def _try(self, action: Callable[[], object]) -> None:
        try:
            action()
        except Exception as error:  # whatever a logging service raises must not end a training
            self._broken = True
            self._screen.warn(f"W&B stopped logging ({_message_of(error)}); the local records go on.")

    @property
    def experiment(self) -> Any:
        """The W&B run, for a user's callbacks; its first use waits until it has started."""
        return _Experiment(self._run)

    @property
    def offline(self) -> bool:
        """Whether the ended run was written to a local folder only, or not at all."""
        return not self._run.done() or self._run.result() is None or self._run.result().settings.mode == "offline"

    @property
    def name(self) -> str:
        return "wandb"

    @property
    def version(self) -> str:
        return self._id

    def attempt(self, action: Callable[[Any], object]) -> None:
        """Queues `action` on the W&B run; it is skipped after a failure, of which only the first is shown."""
        self._actions.put(action)

    def log_hyperparams(self, *arguments: Any, **named: Any) -> None:
        """Does nothing: the config was sent at the start."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers against llmft's count of optimizer steps."""
        numbers = {**metrics, "step": step}
        self.attempt(lambda run: run.log(numbers))

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds one validation's generations to the samples table."""
        import wandb

        columns: list[str | int] = ["step", "where", "prompt", "reference", "generated"]
        rows = [[step, *(redact(sample[str(column)]) for column in columns[1:])] for sample in samples[:64]]
        self.attempt(lambda run: run.log({"samples": wandb.Table(columns=columns, data=rows), "step": step}))

    def summarise(self, values: Mapping[str, Any]) -> None:
        self.attempt(lambda run: run.summary.update(dict(values)))

    def finish(self, exit_code: int) -> None:
        """Closes the run, so that the next job of this process opens its own; waits at most `longest_end_s`."""
        self._exit_code = exit_code
        self._actions.put(None)
        if not wait([self._done], self._longest_end_s).done:
            self._screen.warn(f"W&B was not done within {self._longest_end_s:g} s; what is in its folder stays.")


class _Experiment:
    """A W&B run that may not have started: Lightning reads `experiment` when a training starts, and must not wait."""

    def __init__(self, run: Future[Any]) -> None:
        self._run = run

    def __getattr__(self, name: str) -> Any:
        run = self._run.result()
        return (lambda *arguments, **named: None) if run is None else getattr(run, name)


def make_loggers(config: TrainConfig, run: Run, environment: dict[str, Any], screen: Screen) -> list[Logger]:
    """The loggers that the config names; W&B first."""
    wandb = _start_wandb(config, run, environment, screen) if config.logger.wandb.enabled else None
    others = []
    for name, node in config.logger.loggers.items():
        directory = {} if "save_dir" in node else {"save_dir": str(run.directory)}
        others.append(build(node, f"logger.loggers.{name}", "logger", **directory))
    return [*([wandb] if wandb is not None else []), *others]


def finish_loggers(loggers: Sequence[Logger], kind: type[BaseException] | None, *_: Any) -> None:
    """Closes the loggers of a run; `kind` is the type of the error that ended it, or None."""
    for logger in loggers:
        if isinstance(logger, SafeWandbLogger):
            logger.finish(0 if kind is None else 1)
        else:
            logger.finalize("success" if kind is None else "failed")


def summarise(loggers: Sequence[Logger], values: Mapping[str, Any]) -> None:
    for logger in loggers:
        if isinstance(logger, SafeWandbLogger):
            logger.summarise(values)


def _wandb_id(run: Run) -> str:
    """The id from a W&B agent; else the run's own, kept in its directory so that a resumed run continues it.

    It is the run's key and a random part: the same config in another directory, or run again, is another W&B run.
    """
    agent_id = os.environ.get("WANDB_RUN_ID")
    if os.environ.get("WANDB_SWEEP_ID") and agent_id:
        return agent_id
    run_id = run.status().get("wandb_id")
    if run_id is None:
        run_id = f"{run.key}-{secrets.token_hex(4)}"
        run.update(wandb_id=run_id)
    return run_id


def report_to_agent(config: TrainConfig, run: Run, screen: Screen) -> None:
    """Sends the result of a finished run to the W&B agent that asked for it again."""
    logger = _start_wandb(config, run, {}, screen) if config.logger.wandb.enabled else None
    if logger is not None:
        result = run.status().get("result", {})
        after = result.get("after", {})
        logger.log_metrics(after, step=result.get("step"))
        logger.summarise({f"best/{name}": value for name, value in after.items()})
        logger.finish(0)


def _start_wandb(config: TrainConfig, run: Run, environment: dict[str, Any], screen: Screen) -> SafeWandbLogger | None:
    settings = config.logger.wandb
    flat = redact(flatten(to_plain(config)))  # for W&B's filters and parallel coordinates
    flat["git.commit"] = environment.get("git", {}).get("commit")
    flat["run.key"] = run.key
    flat["overrides"] = redact(run.status().get("overrides", []))
    return open_wandb(
        settings,
        screen,
        name=run_name(config),
        group=settings.group or f"{config.model.label}-{config.data.name}",
        job_type=settings.job_type,
        tags=redact(list(config.tags)),
        notes=redact(config.notes),
        config=flat,
        dir=run.directory,
        id=lambda: _wandb_id(run),
    )


def fitting(text: str, longest: int = LONGEST_NAME) -> str:
    """`text` cut to `longest` characters, with an ellipsis at its end where it was cut."""
    return text if len(text) <= longest else text[: longest - 1] + "…"


def open_wandb(
    settings: WandbConfig, screen: Screen, *, id: Callable[[], str], dir: Path, tags: Sequence[str], **arguments: Any
) -> SafeWandbLogger | None:
    """A logger of a W&B run, online where possible, else offline; None where W&B is disabled or not installed."""
    if os.environ.get("WANDB_MODE") == "disabled":
        return None
    try:
        _without_telemetry()
        import wandb  # noqa: F401 (here, not in the thread, where other imports run too)
    except ImportError as error:
        screen.warn(f"W&B cannot log ({error}); the local records go on.")
        return None
    cut = [tag for tag in tags if len(tag) > LONGEST_TAG]
    if cut:
        screen.warn(f"W&B takes tags of {LONGEST_TAG} characters: {', '.join(cut)} will be cut there.")
    arguments |= {key: fitting(arguments[key]) for key in ("name", "group", "job_type")}
    arguments |= {"project": settings.project, "entity": settings.entity, "id": id()}
    arguments["tags"] = [*dict.fromkeys(fitting(tag, LONGEST_TAG) for tag in tags if tag)]
    return SafeWandbLogger(
        lambda: _begin(settings, screen, dir, arguments),
        screen,
        settings.start_timeout_s + settings.finish_timeout_s + GRACE_S,
        arguments["id"],
    )


def _without_telemetry() -> None:
    """Switches off W&B's reports about itself, unless the environment asks for them.

    They are sent offline too, and a server that hangs delays the end of the process by half a minute.
    """
    if os.environ.setdefault("WANDB_ERROR_REPORTING", "false").lower() in ("false", "0", "f", "n", "no", "off"):
        with suppress(ImportError):  # older versions read the variable
            from wandb.analytics.opentelemetry.opentelemetry_proxy import disable

            disable()


def _begin(settings: WandbConfig, screen: Screen, dir: Path, arguments: dict[str, Any]) -> Any:
    """Starts the W&B run and prints where it is; warns and returns None where even offline logging fails."""
    began = time.monotonic()
    mode, why = wandb_mode(settings)
    run: Any = None
    try:
        if mode == "online":
            left = max(1.0, settings.start_timeout_s - (time.monotonic() - began))
            online = in_thread(lambda: _init(settings, dir, arguments, left, mode="online", resume="allow"))
            if not wait([online], left + GRACE_S).done:
                raise NoAnswer(f"{wandb_url()} did not take the run within {left:.0f} s")
            run = online.result()
    except Exception as error:
        why = _message_of(error)
        # W&B's service still has the other one open.
        arguments = {**arguments, "id": f"{arguments['id']}-offline"}
    for context in (nullcontext, _without_settings):
        if run is None:
            try:
                with context():
                    run = _init(settings, dir, arguments, OFFLINE_START_S, mode="offline")
            except Exception as error:
                why = why or _message_of(error)
    if run is None:
        screen.warn(f"W&B cannot log ({why}); the local records go on.")
    elif run.settings.mode == "offline":
        folder = Path(run.dir).resolve().parent
        folder = dir / folder.relative_to(dir.resolve()) if folder.is_relative_to(dir.resolve()) else folder
        screen.print(
            f"W&B is offline{': ' + escape(why) if why else ''}. To upload the run later:",
            f"  wandb sync {escape(shlex.quote(str(folder)))}",
        )
    elif run.url:
        screen.print(f"W&B {run.url}")
    return run


def _init(settings: WandbConfig, dir: Path, arguments: dict[str, Any], timeout_s: float, **how: Any) -> Any:
    import wandb

    return wandb.init(
        **arguments,
        **how,
        # Absolute, since the service that writes may have another working directory.
        dir=str(dir.resolve()),
        reinit="create_new",  # trainings that share a base have several runs open
        settings=wandb.Settings(
            init_timeout=timeout_s,
            finish_timeout=settings.finish_timeout_s,
            console="off",
            silent=True,
            x_disable_meta=True,  # metadata would include the raw command line
            save_code=False,
        ),
    )


@contextmanager
def _without_settings() -> Iterator[None]:
    """Removes W&B's environment variables meanwhile: an invalid one would prevent offline logging too."""
    before = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("WANDB_")}
    try:
        yield
    finally:
        os.environ.update(before)


def _message_of(error: BaseException) -> str:
    kind = "" if isinstance(error, NoAnswer) else f"{type(error).__name__}: "
    return redact(f"{kind}{' '.join(str(error).split())}"[:300])
