"""TRL's GRPOTrainer or RLOOTrainer with PEFT, on the work's prompts, answers and rewards."""

from __future__ import annotations

import os
import tempfile
from typing import Any

os.environ.setdefault("HF_DATASETS_CACHE", tempfile.mkdtemp())
from common import Gate, gated, peft_model, read_work, set_threads, trainer_arguments

work = read_work()
import datasets
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

datasets.disable_progress_bars()
set_threads(work)
grpo = work["task"] == "grpo"
windows = iter(work["windows"])
answers = len(work["windows"][0])


class GivenAnswers(GRPOTrainer if grpo else RLOOTrainer):  # type: ignore[misc]
    """Takes each window's answers from the work instead of generating them."""

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        self.window = next(windows)
        return [row["prompt"] for row in self.window], None, {}

    def _generate_single_turn(self, *arguments: Any) -> Any:
        ids = [row["answer"] for row in self.window]
        return (ids, None) if grpo else ids


def rewards(**named: Any) -> list[float]:
    return [row["reward"] for row in trainer.window]


Recorded, callback = gated(GivenAnswers, Gate(), in_order=False)
tokenizer = PreTrainedTokenizerFast.from_pretrained(work["model"])
tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work["pad"])
more: dict[str, Any] = {"use_bias_correction_kl": False, "loss_type": "dapo"} if grpo else {}
settings = trainer_arguments(
    work,
    **more,
    beta=work["beta"],
    num_iterations=work["updates"],
    num_generations=work["group"],
    temperature=work["temperature"],
    max_completion_length=work["most"],
    per_device_train_batch_size=answers,
    max_steps=len(work["windows"]) * work["updates"],
    gradient_checkpointing=False,
)
rows = datasets.Dataset.from_dict({"prompt": ["x"] * answers})
trainer = Recorded(
    model=peft_model(work),
    args=(GRPOConfig if grpo else RLOOConfig)(**settings),
    train_dataset=rows,
    processing_class=tokenizer,
    reward_funcs=rewards,
    callbacks=[callback],
)
trainer.train()
