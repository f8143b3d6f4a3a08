"""Prediction jobs: the rows that a run predicts and the directory of its predictions. Needs no weights."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from llmft.config.commands import PredictConfig
from llmft.config.convert import canonical, digest_of
from llmft.config.data import Columns
from llmft.config.sections import TrainConfig
from llmft.config.task import TaskType
from llmft.config.untrusted import read_json
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.core.files import exclusive_lock, write_atomically
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.naming import names_in
from llmft.data.readers import BadRows, Row
from llmft.data.sources import check_csv_columns, named_columns, read_files, with_nested
from llmft.data.targets import Targets
from llmft.evaluation.prediction_sets import EnsembleRecipe
from llmft.runs.directory import Run, finished_run, source_record
from llmft.runs.naming import slug
from llmft.runs.predictions import FOLDER, TEXT, Predictions, read_table, write_table

T = TypeVar("T")
PLAN = "plan.json"
PROMPT = "prompt"


@dataclass
class PredictionJob:
    """The rows that one run predicts, and the directory of its predictions.

    Attributes:
        digest: of the files' content.
        target_model: the classes or the scale of numbers; None where the run writes text or scores answers.
        plan: a hash of all that the predictions depend on.
        notes: messages to print before predicting.
        references: the known answers as the prompt format writes them; set once the tokenizer is loaded.
    """

    run: Run
    config: TrainConfig
    directory: Path
    conversations: list[Conversation] = field(default_factory=list)
    files: list[str] = field(default_factory=list)
    digest: str = ""
    id_column: str | None = None
    target_model: Targets | None = None
    rows_fingerprint: str = ""
    plan: str = ""
    notes: list[str] = field(default_factory=list)
    references: list[Any] | None = None

    @property
    def baseline(self) -> bool:
        """Whether the run is a baseline, not a language model."""
        return self.config.model.architecture == "tfidf"

    @property
    def labels(self) -> list[str]:
        """The classes; none for text, and only "score" for a reward model."""
        if self.config.task.scores_answers:
            return ["score"]
        return self.target_model.labels if self.target_model is not None else []

    @property
    def problem(self) -> str:
        if self.config.task.scores_answers:
            return TaskType.regression
        return self.target_model.problem if self.target_model is not None else TEXT

    def predictions(self, values: np.ndarray, columns: dict[str, list[Any]]) -> Predictions:
        """The Predictions of `values` and further `columns`, with the rows' ids, known targets and sources."""
        rows = self.conversations
        known: dict[str, list[Any]] = {"where": [row.where for row in rows]}
        if any(row.group is not None for row in rows):
            known["group"] = [row.group for row in rows]
        if not self.files:
            known[PROMPT] = [row.messages[0]["content"] for row in rows]
        prior = self.target_model.prior if self.target_model is not None else []
        provenance = {
            "sources": [source_record(self.run, self.config, self.rows_fingerprint, prior)],
            "files": self.files,
            "files_digest": self.digest,
            "id_column": self.id_column,
            "plan": self.plan,
        }
        ids = [row.id for row in rows]
        return Predictions(ids, self.labels, values, self.problem, self._targets(), known | columns, provenance)

    def _targets(self) -> list[Any]:
        """The true targets or answers; None for rows without one."""
        if self.config.task.scores_answers:
            return [None] * len(self.conversations)
        if self.target_model is not None:
            return [self.target_model.name(row.target) for row in self.conversations]
        if self.references is not None:
            return self.references
        last = [row.messages[-1] for row in self.conversations]
        return [message["content"] if message["role"] == "assistant" else None for message in last]

    def finished(self) -> Predictions | None:
        """The existing predictions of the same weights and rows; None if there are none."""
        try:
            predictions = Predictions.load(self.directory)
        except DataError:
            return None
        return predictions if predictions.provenance.get("plan") == self.plan else None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Locks the directory. Raises ConfigError where another process has locked it."""
        busy = ConfigError(f"{self.directory}: another process is predicting these rows; wait for it.")
        return exclusive_lock(self.directory / ".lock", busy)

    def open_parts(self, size: str) -> Path:
        """The folder of finished parts; emptied first where they belong to other weights, rows or sizes."""
        folder = self.directory / "parts"
        plan = canonical([self.plan, size])
        with contextlib.suppress(OSError):
            if (folder / PLAN).read_text() == plan:
                return folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_atomically(folder / PLAN, plan.encode())
        return folder

    def clear_parts(self) -> None:
        shutil.rmtree(self.directory / "parts", ignore_errors=True)


def compute_parts(
    folder: Path, parts: Sequence[T], compute: Callable[[T], dict[str, list[Any]]], screen: Screen
) -> dict[str, list[Any]]:
    """The columns of all parts in their order: reads those in `folder`, computes and writes the others.

    So a kill loses only the part being computed.
    """
    paths = [folder / f"part-{number:06d}.parquet" for number in range(len(parts))]
    if num_done := sum(path.is_file() for path in paths):
        screen.print(f"{num_done} of {len(parts)} parts are done already.")
    for part, path in zip(parts, paths, strict=True):
        if not path.is_file():
            write_table(path, compute(part))
    return concatenated([read_table(path) for path in paths])


def concatenated(tables: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """One table of the rows of all `tables`, which have the same columns."""
    return {name: [value for table in tables for value in table[name]] for name in tables[0]}


@dataclass
class EnsembleJob:
    """The jobs of the members of joined folds or a blend, and the recipe that combines their predictions."""

    directory: Path
    recipe: EnsembleRecipe
    parts: list[PredictionJob | EnsembleJob]

    @property
    def baseline(self) -> bool:
        """Whether no member is a language model."""
        return all(part.baseline for part in self.parts)

    @property
    def notes(self) -> list[str]:
        return [note for part in self.parts for note in part.notes]


def plan_predictions(
    directory: Path, config: PredictConfig, ids: str | None = None, above: tuple[Path, ...] = ()
) -> PredictionJob | EnsembleJob:
    """The job for the run in `directory`, or for the members of joined folds or a blend.

    `ids` is the preferred id column. Raises ConfigError or DataError for a directory, files, columns or rows that
    cannot be used.
    """
    recipe = EnsembleRecipe.of(directory)
    if recipe is None:
        return _plan_run(*finished_run(directory), config, ids)
    if directory in above:
        raise ConfigError(f"{directory}: a member of itself; make the blend again.")
    parts = [plan_predictions(member, config, ids, (*above, directory)) for member in recipe.members]
    return EnsembleJob(directory / FOLDER / parts[0].directory.name, recipe, parts)


def _plan_run(run: Run, trained: TrainConfig, config: PredictConfig, ids: str | None) -> PredictionJob:
    targets, notes, problems = targets_of(run, trained), [], BadRows()
    names = trained.data.csv_columns if config.data.csv_columns is None else config.data.csv_columns
    data = replace(trained.data, csv_columns=names)
    if config.prompts is not None and trained.task.scores_answers:
        raise ConfigError("prompts: this run scores answers; give rows with answers in data.files.")
    if config.prompts is not None:
        rows, files, digest, name = _from_prompts(config.prompts)
        data = replace(data, columns=Columns(prompt=PROMPT), group=None)
        trained_prompt = trained.data.columns.prompt or ""
        if "{" in trained_prompt:
            notes.append(f"prompts: each is used as the whole prompt ({trained_prompt!r} in the training).")
    else:
        rows, files, digest, name = _from_files(config, names, problems)
        rows = with_nested(rows, chain.from_iterable(named_columns(data).values()))
        data = replace(data, columns=_prompt_column(data.columns, rows[0], notes))
        if trained.task.writes and data.columns.text and not data.columns.response:  # a text to continue
            data = replace(data, columns=Columns(prompt=data.columns.text, id=data.columns.id))
    columns = ColumnMap.of(data, rows, trained.task, targets=targets, lenient=True)
    columns.id = _id_column(config, [ids, data.columns.id], rows, columns.id, notes)
    conversations = columns.conversations(rows, problems)
    if len({row.id for row in conversations}) < len(conversations):
        raise DataError(f"data.files: two rows have one id in '{columns.id}'; every row needs its own.")
    name = config.name or f"{slug(name)}-{digest[:8]}"
    options = [config.batch_size, config.max_new_tokens, names, [str(row.id) for row in conversations]]
    return PredictionJob(
        run=run,
        config=trained,
        directory=run.directory / FOLDER / slug(name),
        conversations=conversations,
        files=files,
        digest=digest,
        id_column=columns.id,
        target_model=targets,
        rows_fingerprint=run.recorded("data", "rows_fingerprint"),
        plan=digest_of([run.key, run.digests(), digest, options]),
        notes=notes,
    )


def _from_prompts(prompts: Any) -> tuple[list[Row], list[str], str, str]:
    """Prompts from the command line as (rows, no files, digest, name)."""
    texts = [str(text) for text in (prompts if isinstance(prompts, (list, tuple)) else [prompts])]
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError('prompts: no text, or an empty one; write prompts=["…"].')
    rows = [Row({PROMPT: text}, f"prompts:{number}") for number, text in enumerate(texts, start=1)]
    return rows, [], digest_of(texts), "prompts"


def _from_files(config: PredictConfig, names: list[str], problems: BadRows) -> tuple[list[Row], list[str], str, str]:
    """(rows, files, digest, name of the first file)."""
    read = read_files(config.data.files, "data.files", problems, names)
    check_csv_columns(config.data.csv_columns or [], read.paths)
    if not read.rows:
        raise DataError(f"data.files={config.data.files}: no rows to predict.")
    digest = hashlib.sha256(bytes.fromhex("".join(read.digests))).hexdigest()
    return read.rows, [str(path.absolute()) for path in read.paths], digest, read.paths[0].name.partition(".")[0]


def _prompt_column(columns: Columns, first: Row, notes: list[str]) -> Columns:
    """`columns`; for a file without the prompt's columns, its column `prompt` or its only column as the prompt."""
    trained_prompt = columns.messages or columns.text or columns.prompt or columns.chosen or ""
    if any(name in first.values for name in names_in(trained_prompt)):
        return columns
    candidates = [name for name in first.values if name not in ("id", columns.id)]
    if PROMPT not in candidates and len(candidates) != 1:
        return columns  # ColumnMap reports the missing column
    column = PROMPT if PROMPT in candidates else candidates[0]
    notes.append(f"data.files: the column '{column}' is used as the whole prompt ({trained_prompt!r} in the training).")
    return Columns(prompt=column, id=columns.id)


def _id_column(
    config: PredictConfig, preferred: list[str | None], rows: list[Row], fallback: str | None, notes: list[str]
) -> str | None:
    """The column of the rows' ids: data.id, or the first of `preferred` and `fallback` that all rows have."""
    chosen = config.data.id
    if chosen is not None:
        for row in rows:
            if row.values.get(chosen) is None:
                raise DataError(f"data.id={chosen}: {row.where} has none{did_you_mean(chosen, row.values)}")
        return chosen
    for name in (*preferred, fallback):
        if name is not None and all(row.values.get(name) is not None for row in rows):
            return name
    missing = next((name for name in (*preferred, "id") if name in rows[0].values or name == preferred[-1]), None)
    if missing is not None and config.prompts is None:
        notes.append(
            f"data.files: not every row has an id in '{missing}', so file and line are used as ids "
            "(data.id=COLUMN names another column)."
        )
    return None


def targets_of(run: Run, trained: TrainConfig) -> Targets | None:
    if trained.task.head is None:
        return None
    try:
        return Targets.from_plain(read_json(run.targets_file))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{run.targets_file}: the run's classes cannot be read ({error}).") from None
