"""Rows behind each other in one sequence instead of padded side by side: no padding through norms, linears and head.

Attention alone must know where rows end. On CUDA, torch's variable-length kernel takes them as they are. Elsewhere
attention runs block by block: rows of like length, padded to the longest of their block where a block of its own would
cost more than the padding. Either way a row sees what it would see alone; tests hold packed logits against those of
each row by itself.

It is an attention implementation of transformers (`NAME`) that does what "sdpa" does until it is told of blocks. The
mask handed in with blocks is a four-dimensional dummy: transformers passes such a one on as it is. With any mask of two
dimensions, or none and a cache, it would silently let rows see each other.
"""

from __future__ import annotations

import inspect
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch

from llmft.model import pointwise, rotary
from llmft.model.apart import Kept, ask
from llmft.model.families import base_of
from llmft.model.tail import Asked, Last, Tail, ends_of_rows, lengthen, shorten

NAME = "llmft_flat"
BLOCK_COST_TOKENS = 48
"""What one more attention call costs, in tokens of padding: measured on the CPU with hidden sizes of 64 and 256."""
MOST_VARLEN_HEAD_DIM = 256
LENGTH_STEP = 256


@dataclass(frozen=True)
class Blocks:
    """Where rows stand in a flat sequence.

    Attributes:
        shapes: (rows, width) of each block, one behind the other; the shorter rows of a block are padded to its width.
        seqlens: (rows + 1,) int32 cumulative lengths for variable-length attention, where no row is padded at all.
        longest: at least the longest row in tokens; in coarse steps, since a compiled layer knows it as a constant.
        tail: what the last layer computes; None for all.
    """

    shapes: tuple[tuple[int, int], ...]
    seqlens: torch.Tensor | None = None
    longest: int = 0
    tail: Tail | None = None


@dataclass(frozen=True)
class Flat:
    """Rows as one sequence.

    Attributes:
        input_ids, position_ids: (1, tokens).
        index: (tokens,) where each token stands in the padded batch, counted row by row.
        last: (rows,) where each row's last real token stands in the flat sequence.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    index: torch.Tensor
    last: torch.Tensor
    blocks: Blocks

    @property
    def arguments(self) -> dict[str, Any]:
        """What a model's forward takes."""
        dummy = torch.empty(1, 1, 1, 1, device=self.input_ids.device)
        return {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "attention_mask": dummy,
            "use_cache": False,
            "llmft_blocks": self.blocks,
        }

    def pick(self, padded: torch.Tensor) -> torch.Tensor:
        """(1, tokens) values of a padded (rows, seq_len) tensor."""
        return padded.reshape(-1)[self.index][None]


def register() -> None:
    """Makes the implementation known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, flat_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def enable(model: Any, before: Kept | None = None) -> Kept:
    """Lets `model`, in evaluation mode, take flat rows where it can; whether it can tells `is_flat` from then on.

    With what it told `before`, it is not asked again.
    """
    module = sys.modules[type(model).__module__]
    # For every model, flat or not: both hold for a process, and no run's numbers may depend on those before.
    rotary.install(module)
    pointwise.install(model)
    known = getattr(model, "_supports_flash_attn", False) and hasattr(module, "ALL_ATTENTION_FUNCTIONS")
    causal = not getattr(model.config, "is_encoder_decoder", False)
    if not (known and causal and model.config._attn_implementation == "sdpa" and not _stateful(model)):
        return Kept(False, False)
    register()
    model.set_attn_implementation(NAME)
    shorten(model)
    kept = before or ask(model)
    if not kept.ends:
        lengthen(model)
    if not kept.rows:
        model.set_attn_implementation("sdpa")
    return kept


def is_flat(model: Any) -> bool:
    """Whether `enable` took effect on the model below any adapter."""
    base = base_of(model)
    return getattr(getattr(base, "config", None), "_attn_implementation", None) == NAME


def _stateful(model: Any) -> bool:
    """Whether layers carry a state from token to token besides attention: it would run on from row to row."""
    return any(
        word in type(module).__name__.lower() for module in model.modules() for word in ("mamba", "conv1d_", "ssm")
    )


def flatten(
    input_ids: torch.Tensor, lengths: Sequence[int], *, firsts: Sequence[int] | None = None, varlen: bool = False
) -> Flat:
    """One sequence of the rows of `input_ids`, (rows, seq_len) padded on the right, whose real tokens are `lengths`.

    With `firsts` a row's outputs are computed from there to its end, and may be zero before (`llmft.model.tail`).
    """
    device, seq_len = input_ids.device, input_ids.shape[1]
    shapes = () if varlen else plan_blocks(lengths)
    widths = list(lengths) if varlen else [width for rows, width in shapes for _ in range(rows)]
    place = torch.arange(seq_len)
    kept = place < torch.tensor(widths)[:, None]
    positions = place.expand(len(widths), -1)[kept]
    index = kept.reshape(-1).nonzero()[:, 0]
    starts = torch.tensor([0, *widths]).cumsum(0)
    last = starts[:-1] + torch.tensor(list(lengths)) - 1
    index = index.to(device)
    ids = input_ids.reshape(-1)[index][None]
    if varlen and not _last_query_sees_all(device):
        firsts = None
    tail = None if firsts is None else ends_of_rows(lengths, firsts, starts[:-1].tolist(), device)
    if tail is not None and varlen:
        ends = torch.tensor([0, *tail.lengths]).cumsum(0)
        tail = replace(tail, seqlens=ends.to(device, torch.int32), longest=_coarse(max(tail.lengths)))
    seqlens = starts.to(device, torch.int32) if varlen else None
    blocks = Blocks(shapes, seqlens, _coarse(max(lengths)), tail)
    return Flat(ids, positions[None].to(device), index, last.to(device), blocks)


def _coarse(length: int) -> int:
    return math.ceil(length / LENGTH_STEP) * LENGTH_STEP


def plan_blocks(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Cuts rows, in their order, into blocks such that padding and attention calls together cost least."""
    best: list[tuple[int, int]] = [(0, 0)]  # cost up to a row, and where its block begins
    for end in range(1, len(lengths) + 1):
        width, options = 0, []
        for start in range(end - 1, -1, -1):
            width = max(width, lengths[start])
            options.append((best[start][0] + (end - start) * width + BLOCK_COST_TOKENS, start))
        best.append(min(options))
    blocks: list[tuple[int, int]] = []
    end = len(lengths)
    while end > 0:
        start = best[end][1]
        blocks.append((end - start, max(lengths[start:end])))
        end = start
    return tuple(reversed(blocks))


def takes_varlen(model: Any) -> bool:
    """Whether torch's variable-length attention computes this model: CUDA from Ampere on, 16-bit, heads up to 256."""
    device = model.device
    if device.type != "cuda":
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    if dtype not in (torch.bfloat16, torch.float16) or not _knows_windows():
        return False
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    fits = head_dim <= MOST_VARLEN_HEAD_DIM and head_dim % 8 == 0 and not dropout
    return fits and torch.cuda.get_device_capability(device)[0] >= 8


@lru_cache(maxsize=1)
def _knows_windows() -> bool:
    """Whether this torch has variable-length attention with windows and grouped queries, as its first forms had not."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return False
    return {"window_size", "enable_gqa", "scale"} <= set(inspect.signature(varlen_attn).parameters)


@lru_cache(maxsize=8)
def _last_query_sees_all(device: torch.device) -> bool:
    """Whether fewer queries than keys stand at the ends of their rows, as torch's documentation does not say."""
    from torch.nn.attention.varlen import varlen_attn

    def rows(length: int) -> torch.Tensor:
        return torch.tensor([0, length], dtype=torch.int32, device=device)

    nothing = torch.zeros(2, 1, 32, dtype=torch.bfloat16, device=device)
    value = torch.stack([nothing[0], nothing[0] + 1])
    found = varlen_attn(
        nothing[:1], nothing, value, rows(1), rows(2), 1, 2, scale=1.0, window_size=(-1, 0), enable_gqa=False
    )
    assert isinstance(found, torch.Tensor)
    return bool((found.float() - 0.5).abs().max() < 0.01)  # the mean of both, not the first alone


def flat_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    llmft_blocks: Blocks | Last | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (1, heads, tokens, head_dim) over `llmft_blocks`; transformers' own "sdpa" where there are none.

    Returns (1, tokens, heads, head_dim), as transformers' implementations do; of the last layer the ends of rows.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if llmft_blocks is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    tail = None
    if isinstance(llmft_blocks, Last):
        if llmft_blocks.known is None:
            raise Asked(key, value)
        if llmft_blocks.tail.calls is not None:
            llmft_blocks.tail.calls.attention += 1
        key, value = llmft_blocks.known
        llmft_blocks, tail = llmft_blocks.blocks, llmft_blocks.tail
    window = kwargs.pop("sliding_window", None)
    if llmft_blocks.seqlens is not None:
        return _varlen(query, key, value, scaling, window, llmft_blocks, tail), None
    outputs, row = [], 0
    shapes = llmft_blocks.shapes
    all_keys, all_values = _by_block(key, shapes), _by_block(value, shapes)
    queries = _by_block(query, shapes) if tail is None else []
    for number, (rows, width) in enumerate(shapes):
        keys, values, real = all_keys[number], all_values[number], None
        if tail is None:
            own = queries[number]
            mask = None if window is None or width <= window else _band(width, window, query.device)
        else:
            own, mask, real = tail.block(query, row, rows, width, window)
        output, _ = sdpa_attention_forward(module, own, keys, values, mask, dropout, scaling, **kwargs)
        output = output.flatten(0, 1)
        outputs.append(output if real is None else output.index_select(0, real))
        row += rows
    return (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None], None


def _by_block(part: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """(rows, heads, width, head_dim) block by block of a (1, heads, tokens, head_dim) tensor.

    Cut at once, so that the gradient is put together at once: that of a slice is a whole tensor of zeros with a part.
    """
    cut = part.squeeze(0).split([rows * width for rows, width in shapes], dim=1)
    return [own.unflatten(1, shape).transpose(0, 1) for own, shape in zip(cut, shapes, strict=True)]


def _band(width: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, width, width): each token sees itself and the window - 1 before it."""
    place = torch.arange(width, device=device)
    distance = place[:, None] - place
    return ((distance >= 0) & (distance < window))[None, None]


def _varlen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float | None,
    window: int | None,
    blocks: Blocks,
    tail: Tail | None,
) -> torch.Tensor:
    """A query sees the keys up to its own place from the row's end, which both have in common."""
    from torch.nn.attention.varlen import varlen_attn

    queries = blocks.seqlens if tail is None else tail.seqlens
    assert blocks.seqlens is not None
    assert queries is not None
    # Autocast knows nothing of this kernel: rotary angles may have left queries and keys in fp32.
    found = varlen_attn(
        query[0].transpose(0, 1).to(value.dtype),
        key[0].transpose(0, 1).to(value.dtype),
        value[0].transpose(0, 1),
        queries,
        blocks.seqlens,
        blocks.longest if tail is None else tail.longest,
        blocks.longest,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(found, torch.Tensor)
    return found[None]
