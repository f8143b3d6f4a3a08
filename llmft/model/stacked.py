"""Several adapters on one base in one forward: each sees its own tokens, and computes what it would compute alone.

`Joint` is a copy of the base's body in structure, with the same weights. Its linear layers know which tokens belong to
whom: the base's weight is dequantised once for all, each adapter's own product is added to its own tokens.

On the CPU what comes out is bit-identical to each adapter's own forward. Two things take care for that there: matrix
products are taken adapter by adapter, because how they round depends on the number of rows; and so are functions such
as exp, which torch computes otherwise in the last few elements of a tensor than in the others. All else in a body works
token by token with exactly rounded arithmetic, or row by row, as attention does.

An order of additions matters as well: where a tensor is used several times, autograd adds its gradients in the reverse
order of the forward, here as in a forward alone, since both take the same steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch

from llmft.model.families import base_of, body_of, is_mixture
from llmft.model.kernels.lora import Share, is_dense, is_plain, lora_layers, lora_linear, share_of
from llmft.model.kernels.packing import Blocks, uses_packing


@dataclass
class Part:
    """One adapter's share of a joint forward.

    Attributes:
        arguments: what its own body's forward was called with: packed rows, see `llmft.model.kernels.packing`.
        layers: its LoRA layers by their names in the body.
        random: a context in which torch draws its random numbers.
        start, end: its tokens.
    """

    arguments: dict[str, Any]
    layers: dict[str, Any]
    random: Callable[[], AbstractContextManager[Any]]
    start: int = 0
    end: int = 0

    def draw(self, shape: Any, device: torch.device) -> torch.Tensor:
        """Uniform numbers as it alone would have drawn them here."""
        with self.random():
            return torch.rand(shape, device=device)


def share(module: Any, known: dict[int, Any] | None = None) -> Any:
    """A copy of a module's structure that holds the very same weights, to be adapted without touching the original."""
    known = {} if known is None else known
    if id(module) not in known:
        made = copy.copy(module)
        known[id(module)] = made
        for name, value in vars(module).items():
            if isinstance(value, dict) and name.startswith("_"):
                vars(made)[name] = copy.copy(value)  # parameters, buffers, hooks
        if "forward" in vars(made):  # a kernel's, of the module that was copied
            made.forward = made.forward.__func__.__get__(made)
        made._modules = {name: child and share(child, known) for name, child in module._modules.items()}
    return known[id(module)]


def why_alone(model: Any) -> str | None:
    """Why an adapted model cannot be stacked with others; None if it can."""
    base = base_of(model)
    body = body_of(model)
    if not uses_packing(base):
        return "its family takes no rows without padding"
    if is_mixture(base):
        return "a mixture of experts computes tokens in groups"
    if any(isinstance(m, torch.nn.Dropout) and m.p and "lora_dropout" not in n for n, m in body.named_modules()):
        return "its base has dropout of its own"
    if getattr(base.config.get_text_config(), "attention_dropout", 0.0):
        return "its base has dropout of its own"
    if getattr(base, "is_gradient_checkpointing", False):
        return "its forward is checkpointed"
    linear = set(_linears(body))
    strange = [name for name, layer in lora_layers(body).items() if name not in linear]
    return f"{strange[0]} is adapted and no linear layer" if strange else None


def _linears(body: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Linear layers by name, the adapted ones under the names that they had before."""
    from transformers.pytorch_utils import Conv1D

    adapted = lora_layers(body)
    found: dict[str, torch.nn.Module] = {}
    for name, module in body.named_modules():
        inside = any(name.startswith(f"{other}.") for other in adapted)
        base = getattr(module, "base_layer", module)
        if not inside and isinstance(base, (torch.nn.Linear, Conv1D)):
            found[name] = module
    return found


@dataclass
class _Pass:
    """The forward under way.

    Attributes:
        fused: whether all adapters are plain, so that a layer takes all parts in one step of autograd.
    """

    parts: list[Part] = field(default_factory=list)
    fused: bool = True
    _cut: tuple[torch.Tensor, Sequence[torch.Tensor]] | None = None

    def begin(self, parts: Sequence[Part]) -> None:
        """Sets the parts and where each stands; none ends the forward."""
        self.parts = list(parts)
        self._stand([part.arguments["input_ids"].shape[1] for part in self.parts])
        self.fused = all(is_plain(layer) for part in parts for layer in part.layers.values())

    def _stand(self, tokens: Sequence[int]) -> None:
        place = 0
        for part, own in zip(self.parts, tokens, strict=True):
            part.start, place = place, place + own
            part.end = place
        self._cut = None

    def cut(self, x: torch.Tensor) -> Sequence[torch.Tensor]:
        """`x` part by part; the same tensors for every layer that takes it, so that gradients add up in one order."""
        if self._cut is None or self._cut[0] is not x:
            dim = tokens_dim(x)
            self._cut = x, x.split([part.end - part.start for part in self.parts], dim=dim)
        return self._cut[1]

    def spans(self, x: torch.Tensor) -> list[tuple[int, int]] | None:
        """Each part's tokens, where `x` is computed part by part; None where all are computed at once."""
        return None if x.is_cuda else [(part.start, part.end) for part in self.parts]


class Joint:
    """A body that several adapters share."""

    def __init__(self, base: Any) -> None:
        """Takes the base as it was loaded, without an adapter."""
        self.body = share(body_of(base))
        # As a training before may have left it: layers are computed again after the parts are gone.
        self.body.gradient_checkpointing_disable()
        self._pass = _Pass()
        for name, layer in _linears(self.body).items():
            self.body.set_submodule(name, _StackedLinear(name, layer, self._pass))
        for name, module in list(self.body.named_modules()):
            if _is_function(module):
                self.body.set_submodule(name, _BySpan(module, self._pass))
        self.body.train()

    def forward(self, parts: Sequence[Part]) -> list[Any]:
        """Each part's output, as its own body would give it; one graph leads back from all."""
        if not parts:
            return []
        self._pass.begin(parts)
        try:
            together = self.body(**_joined([part.arguments for part in parts]))
        finally:
            self._pass.begin([])
        states = together.last_hidden_state.split([part.end - part.start for part in parts], dim=1)
        return [type(together)(last_hidden_state=state) for state in states]


def _joined(arguments: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """One call's arguments for several calls'."""
    blocks = [each["llmft_blocks"] for each in arguments]
    seqlens = None
    if all(each.seqlens is not None for each in blocks):
        offset, pieces = blocks[0].seqlens[-1:] * 0, [blocks[0].seqlens[:1]]
        for each in blocks:
            pieces.append(each.seqlens[1:] + offset)
            offset = offset + each.seqlens[-1:]
        seqlens = torch.cat(pieces)
    shapes = tuple(shape for each in blocks for shape in each.shapes)
    return {
        **arguments[0],
        "input_ids": torch.cat([each["input_ids"] for each in arguments], dim=1),
        "position_ids": torch.cat([each["position_ids"] for each in arguments], dim=1),
        "llmft_blocks": Blocks(shapes, seqlens, max(each.longest for each in blocks)),
    }


class _StackedLinear(torch.nn.Module):
    """A linear layer of the body, with whatever each part's adapter adds to it."""

    def __init__(self, name: str, layer: torch.nn.Module, current: _Pass) -> None:
        super().__init__()
        self.name = name
        self.layer = layer
        self._current = current

    def __getattr__(self, name: str) -> Any:
        """What a forward asks of a linear layer besides its product (its weight's dtype, say)."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(1, tokens, in) or (tokens, in) to the same with out."""
        parts = self._current.parts
        layers = [part.layers.get(self.name) for part in parts]
        if not self._current.fused or not is_dense(self.layer):
            pieces = []
            for part, layer, own in zip(parts, layers, self._current.cut(x), strict=True):
                with part.random():
                    pieces.append((layer or self.layer)(own))
            return torch.cat(pieces, dim=tokens_dim(x))
        shares: list[Share] = []
        weights: list[torch.Tensor] = []
        for layer, part in zip(layers, parts, strict=True):
            if layer is not None:
                share, pair = share_of(layer, part.start, part.end, part.draw)
                shares.append(share)
                weights += pair
        return lora_linear(x, self.layer, shares, weights, self._current.spans(x))


def tokens_dim(x: torch.Tensor) -> int:
    """The dimension of a body's tensor that counts tokens: some families drop the first."""
    return 1 if x.ndim > 2 or x.shape[0] == 1 else 0


def _is_function(module: torch.nn.Module) -> bool:
    """Whether a module is a function of its inputs alone, such as an activation or rotary angles."""
    leaf = not any(True for _ in module.children()) and not any(True for _ in module.parameters())
    return leaf and not isinstance(module, (torch.nn.Dropout, torch.nn.Identity, _StackedLinear))


class _BySpan(torch.nn.Module):
    """A function of tokens, part by part."""

    def __init__(self, function: torch.nn.Module, current: _Pass) -> None:
        super().__init__()
        self.function = function
        self._current = current

    def __getattr__(self, name: str) -> Any:
        """What a body asks of the function besides its values."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("function"), name)

    def spans(self, x: torch.Tensor) -> list[tuple[int, int]] | None:
        """See `_Pass.spans`."""
        return self._current.spans(x)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The function's value, of all tokens together where parts need not be alike to the bit."""
        tokens = self._current.parts[-1].end
        spans = self.spans(args[0])
        if spans is None or len(spans) == 1:
            return self.function(*args, **kwargs)

        def cut(value: Any, start: int, end: int) -> Any:
            if not isinstance(value, torch.Tensor) or value.ndim < 2:
                return value
            dim = tokens_dim(value)
            return value.narrow(dim, start, end - start) if value.shape[dim] == tokens else value

        made = [
            self.function(*(cut(v, *span) for v in args), **{name: cut(v, *span) for name, v in kwargs.items()})
            for span in spans
        ]
        if isinstance(made[0], tuple):
            return tuple(torch.cat(pieces, dim=tokens_dim(pieces[0])) for pieces in zip(*made, strict=True))
        return torch.cat(made, dim=tokens_dim(made[0]))
