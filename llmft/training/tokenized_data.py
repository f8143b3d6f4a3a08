"""Tokenises the prepared conversations and counts their steps, before weights load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from llmft.config.convert import canonical, to_plain
from llmft.config.data import PromptConfig
from llmft.core.errors import ConfigError
from llmft.data.batch import steps_per_epoch
from llmft.data.encode import Encoder
from llmft.data.ends import Ends
from llmft.data.examples import Examples
from llmft.data.messages import message_text
from llmft.data.prompt import PromptFormat, prompt_format
from llmft.data.targets import Targets
from llmft.model.families import positions
from llmft.model.load import model_config
from llmft.model.quantization import effective_quantization
from llmft.model.tokenizer import load_tokenizer, train_tokenizer
from llmft.training.prepare import RunInputs, check_rejected


@dataclass
class TokenizedData:
    """Tokenised splits, their tokenizer and prompt format, and the number of steps."""

    tokenizer: Any
    prompt: PromptFormat
    encoder: Encoder
    splits: dict[str, Examples]
    total_steps: int
    validate_every: int
    context_tokens: int | None
    learned_positions: bool

    @property
    def ends(self) -> Ends:
        """What ends an answer."""
        return self.encoder.ends


def with_options(prompt: PromptConfig, targets: Targets | None) -> PromptConfig:
    """`prompt` with {options} in its instruction replaced by the classes, one per line, such as "A: first class"."""
    if not prompt.instruction or "{options}" not in prompt.instruction:
        return prompt
    if targets is None:
        raise ConfigError("prompt.instruction: {options} are a task's classes, and this task has none.")
    words = targets.words or targets.labels
    listed = [label if word == label else f"{word}: {label}" for word, label in zip(words, targets.labels, strict=True)]
    return replace(prompt, instruction=prompt.instruction.replace("{options}", "\n".join(listed)))


def read_rows(inputs: RunInputs, warn: Callable[[str], None]) -> TokenizedData:
    """Loads (or trains) the tokenizer and encodes every split.

    Raises ConfigError for a tokenizer or prompt format that cannot be used, DataError for rows that cannot.
    """
    config, conversations = inputs.config, inputs.conversations
    architecture = model_config(config.model, inputs.located)
    effective_quantization(config.quantization, architecture, f"model={config.model.label}")
    if config.model.train_tokenizer_vocab is not None:
        texts = [message_text(message) for c in conversations["train"] for message in c.messages]
        texts += config.model.train_tokenizer_extra
        tokenizer = train_tokenizer(texts, config.model.train_tokenizer_vocab, config.data.max_tokens)
    else:
        tokenizer = load_tokenizer(config.model, inputs.located)
    prompt = prompt_format(with_options(config.prompt, inputs.targets), tokenizer)
    # All that the text of a row depends on, except the configuration of data and prompt.
    targets = to_plain(replace(inputs.targets, prior=[])) if inputs.targets is not None else None
    kind = to_plain(config.task.feedback or config.task.head)
    fingerprint = canonical([inputs.data_fingerprint, targets, kind])
    encoder = Encoder(tokenizer, prompt, config.data, fingerprint, warn)
    splits = {split: encoder.encode(split, rows, inputs.problems) for split, rows in conversations.items() if rows}
    check_rejected(inputs.problems, sum(map(len, conversations.values())), config)
    per_epoch, every = steps_per_epoch(len(splits["train"]), config.trainer.batch_size), config.trainer.validate_every
    total = config.trainer.max_steps or max(1, round(config.trainer.epochs * per_epoch))
    every = max(1, round(every * total if every < 1 else every))
    return TokenizedData(tokenizer, prompt, encoder, splits, total, every, *positions(architecture))
