"""Rows concatenated into one sequence instead of padded: no padding in norms, linear layers and head.

Only attention must know where rows end. On CUDA, torch's variable-length kernel takes them unpadded. Elsewhere
attention runs block by block: rows of similar length, padded to the longest of their block if a separate block would
cost more than the padding. Either way a row sees only itself; tests compare packed logits with those of single rows.

It is an attention implementation of transformers (`NAME`) that equals "sdpa" unless it is given blocks. The mask passed
with blocks is a four-dimensional dummy, which transformers passes on unchanged. With a two-dimensional mask, or none
and a cache, it would silently let rows see each other.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from llmft.core.errors import ConfigError
from llmft.data.batch import send
from llmft.model.families import base_of

NAME = "llmft_packed"
BLOCK_COST_TOKENS = 48
"""What one more attention call costs, in tokens of padding: measured on the CPU with hidden sizes of 64 and 256."""
MOST_VARLEN_HEAD_DIM = 256
LENGTH_STEP = 256
Positions = tuple[np.ndarray, np.ndarray]
"""Rows and columns of tokens in a padded batch, row by row."""
NO_POSITIONS: Positions = (np.zeros(0, np.int64), np.zeros(0, np.int64))


@dataclass(frozen=True)
class Blocks:
    """The layout of rows in a packed sequence.

    Attributes:
        shapes: (rows, width) of each block, in order; the shorter rows of a block are padded to its width.
        seqlens: (rows + 1,) int32 cumulative lengths for variable-length attention, where no row is padded at all.
        longest: at least the longest row in tokens; in coarse steps, since it is a constant in a compiled layer.
        branches: for each row, the tokens of its prompt and of each answer after it, if answers share their prompt;
            then the rows of `shapes` and `seqlens` are a prompt with one of its answers each.
    """

    shapes: tuple[tuple[int, int], ...]
    seqlens: torch.Tensor | None = None
    longest: int = 0
    branches: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class PackedBatch:
    """Rows concatenated into one sequence.

    Attributes:
        input_ids, position_ids: (1, tokens).
        last: (rows,) position of each row's last real token in the packed sequence; for answers, of their ends.
        positions: (positions,) packed positions of those given to `pack`.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    last: torch.Tensor
    blocks: Blocks
    positions: torch.Tensor | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments of a model's forward."""
        dummy = torch.empty(1, 1, 1, 1, device=self.input_ids.device)
        tokens = {"input_ids": self.input_ids, "position_ids": self.position_ids}
        return {**tokens, "attention_mask": dummy, "use_cache": False, "llmft_blocks": self.blocks}


ATTENTION = {"full_attention", "sliding_attention"}
"""Kinds of layers in which tokens interact only in attention, and that `packed_attention` computes."""


def enable(model: Any) -> None:
    """Makes `model` take packed rows if its family can; `uses_packing` says whether it does."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    if model.config._attn_implementation == "sdpa" and supports_packing(model):
        AttentionInterface.register(NAME, packed_attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def supports_packing(model: Any) -> bool:
    """Whether tokens interact only in transformers' attention interface, by a family's own declarations.

    A short convolution or a linear attention carries state from row to row; chunked attention depends on its mask.
    """
    config = model.config.get_text_config()
    return (
        model._supports_attention_backend
        and model._supports_flash_attn
        and not model._is_stateful
        and not getattr(model.config, "is_encoder_decoder", False)
        and set(getattr(config, "layer_types", None) or ()) <= ATTENTION
    )


def uses_packing(model: Any) -> bool:
    """Whether `enable` took effect on the model below any adapter."""
    base = base_of(model)
    return getattr(getattr(base, "config", None), "_attn_implementation", None) == NAME


def pack(
    base: Any, input_ids: torch.Tensor, lengths: Sequence[int], positions: Positions = NO_POSITIONS
) -> PackedBatch:
    """One sequence of the rows of `input_ids`, (rows, seq_len) padded on the right, whose real tokens are `lengths`.

    `positions` are rows and columns of tokens to locate in it; `base` is the model that will read it.
    """
    varlen = takes_varlen(base)
    shapes = () if varlen else plan_blocks(lengths)
    widths = list(lengths) if varlen else [width for rows, width in shapes for _ in range(rows)]
    starts = np.cumsum([0, *widths])
    position_ids = np.concatenate([np.arange(width) for width in widths])
    index = np.repeat(np.arange(len(widths)) * input_ids.shape[1], widths) + position_ids
    rows, columns = positions
    arrays = [index, position_ids, starts[:-1] + np.array(lengths) - 1, starts[rows] + columns, starts]
    source, ids, last, wanted, seqlens = send(arrays, input_ids.device)
    blocks = Blocks(shapes, seqlens.to(torch.int32) if varlen else None, _coarse(max(lengths)))
    return PackedBatch(input_ids.reshape(-1)[source][None], ids[None], last, blocks, wanted)


def inputs_of(
    base: Any, input_ids: torch.Tensor, lengths: Sequence[int], positions: Positions
) -> tuple[dict[str, Any], torch.Tensor]:
    """Arguments of a model's forward, and the indices of `positions` among all their tokens, row by row.

    Packed rows if the family can, else padded ones.
    """
    if not uses_packing(base):
        rows, columns = positions
        (indices,) = send([rows * input_ids.shape[1] + columns], input_ids.device)
        return {"input_ids": input_ids, "use_cache": False}, indices
    packed = pack(base, input_ids, lengths, positions)
    assert packed.positions is not None
    return packed.arguments, packed.positions


def pack_answers(
    base: Any, input_ids: torch.Tensor, lengths: Sequence[Sequence[int]]
) -> tuple[PackedBatch, list[tuple[int, int]]]:
    """Prompts with several answers each as one sequence, and (end of the prompt, start of the answer) of each answer.

    Every token occurs once, so all but attention is computed once per prompt. An answer's positions continue those of
    its prompt, and it sees its prompt and itself: attention takes the prompt's queries, keys and values once for each
    answer, which costs little while rows are short compared with the model's width.

    Args:
        base: the model that will read it.
        input_ids: (rows, seq_len) padded on the right: a prompt and all its answers.
        lengths: for each row, the tokens of its prompt and of each answer.
    """
    varlen = takes_varlen(base)
    index, positions, spans, ends, start = [], [], [], [], 0
    for row, (prompt, *answers) in enumerate(lengths):
        index.append(row * input_ids.shape[1] + np.arange(prompt + sum(answers)))
        positions += [np.arange(prompt), *(prompt + np.arange(answer) for answer in answers)]
        end = start + prompt - 1
        start += prompt
        for answer in answers:
            spans.append((end, start))
            start += answer
            ends.append(start - 1)
    widths = [prompt + answer for prompt, *answers in lengths for answer in answers]
    shapes = () if varlen else plan_blocks(widths)
    sent = [np.concatenate(index), np.concatenate(positions), np.array(ends), np.cumsum([0, *widths])]
    flat, positions_, last, seqlens = send(sent, input_ids.device)
    longest, branches = _coarse(max(widths)), tuple(map(tuple, lengths))
    blocks = Blocks(shapes, seqlens.to(torch.int32) if varlen else None, longest, branches)
    return PackedBatch(input_ids.reshape(-1)[flat][None], positions_[None], last, blocks), spans


def _coarse(length: int) -> int:
    return math.ceil(length / LENGTH_STEP) * LENGTH_STEP


def plan_blocks(lengths: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Splits rows, in order, into blocks that minimise the cost of padding and attention calls together."""
    best = [(0, 0)]  # cost up to a row, and the start of its block
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
    """Whether torch's variable-length attention computes this model: CUDA from Ampere on, 16-bit, heads up to 256.

    Not on AMD's GPUs, where it has not been tried; they use blocks.
    """
    device = model.device
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else model.dtype
    if dtype not in (torch.bfloat16, torch.float16) or not {"window_size", "scale"} <= _varlen_parameters():
        return False
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    dropout = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    fits = head_dim <= MOST_VARLEN_HEAD_DIM and head_dim % 8 == 0 and not dropout
    return fits and has_flash(device, dtype)


def _varlen_parameters() -> frozenset[str]:
    """What this torch's variable-length attention takes; the first versions had neither windows nor grouped queries."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return frozenset()
    return frozenset(inspect.signature(varlen_attn).parameters)


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    llmft_blocks: Blocks | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of (1, heads, tokens, head_dim) over `llmft_blocks`; transformers' own "sdpa" without them.

    Returns (1, tokens, heads, head_dim), as transformers' implementations do.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if llmft_blocks is None:
        if query.shape[2] > 1 and attention_mask is None:
            module, key, value = _repeated(module, query, key, value)
        if attention_mask is not None and attention_mask.shape[-1] < key.shape[2]:
            raise ConfigError(
                f"model.attn_implementation: {type(module).__name__} does not pass on where rows end; set it to eager."
            )
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    window = kwargs.pop("sliding_window", None)
    if llmft_blocks.branches:
        query, key, value = (_with_prompts(part, llmft_blocks) for part in (query, key, value))
    if llmft_blocks.seqlens is not None:
        return _without_prompts(_varlen(query, key, value, scaling, window, llmft_blocks), llmft_blocks), None
    outputs = []
    module, key, value = _repeated(module, query, key, value)
    parts = [_by_block(part, llmft_blocks.shapes) for part in (query, key, value)]
    for (_, width), queries, keys, values in zip(llmft_blocks.shapes, *parts, strict=True):
        mask = None if window is None or width <= window else _band(width, window, query.device)
        output, _ = sdpa_attention_forward(module, queries, keys, values, mask, dropout, scaling, **kwargs)
        outputs.append(output.flatten(0, 1))
    output = (torch.cat(outputs) if len(outputs) > 1 else outputs[0])[None]
    return _without_prompts(output, llmft_blocks), None


def _with_prompts(part: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """(1, heads, rows' tokens, head_dim): each answer after a copy of its prompt, padded as in `blocks`.

    Concatenated from pieces, so that gradients are summed in a fixed order on every device.
    """
    tokens = part[0].transpose(0, 1)
    pieces = iter(tokens.split([length for branch in blocks.branches for length in branch]))
    paddings = _paddings(blocks)
    rows: list[torch.Tensor] = []
    for branch in blocks.branches:
        prompt = next(pieces)
        for _ in branch[1:]:
            rows += [prompt, next(pieces)]
            if padding := next(paddings):
                rows.append(tokens.new_zeros(padding, *tokens.shape[1:]))
    return torch.cat(rows).transpose(0, 1)[None]


def _without_prompts(output: torch.Tensor, blocks: Blocks) -> torch.Tensor:
    """(1, tokens, heads, head_dim) with each prompt once, and no padding: the inverse of `_with_prompts`."""
    if not blocks.branches:
        return output
    paddings = _paddings(blocks)
    lengths = [n for prompt, *answers in blocks.branches for a in answers for n in (prompt, a, next(paddings))]
    pieces = iter(output[0].split(lengths))
    rows: list[torch.Tensor] = []
    for branch in blocks.branches:
        for number, _ in enumerate(branch[1:]):
            prompt, answer, _ = next(pieces), next(pieces), next(pieces)
            rows += [answer] if number else [prompt, answer]
    return torch.cat(rows)[None]


def _paddings(blocks: Blocks) -> Iterator[int]:
    """The padding of each row of `blocks` to its block's width."""
    widths = (width for rows, width in blocks.shapes for _ in range(rows))
    lengths = (prompt + answer for prompt, *answers in blocks.branches for answer in answers)
    return (next(widths, length) - length for length in lengths)


def _repeated(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Arguments of transformers' "sdpa", keys and values repeated per query if CUDA would otherwise keep all scores.

    Only flash attention supports grouped queries, and it needs 16 bits and Ampere. On a T4 or V100, and in fp32, torch
    would fall back to plain products with the scores in fp32: 176 MiB a layer for a row of 1,024 tokens in place of
    20 (transformers issue 48633).
    """
    groups = query.shape[1] // key.shape[1]
    if groups == 1 or has_flash(query.device, query.dtype):
        return module, key, value
    without_groups = SimpleNamespace(is_causal=getattr(module, "is_causal", True))
    return without_groups, key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)


def has_flash(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether fused attention supports grouped queries: in 16 bits on Ampere or later, or AMD's; on a CPU always."""
    if device.type != "cuda":
        return True
    return dtype is not torch.float32 and torch.cuda.get_device_capability(device)[0] >= 8


def _by_block(part: torch.Tensor, shapes: Sequence[tuple[int, int]]) -> list[torch.Tensor]:
    """(rows, heads, width, head_dim) block by block of a (1, heads, tokens, head_dim) tensor.

    Split at once, so that the gradient is concatenated once; that of a slice is a full tensor, mostly zeros.
    """
    cut = part.squeeze(0).split([rows * width for rows, width in shapes], dim=1)
    return [block.unflatten(1, shape).transpose(0, 1) for block, shape in zip(cut, shapes, strict=True)]


def _band(width: int, window: int, device: torch.device) -> torch.Tensor:
    """(1, 1, width, width): each token sees itself and the window - 1 before it."""
    columns = torch.arange(width, device=device)
    distance = columns[:, None] - columns
    return ((distance >= 0) & (distance < window))[None, None]


def _varlen(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: Any, window: int | None, blocks: Blocks
) -> torch.Tensor:
    from torch.nn.attention.varlen import varlen_attn

    assert blocks.seqlens is not None
    grouped: dict[str, Any] = {}
    if (groups := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in _varlen_parameters():
            grouped["enable_gqa"] = True
        else:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    # Autocast does not cover this kernel: rotary angles may have left queries and keys in fp32.
    query, key, value = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
    ends, longest = blocks.seqlens, blocks.longest
    size = (-1 if window is None else window - 1, 0)
    output: Any = varlen_attn(
        query, key, value, ends, ends, longest, longest, scale=scaling, window_size=size, **grouped
    )
    return output[None]
