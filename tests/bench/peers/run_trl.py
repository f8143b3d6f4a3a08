"""TRL's SFTTrainer with PEFT, on rows that are tokenised already."""

from __future__ import annotations

import os
import tempfile

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
from common import Gate, gated, peft_model, read_work, set_threads

work = read_work()
import datasets
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

datasets.disable_progress_bars()
set_threads(work)
InOrder, told = gated(SFTTrainer, Gate())


order = [row for batch in work["batches"] for row in batch]
rows = [work["rows"][row] for row in order]
marks = [[int(label != -100) for label in labels] for _, labels in rows]
items = datasets.Dataset.from_dict({"input_ids": [ids for ids, _ in rows], "completion_mask": marks})
tokenizer = PreTrainedTokenizerFast.from_pretrained(work["model"])
tokenizer.pad_token_id, tokenizer.padding_side = work["pad"], "right"
settings = SFTConfig(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=work["micro"],
    gradient_accumulation_steps=len(work["batches"][0]) // work["micro"],
    max_steps=len(work["batches"]),
    max_length=4096,
    completion_only_loss=True,
    learning_rate=work["rate"],
    lr_scheduler_type="constant",
    max_grad_norm=work["clip"],
    optim="adamw_torch",
    weight_decay=0.0,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    padding_free=bool(work.get("padding_free")),
    report_to=[],
    save_strategy="no",
    logging_strategy="no",
    eval_strategy="no",
    disable_tqdm=True,
    dataloader_pin_memory=False,
)
InOrder(
    model=peft_model(work), args=settings, train_dataset=items, processing_class=tokenizer, callbacks=[told]
).train()
