"""The records of a run directory, except the numbers of each step."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from llmft.config.convert import to_plain
from llmft.config.data import TrainOn
from llmft.config.task import Feedback
from llmft.core.files import write_atomically
from llmft.core.redaction import redact
from llmft.data.columns import Conversation
from llmft.data.examples import Examples
from llmft.data.overlap import Overlap
from llmft.metrics.preference import against_length, length_sentence, movement
from llmft.metrics.prior import against_prior
from llmft.runs.directory import Run, source_record, write_config
from llmft.runs.predictions import FOLDER, PREFIX, Predictions, load_predictions, names_in, read_table
from llmft.runs.records import append_line
from llmft.training.prepare import RunInputs
from llmft.training.tokenized_data import TokenizedData


def write_records(
    inputs: RunInputs,
    environment: dict[str, Any],
    rows: TokenizedData | None = None,
    overlaps: Sequence[Overlap] = (),
) -> None:
    """Writes the config, the environment with the rows cut by limits, the classes, and the rejected rows."""
    run, model = inputs.run, inputs.config.model
    write_config(run, inputs.config)
    data: dict[str, Any] = {
        "fingerprint": inputs.data_fingerprint,
        "rows_fingerprint": inputs.rows_fingerprint,
        "labels": inputs.labels,
        "pseudo": inputs.pseudo.counts() if inputs.pseudo.fingerprint else None,
        "left_out": inputs.problems.reasons(),
        "train_on": inputs.config.data.train_on.value,
    }
    # The source of third-party code that the training ran: a pinned revision or a directory.
    remote_code = (model.path or f"{model.id}@{model.revision}") if model.trust_remote_code else None
    facts = {"fingerprint": inputs.located.fingerprint, "remote_code": remote_code}
    record = {**environment, "data": data, "model": facts}
    if rows is not None:
        data["splits"] = {split: asdict(lengths) for split, lengths in rows.encoder.lengths.items()}
        data["overlaps"] = [asdict(overlap) for overlap in overlaps]
        record["tokenizer"] = {"pad": rows.tokenizer.pad_token, "end": rows.tokenizer.eos_token}
    write_atomically(run.environment_file, json.dumps(redact(record), indent=1).encode())
    if inputs.targets is not None:
        write_atomically(run.targets_file, json.dumps(to_plain(inputs.targets), indent=1).encode())
    if inputs.problems.rejected:
        run.rejected_file.unlink(missing_ok=True)
        for entry in inputs.problems.rejected:
            append_line(run.rejected_file, redact(entry))


def write_predictions(inputs: RunInputs, splits: Mapping[str, Examples], step: int) -> None:
    """Writes the predictions of validation and test after `step`, from the row tables of these two evaluations.

    They belong to the exported weights. Nothing is written for a split that was trained on.
    """
    run, targets = inputs.run, inputs.targets
    if targets is None:
        return
    for split, name in (("validation", "val"), ("test", "test")):
        path = run.row_losses_file(name, step)
        if not path.is_file():
            continue
        table = read_table(path)
        values = np.asarray([table[f"{PREFIX}{label}"] for label in targets.labels], dtype=np.float64).T.copy()
        rows = [example.conversation for example in splits[split]]
        predictions_of(inputs, rows, split, values, table["loss_nats"], step).save(run.directory / FOLDER / name)


def predictions_of(
    inputs: RunInputs,
    rows: Sequence[Conversation],
    split: str,
    values: np.ndarray,
    losses: Sequence[float],
    step: int,
) -> Predictions:
    """The predictions of one of the run's own splits, with the columns and facts that folds and blends need."""
    targets, data = inputs.targets, inputs.config.data
    assert targets is not None
    columns: dict[str, list[Any]] = {"where": [row.where for row in rows]}
    if data.group:
        columns["group"] = [row.group for row in rows]
    if data.fold is not None and split == "validation":
        columns["fold"] = [data.fold] * len(rows)
    columns["loss_nats"] = list(losses)
    facts = {
        "sources": [source_record(inputs.run, inputs.config, inputs.rows_fingerprint, targets.prior)],
        "id_column": inputs.id_column,
        "step": step,
        "held_out_rows": inputs.num_rows.get(split, 0),
        "all_rows": inputs.num_rows.get("all", 0),
    }
    names = [targets.name(row.target) for row in rows]
    return Predictions([row.id for row in rows], targets.labels, values, targets.problem.value, names, columns, facts)


def chance_of(inputs: RunInputs, metrics: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The comparison with the prior, by split, on the validation and test rows that have predictions."""
    chances: dict[str, dict[str, Any]] = {}
    targets, trained_on = inputs.targets, inputs.config.data.train_on is TrainOn.all
    for split in ("test",) if trained_on else ("val", "test"):
        if targets is not None and split in names_in(inputs.run.directory):
            chance = against_prior(load_predictions(inputs.run.directory, split), metrics, targets.scale)
            if chance is not None:
                chances[split] = chance
    return chances


def result_of(inputs: RunInputs, step: int, metrics: Mapping[str, Any]) -> dict[str, Any]:
    """A run's result: its metrics before training and after `step`, and comparisons with chance.

    `metrics` are those of predictions, which have a chance level. Runs on compared answers also have sentences about
    their probabilities (key `words`), and their accuracy compared with that of "the longer answer wins" (`length`).
    """
    config, run = inputs.config, inputs.run
    before: dict[str, float | None] = {}
    after: dict[str, float | None] = {}
    for record in _metrics(run):
        values = {key: value for key, value in record.items() if key.startswith(("val/", "test/"))}
        before |= values if record["step"] == 0 else {}
        after |= values if record["step"] == step or "test/loss_nats" in values else {}
    notes, length = [], {}
    if config.task.feedback is not None and config.data.train_on is not TrainOn.all:
        moved = movement(before, after)
        notes += [moved] if moved else []
        path = run.row_losses_file("val", step)
        if config.task.feedback is Feedback.pairs and path.is_file():
            table = read_table(path)
            ahead, longer = (np.asarray(table[name], dtype=np.float64) for name in ("ahead", "longer"))
            length = against_length(ahead, longer)
            notes += [length_sentence(length)] if length else []
    comparisons = {"words": notes, "length": length, "chance": chance_of(inputs, metrics)}
    return {"before": before, "after": after, **{name: value for name, value in comparisons.items() if value}}


def validated_at(run: Run, step: int) -> dict[str, float] | None:
    """Metrics of the validation at `step`; None if there was none."""
    for record in _metrics(run):
        if record["step"] == step and "val/loss_nats" in record:
            return {key: value for key, value in record.items() if key.startswith("val/")}
    return None


def _metrics(run: Run) -> list[dict[str, Any]]:
    path = run.metrics_file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
