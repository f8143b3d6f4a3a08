"""Predictions joined by row id with the true targets of another file."""

from __future__ import annotations

import contextlib
import glob
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.commands import EvaluateConfig
from llmft.config.task import TaskType
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.data.readers import Row
from llmft.data.sources import read_table, with_nested
from llmft.runs.predictions import FOLDER, PREFIX, TEXT, Predictions, from_table, names_in


def open_predictions(path_or_glob: str) -> tuple[Predictions, Path]:
    """The predictions of a directory or file, and the path of their evaluation.

    Raises ConfigError or DataError where there are no predictions.
    """
    path = Path(path_or_glob).expanduser()
    if glob.has_magic(str(path)) and not path.exists():
        matches = sorted(glob.glob(str(path)))
        if len(matches) != 1:
            reason = f"{len(matches)} match; name one, such as {matches[0]}" if matches else "nothing matches"
            raise ConfigError(f"predictions={path_or_glob}: {reason}.")
        path = Path(matches[0])
    folder = path.parent if path.name.startswith("predictions.") else path
    if (folder / "predictions.json").is_file():
        return Predictions.load(folder), folder / "evaluation.json"
    if path.is_dir():
        folders = [str(path / FOLDER / name) for name in names_in(path)] or ["a folder such as RUN/predictions/val"]
        raise ConfigError(f"predictions={path_or_glob}: no predictions.json there; name {', '.join(folders)}.")
    rows = _rows(path_or_glob, "predictions")
    return _from_rows(rows, path_or_glob), path.with_name(f"{path.stem}.evaluation.json")


def _rows(files: Any, key: str, names: Sequence[str] = ()) -> list[Row]:
    return with_nested(read_table(files, key), names)


def _from_rows(rows: list[Row], source: str) -> Predictions:
    """Predictions from p_CLASS columns of probabilities, or from `generated` or `predicted`."""
    names = list(rows[0].values)
    for row in rows:
        if list(row.values) != names:
            raise DataError(f"{row.where}: its columns differ from those of the rows before.")
    table = {name: [row.values[name] for row in rows] for name in names}
    table["id"] = table.get("id") or [row.id for row in rows]
    labels = [name.removeprefix(PREFIX) for name in names if name.startswith(PREFIX)]
    try:
        if labels:
            return from_table(table, labels, TaskType.single_label)
        if "generated" not in table:
            if "predicted" not in table:
                raise ConfigError(
                    f"predictions={source}: a column generated, predicted or p_CLASS was expected "
                    f"(columns: {', '.join(names)})."
                )
            table["generated"] = table.pop("predicted")
    except ValueError as error:
        raise DataError(f"predictions={source}: {error}.") from None
    return from_table(table, [], TEXT)


def with_references(predictions: Predictions, config: EvaluateConfig) -> tuple[Predictions, dict[str, list[Any]]]:
    """`predictions` with their true targets, and the columns to slice by.

    Raises ConfigError for columns that do not exist, DataError for rows with no reference or several.
    """
    if config.references is None:
        for key in ("id", "target"):
            if getattr(config, key):
                raise ConfigError(f"{key}={getattr(config, key)} needs references=FILE, which is not set.")
        return predictions, {name: _prediction_column(predictions, name) for name in config.slice}
    rows = _rows(config.references, "references", [*config.slice, config.id or "", config.target or ""])
    name = config.id or predictions.provenance.get("id_column") or ("id" if "id" in rows[0].values else None)
    if config.id and config.id not in rows[0].values:
        raise ConfigError(
            f"id={config.id}: the references have no such column{did_you_mean(config.id, rows[0].values)}"
        )
    ids = [str(row.values[name]) if name and name in row.values else row.id for row in rows]
    repeated = [row_id for row_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise DataError(f"references={config.references}: two rows have the id '{repeated[0]}'; set id=COLUMN.")
    row_of = dict(zip(ids, rows, strict=True))
    missing = [row_id for row_id in predictions.ids if row_id not in row_of]
    if missing:
        raise DataError(
            f"references={config.references}: {len(missing)} predicted rows are missing ({missing[0]} first)."
        )
    target = config.target or ("target" if "target" in rows[0].values else None)
    if target is None or target not in rows[0].values:
        hint = did_you_mean(target, rows[0].values) if target else f" (columns: {', '.join(rows[0].values)})."
        raise ConfigError(f"target={target}: the references have no such column{hint}")
    joined = [row_of[row_id] for row_id in predictions.ids]
    targets = [_target(row, target, predictions.problem) for row in joined]
    columns = {}
    for column in config.slice:
        if column in rows[0].values:
            columns[column] = [row.values.get(column) for row in joined]
        else:
            columns[column] = _prediction_column(predictions, column)
    return replace(predictions, targets=targets), columns


def _prediction_column(predictions: Predictions, name: str) -> list[Any]:
    if name == "target":
        return list(predictions.targets)
    if name not in predictions.columns:
        raise ConfigError(
            f"slice=[{name}]: the predictions have no such column (references=FILE adds the rows' columns)"
            f"{did_you_mean(name, ['target', *predictions.columns])}"
        )
    return predictions.columns[name]


def _target(row: Row, column: str, problem: str) -> Any:
    value = row.values.get(column)
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        raise DataError(f"{row.where}: its '{column}' is empty or not a finite number.")
    if problem == TaskType.regression:
        with contextlib.suppress(TypeError, ValueError):
            if np.isfinite(number := float(value)):
                return number
        raise DataError(f"{row.where}: '{column}' is '{value}', a number was expected.")
    if problem == TaskType.multi_label:
        names = value if isinstance(value, (list, tuple)) else str(value).replace("|", ",").split(",")
        return "|".join(str(name).strip() for name in names if str(name).strip())
    return str(value)
