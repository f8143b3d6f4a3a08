"""Predictions of a finished run's model, written part by part."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from llmft.config.commands import PredictConfig
from llmft.config.data import NO_LIMIT, Truncation
from llmft.core.console import Screen
from llmft.core.errors import ConfigError, DataError
from llmft.data.batch import Limit, collate
from llmft.data.columns import Conversation
from llmft.data.encode import Encoder
from llmft.data.examples import IGNORE, Example
from llmft.data.hub import Located, locate
from llmft.data.prompt import prompt_format
from llmft.data.readers import BadRows
from llmft.evaluation.jobs import PredictionJob, compute_parts, concatenated
from llmft.model import families
from llmft.model.assemble import Assembled, assemble
from llmft.model.device import mixed_precision, pick_device, pick_precision
from llmft.model.generate import decoder, generate
from llmft.model.load import model_config
from llmft.model.tokenizer import load_tokenizer
from llmft.runs.directory import PeftAdapter
from llmft.training.objectives.language_modeling import LanguageModeling
from llmft.training.scoring import make_objective
from llmft.training.tokenized_data import with_options

BATCHES_PER_PART = 4
"""Batches in a part, the most that a kill loses."""


class Predictor:
    """A run's model and tokenizer. The base stays in memory for the next run with the same base."""

    def __init__(self, job: PredictionJob, options: PredictConfig, loaded: Assembled | None = None) -> None:
        """Loads the run's model, unless it is given as `loaded`."""
        self.job, self.config, self.options = job, job.config, options
        self.device = pick_device(options.accelerator)
        self.precision = pick_precision(self.config.trainer.precision, self.device)
        self.located = locate(self.config.model)
        self._check_base()
        trained = job.run.adapter if self.config.lora.enabled else job.run.model
        is_peft_directory = isinstance(job.run, PeftAdapter)
        has_tokenizer = not is_peft_directory or (trained / "tokenizer_config.json").is_file()
        self.tokenizer = load_tokenizer(self.config.model, Located(trained, "") if has_tokenizer else self.located)
        prompt = prompt_format(with_options(self.config.prompt, job.target_model), self.tokenizer)
        data = self.config.data
        # Every row is predicted: rows that training would drop are cut.
        self.context_tokens, learned = families.positions(model_config(self.config.model, self.located))
        cuts = data.truncation in (Truncation.drop, Truncation.error)
        # Answers are never cut: scored ones may be as long as the model can read.
        most = NO_LIMIT if self.config.task.scores_answers else data.max_tokens
        data = replace(
            data,
            max_tokens=min(most, self.context_tokens or most) if learned else most,
            truncation=Truncation.cut_prompt_left if cuts else data.truncation,
            max_answer_tokens=None,
            min_prompt_tokens=0,
            min_answer_tokens=0,
        )
        self.encoder = Encoder(self.tokenizer, prompt, data)
        self.objective = make_objective(self.config.task, job.target_model, self.encoder, {})
        if not self.config.task.writes and not hasattr(self.objective, "predict"):
            raise ConfigError(f"task.objective={self.config.task.objective} has no method predict(model, batch).")
        self.assembled = loaded or assemble(
            self.config,
            self.located,
            device=self.device,
            precision=self.precision,
            num_labels=len(job.labels),
            vocabulary=len(self.tokenizer),
            pad_id=self.tokenizer.pad_token_id,
            threads=options.threads,
            weights_directory=trained,
            is_peft_directory=is_peft_directory,
        )
        self.model = self.assembled.model

    def _check_base(self) -> None:
        record = self.job.run.recorded("model", "fingerprint")
        if self.config.lora.enabled and record != self.located.fingerprint:
            raise ConfigError(
                f"{self.job.run.directory}: the base model found for model={self.config.model.label} is not the one "
                "that this run was trained on."
            )

    def close(self) -> None:
        """Removes the adapter from the base."""
        if self.model is not None:
            self.assembled.release()
        self.model = None

    def encode(self, conversations: Sequence[Conversation]) -> list[Example]:
        """Every row as an example, cut where it is too long; for generation only its prompt."""
        if self.config.task.writes:
            prompts = [self.encoder.prompt_ids(row) for row in conversations]
            return [Example(ids, [IGNORE] * len(ids), row) for ids, row in zip(prompts, conversations, strict=True)]
        fitting = self.encoder.encode("predict", conversations, BadRows())
        encoded = {int(index): fitting[number] for number, index in enumerate(fitting.rows)}
        for index, row in enumerate(conversations):
            if index not in encoded and row.comparison is not None:
                raise DataError(f"{row.where}: its prompt and answers are longer than this model can read.")
            if index not in encoded:
                ids, marks = self.encoder.truncated(row)
                encoded[index] = Example(ids, np.where(marks != 0, ids, IGNORE).tolist(), row)
        return [encoded[index] for index in range(len(conversations))]

    @torch.no_grad()
    def predict(self, examples: Sequence[Example]) -> dict[str, list[Any]]:
        """Columns for a batch of rows: `values` (a list per row), or `generated`, `logprob` and `tokens`."""
        with self.autocast():
            if self.config.task.writes:
                return self._generate(examples)
            batch = collate(examples, range(len(examples)), self.tokenizer.pad_token_id).to(self.device)
            objective: Any = self.objective
            values = objective.predict(self.model, batch).cpu().tolist()
            if not self.config.task.scores_answers:
                return {"values": values}
            scores = [[score for score in row if not math.isnan(score)] for row in values]
            return {"values": [row[:1] for row in scores], "scores": scores}

    def autocast(self) -> torch.autocast:
        """The autocast of the run's validation precision."""
        return mixed_precision(self.device, self.precision)

    def _generate(self, examples: Sequence[Example]) -> dict[str, list[Any]]:
        """Columns of generated text, its log-probability in nats, and its tokens, both without the end token."""
        outputs = generate(
            self.model,
            [list(example.input_ids) for example in examples],
            pad_id=self.tokenizer.pad_token_id,
            ends=self.encoder.ends,
            max_new_tokens=self.options.max_new_tokens or self.config.task.max_new_tokens,
            batch_size=len(examples),
            context_tokens=self.context_tokens,
        )
        decode = decoder(self.tokenizer, [*self.config.prompt.stop, self.encoder.ends.text])
        return {
            "generated": [decode(output) for output in outputs],
            "logprob": self.logprobs(examples, outputs),
            "tokens": [len(output) for output in outputs],
        }

    @torch.no_grad()
    def logprobs(self, examples: Sequence[Example], outputs: Sequence[list[int]]) -> list[float]:
        """Log-probability in nats of each output's tokens after its example's prompt; 0 for an empty output."""
        logprobs = [0.0] * len(outputs)
        if written := [index for index, output in enumerate(outputs) if output]:
            rows = []
            for index in written:
                prompt, output = list(examples[index].input_ids), outputs[index]
                rows.append(Example([*prompt, *output], [IGNORE] * len(prompt) + output, examples[index].conversation))
            batch = collate(rows, range(len(rows)), self.tokenizer.pad_token_id).to(self.device)
            losses = LanguageModeling().losses(self.model, batch)
            for index, nll in zip(written, losses.nll.double().cpu().tolist(), strict=True):
                logprobs[index] = -nll
        return logprobs


def run_parts(job: PredictionJob, options: PredictConfig, screen: Screen) -> tuple[np.ndarray, dict[str, list[Any]]]:
    """(rows, classes) values and further columns, in the rows' order. Finished parts are not computed again."""
    folder = job.open_parts(f"{options.batch_size} x {BATCHES_PER_PART}")
    predictor = Predictor(job, options)
    try:
        examples = predictor.encode(job.conversations)
        if job.config.task.writes:
            job.references = [
                predictor.encoder.reference(row) if row.messages[-1]["role"] == "assistant" else None
                for row in job.conversations
            ]
        lengths = [len(example.input_ids) for example in examples]
        batches = Limit(rows=options.batch_size).groups(lengths, range(len(examples)))
        parts = [batches[start : start + BATCHES_PER_PART] for start in range(0, len(batches), BATCHES_PER_PART)]

        def compute(part: list[list[int]]) -> dict[str, list[Any]]:
            columns = concatenated([predictor.predict([examples[row] for row in batch]) for batch in part])
            return {"row": [row for batch in part for row in batch], **columns}

        columns = compute_parts(folder, parts, compute, screen)
    finally:
        predictor.close()
    order = np.argsort(columns.pop("row"), kind="stable")
    assert len(order) == len(examples)
    columns = {name: [values[index] for index in order] for name, values in columns.items()}
    return np.asarray(columns.pop("values", [[]] * len(order)), dtype=np.float64), columns
