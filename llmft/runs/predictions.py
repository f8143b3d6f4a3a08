"""Predictions on the disk, in one form for runs, joined folds and blends.

A directory contains `predictions.parquet`, the same as `predictions.csv`, and `predictions.json` with the order of the
classes, the sources and a digest. It is in the `predictions` folder of its run, folds or blend, and is named after its
rows: `val` for validation rows (or all rows out of fold), `test` for held-out rows, else the file's name.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.convert import canonical
from llmft.config.task import TaskType
from llmft.core.errors import DataError, did_you_mean, first_line
from llmft.core.files import read_plain, staged_file, write_atomically, write_json

TEXT = "text"
PREFIX = "p_"
FOLDER = "predictions"


@dataclass
class Predictions:
    """One prediction per row.

    Attributes:
        ids: the rows' ids, all different.
        labels: the classes, in the order of the columns of `values`.
        values: (rows, classes) probabilities; (rows, 1) numbers of a regression; (rows, 0) for generated text.
        problem: a value of `TaskType`, or "text".
        targets: the true class, the true classes joined by |, or a number; None if unknown.
        columns: further columns, such as group, fold, generated, logprob.
        provenance: where the predictions come from.
    """

    ids: list[str]
    labels: list[str]
    values: np.ndarray
    problem: str = TaskType.single_label
    targets: list[Any] = field(default_factory=list)
    columns: dict[str, list[Any]] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.targets = list(self.targets) or [None] * len(self.ids)
        assert len(self.ids) == len(self.values) == len(self.targets)

    @property
    def known(self) -> bool:
        """Whether the true target of every row is known."""
        return len(self.targets) > 0 and all(target is not None for target in self.targets)

    @property
    def predicted(self) -> list[Any]:
        """The likeliest class, the classes with at least 0.5, the number, or the text."""
        if self.problem == TEXT:
            return self.columns["generated"]
        if self.problem == TaskType.regression:
            return [float(value) for value in self.values[:, 0]]
        if self.problem == TaskType.multi_label:
            return ["|".join(np.asarray(self.labels)[row >= 0.5]) for row in self.values]
        return [self.labels[index] for index in self.values.argmax(axis=1)]

    def references(self) -> np.ndarray:
        """The targets as class indices, (rows, classes) of 0 and 1, or numbers.

        Raises DataError for a target that is not a class.
        """
        if self.problem == TaskType.regression:
            return np.asarray(self.targets, dtype=np.float64)
        if self.problem == TaskType.multi_label:
            names_of_row = [set(str(target).split("|")) - {""} for target in self.targets]
            self._check_labels({name for names in names_of_row for name in names})
            return np.asarray([[label in names for label in self.labels] for names in names_of_row], dtype=np.int64)
        self._check_labels({str(target) for target in self.targets})
        index_of = {label: number for number, label in enumerate(self.labels)}
        return np.asarray([index_of[str(target)] for target in self.targets], dtype=np.int64)

    def _check_labels(self, names: set[str]) -> None:
        for name in sorted(names - set(self.labels)):
            raise DataError(f"the target '{name}' is not among the classes{did_you_mean(name, self.labels)}")

    def at(self, rows: Sequence[int]) -> Predictions:
        return replace(
            self,
            ids=[self.ids[row] for row in rows],
            values=self.values[list(rows)],
            targets=[self.targets[row] for row in rows],
            columns={name: [column[row] for row in rows] for name, column in self.columns.items()},
        )

    @property
    def fingerprint(self) -> str:
        """sha256 over ids, classes and values."""
        digest = hashlib.sha256(canonical([self.ids, self.labels, self.problem]).encode())
        digest.update(np.ascontiguousarray(self.values, dtype=np.float64).tobytes())
        if self.problem == TEXT:
            digest.update(canonical(self.columns["generated"]).encode())
        return digest.hexdigest()

    def table(self) -> dict[str, list[Any]]:
        """All columns as they are written."""
        table: dict[str, list[Any]] = {"id": self.ids}
        if any(target is not None for target in self.targets):
            table["target"] = self.targets
        if self.problem != TEXT:
            table["predicted"] = self.predicted
        if self.problem != TaskType.regression:
            for index, label in enumerate(self.labels):
                table[f"{PREFIX}{label}"] = self.values[:, index].tolist()
        return {**table, **{name: column for name, column in self.columns.items() if name not in table}}

    def save(self, directory: Path) -> Path:
        """Writes the three files atomically, predictions.json last; returns `directory`.

        Raises DataError when two rows have the same id.
        """
        repeated = [name for name, count in Counter(self.ids).items() if count > 1]
        if repeated:
            raise DataError(f"two rows have the id '{repeated[0]}': set data.columns.id to a column of unique values.")
        columns = self.table()
        write_table(directory / "predictions.parquet", columns)
        table = csv_text(columns, zip(*columns.values(), strict=True))
        write_atomically(directory / "predictions.csv", table.encode())
        record = {
            "problem": self.problem,
            "labels": self.labels,
            "rows": len(self.ids),
            "fingerprint": self.fingerprint,
            **self.provenance,
        }
        write_json(directory / "predictions.json", record)
        return directory

    @classmethod
    def load(cls, directory: Path) -> Predictions:
        """Reads what `save` wrote. Raises DataError for files that are missing, damaged or mixed up."""
        try:
            record = json.loads(read_plain(directory / "predictions.json"))
            labels, problem = list(record["labels"]), str(record["problem"])
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise DataError(f"{directory}: no predictions there ({error}).") from None
        predictions = from_table(read_table(directory / "predictions.parquet"), labels, problem)
        ours = ("problem", "labels", "rows", "fingerprint")
        predictions.provenance = {key: value for key, value in record.items() if key not in ours}
        if predictions.fingerprint != record.get("fingerprint"):
            raise DataError(
                f"{directory}: predictions.parquet and predictions.json do not belong together; make them again."
            )
        return predictions


def write_table(path: Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Writes a parquet file of these columns atomically."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with staged_file(path) as file:
        pq.write_table(pa.table(dict(columns)), file, compression="zstd")


def csv_text(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table with a header as CSV text; None is an empty cell."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


def read_table(path: Path) -> dict[str, list[Any]]:
    """The columns of a parquet file. Raises DataError if it cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no such file.")
    try:
        with pq.ParquetFile(path) as file:  # its own `read_table` would import pandas
            return file.read().to_pydict()
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read ({first_line(error)}).") from None


def from_table(table: dict[str, list[Any]], labels: Sequence[str], problem: str) -> Predictions:
    """Predictions from the columns of `Predictions.table`."""
    rows = len(table["id"])
    if problem == TaskType.regression:
        values = np.asarray(table["predicted"], dtype=np.float64).reshape(rows, 1)
    else:
        names = [f"{PREFIX}{label}" for label in labels]
        missing = [name for name in names if name not in table]
        if missing:
            raise DataError(f"the predictions have no column {missing[0]}.")
        values = np.asarray([table[name] for name in names], dtype=np.float64).reshape(len(names), rows).T.copy()
    known = {"id", "target", "predicted", *(f"{PREFIX}{label}" for label in labels)}
    extra = {name: column for name, column in table.items() if name not in known}
    targets = table.get("target") or []
    return Predictions(list(map(str, table["id"])), list(labels), values, problem, targets, extra)


def names_in(directory: Path) -> list[str]:
    """The names of all predictions of a run directory, joined folds or a blend."""
    return sorted(path.parent.name for path in (directory / FOLDER).glob("*/predictions.json"))


def load_predictions(directory: Path, name: str) -> Predictions:
    """The predictions called `name` of a run directory, joined folds or a blend.

    Raises DataError naming those that exist.
    """
    existing = names_in(directory)
    if name not in existing:
        hint = f"it has {', '.join(existing)}" if existing else "it has none; a run of a task with a head writes them"
        raise DataError(
            f"{directory}: no predictions called {name}{did_you_mean(name, existing) if existing else ''} ({hint})."
        )
    return Predictions.load(directory / FOLDER / name)
