"""transformers' Trainer with PEFT."""

from __future__ import annotations

from common import Gate, gated, peft_model, read_work, rows_in_order, set_threads, tokenizer_of, trainer_arguments

work = read_work()
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

set_threads(work)
InOrder, callback = gated(Trainer, Gate())
InOrder(
    model=peft_model(work),
    args=TrainingArguments(**trainer_arguments(work, remove_unused_columns=False)),
    train_dataset=[{"input_ids": ids, "labels": labels} for ids, labels in rows_in_order(work)],
    data_collator=DataCollatorForSeq2Seq(tokenizer_of(work), pad_to_multiple_of=1),
    callbacks=[callback],
).train()
