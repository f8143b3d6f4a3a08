"""Imports torch, transformers, PEFT and Lightning: quietly, and without passes of the garbage collector."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

NOISY = ("lightning", "transformers", "peft", "bitsandbytes", "torch", "accelerate", "huggingface_hub")


def load_libraries(*, training: bool = True) -> None:
    """Imports what a training or a prediction needs; without `training` all but Lightning.

    A fifth of the time would be the collector's, which looks through objects that all stay. LLMFT_TRACE=1 leaves the
    libraries their voice.
    """
    _quieten()
    collects = gc.isenabled()
    gc.disable()
    try:
        with quiet_warnings():
            if training:
                import lightning  # noqa: F401
            import bitsandbytes  # noqa: F401
            import peft  # noqa: F401
            import transformers.modeling_utils
    finally:
        if collects:
            gc.enable()
    _quieten()  # Lightning gives itself a voice when it is imported
    if not os.environ.get("LLMFT_TRACE"):
        transformers.utils.logging.disable_progress_bar()


def _quieten() -> None:
    if not os.environ.get("LLMFT_TRACE"):
        for name in (*NOISY, "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Inside, advice of these libraries' own modules is not shown; the filters of the program around stay as they are.

    Everybody else's warnings, and other kinds of theirs, are heard.
    """
    with warnings.catch_warnings():
        if not os.environ.get("LLMFT_TRACE"):
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(NOISY)})(\.|$)")
        yield


def missing(*names: str) -> list[str]:
    """Of the packages `names`, those that are not installed."""
    import importlib.util

    return [name for name in names if importlib.util.find_spec(name) is None]
