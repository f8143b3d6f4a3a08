"""A quantised base to tensors by name, and back: the form of `model.state_dict()`, scales beside the packed weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any
from unittest import mock

import torch

from llmft.model.basecache import Damaged
from llmft.model.experts import put_fused


def packed_state(model: Any, leave_out: Iterable[str]) -> dict[str, torch.Tensor]:
    """Every tensor of a quantised model by name, tied ones once, without those that begin with `leave_out`."""
    prefixes = tuple(leave_out)
    tied = getattr(model, "all_tied_weights_keys", {})
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in tied and not name.startswith(prefixes)
    }


def has_plain_tensors(model: torch.nn.Module) -> bool:
    """Whether a module holds tensors that are neither parameters nor buffers: `packed_state` would not know them."""
    return any(isinstance(value, torch.Tensor) for module in model.modules() for value in vars(module).values())


class Restorer:
    """Puts `tensors`, those of `packed_state`, into a model while transformers loads it.

    Attributes:
        waiting: scales of fused experts by name, whose packed weights are in their places. They wait for `finish`: a
            module that dequantises its weights looks to transformers like one that has none.
    """

    def __init__(self, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
        self.tensors = tensors
        self.waiting: dict[str, dict[str, torch.Tensor]] = {}

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """Lets `from_pretrained` take the tensors in place of the directory's weights.

        All else (generation's defaults, buffers that no file holds, tied weights, a new head) comes about as ever.
        """
        from transformers import PreTrainedModel

        load = PreTrainedModel._load_pretrained_model

        def replaced(model: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
            found, index = load(model, {}, *args, **kwargs)
            found.missing_keys -= self.put(model)
            return found, index

        with mock.patch.object(PreTrainedModel, "_load_pretrained_model", staticmethod(replaced)):
            yield

    def put(self, model: Any) -> set[str]:
        """Puts the tensors into a model on the meta device whose layers are bitsandbytes' already; returns the names.

        Raises Damaged for a tensor that the model has no place for.
        """
        known = {name: tensor.shape for name, tensor in model.state_dict().items()}
        whole: dict[str, torch.Tensor] = {}
        parts: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors:
            if name in known:
                whole[name] = tensor
            else:
                owner = _owner(name, known)
                parts.setdefault(owner, {})[name.removeprefix(owner).lstrip(".")] = tensor
        for name, tensor in whole.items():
            self._put(model, name, tensor, parts.pop(name, {}), known[name])
        if parts:
            raise Damaged(f"{next(iter(parts))} has scales and no weights")
        return set(whole)

    def _put(
        self, model: Any, name: str, tensor: torch.Tensor, parts: dict[str, torch.Tensor], shape: torch.Size
    ) -> None:
        import bitsandbytes as bnb

        path, _, attribute = name.rpartition(".")
        module = model.get_submodule(path)
        made: Any = tensor
        if isinstance(module, bnb.nn.Linear4bit) and attribute == "weight":
            made = bnb.nn.Params4bit.from_prequantized(
                tensor, parts, requires_grad=False, device=tensor.device, module=module
            )
        elif isinstance(module, bnb.nn.Linear8bitLt) and attribute == "weight":
            scales = parts[next(key for key in parts if key.endswith("SCB"))]
            made = bnb.nn.Int8Params(tensor, requires_grad=False, CB=tensor, SCB=scales)  # type: ignore[misc]
        elif parts:
            self.waiting[name] = parts
            made = torch.nn.Parameter(tensor, requires_grad=False)
        elif tensor.shape != shape:
            raise Damaged(f"{name} has the shape {tuple(tensor.shape)}, not {tuple(shape)}")
        elif attribute in module._parameters:
            made = torch.nn.Parameter(tensor, requires_grad=False)
        made._is_hf_initialized = True  # else transformers fills it with random numbers
        setattr(module, attribute, made)

    def finish(self, model: Any) -> None:
        """Lets the experts dequantise their weights when they are used."""
        for name, parts in self.waiting.items():
            put_fused(model, name, model.get_parameter(name).data, parts)


def _owner(name: str, known: dict[str, torch.Size]) -> str:
    """The weight that a scale belongs to: "a.weight" of "a.weight.absmax" and of bitsandbytes' 8-bit "a.SCB"."""
    path = name
    while path:
        path = path.rpartition(".")[0]
        for owner in (path, f"{path}.weight"):
            if owner in known:
                return owner
    raise Damaged(f"the model has no place for {name}")
