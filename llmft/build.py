"""Config to objects: the only caller of hydra.utils.instantiate.

A `_target_` may name only classes under a short list of packages, because opening somebody's run directory must not
execute what its config names; and its arguments are bound to the signature before any weights load, because a
misspelt argument of a partial builds happily and fails only when it is called.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from llmft.errors import ConfigError, did_you_mean

ALLOWED_TARGETS = (
    "torch.optim.",
    "bitsandbytes.optim.",
    "lightning.pytorch.callbacks.",
    "lightning.pytorch.loggers.",
    "lightning.pytorch.strategies.",
    "llmft.training.",
    "llmft.metrics.",
)


def find(path: str, key: str) -> Any:
    """The class or function at a dotted `path` under an allowed package; `key` names the config value in errors."""
    if not path.startswith(ALLOWED_TARGETS):
        raise ConfigError(
            f"{key}={path}: only {', '.join(prefix + '*' for prefix in ALLOWED_TARGETS)} may be named in a config."
        )
    module_name, _, name = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}={path}: {error}.") from None
    if not hasattr(module, name):
        options = [option for option in vars(module) if not option.startswith("_")]
        raise ConfigError(f"{key}={path}: {module_name} has no {name}{did_you_mean(name, options)[:200]}")
    found = getattr(module, name)
    # A module also holds what it imports: `llmft.training.x.os` must not lead out of the allowed packages.
    home = f"{getattr(found, '__module__', '')}."
    if not callable(found) or not home.startswith(ALLOWED_TARGETS):
        raise ConfigError(f"{key}={path}: not a class or function of that package.")
    return found


def check_target(node: dict[str, Any], key: str, *given: str) -> None:
    """Checks that `node` names something allowed and that its arguments, with those `given` in code, fit it.

    Raises ConfigError naming the argument.
    """
    if "_target_" not in node:
        raise ConfigError(f"{key}: has no _target_, so nothing says what to build.")
    target = find(node["_target_"], f"{key}._target_")
    arguments = {name: value for name, value in node.items() if not name.startswith("_")}
    for name, value in node.items():
        if name != "_target_":
            _check_nested(value, f"{key}.{name}")
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return
    parameters = signature.parameters
    takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not takes_all:
            raise ConfigError(
                f"{key}.{name}: {node['_target_']} takes no such argument{did_you_mean(name, parameters)}"
            )
    try:
        signature.bind_partial(*[None] * len(given), **arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {node['_target_']}: {error}.") from None


def _check_nested(value: Any, key: str) -> None:
    """Hydra builds every `_target_` at any depth, also inside lists: so every one is checked."""
    if isinstance(value, dict):
        if "_target_" in value:
            check_target(value, key)
        else:
            for name, item in value.items():
                _check_nested(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for place, item in enumerate(value):
            _check_nested(item, f"{key}[{place}]")


def build(node: dict[str, Any], key: str, **extra: Any) -> Any:
    """Builds a checked `_target_` node."""
    from hydra.utils import instantiate

    check_target(node, key)
    try:
        return instantiate(node, _convert_="all", **extra)
    except Exception as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise ConfigError(f"{key}: {node['_target_']} cannot be built ({cause}).") from None


def optimizer_factory(node: dict[str, Any], rate: float) -> Callable[[Any], Any]:
    """A function from parameters to an optimizer; `rate` is its first learning rate."""
    check_target(node, "optimizer", "params")
    if "lr" in node:
        raise ConfigError("optimizer.lr: the rate is set by learning_rate.peak.")

    def make(parameters: Any) -> Any:
        return build({**node, "_partial_": True}, "optimizer")(parameters, lr=rate)

    return make


def metric_functions(paths: list[str], options: dict[str, Any] | None = None) -> dict[str, Callable[..., float]]:
    """Metric functions (references, predictions) -> float by their last name, with the arguments that `options` gives.

    Raises ConfigError for a metric that does not exist, an option for none, or an argument that it does not take.
    """
    found: dict[str, Callable[..., float]] = {}
    for path in paths:
        name = path.rpartition(".")[2]
        if name in found:
            raise ConfigError(f"task.metrics: two metrics are called {name}; keep one, or give one another name.")
        found[name] = find(path, "task.metrics")
    for name, arguments in (options or {}).items():
        if name not in found:
            raise ConfigError(f"task.metric_options.{name}: not among task.metrics{did_you_mean(name, found)}")
        takes = list(inspect.signature(found[name]).parameters)[2:]
        for argument in arguments:
            if argument not in takes:
                raise ConfigError(
                    f"task.metric_options.{name}.{argument}: no such option{did_you_mean(argument, takes)}"
                )
        found[name] = partial(found[name], **arguments)
    return found


def reads_text(path: str) -> bool:
    """Whether a metric compares texts; the others compare targets with probabilities or numbers."""
    return path.startswith("llmft.metrics.text.")
