"""Predictions of runs, joined folds and blends as members of an ensemble; refuses members that do not match."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.commands import Method
from llmft.config.convert import digest_of
from llmft.config.task import TaskType
from llmft.config.untrusted import read_json
from llmft.core.errors import ConfigError, DataError
from llmft.core.files import write_atomically, write_json
from llmft.evaluation.blending import combine
from llmft.runs.naming import slug
from llmft.runs.predictions import FOLDER, TEXT, Predictions, load_predictions, names_in

MOST_RECORD_BYTES = 2**24
"""Most bytes of a folds.json or blend.json."""
ROW_COLUMNS = ("where", "group", "fold", "prompt")
"""Columns that describe the row, not its prediction."""


@dataclass
class PredictionSet:
    """A directory and one of its sets of predictions."""

    directory: Path
    predictions: Predictions

    @property
    def name(self) -> str:
        return self.directory.name


def open_prediction_sets(directories: Sequence[Path], name: str) -> list[PredictionSet]:
    """The predictions `name` of each directory, with rows in the order of the first.

    Raises DataError naming the directory whose task, classes, rows or targets differ from the first.
    """
    sets = [PredictionSet(directory, load_predictions(directory, name)) for directory in directories]
    first, expected = sets[0], sets[0].predictions
    if expected.problem == TEXT:
        raise ConfigError(f"{first.directory}: generated texts cannot be averaged.")
    known = set(expected.ids)
    for member in sets:
        where, predictions = member.directory, member.predictions
        if predictions.problem != expected.problem:
            raise DataError(f"{where}: predicts {predictions.problem}, and {first.name} {expected.problem}.")
        if predictions.labels != expected.labels and predictions.problem != TaskType.regression:
            raise DataError(
                f"{where}: its classes are {_shortened(predictions.labels)}, those of {first.name} "
                f"{_shortened(expected.labels)}; they must be the same in the same order (data.labels)."
            )
        row_of = {row: number for number, row in enumerate(predictions.ids)}
        if missing := [row for row in expected.ids if row not in row_of]:
            raise DataError(f"{where}: {len(missing)} rows of {first.name} are missing ({missing[0]} first).")
        if extra := [row for row in predictions.ids if row not in known]:
            raise DataError(f"{first.directory}: {len(extra)} rows of {member.name} are missing ({extra[0]} first).")
        member.predictions = predictions.at([row_of[row] for row in expected.ids])
        for row, target, other in zip(expected.ids, member.predictions.targets, expected.targets, strict=True):
            if target is not None and other is not None and target != other:
                raise DataError(f"{where}: the row {row} has the target '{target}', in {first.name} '{other}'.")
    return sets


def _shortened(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")


@dataclass(frozen=True)
class EnsembleRecipe:
    """The members of joined folds or a blend, and the method that combines their predictions."""

    members: list[Path]
    weights: list[float]
    method: Method

    @classmethod
    def of(cls, directory: Path) -> EnsembleRecipe | None:
        """The recipe of a directory of `llmft.folds` or `llmft.blend`; None for any other directory.

        Raises ConfigError where the record is damaged or a member is missing.
        """
        path = next((file for file in (directory / "folds.json", directory / "blend.json") if file.is_file()), None)
        if path is None:
            return None
        record = read_json(path, MOST_RECORD_BYTES)
        try:
            if path.stem == "folds":
                names, weights, method = list(record["runs"]), [1 / len(record["runs"])] * len(record["runs"]), "mean"
            else:
                names = [member["directory"] for member in record["members"]]
                weights, method = [float(member["weight"]) for member in record["members"]], record["method"]
            return cls([_member(directory, Path(str(name))) for name in names], weights, Method(method))
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"{path}: damaged ({error!r}); make it again.") from None

    def combined(self, name: str) -> Predictions:
        members = open_prediction_sets(self.members, name)
        problem = members[0].predictions.problem
        return joined(members, combine(stack(members), np.asarray(self.weights), self.method, problem))


def _member(directory: Path, name: Path) -> Path:
    """A member's directory: the recorded one, or the one of the same name under the ensemble's root."""
    for path in (name, directory.parent.parent / name.parent.name / name.name):
        if path.is_dir():
            return path
    raise ConfigError(
        f"{directory}: its member {name} is missing; run the command where it was made, or make it again."
    )


def shared_names(directories: Sequence[Path]) -> list[str]:
    """The names of predictions that all directories have, without `val`."""
    common = set.intersection(*(set(names_in(directory)) for directory in directories))
    return sorted(common - {"val"})


def stack(members: Sequence[PredictionSet]) -> np.ndarray:
    """The members' values as (members, rows, classes)."""
    return np.stack([member.predictions.values for member in members])


def joined(members: Sequence[PredictionSet], values: np.ndarray, **columns: list[Any]) -> Predictions:
    """Predictions of the members' rows with new values and the sources of all members."""
    first, provenances = members[0].predictions, [member.predictions.provenance for member in members]
    known = zip(*(member.predictions.targets for member in members), strict=True)
    targets = [next((target for target in candidates if target is not None), None) for candidates in known]
    shared = {name: first.columns[name] for name in ROW_COLUMNS if name in first.columns}
    sources: list[Any] = []
    for provenance in provenances:
        sources += [source for source in provenance.get("sources", []) if source not in sources]
    provenance = {"sources": sources, "members": [str(member.directory) for member in members]}
    for name in ("files", "files_digest", "id_column"):
        if all(of_member.get(name) == first.provenance.get(name) for of_member in provenances):
            provenance[name] = first.provenance.get(name)
    return Predictions(first.ids, first.labels, values, first.problem, targets, {**shared, **columns}, provenance)


def ensemble_directory(root: Path, name: str | None, default: str, content: Any) -> Path:
    """The directory of an ensemble, named by a hash of `content`."""
    key = digest_of(content)[:10]
    return root / f"{slug(name or default)[:80]}-{key}"


def write_ensemble(
    directory: Path, kind: str, predictions: dict[str, Predictions], record: dict[str, Any], after: dict[str, float]
) -> None:
    """Writes the predictions, then `<kind>.json`, then a run.json with the scores."""
    for name, member_predictions in predictions.items():
        member_predictions.save(directory / FOLDER / name)
    write_json(directory / f"{kind}.json", record)
    finished = time.strftime("%Y-%m-%d %H:%M:%S")
    status = {"status": "done", "kind": kind, "finished": finished, "result": {"before": {}, "after": after}}
    write_atomically(directory / "run.json", json.dumps(status, indent=1).encode())


def file_order(predictions: Predictions) -> list[int]:
    """Row indices in the order of files and lines."""

    def key(row: int) -> tuple[Any, ...]:
        where = str(predictions.columns.get("where", predictions.ids)[row])
        return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", where))

    return sorted(range(len(predictions.ids)), key=key)
