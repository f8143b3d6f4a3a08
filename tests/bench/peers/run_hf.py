"""transformers' Trainer with PEFT."""

from __future__ import annotations

import tempfile

from common import Gate, gated, peft_model, read_work, set_threads

work = read_work()
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainingArguments

set_threads(work)
InOrder, told = gated(Trainer, Gate())


order = [row for batch in work["batches"] for row in batch]
items = [{"input_ids": work["rows"][row][0], "labels": work["rows"][row][1]} for row in order]
tokenizer = PreTrainedTokenizerFast.from_pretrained(work["model"])
tokenizer.pad_token_id, tokenizer.padding_side = work["pad"], "right"
settings = TrainingArguments(
    output_dir=tempfile.mkdtemp(),
    per_device_train_batch_size=work["micro"],
    gradient_accumulation_steps=len(work["batches"][0]) // work["micro"],
    max_steps=len(work["batches"]),
    learning_rate=work["rate"],
    lr_scheduler_type="constant",
    max_grad_norm=work["clip"],
    optim="adamw_torch",
    weight_decay=0.0,
    use_cpu=True,
    bf16=False,
    report_to=[],
    save_strategy="no",
    logging_strategy="no",
    eval_strategy="no",
    disable_tqdm=True,
    remove_unused_columns=False,
    dataloader_pin_memory=False,
)
InOrder(
    model=peft_model(work),
    args=settings,
    train_dataset=items,
    data_collator=DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=1),
    callbacks=[told],
).train()
