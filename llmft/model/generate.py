"""Prompts to text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from llmft.data.ends import Ends


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    pad_id: int,
    ends: Ends,
    max_new_tokens: int,
    batch_size: int = 64,
    context_tokens: int | None = None,
) -> list[list[int]]:
    """Greedy continuations of `prompts`, in their order, up to what ends them (see `Ends.cut`).

    A continuation ends at the model's last position, `context_tokens`, if it has one.

    Prompts of similar length are batched and padded on the left, so that each row's next token comes last.
    """
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    results: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        rows = [torch.tensor(prompts[index], dtype=torch.long) for index in group]
        width = len(rows[0])
        room = max_new_tokens if context_tokens is None else min(max_new_tokens, context_tokens - width)
        if room < 1:
            continue
        input_ids = pad_sequence(rows, batch_first=True, padding_value=pad_id, padding_side="left")
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        output = model.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=room,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            eos_token_id=list(ends.ids) or None,
            stopping_criteria=[_Reached(ends, width)] if ends.text else None,
            pad_token_id=pad_id,
            use_cache=True,
        )
        for index, written in zip(group, output[:, width:].tolist(), strict=True):
            results[index] = ends.cut(written)
    return results


def decoder(tokenizer: Any, stop: Sequence[str]) -> Callable[[list[int]], str]:
    """A function from an answer's tokens to its text, up to the first of the strings `stop`; empty ones are ignored."""

    def decode(ids: list[int]) -> str:
        text: str = tokenizer.decode(ids, skip_special_tokens=True)
        return text[: min((index for index in map(text.find, filter(None, stop)) if index >= 0), default=len(text))]

    return decode


@dataclass
class _Reached:
    """Stopping criterion, per row: whether it has written the end marker of several tokens."""

    ends: Ends
    width: int

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        done = [self.ends.reached(row) for row in input_ids[:, self.width :].tolist()]
        return torch.tensor(done, device=input_ids.device)
