"""Next-token logits after a prompt and after several prefixes of its answer, with the prompt read once.

The prompts' keys and values are computed once and cached; the prefixes, which form a trie, follow as one short row
whose tokens attend to their prompt and to the earlier tokens of their own branch (tree attention, arXiv:2305.09781).
For prompts of P tokens and K answers of a tokens that is P + K a tokens instead of K (P + a).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from llmft.model.families import base_of, selects_positions
from llmft.model.kernels import packing

Prefix = tuple[int, ...]
CACHE_BYTES = 2 * 2**30
"""Most bytes of cached keys and values; more rows are computed in groups, large enough to keep a GPU busy."""
NEEDED = ("attention_mask", "position_ids", "logits_to_keep")
CACHE_ARGUMENTS = ("cache", "past_key_values")
"""Names of a forward's argument for keys and values: since transformers 5.24, and before."""
FIXED_ROPE = ("default", "linear", "llama3", "yarn", "proportional")
"""Types of rotary positions that do not depend on the row's length."""


def can_share(model: Any, tokens: int) -> bool:
    """Whether rows of `tokens` tokens computed after cached keys and values give the model's own numbers.

    Not with positions that count places in the row (learned ones, ALiBi), which the padding between prompt and answer
    would shift, nor where a window is shorter than the row, in recurrent models, or with attention kernels that accept
    no custom mask.
    """
    base = base_of(model)
    config = base.config
    if base.training or _cache_argument(base.__class__) is None:
        return False
    rotary = [module for module in base.modules() if type(module).__name__.endswith("RotaryEmbedding")]
    if not rotary or getattr(config, "alibi", False):
        return False
    types = [getattr(module, "rope_type", "default") for module in rotary]
    ropes = {kind for kinds in types for kind in (kinds.values() if isinstance(kinds, dict) else [kinds])}
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    window = getattr(config, "sliding_window", None)
    return (
        ropes <= set(FIXED_ROPE)
        and layers <= packing.ATTENTION
        and (window is None or tokens < window)
        and getattr(config, "_attn_implementation", None) in ("sdpa", packing.NAME, "eager")
    )


@lru_cache(maxsize=8)
def _cache_argument(model_class: Any) -> str | None:
    """The name of the argument for keys and values; None for a forward without the arguments needed here."""
    parameters = inspect.signature(model_class.forward).parameters
    if not selects_positions(model_class) or not all(name in parameters for name in NEEDED):
        return None
    return next((name for name in CACHE_ARGUMENTS if name in parameters), None)


def shared_prefix_logits(
    model: Any, ids: torch.Tensor, prompts: torch.Tensor, prefixes: Sequence[Prefix]
) -> dict[Prefix, torch.Tensor] | None:
    """By prefix (rows, vocabulary) next-token logits after each prompt and prefix; None where `can_share` is false.

    Args:
        ids: (rows, seq_len), padded on the right.
        prompts: (rows,) tokens of each row's prompt.
        prefixes: of an answer; the empty one gives the logits after the prompt.
    """
    nodes = sorted({prefix[:depth] for prefix in prefixes for depth in range(1, len(prefix) + 1)})
    width = int(prompts.max())
    if not nodes or not can_share(model, width + len(nodes)):
        return None
    rows = max(1, CACHE_BYTES // (width * bytes_per_token(model)))
    groups = [
        _group(model, ids[start : start + rows], prompts[start : start + rows], nodes, prefixes)
        for start in range(0, len(ids), rows)
    ]
    return {prefix: torch.cat([group[prefix] for group in groups]) for prefix in prefixes}


def bytes_per_token(model: Any) -> int:
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(width) * int(model.dtype.itemsize)


def _group(
    model: Any, ids: torch.Tensor, prompts: torch.Tensor, nodes: list[Prefix], prefixes: Sequence[Prefix]
) -> dict[Prefix, torch.Tensor]:
    from transformers import DynamicCache

    base = base_of(model)
    width = int(prompts.max())
    positions = torch.arange(width, device=ids.device)
    argument = _cache_argument(base.__class__)
    assert argument is not None
    cache = {argument: DynamicCache(config=base.config), "use_cache": True}
    last = positions == prompts[:, None] - 1
    first = model(input_ids=ids[:, :width], **cache, logits_to_keep=last).logits

    depths = torch.tensor([len(node) for node in nodes], device=ids.device)
    branch = torch.tensor([[other == node[: len(other)] for other in nodes] for node in nodes], device=ids.device)
    of_prompt = (positions < prompts[:, None])[:, None].expand(-1, len(nodes), -1)
    visible = torch.cat([of_prompt, branch[None].expand(len(ids), -1, -1)], dim=-1)[:, None]
    mask = visible
    if base.config._attn_implementation == "eager":  # it adds its mask to the scores
        mask = torch.zeros(visible.shape, device=ids.device).masked_fill(~visible, torch.finfo(torch.float32).min)
    keep = torch.tensor([node in prefixes for node in nodes], device=ids.device).expand(len(ids), -1)
    next_logits = model(
        input_ids=torch.tensor([node[-1] for node in nodes], device=ids.device).expand(len(ids), -1),
        attention_mask=mask,
        position_ids=prompts[:, None] + depths - 1,
        **cache,
        logits_to_keep=keep,
    ).logits.view(len(ids), -1, first.shape[-1])
    order = [node for node in nodes if node in prefixes]
    logits = {node: next_logits[:, number] for number, node in enumerate(order)}
    return logits | ({(): first} if () in prefixes else {})
