"""Compares the answers of a run and its exported model on a few validation rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmft.config.model import QuantizationFormat
from llmft.core.errors import ConfigError, DataError
from llmft.data.batch import collate
from llmft.data.columns import Conversation
from llmft.data.examples import IGNORE, Example
from llmft.data.readers import BadRows
from llmft.evaluation.predictor import Predictor
from llmft.model.generate import generate
from llmft.model.heads import linear_scores
from llmft.training.prepare import prepare

ROWS = 8
POSITIONS = 64
"""Positions compared per row, the last ones: each takes a megabyte for a vocabulary of 256,000."""
NEW_TOKENS = 64
BOUNDS = {torch.float32: 1e-5, torch.float16: 1e-4, torch.bfloat16: 3e-3}
"""Bounds on the KL divergence in nats per token, by stored dtype.

Measured on trained 4-bit runs computed in fp32: 5e-7 stored in fp16, 3e-5 in bf16; 1.4e-2 and more for merges that
requantise or take the original base.
"""
ROUNDED = 1e-2
"""The bound if one of the two computes in 16 bits or with 8-bit activations, whose rounding alone costs 2e-3."""
LEAST_ARGMAX = 0.95
QUESTIONS = ("Why is the sky blue?", "Write a short poem about rain.", "What is 17 + 25?", "Name three colours.")
"""Asked if the training rows no longer exist."""


@dataclass
class Questions:
    """The inputs for both a run and its exported model.

    Attributes:
        rows: token ids, labels mark the compared positions. prompts: token ids to be continued.
    """

    conversations: list[Conversation]
    rows: list[Example]
    prompts: list[list[int]]
    source: str

    @classmethod
    def of(cls, predictor: Predictor) -> Questions:
        """The first validation rows of the run; fixed questions if its files no longer exist."""
        source, read = "validation rows", True
        try:
            conversations = prepare(predictor.config, open_directory=False).conversations["validation"][:ROWS]
        except (ConfigError, DataError, OSError):
            source, read = "questions, since the training rows no longer exist", False
            conversations = [
                Conversation([{"role": "user", "content": text}], where=f"question {number}", target=0)
                for number, text in enumerate(QUESTIONS, 1)
            ]
        if not predictor.config.task.writes:
            sequences = [list(row.input_ids) for row in predictor.encode(conversations)] if read else []
            sequences = sequences or [predictor.tokenizer(text).input_ids for text in QUESTIONS]
            pairs = zip(sequences, conversations, strict=True)
            return cls(conversations, [Example(ids, [IGNORE] * len(ids), row) for ids, row in pairs], [], source)
        examples = predictor.encoder.encode("proof", conversations, BadRows())
        rows = [examples[index] for index in range(len(examples))]
        spoken = [row for row in conversations if any(turn["role"] == "user" for turn in row.messages)]
        return cls(conversations, rows, [predictor.encoder.prompt_ids(row) for row in spoken], source)


@dataclass
class ModelAnswers:
    """Log-probabilities (positions, vocabulary) or scores (1, classes) of each row, and a text for each prompt."""

    outputs: list[torch.Tensor] = field(default_factory=list)
    texts: list[list[int]] = field(default_factory=list)
    probabilities: list[list[float]] = field(default_factory=list)
    """Log-probabilities of the tokens of `texts`."""
    largest: float = 0.0
    """The largest absolute output of any layer, to check fp16's range."""


@dataclass(frozen=True)
class Proof:
    """The difference between an exported model and its run."""

    kl_nats: float
    argmax: float
    texts_same: int
    texts: int
    positions: int
    largest_difference: float

    def __str__(self) -> str:
        texts = f", {self.texts_same} of {self.texts} greedy texts the same" if self.texts else ""
        return f"KL {self.kl_nats:.1e} nats per token, {self.argmax:.2%} of {self.positions} argmaxes the same{texts}"

    def is_within(self, bound: float) -> bool:
        """Whether the difference is small enough."""
        return self.kl_nats <= bound and self.argmax >= LEAST_ARGMAX


def answers_of_run(predictor: Predictor, questions: Questions) -> ModelAnswers:
    """The run's answers, computed as in its validation."""
    model, answers = predictor.model, ModelAnswers()
    with torch.no_grad(), predictor.autocast(), _largest_output(model, answers):
        for row in questions.rows:
            if str(predictor.config.task.auto_class) == "sequence_classification":
                batch = collate([row], [0], predictor.tokenizer.pad_token_id).to(predictor.device)
                answers.outputs.append(linear_scores(model, batch).float().cpu())
            else:
                answers.outputs.append(_log_probabilities(model, row))
        answers.texts = _texts(model, predictor, questions)
        for prompt, text in zip(questions.prompts, answers.texts, strict=True):
            sequence = Example([*prompt, *text], [*[IGNORE] * len(prompt), *text], questions.conversations[0])
            log_probabilities = _log_probabilities(model, sequence) if text else torch.zeros(0, 1)
            answers.probabilities.append(
                [float(log_probabilities[position, token]) for position, token in enumerate(text)]
            )
    return answers


def answers_of_plain(model: Any, predictor: Predictor, questions: Questions) -> ModelAnswers:
    """The answers of an exported model in plain transformers."""
    answers = ModelAnswers()
    with torch.no_grad():
        for row in questions.rows:
            if str(predictor.config.task.auto_class) == "sequence_classification":
                ids = torch.tensor([list(row.input_ids)], device=model.device)
                answers.outputs.append(model(input_ids=ids).logits.float().cpu())
            else:
                answers.outputs.append(_log_probabilities(model, row))
        answers.texts = _texts(model, predictor, questions)
    return answers


def _log_probabilities(model: Any, row: Example) -> torch.Tensor:
    ids = torch.tensor([list(row.input_ids)], device=model.device)
    labels = torch.tensor(list(row.labels))[1:]
    positions = (
        torch.nonzero(labels != IGNORE).flatten() if bool((labels != IGNORE).any()) else torch.arange(len(labels))
    )
    logits = model(input_ids=ids).logits[0, positions[-POSITIONS:].to(model.device)]
    return logits.float().log_softmax(-1).cpu()


def _texts(model: Any, predictor: Predictor, questions: Questions) -> list[list[int]]:
    """Greedy continuations, one prompt at a time to avoid effects of padding."""
    return generate(
        model,
        questions.prompts,
        pad_id=predictor.tokenizer.pad_token_id,
        ends=predictor.encoder.ends,
        max_new_tokens=min(NEW_TOKENS, predictor.config.task.max_new_tokens),
        batch_size=1,
        context_tokens=predictor.context_tokens,
    )


@contextmanager
def _largest_output(model: Any, answers: ModelAnswers) -> Iterator[None]:
    """Records the largest absolute output of any layer in `answers.largest`."""

    def look(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor) and output.is_floating_point() and output.numel():
            answers.largest = max(answers.largest, float(output.abs().max()))

    handles = [m.register_forward_hook(look) for m in model.modules() if isinstance(m, torch.nn.Module)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(run: ModelAnswers, other: ModelAnswers) -> Proof:
    """The difference of `other` from `run`."""
    outputs, other_outputs = torch.cat(run.outputs), torch.cat(other.outputs)
    difference = float((outputs - other_outputs).abs().max())
    p, q = outputs.double().log_softmax(-1), other_outputs.double().log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    if p.shape[1] == 1:  # regression: not a distribution
        kl = difference**2
    return Proof(
        kl_nats=max(0.0, kl),
        argmax=float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        texts_same=sum(a == b for a, b in zip(run.texts, other.texts, strict=True)),
        texts=len(run.texts),
        positions=len(p),
        largest_difference=difference,
    )


def bound_of(stored: torch.dtype, computed: torch.dtype, quantization: QuantizationFormat) -> float:
    """The largest KL divergence that rounding alone can cause."""
    rounds = computed is not torch.float32 or quantization is QuantizationFormat.int8
    return ROUNDED if rounds else BOUNDS[stored]
