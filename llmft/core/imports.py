"""Imports torch, transformers, PEFT and Lightning quietly, with the garbage collector paused."""

from __future__ import annotations

import gc
import logging
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

NOISY = ("lightning", "transformers", "peft", "bitsandbytes", "torch", "accelerate", "huggingface_hub")
_restore: list[Callable[[], Any]] = []
"""Undoes what `load_libraries` silenced, in this order: a level that Lightning's import set is recorded last."""


def load_libraries(*, training: bool = True) -> None:
    """Imports the libraries of a training, or of a prediction (`training=False`: without Lightning).

    The garbage collector would take a fifth of the time. The libraries are quiet from then on, until
    `restore_messages`; LLMFT_TRACE=1 shows their messages.
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
    _quieten()  # Lightning sets its own log level when it is imported
    bars = transformers.utils.logging
    if not os.environ.get("LLMFT_TRACE") and bars.is_progress_bar_enabled():
        bars.disable_progress_bar()
        _restore.append(bars.enable_progress_bar)


def _quieten() -> None:
    if not os.environ.get("LLMFT_TRACE"):
        for name in (*NOISY, "lightning.pytorch", "lightning.fabric"):
            logger = logging.getLogger(name)
            if logger.level != logging.ERROR:
                _restore.append(partial(logger.setLevel, logger.level))
                logger.setLevel(logging.ERROR)


def restore_messages() -> None:
    """Gives the libraries back the log levels and the progress bar that `load_libraries` took away."""
    while _restore:
        _restore.pop(0)()


@contextmanager
def quiet_warnings() -> Iterator[None]:
    """Hides user, future and deprecation warnings of these libraries' modules inside the block. Others are shown."""
    with warnings.catch_warnings():
        if not os.environ.get("LLMFT_TRACE"):
            for category in (UserWarning, FutureWarning, DeprecationWarning):
                warnings.filterwarnings("ignore", category=category, module=rf"({'|'.join(NOISY)})(\.|$)")
        yield


def missing(*names: str) -> list[str]:
    """Those of the packages `names` that are not installed."""
    import importlib.util

    return [name for name in names if importlib.util.find_spec(name) is None]
