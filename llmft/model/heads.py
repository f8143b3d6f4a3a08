"""The linear head: new weights on a model's last hidden state, in full precision whatever the base computes in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from llmft.data.batch import MicroBatch, send
from llmft.model.families import base_of
from llmft.model.kernels.packing import PackedBatch, pack, pack_answers, uses_packing
from llmft.model.sharding import is_sharded

NAMES = ("score", "classifier", "classification_head", "pooler")
"""What transformers calls the parts of heads: `score` in decoders, `classifier` in encoders, with a `pooler`."""
CHUNK_POSITIONS = 512
"""Positions whose logits are computed at a time."""
CHUNK_BYTES = 16 * 2**20
"""Bytes of fp32 logits at a time on a CPU, where glibc requests tensors of 32 MiB and more from the kernel each time,
page by page, and a few of them are alive at once.

Measured with 300 labels a row (2 cores, glibc 2.36): steps take 0.75 of the time with a vocabulary of 32k, 0.8 with one
of 128k, and 150 to 300 MiB less.
"""
LEAST_POSITIONS = 64
"""With fewer, reading the head's weights takes longer than multiplying by them."""
INITIAL_STD = 0.02
"""Standard deviation of new weights: `initializer_range` of nearly all models."""


class FullPrecisionLinear(torch.nn.Linear):
    """A linear layer that computes in fp32 under autocast too; its weights' names are those of any linear layer."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """(…, in) to (…, out), in fp32."""
        with torch.autocast(states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(states.float(), self.weight.float(), bias)


class ScoreHead(torch.nn.Module):
    """A head on the hidden states of a model with another head; computes what transformers' own would.

    Args:
        body: the model below its head, which stays where it is.
        state: the head's weights.
    """

    def __init__(self, body: Any, state: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.config, self.device, self.dtype = body.config, body.device, body.dtype
        self._body = [body]
        outputs, width = state["weight"].shape
        with torch.device("meta"):  # draws no random numbers
            self.score = FullPrecisionLinear(width, outputs, bias="bias" in state)
        self.score.load_state_dict(dict(state), assign=True)
        self.score.to(body.device).requires_grad_(False)

    def forward(self, **arguments: Any) -> Any:
        """An output whose `logits` are the scores at the last position of each row."""
        states = self._body[0](**arguments).last_hidden_state
        return SimpleNamespace(logits=self.score(states)[:, -1])


def positions_at_a_time(vocabulary: int, device_type: str) -> int:
    if device_type != "cpu" or vocabulary == 0:
        return CHUNK_POSITIONS
    return max(LEAST_POSITIONS, min(CHUNK_POSITIONS, CHUNK_BYTES // (4 * vocabulary)))


def head_names(base: torch.nn.Module) -> list[str]:
    """The parts of the head that `base` has, of `NAMES`."""
    return [name for name in NAMES if isinstance(getattr(base, name, None), torch.nn.Module)]


def renew_head(base: Any, seed: int | None) -> None:
    """Puts a fresh head in full precision on `base`; its weights come from `seed` alone (None: they stay).

    So a base that is kept between two runs passes nothing of the first one's head to the second.
    """
    generator = torch.Generator().manual_seed(seed or 0)
    for name in head_names(base):
        part = getattr(base, name)
        # PEFT leaves its wrapper's copy on the base; the parts are looked up again each time.
        layers = [(inner, layer) for inner, layer in part.named_modules() if isinstance(layer, torch.nn.Linear)]
        for inner, layer in layers:
            fresh = FullPrecisionLinear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            if seed is None:
                fresh.load_state_dict(layer.state_dict())
            else:
                with torch.no_grad():
                    fresh.weight.normal_(0.0, INITIAL_STD, generator=generator)
                    if fresh.bias is not None:
                        fresh.bias.zero_()
            base.set_submodule(f"{name}.{inner}".removesuffix("."), fresh.requires_grad_(False).to(base.device))


def linear_scores(model: Any, batch: MicroBatch) -> torch.Tensor:
    """(rows, classes) scores of a model with a head.

    A decoder's are those at the last real token of each row, by the attention mask. transformers takes the last token
    that is not the padding token instead, and so the one before if rows end in an end token that is also used for
    padding. An encoder's head reads its own pooled state.
    """
    base = base_of(model)
    head = getattr(base, "score", None)
    if head is None:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    if uses_packing(base) and not is_sharded(head):
        return _packed_scores(model, head, pack(base, batch.input_ids, batch.lengths))
    last = batch.attention_mask.sum(dim=1) - 1

    def everywhere(module: torch.nn.Module, inputs: Any, scores: torch.Tensor) -> torch.Tensor:
        """The last real token's scores at all positions, so that any position transformers takes is the right one.

        A hook inside an ordinary forward, since DDP and FSDP wrap a model's own forward and output.
        """
        return scores[torch.arange(len(scores), device=scores.device), last][:, None].expand_as(scores)

    # Decoders keep keys and values for a next token that never comes.
    cache = {"use_cache": False} if hasattr(base.config, "use_cache") else {}
    handle = head.register_forward_hook(everywhere)
    try:
        return model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **cache).logits
    finally:
        handle.remove()


def answer_scores(model: Any, batch: MicroBatch) -> torch.Tensor:
    """(rows, answers) fp32 scores of a model with a head of one, at each answer's last token; 0 for missing answers.

    Prompts are read once where the family takes packed rows, else before each of their answers.
    """
    answers, base = batch.answers, base_of(model)
    assert answers is not None
    head = getattr(base, "score", None)
    if head is not None and uses_packing(base) and not is_sharded(head):
        packed, _ = pack_answers(base, batch.input_ids, answers.lengths)
        flat = _packed_scores(model, head, packed)
    else:
        rows, _ = row_per_answer(batch.input_ids, answers.lengths)
        row_lengths = [prompt + answer for prompt, *in_answers in answers.lengths for answer in in_answers]
        (lengths,) = send([np.array(row_lengths)], rows.device)
        mask = (torch.arange(rows.shape[1], device=rows.device) < lengths[:, None]).long()
        flat = linear_scores(model, replace(batch, input_ids=rows, attention_mask=mask))
    filled = [
        row * answers.max_answers + n for row, tokens in enumerate(answers.lengths) for n in range(len(tokens) - 1)
    ]
    (positions,) = send([np.array(filled)], flat.device)
    scores = flat.new_zeros(len(answers.lengths) * answers.max_answers).index_copy(0, positions, flat.flatten())
    return scores.view(-1, answers.max_answers).float()


def after_one_prompt(
    model: Any, input_ids: torch.Tensor, lengths: Sequence[Sequence[int]]
) -> tuple[dict[str, Any], list[tuple[int, int]]]:
    """Arguments of a forward over prompts with several answers each, and each answer's span as `row_per_answer` has it.

    Prompts are read once where the model family supports packed rows, else again for each answer.
    """
    base = base_of(model)
    if uses_packing(base):
        packed, spans = pack_answers(base, input_ids, lengths)
        return packed.arguments, spans
    rows, spans = row_per_answer(input_ids, lengths)
    return {"input_ids": rows, "use_cache": False}, spans


def row_per_answer(
    input_ids: torch.Tensor, lengths: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, list[tuple[int, int]]]:
    """Padded rows of a prompt and one of its answers each, and (end of the prompt, start of the answer) of each.

    The positions are counted over all tokens of all rows. `lengths` as `pack_answers` takes them.
    """
    width = max(prompt + answer for prompt, *in_answers in lengths for answer in in_answers)
    rows: list[torch.Tensor] = []
    spans = []
    for row, (prompt, *in_answers) in zip(input_ids, lengths, strict=True):
        first = prompt
        for answer in in_answers:
            begin = len(rows) * width + prompt
            spans.append((begin - 1, begin))
            rows.append(torch.cat([row[:prompt], row[first : first + answer]]))
            first += answer
    return pad_sequence(rows, batch_first=True), spans


def _packed_scores(model: Any, head: torch.nn.Module, packed: PackedBatch) -> torch.Tensor:
    """(rows, classes) scores at the last token of each packed row or answer, at positions computed here."""
    outputs: list[torch.Tensor] = []
    handle = head.register_forward_hook(lambda module, inputs, scores: outputs.append(scores[0, packed.last]))
    try:
        model(**packed.arguments)
    finally:
        handle.remove()
    return outputs[0]
