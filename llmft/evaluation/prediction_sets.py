"""Run directories, joined folds and blends as members of something larger; what does not fit is refused by name."""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from llmft.config.commands import Method
from llmft.config.convert import canonical
from llmft.config.sections import TaskType
from llmft.config.untrusted import read_json
from llmft.core.errors import ConfigError, DataError
from llmft.core.files import write_atomically
from llmft.evaluation.blending import combine
from llmft.runs.directory import slug
from llmft.runs.predictions import FOLDER, TEXT, Predictions, load_predictions, names_in

MOST_RECORD_BYTES = 2**24
"""Of folds.json and blend.json."""


@dataclass
class PredictionSet:
    """A directory with predictions, and the ones that are looked at."""

    directory: Path
    predictions: Predictions

    @property
    def name(self) -> str:
        """What people call it."""
        return self.directory.name


def open_prediction_sets(directories: Sequence[Path], name: str) -> list[PredictionSet]:
    """The predictions called `name` of each directory, their rows in the first one's order.

    Raises DataError naming the member whose problem, classes, rows or targets are not those of the first.
    """
    members = [PredictionSet(directory, load_predictions(directory, name)) for directory in directories]
    first = members[0]
    if first.predictions.problem == TEXT:
        raise ConfigError(f"{first.directory}: generated texts cannot be averaged.")
    place = {row: number for number, row in enumerate(first.predictions.ids)}
    for member in members:
        own, theirs = member.predictions, first.predictions
        if own.problem != theirs.problem:
            raise DataError(f"{member.directory}: predicts {own.problem}, and {first.name} {theirs.problem}.")
        if own.labels != theirs.labels and own.problem != TaskType.regression.value:
            raise DataError(
                f"{member.directory}: its classes are {_short(own.labels)}, those of {first.name} "
                f"{_short(theirs.labels)}; they must be the same in the same order (data.labels)."
            )
        missing = [row for row in theirs.ids if row not in set(own.ids)] if len(own.ids) != len(place) else []
        missing = missing or sorted(place.keys() - set(own.ids))
        if missing:
            raise DataError(
                f"{member.directory}: {len(missing)} rows of {first.name} are missing ({missing[0]} first)."
            )
        strange = [row for row in own.ids if row not in place]
        if strange:
            raise DataError(
                f"{first.directory}: {len(strange)} rows of {member.name} are missing ({strange[0]} first)."
            )
        row_of = {row: number for number, row in enumerate(own.ids)}
        member.predictions = own.at([row_of[row] for row in theirs.ids])
        for row, mine, other in zip(theirs.ids, member.predictions.targets, theirs.targets, strict=True):
            if mine is not None and other is not None and mine != other:
                raise DataError(
                    f"{member.directory}: the row {row} has the target '{mine}', in {first.name} '{other}'."
                )
    return members


def _short(labels: Sequence[str]) -> str:
    return ", ".join(labels[:8]) + (", …" if len(labels) > 8 else "")


@dataclass(frozen=True)
class EnsembleRecipe:
    """What joined folds or a blend are made of: directories, and how their predictions become one."""

    members: list[Path]
    weights: list[float]
    method: Method

    @classmethod
    def of(cls, directory: Path) -> EnsembleRecipe | None:
        """That of a directory of `llmft.folds` or `llmft.blend`; None for any other directory.

        Raises ConfigError where the record is damaged or a member has gone.
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
        """The members' predictions called `name` as one."""
        members = open_prediction_sets(self.members, name)
        problem = members[0].predictions.problem
        return joined(members, combine(stack(members), np.asarray(self.weights), self.method, problem))


def _member(directory: Path, name: Path) -> Path:
    """Where a member lies: where it did, or where it would below the same root."""
    for path in (name, directory.parent.parent / name.parent.name / name.name):
        if path.is_dir():
            return path
    raise ConfigError(f"{directory}: its member {name} is not there; give the command where it is, or make it again.")


def shared_names(directories: Sequence[Path]) -> list[str]:
    """The names of predictions that all directories have, besides those of their own validation rows."""
    common = set.intersection(*(set(names_in(directory)) for directory in directories))
    return sorted(common - {"val"})


def stack(members: Sequence[PredictionSet]) -> np.ndarray:
    """(members, rows, classes)."""
    return np.stack([member.predictions.values for member in members])


def joined(members: Sequence[PredictionSet], values: np.ndarray, **columns: list[Any]) -> Predictions:
    """Predictions of the members' rows with new values, which remember every member's own sources."""
    first = members[0].predictions
    told = zip(*(member.predictions.targets for member in members), strict=True)
    targets = [next((target for target in own if target is not None), None) for own in told]
    kept: dict[str, list[Any]] = {
        name: first.columns[name] for name in ("where", "group", "fold", "prompt") if name in first.columns
    }
    sources: list[Any] = []
    for member in members:
        sources += [source for source in member.predictions.facts.get("sources", []) if source not in sources]
    facts: dict[str, Any] = {"sources": sources, "members": [str(member.directory) for member in members]}
    for name in ("files", "files_digest", "id_column"):
        found = [member.predictions.facts.get(name) for member in members]
        if all(own == found[0] for own in found):
            facts[name] = found[0]
    return Predictions(first.ids, first.labels, values, first.problem, targets, {**kept, **columns}, facts)


def ensemble_directory(root: Path, name: str | None, default: str, content: Any) -> Path:
    """Where something made of `content` lies: named by it, so that the same always lies in the same place."""
    key = hashlib.sha256(canonical(content).encode()).hexdigest()[:10]
    return root / f"{slug(name or default)[:80]}-{key}"


def write_ensemble(
    directory: Path, kind: str, predictions: dict[str, Predictions], record: dict[str, Any], after: dict[str, float]
) -> None:
    """Writes predictions by name, then `<kind>.json` and a run.json with the scores."""
    for name, made in predictions.items():
        made.save(directory / FOLDER / name)
    write_atomically(directory / f"{kind}.json", json.dumps(record, indent=1, ensure_ascii=False).encode())
    status = {
        "status": "done",
        "kind": kind,
        "finished": time.strftime("%Y-%m-%d %H:%M:%S"),
        "result": {"before": {}, "after": after},
    }
    write_atomically(directory / "run.json", json.dumps(status, indent=1).encode())


def file_order(predictions: Predictions) -> list[int]:
    """The rows' places in the order of their files and lines."""

    def key(row: int) -> tuple[Any, ...]:
        where = str(predictions.columns.get("where", predictions.ids)[row])
        return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", where))

    return sorted(range(len(predictions.ids)), key=key)
