"""Which held-out rows a validation generates for, and how."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llmft.config.instantiate import reads_text
from llmft.config.sections import TaskConfig, TrainConfig
from llmft.data.columns import Conversation
from llmft.data.examples import Example
from llmft.training.finetuner import Generation, Sample
from llmft.training.tokenized_data import TokenizedData


def make_generation(
    config: TrainConfig,
    rows: TokenizedData,
    metrics: dict[str, Callable[..., float]],
    split: str,
    judged: Callable[[Sequence[Conversation], Sequence[str]], np.ndarray] | None = None,
) -> Generation | None:
    """The generation of `split`, or None where there is nothing to generate.

    The rows are a sample that depends on data.split_seed, so that runs of other seeds show the same ones. `judged` says
    how good answers to prompts are; their mean is the metric reward.
    """
    examples: Sequence[Example] = rows.splits.get(split, [])
    wanted = min(config.task.generate_rows, len(examples))
    if wanted == 0 or config.task.auto_class != "causal_lm" or not _has_prompt(examples[0].conversation):
        return None
    named = {path.rpartition(".")[2]: metrics[path.rpartition(".")[2]] for path in text_metrics(config.task)}
    order = np.random.Generator(np.random.PCG64([config.data.split_seed])).permutation(len(examples))
    chosen = sorted(order[:wanted])
    if judged is not None:
        conversations = [examples[place].conversation for place in chosen]
        named["reward"] = lambda _, answers: float(judged(conversations, answers).mean())
    return Generation(
        samples=[_sample(rows, examples[place]) for place in chosen],
        metrics=named,
        decode=decoder(rows.tokenizer, [*config.prompt.stop, rows.ends.text]),
        pad_id=rows.tokenizer.pad_token_id,
        ends=rows.ends,
        max_new_tokens=config.task.max_new_tokens,
        batch_size=config.trainer.validation_batch_size,
        context_tokens=rows.context_tokens,
    )


def decoder(tokenizer: Any, stop: Sequence[str]) -> Callable[[list[int]], str]:
    """From the tokens of an answer to its text, up to the first of the strings `stop`, of which empty ones are none."""

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((place for place in map(text.find, filter(None, stop)) if place >= 0), default=len(text))]

    return decode


def text_metrics(task: TaskConfig) -> list[str]:
    """The metrics that compare generated text; of a task that predicts numbers, those of llmft.metrics.text alone."""
    return [path for path in task.metrics if not task.predicts or reads_text(path)]


def _has_prompt(conversation: Conversation) -> bool:
    roles = [message["role"] for message in conversation.messages]
    return roles[-1] == "assistant" and "user" in roles


def _sample(rows: TokenizedData, example: Example) -> Sample:
    conversation = example.conversation
    return Sample(
        prompt_ids=rows.encoder.prompt_ids(conversation),
        prompt=rows.encoder.render(conversation, generation=True).text,
        reference=rows.encoder.reference(conversation),
        where=example.where,
    )
