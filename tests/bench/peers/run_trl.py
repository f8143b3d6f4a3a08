"""TRL's SFTTrainer with PEFT, on rows that are tokenised already."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
from common import Gate, gated, peft_model, read_work, rows_in_order, set_threads, tokenizer_of, trainer_arguments

work = read_work()
import datasets
from trl import SFTConfig, SFTTrainer

datasets.disable_progress_bars()
set_threads(work)
InOrder, callback = gated(SFTTrainer, Gate())
rows = rows_in_order(work)
marks = [[int(label != -100) for label in labels] for _, labels in rows]
settings = trainer_arguments(
    work,
    max_length=4096,
    completion_only_loss=True,
    gradient_checkpointing=False,
    padding_free=bool(work.get("padding_free")),
)
InOrder(
    model=peft_model(work),
    args=SFTConfig(**settings),
    train_dataset=datasets.Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": marks}),
    processing_class=tokenizer_of(work),
    callbacks=[callback],
).train()
