"""Loggers: Weights & Biases, which may fail and never stops or delays a run, and Lightning's others.

Without an API key or a connection W&B logs offline at once: never a prompt, never a hang. The run's own files
(`metrics.jsonl`, …) are complete whatever happens here.
"""

from __future__ import annotations

import netrc
import os
import secrets
import shlex
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.pytorch.loggers import Logger, WandbLogger
from rich.markup import escape

from llmft.build import build
from llmft.config import LoggerConfig, TrainConfig, WandbConfig
from llmft.console import Screen
from llmft.redaction import redact
from llmft.runs import Run, run_name
from llmft.schema import to_plain


def wandb_mode(config: WandbConfig) -> tuple[str, str | None]:
    """(mode, why it is offline): found out within `start_timeout_s`, without importing wandb."""
    wanted = os.environ.get("WANDB_MODE")
    if wanted in ("offline", "disabled", "dryrun"):
        return ("offline" if wanted == "dryrun" else wanted), None
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if not has_key(urlparse(url).hostname or ""):
        return "offline", "no API key found (run `wandb login` to log online)"
    try:
        with urllib.request.urlopen(f"{url}/healthz", timeout=config.start_timeout_s):
            pass
    except urllib.error.HTTPError:
        pass  # it answers, that is enough
    except (OSError, ValueError) as error:
        return "offline", f"{url} cannot be reached ({getattr(error, 'reason', error)})"
    return "online", None


def has_key(host: str) -> bool:
    """Whether wandb would find an API key for `host`, in the environment or in ~/.netrc."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    path = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    try:
        return netrc.netrc(path).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one level of dotted keys, for W&B's filters and parallel coordinates."""
    if isinstance(value, dict) and value:
        flat: dict[str, Any] = {}
        for key, item in value.items():
            flat.update(flatten(item, f"{prefix}{key}."))
        return flat
    return {prefix.rstrip("."): value}


class SafeWandbLogger(WandbLogger):
    """W&B as a sink that may fail: its first error is said once, and nothing more is sent."""

    def __init__(self, experiment: Any, screen: Screen) -> None:
        super().__init__(experiment=experiment)
        self._screen = screen
        self._broken = False
        self._table: Any = None

    def attempt(self, action: Any) -> None:
        """Does it, unless something failed before; the first failure is said once."""
        if self._broken:
            return
        try:
            action()
        except Exception as error:  # whatever a logging service raises must not end a training
            self._broken = True
            self._screen.warn(f"W&B stopped logging ({type(error).__name__}: {error}); the local records go on.")

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Logs numbers against our own count of optimizer steps."""
        self.attempt(lambda: self.experiment.log({**metrics, "step": step}))

    def count_steps(self) -> None:
        """Tells W&B to draw everything over our own count of steps."""

        def tell() -> None:
            self.experiment.define_metric("step", hidden=True)
            self.experiment.define_metric("*", step_metric="step")

        self.attempt(tell)

    def log_samples(self, step: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """Adds one validation's generations to the samples table."""
        import wandb

        def add() -> None:
            columns: list[str | int] = ["step", "where", "prompt", "reference", "generated"]
            table = wandb.Table(
                columns=columns, data=[[step, *(redact(s[str(c)]) for c in columns[1:])] for s in samples[:64]]
            )
            self.experiment.log({"samples": table, "step": step})

        self.attempt(add)

    def summarise(self, values: Mapping[str, Any]) -> None:
        """Writes the final values into the run's summary."""
        self.attempt(lambda: self.experiment.summary.update(dict(values)))

    def finalize(self, status: str) -> None:
        """Nothing: the run ends in `finish`, after the summary is written."""

    def finish(self, exit_code: int) -> None:
        """Closes the run, so that the next job of this process gets its own."""
        self._broken = False
        self.attempt(lambda: self.experiment.finish(exit_code=exit_code))


def make_loggers(config: TrainConfig, run: Run, environment: dict[str, Any], screen: Screen) -> list[Logger]:
    """The loggers that the config names; W&B first."""
    loggers: list[Logger] = []
    if config.logger.wandb.enabled:
        made = _start_wandb(config, config.logger.wandb, run, environment, screen)
        if made is not None:
            loggers.append(made)
    loggers.extend(
        build(node, f"logger.loggers.{name}", "logger", **_directory(node, run))
        for name, node in config.logger.loggers.items()
    )
    return loggers


def check_loggers(config: LoggerConfig) -> None:
    """Refuses a logger that cannot be built, before any weights load."""
    from llmft.build import check_target

    for name, node in config.loggers.items():
        check_target(node, f"logger.loggers.{name}", "logger")


def _directory(node: dict[str, Any], run: Run) -> dict[str, Any]:
    return {} if "save_dir" in node else {"save_dir": str(run.directory)}


def _wandb_id(run: Run) -> str:
    """The id that an agent of W&B gave; else the run's own, kept in its directory so that a resumed run goes on.

    It is the run's key and a random part: the same config in another directory, or run again, is another run there.
    """
    given = os.environ.get("WANDB_RUN_ID")
    if os.environ.get("WANDB_SWEEP_ID") and given:
        return given
    known = run.status().get("wandb_id")
    if known is None:
        known = f"{run.key}-{secrets.token_hex(4)}"
        run.update(wandb_id=known)
    return known


def tell_agent(config: TrainConfig, run: Run, screen: Screen) -> None:
    """Gives W&B's agent, which asked for a trial that was done before, the result that it waits for."""
    if not os.environ.get("WANDB_SWEEP_ID") or not config.logger.wandb.enabled:
        return
    logger = _start_wandb(config, config.logger.wandb, run, {}, screen)
    if logger is not None:
        after = run.status().get("result", {}).get("after", {})
        logger.log_metrics(after, step=run.status().get("result", {}).get("step"))
        logger.summarise({f"best/{name}": value for name, value in after.items()})
        logger.finish(0)


def _start_wandb(
    config: TrainConfig, settings: WandbConfig, run: Run, environment: dict[str, Any], screen: Screen
) -> SafeWandbLogger | None:
    flat = redact(flatten(to_plain(config)))
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


def open_wandb(
    settings: WandbConfig, screen: Screen, *, id: Callable[[], str], dir: Path, **arguments: Any
) -> SafeWandbLogger | None:
    """A W&B run, online where that is possible, else offline; None where it is switched off or cannot even do that."""
    mode, why = wandb_mode(settings)
    if mode == "disabled":
        return None
    try:
        import wandb
    except ImportError as error:
        screen.warn(f"W&B cannot log ({error}); the local records go on.")
        return None

    # Absolute: the service that writes may have been started in another directory.
    arguments |= {"project": settings.project, "entity": settings.entity, "id": id(), "dir": str(dir.resolve())}
    experiment: Any = None
    for attempt in dict.fromkeys((mode, "offline")):
        try:
            experiment = wandb.init(
                **arguments,
                resume="allow" if attempt == "online" else None,
                mode=attempt,  # type: ignore[arg-type]
                reinit="create_new",  # trainings that share a base have their runs open side by side
                settings=wandb.Settings(
                    init_timeout=20,
                    finish_timeout=settings.finish_timeout_s,
                    console="off",
                    silent=True,
                    x_disable_meta=True,  # it would send the raw command line
                    save_code=False,
                ),
            )
            break
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
    if experiment is None:
        screen.warn(f"W&B cannot log ({why}); the local records go on.")
        return None
    if experiment.settings.mode == "offline" or attempt == "offline":
        folder = Path(experiment.dir).resolve().parent
        folder = dir / folder.relative_to(dir.resolve()) if folder.is_relative_to(dir.resolve()) else folder
        screen.print(
            f"W&B is offline{': ' + why if why else ''}. To upload the run later:",
            f"  wandb sync {escape(shlex.quote(str(folder)))}",
        )
    elif experiment.url:
        screen.print(f"W&B {experiment.url}")
    logger = SafeWandbLogger(experiment, screen)
    logger.count_steps()
    return logger
