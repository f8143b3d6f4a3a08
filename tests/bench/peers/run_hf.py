"""transformers' Trainer with PEFT."""

from __future__ import annotations

import tempfile
from typing import Any

from common import Gate, peft_model, read_work, set_threads

work = read_work()
import torch
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

set_threads(work)
gate = Gate()
seen: list[torch.Tensor] = []


class Told(TrainerCallback):
    """Takes a step when the gate opens."""

    def on_step_begin(self, *arguments: Any, **named: Any) -> None:
        gate.begin()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        gate.end(float(sum(seen)))
        seen.clear()


class InOrder(Trainer):
    """Takes the rows as they come, and tells each micro-batch's share of the loss."""

    def _get_train_sampler(self, *arguments: Any, **named: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def compute_loss(self, *arguments: Any, **named: Any) -> Any:
        found = super().compute_loss(*arguments, **named)
        seen.append((found[0] if isinstance(found, tuple) else found).detach())
        return found


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
    callbacks=[Told()],
).train()
