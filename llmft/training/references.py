"""Log-probabilities of the answers under the reference, computed once for all runs that start from the same policy.

The reference is the policy before its first step: the base, to which a new LoRA adds exactly nothing, or the adapter
that the run starts from. Rows are computed in groups that do not depend on the micro-batch, and stored in
`output_dir/references` under a key of all that the numbers depend on. A run keeps a copy, so that a resumed run has the
same numbers to the bit on any machine.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from rich.markup import escape

from llmft.config.convert import canonical, digest_of, key_fields, to_plain
from llmft.config.model import ModelInit
from llmft.config.sections import TrainConfig
from llmft.config.task import Reference
from llmft.core.console import Screen
from llmft.core.files import staged_file
from llmft.data.batch import Limit, collate
from llmft.data.examples import Examples
from llmft.model.device import TORCH_DTYPES, mixed_precision
from llmft.model.families import evaluating
from llmft.runs.key import adapter_digest
from llmft.runs.predictions import read_table
from llmft.training.objectives.answers import answer_log_probs
from llmft.training.prepare import RunInputs
from llmft.training.readiness import Readiness

VERSION = 1
GROUP = Limit(tokens=2048)
"""Limit of a batch, here and in validations of a policy, so that both agree to the bit before the first step."""


def make_references(inputs: RunInputs, ready: Readiness, model: Any, screen: Screen | None) -> dict[str, torch.Tensor]:
    """By split (rows, answers) float64 log-probabilities of the untrained `model`; {} without a reference.

    The main process prints their source and writes the run's copy; in the others `screen` is None.
    """
    config, rows = inputs.config, ready.rows
    if config.task.reference is Reference.none:
        return {}
    device = ready.device
    kind = [str(TORCH_DTYPES[ready.precision]), str(device)]
    key = reference_key(config, inputs.located.fingerprint, rows.splits, kind)

    def compute() -> dict[str, torch.Tensor]:
        # The base is the adapted model without its adapter.
        adapter_off = model.disable_adapter() if config.lora.enabled and _is_base(config) else contextlib.nullcontext()
        with adapter_off, mixed_precision(device, ready.precision):
            return compute_references(model, rows.splits, rows.tokenizer.pad_token_id, device)

    run_file = inputs.run.reference_file
    shared_file = Path(config.output_dir) / "references" / f"{key}.parquet"
    references, source = references_of(shared_file, run_file, key, rows.splits, compute)
    if screen is not None:
        if source != "run":
            _write(run_file, key, references)
        origins = {
            "new": f"computed once, kept in {shared_file}",
            "shared": f"from {shared_file}",
            "run": "as this run began",
        }
        screen.print(f"[bold]reference[/bold]  {escape(f'{describe_reference(config)} ({origins[source]})')}")
    return references


def reference_key(
    config: TrainConfig, model_fingerprint: str, splits: Mapping[str, Examples], kind: Sequence[str]
) -> str:
    """A hash, equal for runs whose reference gives the same numbers, whatever their rate, rank, seed, beta or loss.

    `kind` is the dtype and the device of the computation.
    """
    model = config.model
    digest = hashlib.sha256()
    for split, examples in sorted(splits.items()):
        digest.update(canonical([split, len(examples)]).encode())
        for part in (examples.ids, examples.labelled, examples.starts):
            digest.update(np.ascontiguousarray(part).tobytes())
    adapter: list[Any] = []
    if not _is_base(config):
        digests = [adapter_digest(config.lora.adapter)] if config.lora.adapter is not None else [config.seed]
        adapter = [*digests, key_fields(replace(config.lora, adapter=None))]
    parts = [
        VERSION,
        model_fingerprint,
        to_plain([model.init, model.architecture, model.config, model.overrides, model.load_overrides, model.kernels]),
        key_fields(config.quantization),
        adapter,
        [config.seed] if model.init is ModelInit.random else [],
        kind,
        digest.hexdigest(),
    ]
    return digest_of(parts)[:20]


def _is_base(config: TrainConfig) -> bool:
    """Whether the reference is the base without any adapter; not with DoRA, whose new adapter rounds differently."""
    if config.task.reference is Reference.base:
        return True
    return config.lora.adapter is None and not (config.lora.enabled and config.lora.dora)


def describe_reference(config: TrainConfig) -> str:
    """A run's reference in words."""
    if config.task.reference is Reference.none:
        return "none"
    if config.lora.adapter is not None and not _is_base(config):
        return f"the adapter it starts from, {config.lora.adapter}"
    return "the base, without any adapter" if config.lora.enabled else "the model before its first step"


def references_of(
    shared_file: Path,
    run_file: Path,
    key: str,
    splits: Mapping[str, Examples],
    compute: Callable[[], dict[str, torch.Tensor]],
) -> tuple[dict[str, torch.Tensor], str]:
    """By split (rows, answers) float64 log-probabilities, and where they come from: run, shared or new.

    `shared_file` belongs to all runs with this `key`, `run_file` is one run's copy; either may be missing or damaged.
    Concurrent processes wait for the one that computes.
    """
    if (references := _read(run_file, key, splits)) is not None:
        return references, "run"
    shared_file.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(shared_file.with_suffix(".lock")):
        if (references := _read(shared_file, key, splits)) is not None:
            return references, "shared"
        references = compute()
        _write(shared_file, key, references)
    return references, "new"


def compute_references(
    model: Any, splits: Mapping[str, Examples], pad_id: int, device: torch.device
) -> dict[str, torch.Tensor]:
    """By split (rows, answers) log-probabilities under `model`, without dropout and gradients."""
    references = {}
    with evaluating(model), torch.no_grad():
        for split, examples in splits.items():
            groups = GROUP.groups(examples.lengths.tolist(), range(len(examples)))
            batches = (collate([examples[row] for row in rows], rows, pad_id).to(device) for rows in groups)
            parts = [answer_log_probs(model, batch).cpu() for batch in batches]
            table = torch.zeros(len(examples), max(part.shape[1] for part in parts), dtype=torch.float64)
            for rows, part in zip(groups, parts, strict=True):
                table[rows, : part.shape[1]] = part
            references[split] = table
    return references


def _write(path: Path, key: str, references: Mapping[str, torch.Tensor]) -> None:
    """Writes a parquet table with a row for each answer."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, list[Any]] = {"split": [], "row": [], "answer": [], "log_prob_nats": []}
    for split, table in references.items():
        rows, answers = table.shape
        columns["split"] += [split] * (rows * answers)
        columns["row"] += np.repeat(np.arange(rows), answers).tolist()
        columns["answer"] += list(range(answers)) * rows
        columns["log_prob_nats"] += table.flatten().tolist()
    table = pa.table(columns)
    digest = hashlib.sha256(np.asarray(columns["log_prob_nats"]).tobytes()).hexdigest()
    with staged_file(path) as file:
        pq.write_table(table.replace_schema_metadata({"key": key, "sha256": digest}), file, compression="zstd")


def _read(path: Path, key: str, splits: Mapping[str, Examples]) -> dict[str, torch.Tensor] | None:
    """What `_write` wrote under this key. None if missing, damaged, or for other rows."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        return None
    try:
        metadata = pq.read_schema(path).metadata or {}
        columns = {name: np.asarray(values) for name, values in read_table(path).items()}
        digest = hashlib.sha256(np.asarray(columns["log_prob_nats"], np.float64).tobytes()).hexdigest()
        if metadata.get(b"key") != key.encode() or metadata.get(b"sha256") != digest.encode():
            return None
        references = {}
        for split, examples in splits.items():
            values = columns["log_prob_nats"][columns["split"] == split]
            references[split] = torch.from_numpy(values.reshape(len(examples), -1).copy())
        return references
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return None
