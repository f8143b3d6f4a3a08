"""Imports torch and its kin, without their chatter, in half the time of a plain `import`."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib.machinery
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llmft.deferred import defer_compiler, defer_metrics, settle


def load_libraries(*, training: bool = True, several_devices: bool = False) -> None:
    """Imports what a training or a prediction needs; without `training` all but Lightning.

    Measured on one core: 1.8 s instead of 5.1 s, of which 1.1 s are passes of the garbage collector over objects that
    all stay, 0.7 s Inductor, 0.6 s scipy, 0.6 s torch's compiler and its tensors of several devices, which are loaded
    for what nobody calls here and take 75 MiB, 0.3 s of reading in transformers' files, and 0.1 s torchmetrics.
    LLMFT_TRACE=1 leaves the libraries their voice.
    """
    loud = bool(os.environ.get("LLMFT_TRACE"))
    if not loud:
        _quieten()
    if "torch" not in sys.modules and "transformers" not in sys.modules:
        _load(training, several_devices)
    elif training:
        import lightning  # noqa: F401
    if not loud:
        _quieten()  # Lightning gives itself a voice when it is imported
        import transformers.utils.logging

        transformers.utils.logging.disable_progress_bar()


def _quieten() -> None:
    for name in ("lightning", "lightning.pytorch", "lightning.fabric", "transformers", "peft", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def _load(training: bool, several_devices: bool) -> None:
    collects = gc.isenabled()
    gc.disable()
    try:
        import torch

        defer_compiler()
        import torch._dynamo.config  # both alone, for settings of torch that are kept there
        import torch._inductor.config

        with _without_scipy():
            with _files_read_once():
                import transformers.models
            with contextlib.nullcontext() if several_devices else _without_several_devices():
                import transformers.modeling_utils
        transformers.utils.is_scipy_available.cache_clear()
        if training:
            defer_metrics()
            import lightning  # noqa: F401

            settle("torchmetrics")
        with _compiled_when_called(torch):
            import bitsandbytes  # noqa: F401
        import peft.tuners.tuners_utils

        if not several_devices:
            peft.tuners.tuners_utils._torch_supports_distributed = False
        for name in ("torch._dynamo", "torch._inductor"):
            settle(name)
    finally:
        # Nobody has made a tensor yet: what is kept from the collector for good is modules and their like.
        gc.freeze()
        if collects:
            gc.enable()


@contextmanager
def _files_read_once() -> Iterator[None]:
    """transformers reads its 2,000 files for the names in them, and does so again for `transformers.models`.

    Here the second time gets what the first one found, and only the end of a file, where its list of names stands, is
    taken apart line by line (0.23 -> 0.10 s, the same names).
    """
    reader, function, names_of = "transformers.utils.import_utils", "create_import_structure_from_path", "fetch__all__"
    restore = contextlib.ExitStack()

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any = None, target: Any = None) -> Any:
            if name != reader:
                return None
            spec: Any = importlib.machinery.PathFinder.find_spec(name, path, target)
            execute = spec.loader.exec_module

            def execute_and_remember(module: Any) -> None:
                execute(module)
                read = getattr(module, function, None)
                if read is not None:  # as in the versions that were tested
                    setattr(module, function, functools.cache(read))
                    restore.callback(setattr, module, function, read)
                find = getattr(module, names_of, None)
                if find is not None:
                    # The last line that begins so counts; without one, the search's -1 leaves the whole text.
                    setattr(module, names_of, lambda content: find(content[content.rfind("\n__all__") + 1 :]))
                    restore.callback(setattr, module, names_of, find)

            spec.loader.exec_module = execute_and_remember
            return spec

    sys.meta_path.insert(0, Finder)
    with restore:
        try:
            yield
        finally:
            sys.meta_path.remove(Finder)


@contextmanager
def _without_several_devices() -> Iterator[None]:
    """transformers finds a torch that was built without torch.distributed, and asks no weight whether it is divided.

    Lightning, which divides the work here, knows better.
    """
    import transformers.utils.import_utils

    places: list[Any] = [transformers.utils, transformers.utils.import_utils]
    name = "is_torch_distributed_available"
    known = places[0].is_torch_distributed_available
    for place in places:
        setattr(place, name, lambda: False)
    try:
        yield
    finally:
        for place in places:
            setattr(place, name, known)


@contextmanager
def _without_scipy() -> Iterator[None]:
    """scipy seems not to be installed: transformers would take its optimisers for losses of pictures."""
    if "scipy" in sys.modules:
        yield
        return
    sys.modules["scipy"] = None  # type: ignore[assignment]  # the import system's own mark for what is not there
    try:
        yield
    finally:
        del sys.modules["scipy"]


@contextmanager
def _compiled_when_called(torch: Any) -> Iterator[None]:
    """`torch.compile` as a decorator waits for the first call.

    bitsandbytes decorates functions of its optimizers and of int8 on the CPU, which would load Inductor.
    """
    compile_now = torch.compile

    def later(function: Callable[..., Any] | None = None, **options: Any) -> Any:
        if function is None:
            return functools.partial(later, **options)
        made: list[Callable[..., Any]] = []

        @functools.wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            if not made:
                made.append(compile_now(function, **options))
            return made[0](*arguments, **named)

        return call

    torch.compile = later
    try:
        yield
    finally:
        torch.compile = compile_now
