"""A competition's csv from its sample: the same columns and rows in the same order.

`predict`, `folds` and `blend` all write it here: `format=submission template=sample_submission.csv`.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.markup import escape

from llmft.config.commands import PredictionFormat, SubmissionConfig
from llmft.config.sections import TaskType
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.core.files import write_atomically
from llmft.runs.predictions import FOLDER, TEXT, Predictions


@dataclass
class Template:
    """A sample submission.

    Attributes:
        columns: its header; the first column holds the row ids.
        ids: of the rows.
        cells: what the second column holds in the sample, which says what belongs there.
    """

    path: Path
    columns: list[str]
    ids: list[str]
    cells: list[str]


def template_of(config: SubmissionConfig) -> Template | None:
    """The sample that a command line names with format=submission; read before anything is computed."""
    return (
        read_template(Path(str(config.template)).expanduser()) if config.format is PredictionFormat.submission else None
    )


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
    ids = [row[0] for row in rows[1:]]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"template={path}: it names a row twice.")
    return Template(path, rows[0], ids, [row[1] for row in rows[1:]])


def write_fitting(
    predictions: Mapping[str, Predictions], template: Template, given: dict[str, str], member: Path, screen: Screen
) -> Path:
    """Writes the submission of those of the directory `member`'s predictions, by name, that are of `template`'s rows.

    Raises DataError where none is, with what is missing from the only ones there are.
    """
    wanted = set(template.ids)
    names = [name for name, made in predictions.items() if set(made.ids) == wanted]
    if len({predictions[name].fingerprint for name in names}) > 1:
        raise ConfigError(
            f"{member}: {', '.join(names)} are different predictions of the rows of template={template.path}; delete "
            f"all but one of the folders {FOLDER}/NAME of its members and give the same command again."
        )
    others = [name for name in predictions if name not in ("val", "test")]
    name = names[-1] if names else others[0] if len(others) == 1 else None
    if name is None:
        raise DataError(
            f"{member}: none of its predictions ({', '.join(predictions)}) are of the {len(wanted):,} rows of "
            f"template={template.path}; make them: python -m llmft.predict run={member} data.files=FILE "
            f"format=submission template={template.path}"
        )
    return write_submission(predictions[name], template, given, member / FOLDER / name / "submission.csv", screen)


def write_submission(
    predictions: Predictions, template: Template, given: dict[str, str], path: Path, screen: Screen
) -> Path:
    """Writes `predictions` in the form of `template`, and says where and how.

    Raises DataError where rows are missing or too many or a prediction is no number, ConfigError where a column cannot
    be filled.
    """
    place = {name: number for number, name in enumerate(predictions.ids)}
    missing = [name for name in template.ids if name not in place]
    if missing:
        strange = next((name for name in predictions.ids if name not in set(template.ids)), None)
        hint = f"; predicted rows are called as {strange}" if strange is not None else ""
        raise DataError(
            f"template={template.path}: {len(missing)} of its rows are not predicted ({missing[0]} first){hint}."
        )
    strange_rows = sorted(set(predictions.ids) - set(template.ids))
    if strange_rows:
        raise DataError(
            f"template={template.path}: {len(strange_rows)} predicted rows are not in it ({strange_rows[0]} first)."
        )
    if not np.isfinite(predictions.values).all():
        row = predictions.ids[int(np.argmin(np.isfinite(predictions.values).all(axis=1)))]
        raise DataError(f"{path.parent}: the prediction of the row {row} is not finite, so no submission is written.")
    filled, what = _columns(predictions, template, given)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(template.columns)
    for name in template.ids:
        writer.writerow([name, *(column[place[name]] for column in filled)])
    write_atomically(path, text.getvalue().encode())
    screen.print(f"[bold]submission[/bold]  {escape(str(path))} ({len(template.ids):,} rows; {escape(what)})")
    return path


def _columns(predictions: Predictions, template: Template, given: dict[str, str]) -> tuple[list[list[object]], str]:
    """What goes into each column behind the id, and a few words that say what it is."""
    wanted = template.columns[1:]
    values: dict[str, list[object]] = {}
    if predictions.problem not in (TEXT, TaskType.regression.value):
        for number, label in enumerate(predictions.labels):
            values[label] = predictions.values[:, number].tolist()
    for label, column in given.items():
        if label not in values:
            raise ConfigError(f"columns.{label}: no such class{did_you_mean(label, values)}")
        if column not in wanted:
            raise ConfigError(
                f"columns.{label}={column}: the template has no such column{did_you_mean(column, wanted)}"
            )
    label_of = {column: label for label, column in given.items()}
    if len(wanted) == 1 and not given:
        named = _named(wanted[0], list(values))
        if named is None:
            return _one_column(predictions, template)
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
    if left and not given and len(wanted) > 1:
        raise ConfigError(f"template={template.path}: the class {left[0]} has no column in it.")
    return [values[label] for label in used], f"probabilities of {len(used)} of {len(values)} classes"


def _one_column(predictions: Predictions, template: Template) -> tuple[list[list[object]], str]:
    """One column that is called like no class: the sample's own cells say what belongs there.

    Numbers, text; a class; the likeliest classes, as many as the sample has; or, of two classes, a probability.
    """
    column, labels = template.columns[1], predictions.labels
    if predictions.problem == TEXT:
        return [list(predictions.predicted)], f"{column}: the text generated"
    if predictions.problem == TaskType.regression.value:
        return [list(predictions.predicted)], f"{column}: the number predicted"
    cells = [cell.strip() for cell in template.cells]
    several = [cell for cell in cells if cell and cell not in labels]
    separator = next((mark for mark in (" ", ",", "|", ";") if several and _lists(several, labels, mark)), None)
    if predictions.problem == TaskType.multi_label.value:
        mark = separator or "|"
        rows = [[label for label, p in zip(labels, row, strict=True) if p >= 0.5] for row in predictions.values]
        return [[mark.join(own) for own in rows]], f"{column}: the classes of one half or more, with '{mark}' between"
    if separator is not None:
        most = max(len(_parts(cell, separator)) for cell in several)
        order = np.argsort(-predictions.values, axis=1, kind="stable")[:, :most]
        ranked: list[object] = [separator.join(labels[place] for place in row) for row in order]
        return [ranked], f"{column}: the {most} likeliest classes, best first"
    if several and all(map(_is_number, several)):
        # Probabilities, or classes under other names: neither is to be guessed, but for two that say yes and no.
        if [label.lower() for label in labels] not in (["0", "1"], ["false", "true"], ["no", "yes"]):
            raise ConfigError(
                f"template={template.path}: the column {column} holds numbers such as {several[0]}, and the classes "
                f"are {', '.join(labels[:20])}; say whose probability belongs there with columns.CLASS={column}."
            )
        return [predictions.values[:, 1].tolist()], f"{column}: the probability of the class {labels[1]}"
    other = f"; columns.{labels[-1]}={column} writes that class's probability" if len(labels) == 2 else ""
    return [list(predictions.predicted)], f"{column}: the likeliest class{other}"


def _parts(cell: str, separator: str) -> list[str]:
    return [part.strip() for part in cell.split(separator) if part.strip()]


def _lists(cells: list[str], labels: list[str], separator: str) -> bool:
    """Whether every cell is several classes with `separator` between them."""
    return all(len(parts := _parts(cell, separator)) > 1 and set(parts) <= set(labels) for cell in cells)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text) is not None


def _named(column: str, labels: list[str]) -> str | None:
    """The class that a column's name is, or ends in behind an underscore, as target_3 does."""
    if column in labels:
        return column
    ending = [label for label in labels if column.endswith(f"_{label}")]
    return max(ending, key=len) if ending else None
