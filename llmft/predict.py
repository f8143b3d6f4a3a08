"""run + rows -> predictions: `python -m llmft.predict run=DIR data.files=test.csv`.

The run's own config is opened again, so prompt, lengths and quantisation are those of its training. Row ids are kept,
rows come out in the order of the files, and a killed prediction goes on where it was. Of joined folds or a blend every
member predicts, and the answers are joined as the members' were.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from llmft.config.commands import PredictConfig
from llmft.config.convert import to_config
from llmft.config.hydra_app import run_verb
from llmft.config.invocation import Invocation, arguments_of_process, taken
from llmft.core.outcome import tell_outcome


def main(argv: Sequence[str]) -> None:
    """The command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    # A prompt may hold any character, so no grammar of Hydra's sees it.
    given, argv = taken(argv, "prompts=")

    def job(composed: Any, invocation: Invocation) -> None:
        config = to_config(composed, PredictConfig)
        predict(replace(config, prompts=texts_of(given[-1])) if given else config)

    run_verb("predict", PredictConfig, job, [*argv, "prompts=[]"] if given else argv)


def texts_of(given: str) -> list[str]:
    """The texts of `prompts=` as a shell hands it over: one, or a list in brackets with or without its quotes.

    In a list whose quotes the shell took, a comma with white space behind it belongs to a text.
    """
    inside = given.strip()
    if not (inside.startswith("[") and inside.endswith("]")):
        return [given]
    inside = inside[1:-1].strip()
    if inside[:1] in ("'", '"'):
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            return [str(text) for text in yaml.safe_load(f"[{inside}]")]
    return [text.strip() for text in re.split(r",(?!\s)", inside)] if inside else []


def predict(config: PredictConfig, *, quiet: bool = False) -> list[Path]:
    """Predicts what `config` names with each run, joined folds or blend; returns their directories of predictions.

    Raises ConfigError or DataError for runs, files or templates that cannot be used.
    """
    from llmft.core.console import Screen
    from llmft.evaluation.jobs import plan_predictions
    from llmft.evaluation.submission import load_template, write_submission
    from llmft.runs.directory import usable

    screen = Screen(quiet=quiet)
    template = load_template(config)
    ids = template.columns[0] if template is not None else None
    asked = usable(config.run, "run", lambda directory: plan_predictions(directory, config, ids), screen.warn)
    for note in dict.fromkeys(note for question in asked for note in question.notes):
        screen.warn(note)
    directories: list[Path] = []
    answered: dict[Path, Any] = {}
    try:
        for question in asked:
            predictions = _answer(question, config, screen, answered)
            if config.prompts is not None:
                _show(screen, predictions)
            if template is not None:
                path = question.directory / "submission.csv"
                write_submission(predictions, template, config.columns, path, screen)
            directories.append(question.directory)
    finally:
        if any(not question.baseline for question in asked):
            from llmft.model.load import drop_base

            drop_base()
    tell_outcome(*directories)
    return directories


def _answer(question: Any, config: PredictConfig, screen: Any, answered: dict[Path, Any]) -> Any:
    """The predictions of one run, joined folds or blend: those that are there already, or new ones."""
    if question.directory not in answered:
        answer = _predicted if question.recipe is None else _joined
        answered[question.directory] = answer(question, config, screen, answered)
    return answered[question.directory]


def _joined(question: Any, config: PredictConfig, screen: Any, answered: dict[Path, Any]) -> Any:
    for part in question.parts:
        _answer(part, config, screen, answered)
    predictions = question.recipe.combined(question.directory.name)
    predictions.save(question.directory)
    screen.print(f"[bold]predictions[/bold]  {question.directory} ({len(predictions.ids):,} rows)")
    return predictions


def _predicted(question: Any, config: PredictConfig, screen: Any, answered: dict[Path, Any]) -> Any:
    from llmft.runs.predictions import Predictions

    finished = None if config.force else question.finished()
    if finished is not None:
        screen.print(f"These predictions are done: [bold]{question.directory}[/bold] (force=true makes them again)")
        return finished
    columns: dict[str, list[Any]] = {}
    question.directory.mkdir(parents=True, exist_ok=True)
    with question.locked():
        if question.baseline:
            from llmft.training.baseline import Baseline

            values = Baseline.load(question.run.model).predict(question.conversations)
        else:
            from llmft.core.imports import load_libraries, quiet_warnings

            load_libraries()
            from llmft.evaluation.predictor import run_parts

            with quiet_warnings():
                values, columns = run_parts(question, config, screen)
        predictions = Predictions(
            question.ids,
            question.labels,
            values,
            question.problem,
            question.targets,
            {"where": [row.where for row in question.conversations], **question.columns, **columns},
            question.facts(),
        )
        predictions.save(question.directory)
        question.clear_parts()
    screen.print(f"[bold]predictions[/bold]  {question.directory} ({len(predictions.ids):,} rows)")
    return predictions


def _show(screen: Any, predictions: Any) -> None:
    """Prompts with what the model says: its text, each class's probability, or the number."""
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
