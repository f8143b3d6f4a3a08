"""run + rows -> predictions: `python -m llmft.predict run=DIR data.files=test.csv`.

The run's own config is opened again, so prompt, lengths and quantisation are those of its training. Row ids are kept,
rows come out in the order of the files, and a killed prediction goes on where it was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from llmft.app import run_verb
from llmft.config_verbs import Form, PredictConfig
from llmft.environment import prepare_for_torch
from llmft.schema import to_config


def main() -> None:
    """The command."""
    prepare_for_torch()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    run_verb("predict", PredictConfig, lambda composed: predict(to_config(composed, PredictConfig)))


def predict(config: PredictConfig, *, quiet: bool = False) -> list[Path]:
    """Predicts the rows of `config.data.files` with each run; returns the directories of predictions, one per run.

    Raises ConfigError or DataError for runs, files or templates that cannot be used.
    """
    from llmft.console import Screen
    from llmft.inference.asked import ask
    from llmft.inference.submission import read_template, write_submission
    from llmft.runs import directories, finished_run

    screen = Screen(quiet=quiet)
    opened = [finished_run(directory) for directory in directories(config.run, "run")]
    template = read_template(Path(str(config.template))) if config.format is Form.submission else None
    asked = [ask(run, trained, config) for run, trained in opened]
    made = []
    try:
        for question in asked:
            if question.note:
                screen.warn(f"data.files: {question.note}")
            predictions = _answer(question, config, screen)
            if template is not None:
                path = write_submission(predictions, template, config.columns, question.directory / "submission.csv")
                screen.print(f"[bold]submission[/bold]  {path}")
            made.append(question.directory)
    finally:
        if any(not question.baseline for question in asked):
            from llmft.model.load import drop_base

            drop_base()
    return made


def _answer(question: Any, config: PredictConfig, screen: Any) -> Any:
    """The predictions of one run: those that are there already, or new ones."""
    from llmft.predictions import Predictions

    found = None if config.force else question.finished()
    if found is not None:
        screen.print(f"These predictions are done: [bold]{question.directory}[/bold] (force=true makes them again)")
        return found
    columns: dict[str, list[Any]] = {}
    question.directory.mkdir(parents=True, exist_ok=True)
    with question.locked():
        if question.baseline:
            from llmft.baseline import Baseline

            values = Baseline.load(question.run.model).predict(question.conversations)
        else:
            from llmft.libraries import load_libraries

            load_libraries()
            from llmft.inference.predictor import run_parts

            values, columns = run_parts(question, config, screen)
        made = Predictions(
            question.ids,
            question.labels,
            values,
            question.problem,
            question.targets,
            {"where": [row.where for row in question.conversations], **question.columns, **columns},
            question.facts(),
        )
        made.save(question.directory)
        question.clear_parts()
    screen.print(f"[bold]predictions[/bold]  {question.directory} ({len(made.ids):,} rows)")
    return made


if __name__ == "__main__":
    main()
