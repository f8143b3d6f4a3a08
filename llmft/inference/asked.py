"""Which rows a run is asked to predict, and where the answers go: all that needs no weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmft.config import TrainConfig
from llmft.config_verbs import PredictConfig
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.sources import Problems, expand, read
from llmft.data.targets import Targets
from llmft.errors import ConfigError, DataError
from llmft.files import held, write_atomically
from llmft.predictions import FOLDER, TEXT, Predictions
from llmft.runs import Run, slug, source_facts
from llmft.schema import canonical

PLAN = "plan.json"


@dataclass
class Asked:
    """The rows for one run."""

    run: Run
    config: TrainConfig
    directory: Path
    conversations: list[Conversation]
    files: list[str]
    digest: str
    id_column: str | None
    target_model: Targets | None
    rows_fingerprint: str
    plan: str
    note: str = ""
    """What should be told before predicting."""
    references: list[Any] | None = None
    """The answers that the files have as the format writes them, once a tokenizer is there."""

    @property
    def baseline(self) -> bool:
        """Whether the run is a baseline without a language model."""
        return self.config.model.architecture == "tfidf"

    @property
    def ids(self) -> list[str]:
        """What the rows are called, in the order of the files."""
        return [row.id for row in self.conversations]

    @property
    def labels(self) -> list[str]:
        """The classes; none for text."""
        return self.target_model.labels if self.target_model is not None else []

    @property
    def problem(self) -> str:
        """What is predicted, as predictions say it."""
        return self.target_model.problem.value if self.target_model is not None else TEXT

    @property
    def targets(self) -> list[Any]:
        """The true targets or answers where the files have them."""
        if self.target_model is not None:
            return [self.target_model.name(row.target) for row in self.conversations]
        if self.references is not None:
            return self.references
        spoken = [row.messages[-1] for row in self.conversations]
        return [turn["content"] if turn["role"] == "assistant" else None for turn in spoken]

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What else is known of the rows."""
        groups = [row.group for row in self.conversations]
        return {"group": groups} if any(group is not None for group in groups) else {}

    def facts(self) -> dict[str, Any]:
        """What the predictions say of themselves."""
        return {
            "sources": [source_facts(self.run, self.config, self.rows_fingerprint)],
            "files": self.files,
            "files_digest": self.digest,
            "id_column": self.id_column,
            "plan": self.plan,
        }

    def finished(self) -> Predictions | None:
        """The predictions that are there already, of the same weights and rows."""
        try:
            found = Predictions.load(self.directory)
        except DataError:
            return None
        return found if found.facts.get("plan") == self.plan else None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Takes the directory for this process; ConfigError where another one has it."""
        busy = ConfigError(f"{self.directory}: another process is predicting these rows; wait for it.")
        return held(self.directory / ".lock", busy)

    # Parts: finished pieces of the work, so that a kill costs one of them.

    def open_parts(self, size: str) -> Path:
        """The folder of finished parts; emptied where they are of other work, weights, rows or sizes."""
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
        """Drops the parts once the whole is written."""
        shutil.rmtree(self.directory / "parts", ignore_errors=True)


def ask(run: Run, trained: TrainConfig, config: PredictConfig) -> Asked:
    """Reads the files as `run` read its own.

    Raises ConfigError or DataError for files, columns or rows that cannot be used.
    """
    names = config.data.csv_columns
    data = replace(trained.data, csv_columns=trained.data.csv_columns if names is None else names)
    paths = expand(config.data.files, "data.files")
    problems, digest, rows = Problems(), hashlib.sha256(), []
    for path in paths:
        content = path.read_bytes()
        digest.update(hashlib.sha256(content).digest())
        rows += list(read(path, content, problems, data.csv_columns))
    if not rows:
        raise DataError(f"data.files={config.data.files}: no rows to predict.")
    targets = _targets(run, trained)
    columns = ColumnMap.of(data, rows, trained.task, targets=targets, lenient=True)
    if data.columns.id and columns.id != data.columns.id:
        columns.id = None
    if columns.id is None and data.columns.id and all(data.columns.id in row.values for row in rows):
        columns.id = data.columns.id
    conversations = columns.conversations(rows, problems)
    if len({row.id for row in conversations}) < len(conversations):
        raise DataError(f"data.files: two rows have one id in '{columns.id}'; every row needs its own.")
    whole = digest.hexdigest()
    name = config.name or f"{slug(paths[0].name.partition('.')[0])}-{whole[:8]}"
    options = [config.batch_size, config.max_new_tokens, data.csv_columns, [str(row.id) for row in conversations]]
    plan = hashlib.sha256(canonical([run.key, run.digests(), whole, options]).encode()).hexdigest()
    directory = run.directory / FOLDER / slug(name)
    fingerprint = json.loads(run.environment_file.read_text())["data"]["rows_fingerprint"]
    files = [str(path.absolute()) for path in paths]
    note = ""
    if columns.id is None and "id" in rows[0].values:
        note = "two rows have one id, or one has none, so the rows are called by file and line."
    return Asked(run, trained, directory, conversations, files, whole, columns.id, targets, fingerprint, plan, note)


def _targets(run: Run, trained: TrainConfig) -> Targets | None:
    if trained.task.head is None:
        return None
    try:
        return Targets.from_plain(json.loads(run.targets_file.read_text()))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{run.targets_file}: the run's classes cannot be read ({error}).") from None
