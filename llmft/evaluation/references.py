"""Predictions joined with the true targets of another file, row by row."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.commands import EvaluateConfig
from llmft.config.sections import TaskType
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.data.sources import BadRows, Row, read_files, with_nested
from llmft.runs.predictions import FOLDER, PREFIX, TEXT, Predictions, from_table, names_in


def open_predictions(named: str) -> tuple[Predictions, Path]:
    """A directory of predictions, or a file of anybody's; and where its evaluation is written.

    Raises ConfigError or DataError where there is none.
    """
    path = Path(named).expanduser()
    if glob.has_magic(str(path)) and not path.exists():
        matches = sorted(glob.glob(str(path)))
        if len(matches) != 1:
            several = f"{len(matches)} match, and one is evaluated: {matches[0]}, say" if matches else "nothing matches"
            raise ConfigError(f"predictions={named}: {several}.")
        path = Path(matches[0])
    folder = path.parent if path.name.startswith("predictions.") else path
    if (folder / "predictions.json").is_file():
        return Predictions.load(folder), folder / "evaluation.json"
    if path.is_dir():
        has = ", ".join(str(path / FOLDER / name) for name in names_in(path)) or "a folder such as RUN/predictions/val"
        raise ConfigError(f"predictions={named}: no predictions.json there; name {has}.")
    rows = _rows(named, "predictions")
    return _anybodys(rows, named), path.with_name(f"{path.stem}.evaluation.json")


def _rows(named: Any, key: str, names: Sequence[str] = ()) -> list[Row]:
    rows = with_nested(read_files(named, key, BadRows()).rows, names)
    if not rows:
        raise DataError(f"{key}={named}: no rows.")
    return rows


def _anybodys(rows: list[Row], named: str) -> Predictions:
    """A table with probabilities in p_CLASS columns, or a text or class in `generated` or `predicted`."""
    names = list(rows[0].values)
    for row in rows:
        if list(row.values) != names:
            raise DataError(f"{row.where}: other columns than the rows before it.")
    table = {name: [row.values[name] for row in rows] for name in names}
    table["id"] = table.get("id") or [row.id for row in rows]
    labels = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    try:
        if labels:
            return from_table(table, labels, TaskType.single_label.value)
        if "generated" not in table:
            if "predicted" not in table:
                raise ConfigError(
                    f"predictions={named}: a column generated, predicted or p_CLASS was expected "
                    f"(columns: {', '.join(names)})."
                )
            table["generated"] = table.pop("predicted")
    except ValueError as error:
        raise DataError(f"predictions={named}: {error}.") from None
    return from_table(table, [], TEXT)


def with_references(predictions: Predictions, config: EvaluateConfig) -> tuple[Predictions, dict[str, list[Any]]]:
    """The predictions with their true targets, and the columns to slice by.

    Raises ConfigError for columns that do not exist, DataError for rows that have no reference, or two.
    """
    if config.references is None:
        for key in ("id", "target"):
            if getattr(config, key):
                raise ConfigError(f"{key}={getattr(config, key)} goes with references=FILE, which is not set.")
        return predictions, {name: _own_column(predictions, name) for name in config.slice}
    rows = _rows(config.references, "references", [*config.slice, config.id or "", config.target or ""])
    name = config.id or predictions.facts.get("id_column") or ("id" if "id" in rows[0].values else None)
    if config.id and config.id not in rows[0].values:
        raise ConfigError(
            f"id={config.id}: the references have no such column{did_you_mean(config.id, rows[0].values)}"
        )
    ids = [str(row.values[name]) if name and name in row.values else row.id for row in rows]
    twice = [own for own, count in Counter(ids).items() if count > 1]
    if twice:
        raise DataError(f"references={config.references}: two rows are called '{twice[0]}'; set id=COLUMN.")
    row_of = dict(zip(ids, rows, strict=True))
    missing = [own for own in predictions.ids if own not in row_of]
    if missing:
        raise DataError(
            f"references={config.references}: {len(missing)} predicted rows are not there ({missing[0]} first)."
        )
    target = config.target or ("target" if "target" in rows[0].values else None)
    if target is None or target not in rows[0].values:
        hint = did_you_mean(target, rows[0].values) if target else f" (columns: {', '.join(rows[0].values)})."
        raise ConfigError(f"target={target}: the references have no such column{hint}")
    joined = [row_of[own] for own in predictions.ids]
    targets = [_target(row, target, predictions.problem) for row in joined]
    columns = {}
    for column in config.slice:
        if column in rows[0].values:
            columns[column] = [row.values.get(column) for row in joined]
        else:
            columns[column] = _own_column(predictions, column)
    made = Predictions(
        predictions.ids,
        predictions.labels,
        predictions.values,
        predictions.problem,
        targets,
        predictions.columns,
        predictions.facts,
    )
    return made, columns


def _own_column(predictions: Predictions, name: str) -> list[Any]:
    if name == "target":
        return list(predictions.targets)
    if name not in predictions.columns:
        raise ConfigError(
            f"slice=[{name}]: no such column beside the predictions (references=FILE brings the rows' own)"
            f"{did_you_mean(name, ['target', *predictions.columns])}"
        )
    return predictions.columns[name]


def _target(row: Row, column: str, problem: str) -> Any:
    value = row.values.get(column)
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        raise DataError(f"{row.where}: its '{column}' is empty, or no finite number.")
    if problem == TaskType.regression.value:
        try:
            number = float(value)
            if np.isfinite(number):
                return number
            raise ValueError
        except (TypeError, ValueError):
            raise DataError(f"{row.where}: '{column}' holds '{value}', a number was expected.") from None
    if problem == TaskType.multi_label.value:
        names = value if isinstance(value, (list, tuple)) else str(value).replace("|", ",").split(",")
        return "|".join(str(name).strip() for name in names if str(name).strip())
    return str(value)
