"""A sweep in Weights & Biases: a run of its own with the results, and a workspace to look at its trials in."""

from __future__ import annotations

import importlib.util
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.markup import escape

from llmft.core.console import Screen
from llmft.core.redaction import redact
from llmft.sweeps.trials import Sweep
from llmft.training.tracking import fitting, open_wandb

REPLICATIONS = ("seed", "data.fold", "data.split_seed")


def log_sweep(sweep: Sweep, screen: Screen, page: Path, verdicts: Sequence[str]) -> None:
    """Logs the results table, the verdicts and the report as one run of the sweep's group, and makes the dashboard."""
    settings = sweep.config.logger.wandb
    if not settings.enabled:
        return
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
        # Every summary is a run of its own: an earlier one of the same sweep stays as it was.
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
        run.summary.update(
            {
                "verdicts": redact(list(verdicts)),
                "trials/all": len(sweep.trials),
                **{
                    f"trials/{status}": sum(trial.status == status for trial in sweep.trials)
                    for status in sorted({trial.status for trial in sweep.trials})
                },
            }
        )

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
    """A wandb_workspaces workspace of the sweep's group: what matters, how it went, what was generated."""
    import wandb_workspaces.reports.v2 as panels
    import wandb_workspaces.workspaces as workspaces

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
    """Saves the dashboard where wandb-workspaces is installed; a service that refuses costs a warning."""
    if importlib.util.find_spec("wandb_workspaces") is None:
        screen.print("For a W&B dashboard of each sweep: pip install wandb-workspaces")
        return
    try:
        saved = dashboard(sweep, entity).save()
    except Exception as error:  # whatever the service raises must not spoil a finished sweep
        screen.warn(f"W&B made no dashboard ({type(error).__name__}: {error}).")
        return
    screen.print(f"W&B dashboard {escape(str(saved.url))}")
