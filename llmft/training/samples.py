"""Chooses the held-out rows that a validation generates for, and how it does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from llmft.config.instantiate import reads_text
from llmft.config.sections import TrainConfig
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import Example
from llmft.model.generate import decoder, generate
from llmft.training.tokenized_data import TokenizedData


@dataclass
class GenerationSample:
    """A held-out row to generate for: its prompt, and `texts` (where, prompt, reference) for people."""

    prompt_ids: list[int]
    texts: dict[str, str]


@dataclass
class Generation:
    """The samples of a validation and how to generate for them."""

    samples: list[GenerationSample]
    metrics: dict[str, Callable[[Sequence[str], Sequence[str]], float]]
    decode: Callable[[list[int]], str]
    generate: Callable[[Any, Sequence[list[int]]], list[list[int]]]
    """(model, prompts) -> the tokens of their answers."""


def make_generation(
    config: TrainConfig,
    rows: TokenizedData,
    metrics: dict[str, Callable[..., float]],
    split: str,
    judge: Callable[[Sequence[Conversation], Sequence[str]], np.ndarray] | None,
) -> Generation | None:
    """The generation of `split`; None where there is nothing to generate.

    The rows are a random sample by data.split_seed, so that runs of other seeds generate for the same ones. `judge`
    gives the rewards of answers to prompts; their mean is the metric reward.
    """
    examples: Sequence[Example] = rows.splits.get(split, [])
    wanted = min(config.task.generate_rows, len(examples))
    if wanted == 0 or config.task.auto_class != "causal_lm":
        return None
    roles = [message["role"] for message in examples[0].conversation.messages]
    if roles[-1] != "assistant" or "user" not in roles:
        return None
    # In a task that predicts numbers, only the metrics of llmft.metrics.text compare generated text.
    paths = [path for path in config.task.metrics if not config.task.predicts or reads_text(path)]
    named = {path.rpartition(".")[2]: metrics[path.rpartition(".")[2]] for path in paths}
    order = np.random.Generator(np.random.PCG64([config.data.split_seed])).permutation(len(examples))
    chosen = sorted(order[:wanted])
    if judge is not None:
        conversations = [examples[index].conversation for index in chosen]
        named["reward"] = lambda _, answers: float(judge(conversations, answers).mean())
    return Generation(
        [_sample(rows.encoder, examples[index]) for index in chosen],
        named,
        decoder(rows.tokenizer, [*config.prompt.stop, rows.ends.text]),
        partial(
            generate,
            pad_id=rows.tokenizer.pad_token_id,
            ends=rows.ends,
            max_new_tokens=config.task.max_new_tokens,
            batch_size=config.trainer.validation_batch_size,
            context_tokens=rows.context_tokens,
        ),
    )


def _sample(encoder: Encoder, example: Example) -> GenerationSample:
    conversation = example.conversation
    prompt, reference = encoder.render(conversation, generation=True).text, encoder.reference(conversation)
    texts = {"where": example.where, "prompt": prompt, "reference": reference}
    return GenerationSample(encoder.prompt_ids(conversation), texts)
