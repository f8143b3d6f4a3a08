"""TRL's DPOTrainer or RewardTrainer with PEFT, on pairs that are tokenised already; no adapter is the reference."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
from common import Gate, gated, load_adapter, peft_model, read_work, set_threads

work = read_work()
import datasets
from transformers import PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

datasets.disable_progress_bars()
set_threads(work)
rewards = work["task"] == "reward"


class Ready(RewardTrainer if rewards else DPOTrainer):  # type: ignore[misc]
    """Takes rows as they are."""

    def _prepare_dataset(self, dataset: Any, *arguments: Any, **named: Any) -> Any:
        return dataset


def judge() -> Any:
    """The base with a score head and the LoRA, as PEFT makes it."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(work["model"], dtype=torch.float32, num_labels=1)
    base.config.pad_token_id = work["pad"]
    lora = peft.LoraConfig(r=work["r"], lora_alpha=work["alpha"], target_modules="all-linear", task_type="SEQ_CLS")
    model = peft.get_peft_model(base, lora)
    load_adapter(model, work)
    return model


InOrder, told = gated(Ready, Gate())
rows = [work["rows"][row] for batch in work["batches"] for row in batch]
if rewards:
    names = {"chosen_ids": [p + a for p, a, _ in rows], "rejected_ids": [p + b for p, _, b in rows]}
    # TRL reads the score at the last token that is not padding, so what pads must not end an answer.
    items = datasets.Dataset.from_dict({**names, "margin": [work["margin"]] * len(rows)})
else:
    columns = zip(("prompt_ids", "chosen_ids", "rejected_ids"), zip(*rows, strict=True), strict=True)
    items = datasets.Dataset.from_dict({name: list(values) for name, values in columns})
tokenizer = PreTrainedTokenizerFast.from_pretrained(work["model"])
tokenizer.padding_side = "right"
tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work["pad"])
shared = {
    "output_dir": tempfile.mkdtemp(),
    "per_device_train_batch_size": work["micro"],
    "gradient_accumulation_steps": len(work["batches"][0]) // work["micro"],
    "max_steps": len(work["batches"]),
    "max_length": 4096,
    "learning_rate": work["rate"],
    "lr_scheduler_type": "constant",
    "max_grad_norm": work["clip"],
    "optim": "adamw_torch",
    "weight_decay": 0.0,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "eval_strategy": "no",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}
settings = (
    RewardConfig(**shared)
    if rewards
    else DPOConfig(**shared, beta=work["beta"], precompute_ref_log_probs=bool(work.get("precompute")))
)
model = judge() if rewards else peft_model(work)
InOrder(model=model, args=settings, train_dataset=items, processing_class=tokenizer, callbacks=[told]).train()
