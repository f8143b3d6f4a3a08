"""Which rows a run is asked to predict, and where the answers go: all that needs no weights."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from llmft.config.commands import PredictConfig
from llmft.config.convert import canonical
from llmft.config.sections import Columns, TrainConfig
from llmft.config.untrusted import read_json
from llmft.core.errors import ConfigError, DataError, did_you_mean
from llmft.core.files import held, write_atomically
from llmft.data.columns import ColumnMap, Conversation
from llmft.data.naming import names_in
from llmft.data.sources import BadRows, Row, check_csv_columns, named_columns, read_files, with_nested
from llmft.data.targets import Targets
from llmft.evaluation.prediction_sets import EnsembleRecipe
from llmft.runs.directory import Run, finished_run, slug, source_facts
from llmft.runs.predictions import FOLDER, TEXT, Predictions

PLAN = "plan.json"
PROMPT = "prompt"


@dataclass
class PredictionJob:
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
    notes: list[str] = field(default_factory=list)
    """What should be told before predicting."""
    references: list[Any] | None = None
    """The answers that the files have as the format writes them, once a tokenizer is there."""
    recipe: None = None

    @property
    def baseline(self) -> bool:
        """Whether the run is a baseline without a language model."""
        return self.config.model.architecture == "tfidf"

    @property
    def prompts(self) -> bool:
        """Whether the rows are prompts of the command line."""
        return not self.files

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
        asked = {"group": groups} if any(group is not None for group in groups) else {}
        return (
            {**asked, "prompt": [row.messages[0]["content"] for row in self.conversations]} if self.prompts else asked
        )

    def facts(self) -> dict[str, Any]:
        """What the predictions say of themselves."""
        prior = self.target_model.prior if self.target_model is not None else []
        return {
            "sources": [source_facts(self.run, self.config, self.rows_fingerprint, prior)],
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


@dataclass
class EnsembleJob:
    """The rows for joined folds or a blend: for each of its members, and how their answers become one."""

    directory: Path
    recipe: EnsembleRecipe
    parts: list[PredictionJob | EnsembleJob]

    @property
    def baseline(self) -> bool:
        """Whether no member is a language model."""
        return all(part.baseline for part in self.parts)

    @property
    def notes(self) -> list[str]:
        """What should be told before predicting."""
        return [note for part in self.parts for note in part.notes]


def ask(
    directory: Path, config: PredictConfig, ids: str | None = None, above: tuple[Path, ...] = ()
) -> PredictionJob | EnsembleJob:
    """Reads the files as the run in `directory`, or the members of joined folds or a blend, read their own.

    `ids` is the column that names the rows, where they have it. Raises ConfigError or DataError for a directory, files,
    columns or rows that cannot be used.
    """
    recipe = EnsembleRecipe.of(directory)
    if recipe is None:
        return _ask(*finished_run(directory), config, ids)
    if directory in above:
        raise ConfigError(f"{directory}: a member of itself; make the blend again.")
    parts = [ask(member, config, ids, (*above, directory)) for member in recipe.members]
    return EnsembleJob(directory / FOLDER / parts[0].directory.name, recipe, parts)


def _ask(run: Run, trained: TrainConfig, config: PredictConfig, ids: str | None) -> PredictionJob:
    targets, notes, problems = _targets(run, trained), [], BadRows()
    names = trained.data.csv_columns if config.data.csv_columns is None else config.data.csv_columns
    data = replace(trained.data, csv_columns=names)
    if config.prompts is not None:
        rows, files, whole, name = _typed(config.prompts)
        data = replace(data, columns=Columns(prompt=PROMPT), group=None)
        wanted = trained.data.columns.prompt or ""
        if "{" in wanted:
            notes.append(f"prompts: each is taken as the whole of {wanted!r}, which made the prompts of the training.")
    else:
        rows, files, whole, name = _read(config, names, problems)
        rows = with_nested(rows, chain.from_iterable(named_columns(data).values()))
        data = replace(data, columns=_prompt_alone(data.columns, rows[0], notes))
        if trained.task.head is None and data.columns.text and not data.columns.response:  # to be gone on with
            data = replace(data, columns=Columns(prompt=data.columns.text, id=data.columns.id))
    columns = ColumnMap.of(data, rows, trained.task, targets=targets, lenient=True)
    columns.id = _id_column(config, [ids, data.columns.id], rows, columns.id, notes)
    conversations = columns.conversations(rows, problems)
    if len({row.id for row in conversations}) < len(conversations):
        raise DataError(f"data.files: two rows have one id in '{columns.id}'; every row needs its own.")
    name = config.name or f"{slug(name)}-{whole[:8]}"
    options = [config.batch_size, config.max_new_tokens, names, [str(row.id) for row in conversations]]
    plan = hashlib.sha256(canonical([run.key, run.digests(), whole, options]).encode()).hexdigest()
    directory = run.directory / FOLDER / slug(name)
    fingerprint = run.fact("data", "rows_fingerprint")
    return PredictionJob(
        run, trained, directory, conversations, files, whole, columns.id, targets, fingerprint, plan, notes
    )


def _typed(prompts: Any) -> tuple[list[Row], list[str], str, str]:
    """Prompts of the command line as rows, no files, their digest, and what they are called."""
    texts = [str(text) for text in (prompts if isinstance(prompts, (list, tuple)) else [prompts])]
    if not texts or not all(text.strip() for text in texts):
        raise ConfigError('prompts: no text, or an empty one; write prompts=["…"].')
    rows = [Row({PROMPT: text}, f"prompts:{number}") for number, text in enumerate(texts, start=1)]
    return rows, [], hashlib.sha256(canonical(texts).encode()).hexdigest(), "prompts"


def _read(config: PredictConfig, names: list[str], problems: BadRows) -> tuple[list[Row], list[str], str, str]:
    """The rows of the files, the files, a digest of them, and the first one's name."""
    read, digest = read_files(config.data.files, "data.files", problems, names), hashlib.sha256()
    check_csv_columns(config.data.csv_columns or [], read.paths)
    for content in read.digests:
        digest.update(bytes.fromhex(content))
    if not read.rows:
        raise DataError(f"data.files={config.data.files}: no rows to predict.")
    files = [str(path.absolute()) for path in read.paths]
    return read.rows, files, digest.hexdigest(), read.paths[0].name.partition(".")[0]


def _prompt_alone(columns: Columns, first: Row, notes: list[str]) -> Columns:
    """`columns`, or where a file has none of those that a prompt is made of, its column `prompt` or its only one."""
    made_of = columns.messages or columns.text or columns.prompt or ""
    if any(name in first.values for name in names_in(made_of)):
        return columns
    others = [name for name in first.values if name not in ("id", columns.id)]
    if PROMPT not in others and len(others) != 1:
        return columns  # what is missing is told by name
    column = PROMPT if PROMPT in others else others[0]
    notes.append(f"data.files: the column '{column}' is taken as the whole prompt ({made_of!r} in the training).")
    return Columns(prompt=column, id=columns.id)


def _id_column(
    config: PredictConfig, wanted: list[str | None], rows: list[Row], usual: str | None, notes: list[str]
) -> str | None:
    """The column that names the rows: as the command line says, or the first of `wanted` or `usual` that all have."""
    given = config.data.id
    if given is not None:
        lacking = next((row for row in rows if row.values.get(given) is None), None)
        if lacking is not None:
            raise DataError(f"data.id={given}: {lacking.where} has none{did_you_mean(given, lacking.values)}")
        return given
    for name in (*wanted, usual):
        if name is not None and all(row.values.get(name) is not None for row in rows):
            return name
    missing = next((name for name in (*wanted, "id") if name in rows[0].values or name == wanted[-1]), None)
    if missing is not None and config.prompts is None:
        notes.append(
            f"data.files: not every row has an id of its own in '{missing}', so the rows are called by file and line "
            "(data.id=COLUMN names them)."
        )
    return None


def _targets(run: Run, trained: TrainConfig) -> Targets | None:
    if trained.task.head is None:
        return None
    try:
        return Targets.from_plain(read_json(run.targets_file))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(f"{run.targets_file}: the run's classes cannot be read ({error}).") from None
