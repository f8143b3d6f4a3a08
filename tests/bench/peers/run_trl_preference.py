"""TRL's DPOTrainer or RewardTrainer with PEFT, on pairs that are tokenised already; without its adapter, the model is
DPO's reference.

TRL's defaults are kept except where they would change the training or slow it down: fp32 without autocast, no
gradient checkpointing (unless the work asks for it), a constant rate, no cut of long rows.
"""

from __future__ import annotations

import os
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
from common import Gate, gated, load_adapter, read_work, set_threads, tokenizer_of, trainer_arguments

work = read_work()
import datasets
import peft
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

datasets.disable_progress_bars()
set_threads(work)
rewards = work["task"] == "reward"
gate = Gate()


class Ready(RewardTrainer if rewards else DPOTrainer):  # type: ignore[misc]
    """Takes rows as they are, and records the time of a reference computed before the first step."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **named: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, *arguments: Any, **named: Any) -> Any:
        began = time.perf_counter()
        dataset = super()._precompute_ref_logps(*arguments, **named)
        gate.reference_s += time.perf_counter() - began
        return dataset


def rows_in_order() -> Any:
    """The rows of all steps, each step's longest first: rows of like length share a micro-batch.

    From the file that the work names, if any, so that several runs share TRL's cached reference.
    """
    path = work.get("dataset")
    if path and Path(path).is_dir():
        return datasets.load_from_disk(path)
    rows = work["rows"]
    batches = [
        sorted(batch, key=lambda row: -len(rows[row][0]) - max(map(len, rows[row][1:]))) for batch in work["batches"]
    ]
    ordered = [rows[row] for batch in batches for row in batch]
    if rewards:
        columns = {"chosen_ids": [p + a for p, a, _ in ordered], "rejected_ids": [p + b for p, _, b in ordered]}
    else:
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        columns = {name: list(values) for name, values in zip(names, zip(*ordered, strict=True), strict=True)}
    dataset = datasets.Dataset.from_dict(columns)
    if not path:
        return dataset
    dataset.save_to_disk(path)
    return datasets.load_from_disk(path)


config, options, model_class = DPOConfig, {"precompute_ref_log_probs": work["precompute"]}, AutoModelForCausalLM
if rewards:
    config, options, model_class = RewardConfig, {}, AutoModelForSequenceClassification
else:
    options["beta"] = work["beta"]
settings = trainer_arguments(work, **options, max_length=None, gradient_checkpointing=work["checkpointing"])
InOrder, callback = gated(Ready, gate, mean=True)
trainer = InOrder(
    model=model_class.from_pretrained(work["model"], dtype=torch.float32, **({"num_labels": 1} if rewards else {})),
    args=config(**settings),
    train_dataset=rows_in_order(),
    # A reward is read at the last token that is not padding, so the padding token must not be the end token.
    processing_class=tokenizer_of(work),
    callbacks=[callback],
    # With peft_config the reference is the base itself and not a copy of the adapter on it.
    peft_config=peft.LoraConfig(
        r=work["r"],
        lora_alpha=work["alpha"],
        target_modules="all-linear",
        task_type="SEQ_CLS" if rewards else "CAUSAL_LM",
    ),
)
load_adapter(trainer.model, work)
trainer.train()
