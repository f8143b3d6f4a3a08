"""The results of a finished sweep: the report, the logbook, and a summary run in Weights & Biases."""

from __future__ import annotations

import importlib.util
import secrets
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

from rich.markup import escape

from llmft.core.console import Screen
from llmft.core.files import write_atomically
from llmft.core.redaction import redact
from llmft.reports.write import write_report
from llmft.sweeps.trials import Sweep

REPLICATIONS = ("seed", "data.fold", "data.split_seed")


def write_sweep_report(sweep: Sweep, screen: Screen, *, has_new_results: bool) -> None:
    """Writes the report into the sweep's directory and prints it.

    With `has_new_results` (trials ran just now) a summary run is also logged to W&B.
    """
    runs = [trial.run.directory for trial in sweep.trials]
    report = write_report(runs, sweep.directory, sweep=sweep.directory)
    report.console(screen, failures=False)
    if has_new_results and sweep.config.logger.wandb.enabled:
        log_sweep(sweep, screen, report.html, report.verdicts.answer)
    folders = dict.fromkeys([*(run / "wandb" for run in runs), sweep.directory / "wandb"])
    offline = [path for folder in folders for path in sorted(folder.glob("offline-run-*"))]
    if offline := [path for path in offline if not any(path.glob("*.synced"))]:
        listing = sweep.directory / "wandb-offline.txt"
        write_atomically(listing, "".join(f"{folder}\n" for folder in offline).encode())
        # A folder's name may contain spaces, at which `$(cat …)` would split it.
        sync = escape(f"tr '\\n' '\\0' < {shlex.quote(str(listing))} | xargs -0 wandb sync")
        screen.print("To upload the whole sweep to W&B later:", f"  {sync}")


def log_sweep(sweep: Sweep, screen: Screen, page: Path, answer: str) -> None:
    """Logs the results table, the answer and the report as one run in the sweep's group; creates the dashboard."""
    from llmft.training.tracking import open_wandb

    settings = sweep.config.logger.wandb
    logger = open_wandb(
        settings,
        screen,
        name=f"sweep {sweep.name}",
        group=settings.group or sweep.name,
        job_type="sweep",
        tags=redact(list(sweep.config.tags)),
        notes=redact(sweep.config.sweep.question),
        config=redact({"swept": sweep.swept, "command": sweep.command, "question": sweep.config.sweep.question}),
        dir=sweep.directory,
        # Every summary is a new run: an earlier summary of the same sweep is not changed.
        id=lambda: f"sweep-{sweep.identity}-{secrets.token_hex(4)}",
    )
    if logger is None:
        return
    import wandb

    def log(run: Any) -> None:
        columns: list[str | int] = [*sweep.swept, sweep.config.trainer.monitor, "status", "seconds", "run", "error"]
        run.log({"trials": wandb.Table(columns=columns, data=trial_rows(sweep))})
        if page.is_file():
            run.log({"report": wandb.Html(str(page), inject=False)})
        statuses = Counter(trial.status for trial in sweep.trials)
        counts = {f"trials/{status}": statuses[status] for status in sorted(statuses)}
        run.summary.update({"verdicts": [redact(answer)], "trials/all": len(sweep.trials), **counts})

    logger.attempt(log)
    logger.finish(0)
    if not logger.offline:
        make_dashboard(sweep, logger.experiment.entity, screen)


def trial_rows(sweep: Sweep) -> list[list[Any]]:
    """One row per trial: its swept values, result, status, seconds, run and error."""
    rows = []
    for trial in sweep.trials:
        values = dict(override.split("=", 1) for override in trial.overrides)
        columns = [trial.value, trial.status, trial.seconds, trial.run.directory.name, redact(trial.error)]
        rows.append([*(values.get(key) for key in sweep.swept), *columns])
    return rows


def dashboard(sweep: Sweep, entity: str) -> Any:
    """A wandb_workspaces workspace for the sweep's group: important keys, curves, generated samples."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

    from llmft.training.tracking import fitting

    monitor = sweep.config.trainer.monitor
    keys = [key for key in sweep.swept if key not in REPLICATIONS]
    columns = [panels.ParallelCoordinatesPlotColumn(metric=panels.Config(key)) for key in keys]
    columns.append(panels.ParallelCoordinatesPlotColumn(metric=panels.SummaryMetric(f"best/{monitor}")))
    overview: list[Any] = [
        panels.ParallelCoordinatesPlot(columns=columns),
        panels.ParameterImportancePlot(with_respect_to=f"best/{monitor}"),
    ]
    curves: list[Any] = [
        panels.LinePlot(title=f"{name} by {key}", x="step", y=[name], groupby=f"config.{key}", groupby_aggfunc="mean")
        for key in keys or ["seed"]
        for name in (monitor, "train/loss_nats")
    ]
    samples: list[Any] = [panels.WeavePanelSummaryTable(table_name="samples")]
    return workspaces.Workspace(
        entity=entity,
        project=sweep.config.logger.wandb.project,
        name=f"sweep {sweep.name}",
        sections=[
            workspaces.Section(name="what matters", panels=overview, is_open=True),
            workspaces.Section(name="curves", panels=curves, is_open=True),
            workspaces.Section(name="samples", panels=samples, is_open=False),
        ],
        runset_settings=workspaces.RunsetSettings(
            filters=f"Metric('group') == '{fitting(sweep.config.logger.wandb.group or sweep.name)}'"
        ),
    )


def make_dashboard(sweep: Sweep, entity: str, screen: Screen) -> None:
    """Saves the dashboard if wandb-workspaces is installed; an error of the service becomes a warning."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        screen.print("For a W&B dashboard of each sweep: pip install wandb-workspaces")
        return
    try:
        saved = dashboard(sweep, entity).save()
    except Exception as error:  # an error of the service must not fail a finished sweep
        screen.warn(f"W&B made no dashboard ({type(error).__name__}: {error}).")
        return
    screen.print(f"W&B dashboard {escape(str(saved.url))}")
