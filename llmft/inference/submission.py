"""A competition's csv from its sample: the same columns and rows in the same order."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path

from llmft.config import Problem
from llmft.errors import ConfigError, DataError, did_you_mean
from llmft.files import write_atomically
from llmft.predictions import TEXT, Predictions


@dataclass
class Template:
    """A sample submission: its columns, the first of which holds the row ids, and these ids."""

    path: Path
    columns: list[str]
    ids: list[str]


def read_template(path: Path) -> Template:
    """Reads a sample submission; raises ConfigError where it is missing or is none."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"template={path}: cannot be read ({error}).") from None
    if len(rows) < 2 or len(rows[0]) < 2:
        raise ConfigError(f"template={path}: a header with an id and a column to fill, and rows, were expected.")
    wrong = next((number for number, row in enumerate(rows, 1) if len(row) != len(rows[0])), None)
    if wrong is not None:
        raise ConfigError(f"template={path}: row {wrong} has not as many cells as the header.")
    return Template(path, rows[0], [row[0] for row in rows[1:]])


def write_submission(predictions: Predictions, template: Template, given: dict[str, str], path: Path) -> Path:
    """Writes `predictions` in the form of `template`.

    Raises DataError where rows are missing or too many, ConfigError where a column cannot be filled.
    """
    place = {name: number for number, name in enumerate(predictions.ids)}
    missing = [name for name in template.ids if name not in place]
    if missing:
        raise DataError(f"template={template.path}: {len(missing)} of its rows are not predicted ({missing[0]} first).")
    strange = sorted(set(predictions.ids) - set(template.ids))
    if strange:
        raise DataError(f"template={template.path}: {len(strange)} predicted rows are not in it ({strange[0]} first).")
    if len(set(template.ids)) < len(template.ids):
        raise DataError(f"template={template.path}: it names a row twice.")
    filled = _columns(predictions, template, given)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(template.columns)
    for name in template.ids:
        writer.writerow([name, *(column[place[name]] for column in filled)])
    write_atomically(path, text.getvalue().encode())
    written = read_template(path)
    assert (written.columns, written.ids) == (template.columns, template.ids)
    return path


def _columns(predictions: Predictions, template: Template, given: dict[str, str]) -> list[list[object]]:
    """What goes into each column behind the id."""
    wanted = template.columns[1:]
    values: dict[str, list[object]] = {}
    if predictions.problem not in (TEXT, Problem.regression.value):
        for number, label in enumerate(predictions.labels):
            values[label] = predictions.values[:, number].tolist()
    for label in given:
        if label not in values:
            raise ConfigError(f"columns.{label}: no such class{did_you_mean(label, values)}")
    if len(wanted) == 1 and not given:
        # One column: the probability of the class that it is named after, else the prediction itself.
        return [values[wanted[0]] if wanted[0] in values else list(predictions.predicted)]
    label_of = {column: label for label, column in given.items()}
    used: list[str] = []
    for column in wanted:
        own: str | None = label_of.get(column) or _named(column, list(values))
        if own is None or own in used:
            raise ConfigError(
                f"template={template.path}: no class of its own fills the column {column}; say which with "
                f"columns.CLASS={column} (classes: {', '.join(list(values)[:20]) or 'none'})."
            )
        used.append(own)
    left = [label for label in values if label not in used]
    if left and not given:
        raise ConfigError(f"template={template.path}: the class {left[0]} has no column in it.")
    return [values[label] for label in used]


def _named(column: str, labels: list[str]) -> str | None:
    """The class that a column's name is, or ends in behind an underscore, as target_3 does."""
    if column in labels:
        return column
    ending = [label for label in labels if column.endswith(f"_{label}")]
    return max(ending, key=len) if ending else None
