"""Exact sampling: an answer is a function of its prompt, its temperature and its own seed.

A token is drawn by inverting the cumulative distribution at a random number of this answer and position. Rows that are
computed together have logits that differ in their last bits from those of a single row, so a draw that is too close to
call is repeated from the single row: the batch size changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmft.data.ends import Ends
from llmft.model.families import base_of, selects_positions

DOUBT = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""How much a logit of a row in a batch may differ from that of the single row, by dtype of the computation.

A bound in fp32, where 1e-4 is observed; in 16 bits nearly all differences are below it.
"""


@dataclass(frozen=True)
class Draw:
    """A requested answer: the temperature that divides its logits, 0 for the likeliest token, and its seed."""

    temperature: float
    seed: int


@dataclass
class Sampled:
    """An answer's tokens, with what ends it; `finished`: whether it ended before the length limit."""

    ids: list[int] = field(default_factory=list)
    finished: bool = False


def choose(
    logits: torch.Tensor, temperature: torch.Tensor, numbers: torch.Tensor, doubt: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows,) tokens drawn from softmax(logits / temperature), and whether each would be the same for logits nearby.

    Args:
        logits: (rows, vocabulary).
        temperature: (rows,) float64; 0 takes the highest logit.
        numbers: (rows,) float64 of [0, 1), one for each draw.
        doubt: how far the logits may be off.
    """
    logits = logits.double()
    greedy = temperature <= 0
    top, order = logits.topk(min(2, logits.shape[1]), dim=-1)
    divided = (logits - top[:, :1]) / torch.where(greedy, 1.0, temperature)[:, None]
    cumulative = divided.exp().cumsum(-1)
    total = cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, numbers[:, None] * total, right=True).clamp(max=logits.shape[1] - 1)
    # The share below a token, F, changes by at most F (1 - F) (e^(2 doubt / T) - 1) where every logit does by `doubt`.
    edges = torch.cat([cumulative.gather(1, (tokens - 1).clamp(min=0)) * (tokens > 0), cumulative.gather(1, tokens)], 1)
    shares = edges / total
    slack = (
        shares * (1 - shares) * torch.expm1((2 * doubt / torch.where(greedy, 1.0, temperature)).clamp(max=50))[:, None]
    )
    sure = ((shares - numbers[:, None]).abs() > slack + 1e-12).all(1)
    best_sure = top[:, 0] - top[:, -1] > 2 * doubt if top.shape[1] > 1 else torch.ones_like(greedy)
    return torch.where(greedy, order[:, 0], tokens[:, 0]), torch.where(greedy, best_sure, sure)


@torch.no_grad()
def sample(
    model: Any,
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Sequence[Draw]],
    *,
    pad_id: int,
    ends: Ends,
    max_new_tokens: int,
    batch_size: int = 8,
    context_tokens: int | None = None,
) -> list[list[Sampled]]:
    """For each prompt, an answer per draw; all prompts have the same number of draws.

    A prompt is read once for all its answers; `batch_size` prompts of similar length are computed at once. Answers
    end at the model's last position, `context_tokens`, if it has one.
    """
    order = sorted(range(len(prompts)), key=lambda index: (-len(prompts[index]), index))
    sampled: list[list[Sampled]] = [[] for _ in prompts]
    for start in range(0, len(order), batch_size):
        group = order[start : start + batch_size]
        batch = _Batch(model, [list(prompts[index]) for index in group], [draws[index] for index in group], ends)
        rooms = [max_new_tokens if context_tokens is None else context_tokens - len(prompts[i]) for i in group]
        answers = batch.run(pad_id, [max(0, min(max_new_tokens, room)) for room in rooms])
        answers_per_prompt = len(draws[group[0]])
        for number, index in enumerate(group):
            sampled[index] = answers[number * answers_per_prompt : (number + 1) * answers_per_prompt]
    return sampled


class _Batch:
    """Prompts that are computed at once, with all their answers."""

    def __init__(self, model: Any, prompts: list[list[int]], draws: Sequence[Sequence[Draw]], ends: Ends) -> None:
        self.model, self.prompts, self.ends = model, prompts, ends
        self.answers_per_prompt = len(draws[0])
        self.draws = [draw for draws_of_prompt in draws for draw in draws_of_prompt]
        self.answers = [Sampled() for _ in self.draws]
        self.temperature = torch.tensor([draw.temperature for draw in self.draws], dtype=torch.float64)
        base = base_of(model)
        takes = inspect.signature(base.forward).parameters
        self.takes_positions = "position_ids" in takes
        self.last = {"logits_to_keep": 1} if selects_positions(base.__class__) else {}
        device = base.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype
        self.doubt = DOUBT.get(dtype, DOUBT[torch.bfloat16])

    def run(self, pad_id: int, rooms: list[int]) -> list[Sampled]:
        """Draws until every answer has ended or has its largest number of tokens, `rooms` per prompt."""
        from transformers import DynamicCache

        base = base_of(self.model)
        width, longest = max(map(len, self.prompts)), max(rooms)
        limits = [room for room in rooms for _ in range(self.answers_per_prompt)]
        numbers = np.stack([np.random.Generator(np.random.PCG64(draw.seed)).random(longest) for draw in self.draws])
        ids = torch.tensor([[pad_id] * (width - len(prompt)) + prompt for prompt in self.prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in self.prompts])
        ids, mask = ids.to(base.device), mask.to(base.device)
        alive = [row for row, room in enumerate(limits) if room > 0]
        cache = DynamicCache(config=base.config)
        logits = self._forward(ids, mask, cache).repeat_interleave(self.answers_per_prompt, 0)
        cache.batch_repeat_interleave(self.answers_per_prompt)
        mask = mask.repeat_interleave(self.answers_per_prompt, 0)
        surviving = alive
        for position in range(longest):
            if not alive:
                break
            if len(surviving) < len(mask):  # drop those that have ended
                chosen = torch.tensor(surviving, device=mask.device)
                cache.batch_select_indices(chosen)
                mask = mask[chosen]
                logits = logits[chosen] if position == 0 else logits
            if position > 0:
                tokens = torch.tensor([[self.answers[row].ids[-1]] for row in alive], device=mask.device)
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                logits = self._forward(tokens, mask, cache)
            self._accept(alive, logits, torch.from_numpy(numbers[alive, position]))
            surviving = [n for n, row in enumerate(alive) if not self._ended(row, limits[row])]
            alive = [alive[n] for n in surviving]
        return self.answers

    def _forward(self, ids: torch.Tensor, mask: torch.Tensor, cache: Any) -> torch.Tensor:
        """(rows, vocabulary) logits after the last of `ids`, on the CPU."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        more = {"position_ids": positions} if self.takes_positions else {}
        output = self.model(
            input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **more, **self.last
        )
        return output.logits[:, -1].float().cpu()

    def _accept(self, alive: list[int], logits: torch.Tensor, numbers: torch.Tensor) -> None:
        """Draws the next token of each answer in `alive`, from the single row if the draw is too close to call."""
        temperature = self.temperature[alive]
        tokens, sure = choose(logits, temperature, numbers, self.doubt)
        for n in (~sure).nonzero()[:, 0].tolist():
            full_ids = self.prompts[alive[n] // self.answers_per_prompt] + self.answers[alive[n]].ids
            ids = torch.tensor([full_ids], device=base_of(self.model).device)
            single_row_logits = self.model(input_ids=ids, use_cache=False, **self.last).logits[:, -1].float().cpu()
            tokens[n] = choose(single_row_logits, temperature[n : n + 1], numbers[n : n + 1], 0.0)[0][0]
        for row, token in zip(alive, tokens.tolist(), strict=True):
            self.answers[row].ids.append(token)

    def _ended(self, row: int, limit: int) -> bool:
        answer = self.answers[row]
        answer.finished = self.ends.trained(answer.ids)
        return answer.finished or len(answer.ids) >= limit
