"""Models without weights, on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch


def auto_model(auto_class: str) -> Any:
    """transformers' factory for a kind of model."""
    import transformers

    return {
        "causal_lm": transformers.AutoModelForCausalLM,
        "sequence_classification": transformers.AutoModelForSequenceClassification,
    }[auto_class]


def skeleton(auto_class: str, config: Any, **arguments: Any) -> Any:
    """The model of a configuration of transformers, without its weights but those that are made of ranges.

    `arguments` as `from_config` takes them.
    """
    make = partial(auto_model(auto_class).from_config, config, **arguments)
    try:
        with nothing_on_meta(config), torch.device("meta"):
            return make()
    except Exception:  # also TorchScript's, which wants torch's own functions; what is really wrong is raised again
        _computes.add(str(config.model_type))
    with torch.device("meta"):
        return make()


LONGEST_REAL = 4096
"""The longest range that is made: code of others may go on to its square."""
_computes: set[str] = set()
"""Kinds of models that compute something of a range and weights that are not there yet."""


@contextlib.contextmanager
def nothing_on_meta(config: Any) -> Iterator[None]:
    """Nothing is computed on the meta device while the model of a configuration is built.

    Initial values are left out, and short ranges, which positions begin with, are real. Both would go through Python
    code that imports sympy: 0.2 s and 30 MiB.
    """
    with torch.device("meta"):
        torch.empty(0)  # torch notes for good, at the first such call, which functions obey `torch.device`
    names = [name for name in vars(torch.nn.init) if name.endswith("_") and not name.startswith("_")]
    patches: list[tuple[Any, str, Callable[..., Any]]] = [(torch.nn.init, name, _unless_meta) for name in names]
    if str(config.model_type) not in _computes:
        patches += [(torch, "arange", _real)]
    known = [(place, name, getattr(place, name)) for place, name, _ in patches]
    for place, name, patch in patches:
        setattr(place, name, patch(getattr(place, name)))
    try:
        yield
    finally:
        for place, name, function in known:
            setattr(place, name, function)


def _unless_meta(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def fill(tensor: torch.Tensor, *arguments: Any, **named: Any) -> Any:
        return tensor if tensor.is_meta else function(tensor, *arguments, **named)

    return fill


def _real(arange: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def real(*arguments: Any, device: Any = None, **named: Any) -> torch.Tensor:
        where = torch.get_default_device() if device is None else torch.device(device)
        small = all(isinstance(bound, int | float) and abs(bound) <= LONGEST_REAL for bound in arguments)
        return arange(*arguments, device="cpu" if where.type == "meta" and small else where, **named)

    return real
