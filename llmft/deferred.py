"""Modules that are executed when they are first used, for what most trainings never call.

torch's compiler (`torch._dynamo`, `torch._inductor`) and its tensors of several devices take 0.6 s and 75 MiB to
import. Libraries import them for a decorator, for a question whether a model is compiled, or for a setting.
torchmetrics takes 0.1 s, for a question whether something is a metric.
"""

from __future__ import annotations

import importlib.util
import logging
import sys
import threading
from collections.abc import Callable
from functools import partial
from types import FunctionType, ModuleType
from typing import Any

_LOCK = threading.RLock()


class Deferred(ModuleType):
    """A module that is executed once anything is asked of it but what it was told beforehand.

    The object stays the same, as with `importlib.util.LazyLoader`, which cannot answer anything beforehand.
    """

    def __getattr__(self, name: str) -> Any:
        # Any module may be asked for names like `__warningregistry__`; the path is asked for by imports.
        settled = "__path__" not in self.__dict__
        if name.startswith("__") and name != "__path__" and not (settled and name == "__version__"):
            raise AttributeError(name)
        execute(self, name)
        return getattr(self, name)


def execute(module: Any, wanted: str) -> None:
    """Executes a module that was put off, once, for somebody who wants something of it."""
    with _LOCK:
        known: dict[str, Any] = module.__dict__
        if "_replay" not in known:
            return  # another thread has executed it in the meantime
        told = known.pop("_told", None)
        if told is None:
            raise AttributeError(wanted)  # its own code asks, too early as in any circular import
        for name in told:
            del known[name]
        module.__path__ = module.__spec__.submodule_search_locations
        try:
            module.__spec__.loader.exec_module(module)
        except BaseException:
            known["_told"] = ()  # the next one who asks hears of the error too
            raise
        replay = known.pop("_replay")
        module.__class__ = ModuleType
        if replay is not None:
            replay(module)


def defer(name: str, told: dict[str, Any] | None = None, replay: Callable[[Any], None] | None = None) -> None:
    """Puts off the package `name`, where it is not there already.

    Until `settle`, its submodules can be imported alone. It answers what is `told` without being executed; once it is,
    `replay` is called with it.
    """
    if name in sys.modules:
        return
    spec = importlib.util.find_spec(name)
    if spec is None:
        return
    module = importlib.util.module_from_spec(spec)
    module.__class__ = Deferred
    module.__dict__.update(told or {}, _told=tuple(told or ()), _replay=replay)
    sys.modules[name] = module
    parent, _, last = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], last, module)


def settle(name: str) -> None:
    """From here on, importing from the deferred package, or a submodule of it, executes it before."""
    module = sys.modules.get(name)
    if isinstance(module, Deferred):
        del module.__path__


def defer_metrics() -> None:
    """Puts off torchmetrics (0.1 s, 250 modules): Lightning asks whether what is logged is one of its metrics."""
    told: dict[str, Any] = {"_logger": logging.getLogger("torchmetrics")}
    defer("torchmetrics", told)
    package = sys.modules.get("torchmetrics")
    if not isinstance(package, Deferred):
        return
    try:
        import torchmetrics.utilities  # noqa: F401  # first: it and `metric` import each other
        from torchmetrics.collections import MetricCollection
        from torchmetrics.metric import Metric
    except ImportError:  # another version's parts may not be had alone
        execute(package, "Metric")
    else:
        told |= {"Metric": Metric, "MetricCollection": MetricCollection}
        package.__dict__.update(told, _told=tuple(told))


def defer_compiler() -> None:
    """Puts off torch's compiler, which can be asked much as long as nothing has been compiled."""
    import torch

    marked: list[tuple[str, Any]] = []
    asked: list[Any] = []

    def mark(name: str, function: Any) -> Any:
        marked.append((name, function))
        return function

    def disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
        """A function that asks for the compiler's own `disable` when it is called, as torch's own functions do."""
        if function is not None and not isinstance(function, FunctionType):
            execute(torch._dynamo, "disable")
            return torch._dynamo.disable(function, recursive, **options)
        if options.get("wrapping", True):
            return torch._disable_dynamo(function, recursive)
        asked.append(function)  # by such a function
        return function

    def replay(compiler: Any) -> None:
        for name, function in marked:
            getattr(compiler, name)(function)
        for function in asked:
            function.__dict__.pop("__dynamo_disable", None)  # it asks again

    told: dict[str, Any] = {name: partial(mark, name) for name in ("allow_in_graph", "assume_constant_result")}
    told |= {"disable": disable, "graph_break": lambda *_, **__: None, "OptimizedModule": _Compiled}
    defer("torch._dynamo", told, replay)
    defer("torch._inductor")


class _CompiledOrNot(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        compiler = sys.modules["torch._dynamo"]
        return not isinstance(compiler, Deferred) and isinstance(instance, compiler.OptimizedModule)


class _Compiled(metaclass=_CompiledOrNot):
    """In the place of `OptimizedModule`: nothing is one before the compiler has been executed."""
