"""Prepares what a run needs before torch is imported: rows, the model's files, the run directory.

So `python -m llmft` reports a mistake, or a finished run, in about a second.
"""

from __future__ import annotations

import hashlib
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any

from llmft.config.data import TrainOn
from llmft.config.sections import TrainConfig
from llmft.config.task import Feedback, TaskType
from llmft.core.errors import DataError
from llmft.data.columns import ColumnMap, Conversation, prompt_of
from llmft.data.hub import Located, locate
from llmft.data.messages import Keys
from llmft.data.preferences import with_other_answers
from llmft.data.pseudo import PseudoLabels, add_pseudo
from llmft.data.readers import BadRows
from llmft.data.sources import load_rows
from llmft.data.splits import make_splits
from llmft.data.targets import Targets, class_weights
from llmft.data.transforms import apply
from llmft.metrics.monitor import with_mode
from llmft.metrics.prior import prior_of
from llmft.runs.directory import Run, check_run_directory, open_run
from llmft.runs.key import run_key


@dataclass
class RunInputs:
    """Conversations of each split, the model's files, and the run they belong to."""

    config: TrainConfig
    conversations: dict[str, list[Conversation]]
    labels: list[str]
    located: Located
    data_fingerprint: str
    run: Run
    problems: BadRows = field(default_factory=BadRows)
    targets: Targets | None = None
    rows_fingerprint: str = ""
    """Of the files only, without pseudo-labels: the same in all folds."""
    pseudo: PseudoLabels = field(default_factory=PseudoLabels)
    id_column: str | None = None
    num_rows: dict[str, int] = field(default_factory=dict)
    """Rows of each split before any was left out, and "all": those split into training and validation."""
    usage: dict[str, Any] = field(default_factory=dict)
    """Which columns are read and which are not, from `ColumnMap.usage`."""
    message_keys: Keys = field(default_factory=Keys)
    started: float = field(default_factory=time.monotonic)

    @property
    def num_outputs(self) -> int:
        """Outputs of the model's head, if it has one: one per class, or one for an answer's score."""
        return 1 if self.config.task.scores_answers else len(self.labels)


def may_be_distributed(config: TrainConfig) -> bool:
    """Whether the run may be distributed; several runs on one device each may have been started in parallel."""
    return bool(config.trainer.devices != 1) or config.trainer.num_nodes > 1


def process_rank(config: TrainConfig) -> int:
    """This process's rank in a distributed run, before torch.distributed is initialised.

    Without a launcher's rank, NODE_RANK is used, so only the first machine has rank 0.
    """
    if not may_be_distributed(config):
        return 0
    for name in ("RANK", "SLURM_PROCID", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"):
        value = os.environ.get(name)
        if value is not None and value.isdigit():
            return int(value)
    return 0


def prepare(config: TrainConfig, *, open_directory: bool = True) -> RunInputs:
    """Reads and checks the rows, finds the model, and opens the run directory (or only names it).

    Raises:
        ConfigError: for files, columns or models that the config names and that are missing.
        DataError: for rows that cannot be used.
    """
    config = with_mode(config)
    problems = BadRows(config.data.on_bad_row)
    loaded = load_rows(config.data, problems)
    # The classes are those of all rows, so that every fold has the same in the same order.
    known = [*loaded.splits["train"], *loaded.splits.get("validation", [])]
    columns = ColumnMap.of(config.data, known, config.task, test=loaded.splits.get("test", ()))
    rows = make_splits(loaded, config.data, prompt_of(config.data) if config.task.feedback is not None else None)
    conversations = {
        split: [apply(config.data.transform, conversation) for conversation in columns.conversations(part, problems)]
        for split, part in rows.items()
    }
    total = sum(map(len, rows.values()))
    check_rejected(problems, total, config)
    if not conversations["train"]:
        raise DataError(f"data={config.data.name}: no training row can be used.")
    if not conversations["validation"]:
        raise DataError(
            f"data={config.data.name} has no validation rows: raise data.validation_fraction or name a file in "
            "data.split_files.validation."
        )
    if config.task.feedback is Feedback.labels:
        conversations = {split: with_other_answers(part) for split, part in conversations.items()}
    others = [*conversations["validation"], *conversations["test"]]
    pseudo = add_pseudo(config.data, columns, conversations["train"], others)
    conversations["train"] = _weighted([*conversations["train"], *pseudo.conversations], config, columns.targets)
    if config.data.train_on is TrainOn.all:  # these rows are trained on; a few suffice to see that the model works
        conversations["validation"] = conversations["validation"][: config.trainer.validation_batch_size]
    fingerprint = loaded.fingerprint
    if pseudo.fingerprint:
        fingerprint = hashlib.sha256(f"{loaded.fingerprint}+{pseudo.fingerprint}".encode()).hexdigest()
    held_out = 0 if "test" in loaded.splits else len(rows["test"])
    num_rows = {**{split: len(part) for split, part in rows.items()}, "all": len(known) - held_out}
    located = locate(config.model)
    key = run_key(config, fingerprint, located.fingerprint)
    run = open_run(config, key) if open_directory else check_run_directory(config, key)
    return RunInputs(
        config,
        conversations,
        columns.labels,
        located,
        data_fingerprint=fingerprint,
        run=run,
        problems=problems,
        targets=columns.targets,
        rows_fingerprint=loaded.fingerprint,
        pseudo=pseudo,
        id_column=columns.id,
        num_rows=num_rows,
        usage=columns.usage([row for part in loaded.splits.values() for row in part]),
        message_keys=columns.keys,
    )


def _weighted(train: list[Conversation], config: TrainConfig, targets: Targets | None) -> list[Conversation]:
    """The training rows with task.class_weights; sets in `targets` the prior, and a regression's mean and scale."""
    if targets is None:
        return train
    targets.prior = prior_of(targets.problem, len(targets.labels), [row.target for row in train])
    if targets.problem is TaskType.regression:
        import numpy as np

        values = np.asarray([row.target for row in train], dtype=np.float64)
        targets.mean, targets.scale = float(values.mean()), float(values.std()) or 1.0
    if config.task.class_weights is None:
        return train
    weights = class_weights(config.task.class_weights, targets.labels, [row.target for row in train])
    return [replace(row, weight=row.weight * weights[int(row.target)]) for row in train]  # type: ignore[arg-type]


def check_rejected(problems: BadRows, total: int, config: TrainConfig) -> None:
    """Raises DataError when more rows were left out than data.max_bad_fraction allows."""
    if len(problems.rejected) > config.data.max_bad_fraction * total:
        reasons = "; ".join(f"{count} x {reason}" for reason, count in problems.reasons().items())
        raise DataError(
            f"data={config.data.name}: {len(problems.rejected)} of {total} rows cannot be used ({reasons[:300]}), more "
            f"than data.max_bad_fraction={config.data.max_bad_fraction}; the first is {problems.rejected[0]['where']}."
        )
