"""The last decoder layer only where somebody reads it: at the labels, which short answers have at the ends of rows.

What a layer makes at a place depends on that place's own state, and through attention on keys and values of the
places before. The last layer's are needed everywhere; its queries, its output product and its feed-forward network,
nine tenths of its work, only where the head will look. The numbers are the same. Of a model of 4 layers that saves a
fifth of all work, of one of 32 about 3%, and the memory of what is not computed.

Two hooks on the last layer do it, so that no family needs code of its own. The first runs the layer until it asks for
attention, takes the keys and values it has made by then, and hands the layer the rows' ends alone; attention, asked
again, looks from these at the keys and values of the whole rows. The second puts the ends back to their places, with
zeros between them, since what follows may count on the shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import tree_map

from llmft.model.families import base_of, layers_of

if TYPE_CHECKING:
    from llmft.model.flat import Blocks

MOST_OF_ROWS = 0.75
"""Share of the tokens in the rows' ends above which too little is left out to begin a layer twice."""


@dataclass
class Calls:
    """How often the last layer was used, and how often it asked for attention."""

    layer: int = 0
    attention: int = 0


@dataclass(frozen=True)
class Tail:
    """The ends of rows that stand behind each other in a flat sequence.

    Attributes:
        lengths: (rows,) tokens of each row's end.
        index: (outputs,) where each of these tokens stands in the flat sequence.
        places: (outputs,) where it stands in its own row.
        seqlens: (rows + 1,) int32 cumulative lengths for variable-length attention.
        longest: at least the longest end.
        calls: where it is counted what is asked for; None for nowhere.
    """

    lengths: tuple[int, ...]
    index: torch.Tensor
    places: torch.Tensor
    seqlens: torch.Tensor | None = None
    longest: int = 0
    calls: Calls | None = None

    def pick(self, values: torch.Tensor, dim: int = 1) -> torch.Tensor:
        """The ends' part of the values of a flat sequence."""
        return values.index_select(dim, self.index)

    def block(
        self, query: torch.Tensor, first: int, rows: int, width: int, window: int | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """For rows `first` to `first + rows`: their queries, (rows, heads, most, head_dim).

        `query` is (1, heads, outputs, head_dim). Beside them (rows, 1, most, width) which keys each sees, and which of
        the queries are real, row by row; None where all are: a shorter end is filled up with its last token.
        """
        lengths = self.lengths[first : first + rows]
        start, most, total = sum(self.lengths[:first]), max(lengths), sum(lengths)
        own, places = query[0, :, start : start + total], self.places[start : start + total]
        real = None
        if total < rows * most:
            steps = torch.arange(most)
            ends = torch.tensor(lengths)[:, None]
            filled = (steps.minimum(ends - 1) + (ends.cumsum(0) - ends)).flatten().to(query.device)
            real = (steps < ends).flatten().nonzero()[:, 0].to(query.device)
            own, places = own.index_select(1, filled), places[filled]
        distance = places.view(rows, 1, most, 1) - torch.arange(width, device=query.device)
        seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
        return own.unflatten(1, (rows, most)).transpose(0, 1), seen, real


@dataclass(frozen=True)
class Last:
    """What the last layer's attention is told in place of `blocks`.

    Attributes:
        known: keys and values of the whole rows, (1, heads, tokens, head_dim); None asks attention for them.
        tokens: of the whole rows.
    """

    blocks: Blocks
    tail: Tail
    known: tuple[torch.Tensor, torch.Tensor] | None = None
    tokens: int = 0


class Asked(Exception):  # no error: the way out of a layer
    """Raised by attention that was asked for its keys and values."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor) -> None:
        super().__init__()
        self.known = key, value


def ends_of_rows(
    lengths: Sequence[int], firsts: Sequence[int], starts: Sequence[int], device: torch.device
) -> Tail | None:
    """The rows' ends from the places `firsts` on; None where they are nearly all of the rows.

    `starts` is where each row begins in the flat sequence.
    """
    tails = tuple(length - first for length, first in zip(lengths, firsts, strict=True))
    if sum(tails) > MOST_OF_ROWS * sum(lengths):
        return None
    places = torch.cat([torch.arange(first, length) for first, length in zip(firsts, lengths, strict=True)])
    index = places + torch.tensor(list(starts)).repeat_interleave(torch.tensor(tails))
    return Tail(tails, index.to(device), places.to(device))


def last_layer(model: Any) -> Any | None:
    """The decoder layer whose output only norm and head read; None where it cannot be told."""
    layers = layers_of(model)
    config = base_of(model).config.get_text_config()
    # More or fewer: layers of several towers, or layers used more than once.
    return layers[-1] if layers and len(layers) == getattr(config, "num_hidden_layers", None) else None


def shorten(model: Any) -> None:
    """Lets the last layer compute what `Blocks.tail` asks for, where the model has such a layer."""
    layer = last_layer(model)
    if layer is not None and not is_short(layer):
        base_of(model)._llmft_ends = (
            layer.register_forward_pre_hook(_before, with_kwargs=True),
            layer.register_forward_hook(_after, with_kwargs=True),
        )


def lengthen(model: Any) -> None:
    """Takes `shorten` back."""
    for handle in base_of(model).__dict__.pop("_llmft_ends", ()):
        handle.remove()


def is_short(layer: Any) -> bool:
    """Whether this layer can compute the ends of rows alone."""
    return _before in layer._forward_pre_hooks.values()


def takes_ends(model: Any) -> bool:
    """Whether `shorten` took effect on the model below any adapter."""
    return "_llmft_ends" in base_of(model).__dict__


def _before(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    blocks = kwargs.get("llmft_blocks")
    if blocks is None or blocks.tail is None:
        return None
    tokens = (args[0] if args else kwargs["hidden_states"]).shape[1]
    try:
        layer.forward(*args, **{**kwargs, "llmft_blocks": Last(blocks, blocks.tail)})
    except Asked as asked:
        known = asked.known
    else:
        return None  # no attention to be asked: the layer is computed whole
    if blocks.tail.calls is not None:
        blocks.tail.calls.layer += 1

    def cut(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if value.ndim == 1:
            return blocks.tail.pick(value, 0) if len(value) == tokens else value
        return blocks.tail.pick(value) if value.shape[:2] == (1, tokens) else value

    args, kwargs = tree_map(cut, (args, kwargs))
    return args, {**kwargs, "llmft_blocks": Last(blocks, blocks.tail, known, tokens)}


def _after(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    last = kwargs.get("llmft_blocks")
    if not isinstance(last, Last):
        return None
    states = output[0] if isinstance(output, tuple) else output
    whole = states.new_zeros(1, last.tokens, states.shape[2]).index_copy(1, last.tail.index, states)
    return (whole, *output[1:]) if isinstance(output, tuple) else whole


def joined(tails: Sequence[Tail], tokens: Sequence[int]) -> Tail:
    """The ends of the rows of several sequences, of `tokens` tokens each, behind each other."""
    offsets = [sum(tokens[:place]) for place in range(len(tokens))]
    seqlens = None
    if all(tail.seqlens is not None for tail in tails):
        seqlens = behind_each_other([tail.seqlens for tail in tails if tail.seqlens is not None])
    return Tail(
        tuple(length for tail in tails for length in tail.lengths),
        torch.cat([tail.index + offset for tail, offset in zip(tails, offsets, strict=True)]),
        torch.cat([tail.places for tail in tails]),
        seqlens,
        max(tail.longest for tail in tails),
    )


def behind_each_other(seqlens: Sequence[torch.Tensor]) -> torch.Tensor:
    """Cumulative lengths of several sequences' rows as those of one."""
    offset, pieces = seqlens[0][-1:] * 0, [seqlens[0][:1]]
    for each in seqlens:
        pieces.append(each[1:] + offset)
        offset = offset + each[-1:]
    return torch.cat(pieces)
