"""run + rows -> predictions: `python -m llmft.predict run=DIR data.files=test.csv`.

It uses the run's own config, so prompt, lengths and quantisation are those of its training. Row ids are kept, rows stay
in the order of the files, and a killed prediction continues where it was. For joined folds or a blend every member
predicts, and the predictions are combined as the members' were.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmft.config.commands import PredictConfig
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import Invocation, arguments_of_process, split_off
from llmft.core.outcome import write_outcome


def main(argv: Sequence[str]) -> None:
    # A prompt may contain any character, so Hydra's grammar must not parse it.
    prompts, argv = split_off(argv, "prompts=")

    def job(config: PredictConfig, invocation: Invocation) -> None:
        predict(replace(config, prompts=texts_of(prompts[-1])) if prompts else config)

    run_verb("predict", PredictConfig, job, [*argv, "prompts=[]"] if prompts else argv)


def texts_of(argument: str) -> list[str]:
    """The texts of `prompts=` as a shell passes it: one, or a list in brackets with or without quotes.

    In a list whose quotes the shell removed, a comma followed by white space belongs to a text.
    """
    inside = argument.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return [argument]
    inside = inside[1:-1].strip()
    if inside[:1] in ("'", '"'):
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            return [str(text) for text in yaml.safe_load(f"[{inside}]")]
    return [text.strip() for text in re.split(r",(?!\s)", inside)] if inside else []


def predict(config: PredictConfig, *, quiet: bool = False) -> list[Path]:
    """Predicts the rows of `config` with each run, joined folds or blend; returns their directories of predictions.

    Raises ConfigError or DataError for runs, files or templates that cannot be used.
    """
    from llmft.core.console import Screen
    from llmft.evaluation.jobs import plan_predictions
    from llmft.evaluation.submission import load_template, write_submission
    from llmft.runs.directory import open_directories

    screen, template = Screen(quiet=quiet), load_template(config)
    ids = template.columns[0] if template is not None else None
    jobs = open_directories(config.run, "run", lambda directory: plan_predictions(directory, config, ids), screen.warn)
    for note in dict.fromkeys(note for job in jobs for note in job.notes):
        screen.warn(note)
    answers: dict[Path, Any] = {}
    try:
        for job in jobs:
            predictions = _answer(job, config, screen, answers)
            if config.prompts is not None:
                _show(screen, predictions)
            if template is not None:
                write_submission(predictions, template, config.columns, job.directory / "submission.csv", screen)
    finally:
        if any(not job.baseline for job in jobs):
            from llmft.model.load import drop_base

            drop_base()
    directories = [job.directory for job in jobs]
    write_outcome(*directories)
    return directories


def _answer(job: Any, config: PredictConfig, screen: Any, answers: dict[Path, Any]) -> Any:
    """The predictions of one run, joined folds or blend: finished ones, or new ones."""
    from llmft.evaluation.jobs import EnsembleJob

    if job.directory in answers:
        return answers[job.directory]
    ensemble = isinstance(job, EnsembleJob)
    predictions = None if config.force or ensemble else job.finished()
    if predictions is not None:
        screen.print(f"These predictions are done: [bold]{job.directory}[/bold] (force=true makes them again)")
    else:
        if ensemble:
            for part in job.parts:
                _answer(part, config, screen, answers)
            predictions = job.recipe.combined(job.directory.name)
            predictions.save(job.directory)
        else:
            predictions = _predict_run(job, config, screen)
        screen.print(f"[bold]predictions[/bold]  {job.directory} ({len(predictions.ids):,} rows)")
    answers[job.directory] = predictions
    return predictions


def _predict_run(job: Any, config: PredictConfig, screen: Any) -> Any:
    columns: dict[str, list[Any]] = {}
    job.directory.mkdir(parents=True, exist_ok=True)
    with job.locked():
        if job.baseline:
            from llmft.training.baseline import Baseline

            values = Baseline.load(job.run.model).predict(job.conversations)
        else:
            from llmft.core.imports import load_libraries, quiet_warnings

            load_libraries()
            from llmft.evaluation.predictor import run_parts

            with quiet_warnings():
                values, columns = run_parts(job, config, screen)
        predictions = job.predictions(values, columns)
        predictions.save(job.directory)
        job.clear_parts()
    return predictions


def _show(screen: Any, predictions: Any) -> None:
    """Prints prompts with the model's text, each class's probability, or the number."""
    from rich.markup import escape

    for row, prompt in enumerate(predictions.columns["prompt"]):
        screen.print(f"\n[dim]{escape(prompt)}[/dim]")
        if predictions.problem == "text":
            screen.print(escape(predictions.predicted[row]) or "[dim](nothing: the model ended at once)[/dim]")
        elif predictions.problem == "regression":
            screen.print(f"[bold]{predictions.predicted[row]:.6g}[/bold]")
        else:
            for p, label in sorted(zip(predictions.values[row], predictions.labels, strict=True), reverse=True):
                screen.print(f"[bold]{p:6.1%}[/bold]  {escape(label)}")
    screen.print("")


if __name__ == "__main__":
    main(arguments_of_process())
