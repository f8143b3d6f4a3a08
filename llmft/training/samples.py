"""Which held-out rows a validation generates for, and how."""

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
from llmft.model.generate import generate
from llmft.training.tokenized_data import TokenizedData


@dataclass
class Sample:
    """A held-out row to generate for: its prompt, and `texts` (where, prompt, reference) for people."""

    prompt_ids: list[int]
    texts: dict[str, str]


@dataclass
class Generation:
    """How validation generates."""

    samples: list[Sample]
    metrics: dict[str, Callable[[Sequence[str], Sequence[str]], float]]
    decode: Callable[[list[int]], str]
    generate: Callable[[Any, Sequence[list[int]]], list[list[int]]]
    """From a model and prompts to the tokens of their answers."""


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
    if wanted == 0 or config.task.auto_class != "causal_lm":
        return None
    roles = [message["role"] for message in examples[0].conversation.messages]
    if roles[-1] != "assistant" or "user" not in roles:
        return None
    # Of a task that predicts numbers, the metrics of llmft.metrics.text alone compare generated text.
    paths = [path for path in config.task.metrics if not config.task.predicts or reads_text(path)]
    named = {path.rpartition(".")[2]: metrics[path.rpartition(".")[2]] for path in paths}
    order = np.random.Generator(np.random.PCG64([config.data.split_seed])).permutation(len(examples))
    chosen = sorted(order[:wanted])
    if judged is not None:
        conversations = [examples[index].conversation for index in chosen]
        named["reward"] = lambda _, answers: float(judged(conversations, answers).mean())
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


def decoder(tokenizer: Any, stop: Sequence[str]) -> Callable[[list[int]], str]:
    """From the tokens of an answer to its text, up to the first of the strings `stop`, of which empty ones are none."""

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((index for index in map(text.find, filter(None, stop)) if index >= 0), default=len(text))]

    return decode


def _sample(encoder: Encoder, example: Example) -> Sample:
    conversation = example.conversation
    prompt, reference = encoder.render(conversation, generation=True).text, encoder.reference(conversation)
    texts = {"where": example.where, "prompt": prompt, "reference": reference}
    return Sample(encoder.prompt_ids(conversation), texts)
