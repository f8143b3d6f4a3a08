"""Opens several runs; those with the same base share it, each with its own adapter, tokenizer and format."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmft.config.commands import PredictConfig
from llmft.config.untrusted import check_adapter
from llmft.core.errors import ConfigError
from llmft.core.imports import quiet_warnings
from llmft.data.columns import Conversation
from llmft.data.messages import Message
from llmft.evaluation.jobs import PredictionJob
from llmft.evaluation.predictor import Predictor
from llmft.model.assemble import base_key
from llmft.model.generate import decoder


@dataclass(eq=False)
class OpenRun:
    """A loaded run.

    Attributes:
        adapter: PEFT's name of its adapter on the shared base; None if all weights were trained.
    """

    name: str
    predictor: Predictor
    adapter: str | None

    def __post_init__(self) -> None:
        ends = self.predictor.encoder.ends
        self.stop = [text for text in [*self.predictor.config.prompt.stop, ends.text] if text]
        self.decode = decoder(self.predictor.tokenizer, [])

    @contextlib.contextmanager
    def active(self) -> Iterator[Any]:
        """The model with this run's adapter, in the precision of `predict`."""
        model = self.predictor.model
        if self.adapter is not None and model.active_adapters != [self.adapter]:
            model.set_adapter(self.adapter, inference_mode=True)
        with self.predictor.autocast():
            yield model

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """The token ids of a conversation up to the next answer, in the run's format.

        Raises ValueError for messages that the format cannot render.
        """
        text = self.predictor.encoder.render(Conversation(list(messages), "messages"), generation=True).text
        return self.tokens(text)

    def tokens(self, text: str) -> list[int]:
        """The token ids of a text that contains its special tokens."""
        return list(self.predictor.tokenizer(text, add_special_tokens=False).input_ids)

    def check_length(self, ids: Sequence[int], max_new_tokens: int | None) -> int:
        """The number of tokens to generate after a prompt, by default task.max_new_tokens of the run.

        Raises ValueError if the prompt is empty, or fills the model's context.
        """
        positions = self.predictor.context_tokens
        wanted = max_new_tokens or self.predictor.config.task.max_new_tokens
        if not ids:
            raise ValueError("the prompt is empty")
        if positions is None:
            return wanted
        if len(ids) >= positions:
            raise ValueError(f"the conversation has {len(ids):,} tokens, and the model {positions:,} positions")
        return min(wanted, positions - len(ids))


def open_runs(jobs: Sequence[PredictionJob], config: Any) -> list[OpenRun]:
    """Loads the runs' models; a common base is loaded once.

    Raises ConfigError for runs that generate no text, or with duplicate names, before weights load.
    """
    directories: dict[str, Path] = {}
    for job in jobs:
        directory = job.run.directory
        if not job.config.task.writes:
            raise ConfigError(f"{directory}: this run gives classes or scores; use llmft.predict.")
        if directory.name in directories:
            other = directories[directory.name]
            raise ConfigError(f"{directory}: another run is called {directory.name} too ({other}).")
        directories[directory.name] = directory
    opened: list[OpenRun] = []
    first_on: dict[tuple[str, str], Predictor] = {}
    for job in jobs:
        options = PredictConfig(
            run=str(job.run.directory), prompts=["-"], accelerator=config.accelerator, threads=config.threads
        )
        base = base_key(job.config, str(job.run.recorded("model", "fingerprint")))
        shared = (str(job.config.task.auto_class), base or str(job.run.directory))  # without a LoRA nothing is shared
        first = first_on.get(shared)
        adapter = "default" if job.config.lora.enabled else None
        with quiet_warnings():
            predictor = Predictor(job, options, first.assembled if first is not None else None)
            if first is not None:
                adapter = f"run{len(opened)}"
                check_adapter(job.run.adapter)
                first.model.load_adapter(job.run.adapter, adapter, torch_device=str(first.device))
        first_on.setdefault(shared, predictor)
        opened.append(OpenRun(job.run.directory.name, predictor, adapter))
    return opened
