"""Config to objects: the only place where a dotted path of a config becomes code.

A path must be defined in a package that the key allows, and be of the kind that the key expects. So opening another's
run directory does not run code that its config names. Arguments are plain data: nothing is resolved or built in them.
They are bound to the signature before any weights load, since a misspelt one would otherwise fail only in a call.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

from llmft.core.errors import ConfigError, did_you_mean, first_line

KINDS: dict[str, tuple[tuple[str, ...], str, str | None]] = {
    "optimizer": (("torch.optim.", "bitsandbytes.optim."), "an optimizer", "torch.optim.Optimizer"),
    "callback": (("lightning.pytorch.callbacks.",), "a callback", "lightning.pytorch.callbacks.Callback"),
    "logger": (("lightning.pytorch.loggers.",), "a logger", "lightning.pytorch.loggers.Logger"),
    "strategy": (("lightning.pytorch.strategies.",), "a strategy", "lightning.pytorch.strategies.Strategy"),
    "objective": (("llmft.training.objectives.",), "a class with a method losses(model, batch)", None),
    "loss": (("llmft.training.objectives.preference_losses.",), "a function of (pairs, beta, …)", None),
    "metric": (("llmft.metrics.",), "a function of (references, predictions)", None),
    "source": (("llmft.data.",), "a function of (split, num_rows, seed, …)", None),
    "reward": (("llmft.metrics.rewards.",), "a function of answers, and of prompts and references where it asks", None),
    "combination": (("llmft.metrics.rewards.",), "a function of judges' scores", None),
}
"""By kind: the allowed packages, a description, and the base class."""
SOURCE_ARGUMENTS = ("split", "num_rows", "seed")
HYDRA_KEYWORDS = ("_target_", "_args_", "_recursive_", "_convert_", "_partial_")
LIBRARIES = ("torch", "lightning", "bitsandbytes", "llmft")
_trusted: set[str] = set()


def trust(packages: Iterable[str]) -> None:
    """Allows dotted paths into `packages` in this process. Only call it with what a user typed."""
    for package in packages:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", package):
            raise ConfigError(f"trusted_packages: {package!r} is not the name of a package.")
        _trusted.add(package)


def _in_packages(path: str, prefixes: Iterable[str]) -> bool:
    return f"{path}.".startswith(tuple(prefixes))


def find(path: str, key: str, kind: str) -> Any:
    """The class or function at a dotted `path`, in a package that `kind` allows or the command line trusts.

    `key` is the config key in errors.
    """
    prefixes, description, base = KINDS[kind]
    allowed = (*prefixes, *(f"{package}." for package in sorted(_trusted)))
    module_name, _, name = path.rpartition(".")
    if not module_name or not _in_packages(module_name, allowed):
        package = path.partition(".")[0]
        hint = f"; for your own code set trusted_packages=[{package}] on the command line"
        hint = "" if package in LIBRARIES or not package.isidentifier() else hint
        allowed_paths = ", ".join(f"{prefix}*" for prefix in prefixes)
        raise ConfigError(f"{key}={path}: only {allowed_paths} may be named in a config{hint}.")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"{key}={path}: {error}.") from None
    if not hasattr(module, name):
        options = [option for option in vars(module) if not option.startswith("_")]
        raise ConfigError(f"{key}={path}: {module_name} has no {name}{did_you_mean(name, options)[:200]}")
    target = getattr(module, name)
    # A module also contains its imports: `llmft.training.x.os` must be refused.
    if not callable(target) or not _in_packages(str(getattr(target, "__module__", "")), allowed):
        raise ConfigError(f"{key}={path}: not a class or function of that package.")
    if base is not None:
        base_module, _, base_name = base.rpartition(".")
        fits = inspect.isclass(target) and issubclass(target, getattr(importlib.import_module(base_module), base_name))
    elif kind == "objective":
        fits = inspect.isclass(target) and callable(getattr(target, "losses", None))
    else:
        fits = inspect.isfunction(target) and _has_arguments_of(kind, inspect.signature(target))
    if not fits:
        raise ConfigError(f"{key}={path}: {description} was expected.")
    return target


def _has_arguments_of(kind: str, signature: inspect.Signature) -> bool:
    """Whether a function of this signature is one of `kind`."""
    names = [*signature.parameters]
    if kind in ("reward", "combination"):
        return ("answers" in names) == (kind == "reward")
    if kind in ("loss", "source"):
        first = ["pairs", "beta"] if kind == "loss" else [*SOURCE_ARGUMENTS]
        return names[: len(first)] == first
    try:
        signature.bind(None, None)  # a metric's references and predictions
    except TypeError:
        return False
    return True


def check_target(node: dict[str, Any], key: str, kind: str, *positional: str) -> tuple[Any, dict[str, Any]]:
    """The target of `node` and its arguments, checked together with the `positional` ones.

    Raises ConfigError naming an argument that does not fit.
    """
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{key}: has no _target_, so there is nothing to build.")
    target = find(str(node["_target_"]), f"{key}._target_", kind)
    arguments = {name: value for name, value in node.items() if name != "_target_"}
    _check_plain(arguments, key)
    check_arguments(target, str(node["_target_"]), arguments, key, *positional)
    return target, arguments


def check_arguments(
    target: Any, path: str, arguments: dict[str, Any], key: str, *positional: str, complete: bool = False
) -> None:
    """Raises ConfigError naming one of the `arguments`, set below `key`, that `target` does not take.

    With `complete`, these and the `positional` ones are all arguments, and a missing one is an error too.
    """
    try:
        signature = inspect.signature(target)
    except (ValueError, TypeError):
        return
    parameters = signature.parameters
    has_kwargs = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    for name in arguments:
        if name not in parameters and not has_kwargs:
            raise ConfigError(f"{key}.{name}: {path} takes no such argument{did_you_mean(name, parameters)}")
    try:
        (signature.bind if complete else signature.bind_partial)(*[None] * len(positional), **arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {path}: {error}.") from None


def _check_plain(value: Any, key: str) -> None:
    """Raises ConfigError for anything that Hydra or OmegaConf would build or resolve, at any depth."""
    if isinstance(value, dict):
        for name, item in value.items():
            if name in HYDRA_KEYWORDS or "${" in str(name):
                raise ConfigError(f"{key}.{name}: arguments are plain data, and nothing is built from them.")
            _check_plain(item, f"{key}.{name}")
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            _check_plain(item, f"{key}[{number}]")
    elif isinstance(value, str) and "${" in value:
        raise ConfigError(f"{key}={value}: nothing is resolved in an argument; write the value itself.")


def build(node: dict[str, Any], key: str, kind: str, **extra: Any) -> Any:
    """Builds the object of a `_target_` node. Raises ConfigError if that fails."""
    target, arguments = check_target(node, key, kind)
    try:
        return target(**arguments, **extra)
    except Exception as error:
        raise ConfigError(f"{key}: {node['_target_']} cannot be built ({first_line(error)}).") from None


def optimizer_factory(node: dict[str, Any], rate: float) -> Callable[[Any], Any]:
    """A function from parameters to an optimizer with the initial learning rate `rate`."""
    check_target(node, "optimizer", "optimizer", "params")
    if "lr" in node:
        raise ConfigError("optimizer.lr: set learning_rate.peak instead.")
    import torch

    # Wrong values such as betas=[1] are found here and not after the weights are loaded.
    build(node, "optimizer", "optimizer", params=[torch.nn.Parameter(torch.zeros(1, 1))], lr=rate)
    return lambda parameters: build(node, "optimizer", "optimizer", params=parameters, lr=rate)


def metric_functions(paths: list[str], options: dict[str, Any] | None = None) -> dict[str, Callable[..., float]]:
    """Metric functions (references, predictions) -> float by the last part of their path, with `options` as arguments.

    Raises ConfigError for an unknown metric, options of a metric that is not listed, or an unknown argument.
    """
    metrics: dict[str, Callable[..., float]] = {}
    for path in paths:
        name = path.rpartition(".")[2]
        if name in metrics:
            raise ConfigError(f"task.metrics: two metrics are called {name}; keep one, or give one another name.")
        metrics[name] = find(path, "task.metrics", "metric")
    for name, arguments in (options or {}).items():
        if name not in metrics:
            raise ConfigError(f"task.metric_options.{name}: not among task.metrics{did_you_mean(name, metrics)}")
        accepted = list(inspect.signature(metrics[name]).parameters)[2:]
        for argument in arguments:
            if argument not in accepted:
                hint = did_you_mean(argument, accepted)
                raise ConfigError(f"task.metric_options.{name}.{argument}: no such option{hint}")
        metrics[name] = partial(metrics[name], **arguments)
    return metrics


def reads_text(path: str) -> bool:
    """Whether a metric compares texts; other metrics take targets and probabilities or numbers."""
    return path.startswith("llmft.metrics.text.")
