"""LLaMA-Factory's supervised fine-tuning, with its rows taken from the work instead of its data files."""

from __future__ import annotations

import os
import tempfile
from typing import Any

folder = tempfile.mkdtemp()
os.environ.update(DISABLE_VERSION_CHECK="1", HF_DATASETS_CACHE=folder)
from common import Gate, gated, load_adapter, read_work, set_threads

work = read_work()
import datasets
from llamafactory.train.sft import trainer, workflow
from llamafactory.train.tuner import run_exp
from transformers import PreTrainedTokenizerFast

set_threads(work)
LossRecorder, callback = gated(trainer.CustomSeq2SeqTrainer, Gate(), in_order=False)


def rows(*arguments: Any, **named: Any) -> Any:
    order = [work["rows"][row] for batch in work["batches"] for row in batch]
    columns = {"input_ids": [ids for ids, _ in order], "labels": [labels for _, labels in order]}
    columns["attention_mask"] = [[1] * len(ids) for ids, _ in order]
    return {"train_dataset": datasets.Dataset.from_dict(columns)}


def tokenizer(*arguments: Any, **named: Any) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_file=f"{work['model']}/tokenizer.json", eos_token="</s>", bos_token="<s>")
    fast.pad_token_id = work["pad"]
    return {"tokenizer": fast, "processor": None}


load_model = workflow.load_model


def model(*arguments: Any, **named: Any) -> Any:
    loaded = load_model(*arguments, **named)
    load_adapter(loaded, work)
    return loaded


workflow.get_dataset, workflow.load_tokenizer, workflow.load_model = rows, tokenizer, model
workflow.CustomSeq2SeqTrainer = LossRecorder
run_exp(
    {
        "model_name_or_path": work["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_target": "all",
        "lora_rank": work["r"],
        "lora_alpha": work["alpha"],
        "lora_dropout": 0.0,
        "template": "empty",
        "dataset": "rows",
        "output_dir": folder,
        "overwrite_output_dir": True,
        "per_device_train_batch_size": work["micro"],
        "gradient_accumulation_steps": len(work["batches"][0]) // work["micro"],
        "max_steps": len(work["batches"]),
        "learning_rate": work["rate"],
        "lr_scheduler_type": "constant",
        "max_grad_norm": work["clip"],
        "optim": "adamw_torch",
        "weight_decay": 0.0,
        "disable_shuffling": True,
        "disable_gradient_checkpointing": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10_000,
        "disable_tqdm": True,
        "use_cpu": True,
        "remove_unused_columns": False,
    },
    callbacks=[callback],
)
