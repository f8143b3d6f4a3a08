"""Whether a model keeps rows apart that stand behind each other, and asks for attention as `llmft.model.tail` needs it.

Names and flags of a family do not tell: a short convolution, a linear attention or a loop over layers may hide behind
any. So the model itself is asked, once, with two rows of a few tokens. The embeddings of the first are no numbers: what
comes out for the second is a number only where nothing of the first has reached it, in whatever precision.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from llmft.model import tail
from llmft.model.families import body_of
from llmft.model.quantization import unsettle_8_bit

CHECK = 2
"""To be raised where the questions change: answers are kept beside cached bases."""
ROW = 6
"""Tokens of each of the two rows: more than a short convolution looks back."""
ENDS = 2
"""Tokens at the end of each that the last layer is asked for."""


@dataclass(frozen=True)
class Kept:
    """What a model can do.

    Attributes:
        rows: compute each row by itself.
        ends: compute its last layer at the ends of rows alone.
    """

    rows: bool
    ends: bool

    @classmethod
    def from_plain(cls, found: Any) -> Kept | None:
        """From what this check wrote; None for anything else."""
        if not isinstance(found, dict) or found.get("check") != CHECK:
            return None
        return cls(found.get("rows") is True, found.get("ends") is True)

    def to_plain(self) -> dict[str, Any]:
        """What is written down."""
        return {"check": CHECK, "rows": self.rows, "ends": self.ends}


def ask(model: Any) -> Kept:
    """Asks a model in evaluation mode that takes `llmft_blocks`; one without values is taken at its word."""
    if model.device.type == "meta":
        return Kept(True, tail.takes_ends(model))
    try:
        return _ask(model)
    finally:
        unsettle_8_bit(model)  # as before this first forward


def _ask(model: Any) -> Kept:
    rows = _reached(model, None) is False
    if not rows or not tail.takes_ends(model):
        return Kept(rows, False)
    calls = tail.Calls()
    ends = torch.arange(2 * ROW).view(2, ROW)[:, -ENDS:].flatten().to(model.device)
    own = tail.Tail((ENDS, ENDS), ends, ends % ROW, calls=calls)
    # Twice asked, the keys of the first time would be taken for the second; and a layer that is used again reads zeros.
    return Kept(True, _reached(model, own) is False and (calls.layer, calls.attention) == (1, 1))


def _reached(model: Any, own: tail.Tail | None) -> bool | None:
    """Whether the second row's states depend on the first row; None where the model cannot compute them so."""
    from llmft.model.flat import Blocks

    def spoil(module: Any, inputs: Any, embedded: torch.Tensor) -> torch.Tensor:
        spoilt = embedded.clone()
        spoilt[:, :ROW] = torch.nan
        return spoilt

    device = model.device
    places = torch.arange(2 * ROW, device=device)
    spoiling: list[Any] = []
    try:
        spoiling.append(model.get_input_embeddings().register_forward_hook(spoil))
        with torch.no_grad():
            states = body_of(model)(
                input_ids=(places % model.config.get_text_config().vocab_size)[None],
                position_ids=(places % ROW)[None],
                attention_mask=torch.zeros(1, 1, 1, 1, device=device),
                use_cache=False,
                llmft_blocks=Blocks(((1, ROW), (1, ROW)), tail=own),
            ).last_hidden_state
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, IndexError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
        return None  # whatever a family makes of arguments that it does not know
    finally:
        for handle in spoiling:
            handle.remove()
    return not bool(torch.isfinite(states[:, ROW:] if own is None else states[:, -ENDS:]).all())
