"""A competition's csv from its sample submission: the same columns, and the same rows in the same order.

`predict`, `folds` and `blend` write it with `format=submission template=sample_submission.csv`.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.markup import escape

from llmft.config.commands import PredictionFormat, SubmissionConfig
from llmft.config.task import TaskType
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.core.files import write_atomically
from llmft.runs.predictions import FOLDER, TEXT, Predictions, csv_text


@dataclass
class Template:
    """A sample submission: its header, the row ids in its first column, and the cells of its second."""

    path: Path
    columns: list[str]
    ids: list[str]
    cells: list[str]


def load_template(config: SubmissionConfig) -> Template | None:
    """The sample submission of format=submission, read before anything is computed; None for other formats."""
    if config.format is not PredictionFormat.submission:
        return None
    return read_template(Path(str(config.template)).expanduser())


def read_template(path: Path) -> Template:
    """Reads a sample submission. Raises ConfigError where it is missing or invalid."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"template={path}: cannot be read ({error}).") from None
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ConfigError(f"template={path}: a header with an id and a column to fill, and rows, were expected.")
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
    if wrong is not None:
        raise ConfigError(f"template={path}: row {wrong} and the header differ in their number of cells.")
    ids = [row[0] for row in rows[1:]]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"template={path}: a row id appears twice.")
    return Template(path, rows[0], ids, [row[1] for row in rows[1:]])


def write_fitting(
    predictions: Mapping[str, Predictions], template: Template, column_of: dict[str, str], member: Path, screen: Screen
) -> Path:
    """Writes a submission from the predictions of the directory `member` whose rows are those of `template`.

    Raises DataError where there are none.
    """
    template_ids = set(template.ids)
    names = [name for name, entry in predictions.items() if set(entry.ids) == template_ids]
    if len({predictions[name].fingerprint for name in names}) > 1:
        raise ConfigError(
            f"{member}: {', '.join(names)} are different predictions of the rows of template={template.path}; delete "
            f"all but one of the folders {FOLDER}/NAME of its members and give the same command again."
        )
    extra_names = [name for name in predictions if name not in ("val", "test")]
    name = names[-1] if names else extra_names[0] if len(extra_names) == 1 else None
    if name is None:
        raise DataError(
            f"{member}: none of its predictions ({', '.join(predictions)}) are of the {len(template_ids):,} rows of "
            f"template={template.path}; make them: python -m llmft.predict run={member} data.files=FILE "
            f"format=submission template={template.path}"
        )
    return write_submission(predictions[name], template, column_of, member / FOLDER / name / "submission.csv", screen)


def write_submission(
    predictions: Predictions, template: Template, column_of: dict[str, str], path: Path, screen: Screen
) -> Path:
    """Writes `predictions` in the format of `template`, and prints the path and the columns.

    Raises DataError for missing or extra rows and for predictions that are not finite, ConfigError for a column that
    cannot be filled.
    """
    index_of = {name: number for number, name in enumerate(predictions.ids)}
    template_ids = set(template.ids)
    missing = [name for name in template.ids if name not in index_of]
    extra = [name for name in predictions.ids if name not in template_ids]
    if missing:
        hint = f"; predicted rows have ids such as {extra[0]}" if extra else ""
        raise DataError(
            f"template={template.path}: {len(missing)} of its rows are not predicted ({missing[0]} first){hint}."
        )
    if extra:
        raise DataError(f"template={template.path}: {len(extra)} predicted rows are not in it ({min(extra)} first).")
    if not np.isfinite(predictions.values).all():
        row = predictions.ids[int(np.argmin(np.isfinite(predictions.values).all(axis=1)))]
        raise DataError(f"{path.parent}: the prediction of the row {row} is not finite, so no submission is written.")
    columns, description = _columns(predictions, template, column_of)
    rows = ([name, *(column[index_of[name]] for column in columns)] for name in template.ids)
    write_atomically(path, csv_text(template.columns, rows).encode())
    screen.print(f"[bold]submission[/bold]  {escape(str(path))} ({len(template.ids):,} rows; {escape(description)})")
    return path


def _columns(predictions: Predictions, template: Template, column_of: dict[str, str]) -> tuple[list[list[object]], str]:
    """The values of each column after the id, and a short description of them."""
    to_fill = template.columns[1:]
    values: dict[str, list[object]] = {}
    if predictions.problem not in (TEXT, TaskType.regression):
        values = dict(zip(predictions.labels, predictions.values.T.tolist(), strict=True))
    for label, column in column_of.items():
        if label not in values:
            raise ConfigError(f"columns.{label}: no such class{did_you_mean(label, values)}")
        if column not in to_fill:
            raise ConfigError(
                f"columns.{label}={column}: the template has no such column{did_you_mean(column, to_fill)}"
            )
    if len(to_fill) == 1 and not column_of and _label_of_column(to_fill[0], values) is None:
        return _one_column(predictions, template)
    label_of = {column: label for label, column in column_of.items()}
    used: list[str] = []
    for column in to_fill:
        chosen = label_of.get(column) or _label_of_column(column, values)
        if chosen is None or chosen in used:
            raise ConfigError(
                f"template={template.path}: no class matches the column {column}; name one with "
                f"columns.CLASS={column} (classes: {', '.join(list(values)[:20]) or 'none'})."
            )
        used.append(chosen)
    unused = [label for label in values if label not in used]
    if unused and not column_of and len(to_fill) > 1:
        raise ConfigError(f"template={template.path}: the class {unused[0]} has no column in it.")
    return [values[label] for label in used], f"probabilities of {len(used)} of {len(values)} classes"


def _one_column(predictions: Predictions, template: Template) -> tuple[list[list[object]], str]:
    """The values of a single column that is not named after a class, chosen by the sample's cells.

    They are texts or numbers, the likeliest class, a list of the likeliest classes, or the probability of "yes".
    """
    column, labels = template.columns[1], predictions.labels
    if predictions.problem in (TEXT, TaskType.regression):
        kind = "the text generated" if predictions.problem == TEXT else "the number predicted"
        return [list(predictions.predicted)], f"{column}: {kind}"
    cells = [cell.strip() for cell in template.cells]
    not_a_class = [cell for cell in cells if cell and cell not in labels]
    separator = next(
        (mark for mark in (" ", ",", "|", ";") if not_a_class and _are_lists_of_labels(not_a_class, labels, mark)), None
    )
    if predictions.problem == TaskType.multi_label:
        mark = separator or "|"
        chosen = [[label for label, p in zip(labels, row, strict=True) if p >= 0.5] for row in predictions.values]
        description = f"{column}: the classes with a probability of at least one half, separated by '{mark}'"
        return [[mark.join(labels_of_row) for labels_of_row in chosen]], description
    if separator is not None:
        num_classes = max(len(_split_cell(cell, separator)) for cell in not_a_class)
        order = np.argsort(-predictions.values, axis=1, kind="stable")[:, :num_classes]
        ranked: list[object] = [separator.join(labels[index] for index in row) for row in order]
        return [ranked], f"{column}: the {num_classes} likeliest classes, best first"
    if not_a_class and all(map(_is_number, not_a_class)):
        # Probabilities, or classes under other names: not guessed, except for two classes that mean yes and no.
        if [label.lower() for label in labels] not in (["0", "1"], ["false", "true"], ["no", "yes"]):
            raise ConfigError(
                f"template={template.path}: the column {column} has numbers such as {not_a_class[0]}, and the "
                f"classes are {', '.join(labels[:20])}; name the class of these probabilities: columns.CLASS={column}."
            )
        return [predictions.values[:, 1].tolist()], f"{column}: the probability of the class {labels[1]}"
    hint = f"; columns.{labels[-1]}={column} writes that class's probability" if len(labels) == 2 else ""
    return [list(predictions.predicted)], f"{column}: the likeliest class{hint}"


def _split_cell(cell: str, separator: str) -> list[str]:
    return [part.strip() for part in cell.split(separator) if part.strip()]


def _are_lists_of_labels(cells: list[str], labels: list[str], separator: str) -> bool:
    """Whether every cell is a list of several classes, joined by `separator`."""
    return all(len(parts := _split_cell(cell, separator)) > 1 and set(parts) <= set(labels) for cell in cells)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def _label_of_column(column: str, labels: Iterable[str]) -> str | None:
    """The class that a column is named after, alone or as in target_3 after an underscore."""
    suffixes = [label for label in labels if f"_{column}".endswith(f"_{label}")]
    return max(suffixes, key=len, default=None)
