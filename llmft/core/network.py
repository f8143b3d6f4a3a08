"""Network requests with a total deadline; a socket timeout restarts with every byte received."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlparse

T = TypeVar("T")
LONGEST_ANSWER = 2**20
STALLED_S = 120.0


class NoAnswer(Exception):
    """No valid answer came in time; the message says what happened instead."""


def in_thread(action: Callable[[], T]) -> Future[T]:
    """Runs `action` in a daemon thread, which a caller may abandon."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True, name="network").start()
    return future


def host_of(url: str) -> str:
    """The host of an http(s) address; empty for any other text."""
    try:
        parts = urlparse(url)
        return (parts.hostname or "") if parts.scheme in ("http", "https") else ""
    except ValueError:
        return ""


def ask(
    url: str, seconds: float, *, headers: Mapping[str, str] | None = None, body: bytes | None = None
) -> tuple[int, bytes]:
    """(status, content) from `url`, with `seconds` for name look-up, redirects and content together.

    Raises NoAnswer. `headers` are not sent to the target of a redirect.
    """
    if not host_of(url):
        raise NoAnswer("not an http address")
    deadline = time.monotonic() + seconds

    def answer() -> tuple[int, bytes]:
        request = urllib.request.Request(url, data=body)
        for name, value in (headers or {}).items():
            request.add_unredirected_header(name, value)
        try:
            response = urllib.request.urlopen(request, timeout=seconds)
        except urllib.error.HTTPError as error:
            return error.code, b""
        with response:
            content = b""
            while (part := response.read1(2**16)) and len(content) < LONGEST_ANSWER and time.monotonic() < deadline:
                content += part
            missing = int(response.headers.get("Content-Length") or 0) - len(content)
            if missing > 0:
                raise http.client.IncompleteRead(content, missing)
            return response.status, content

    try:
        return in_thread(answer).result(seconds)
    except TimeoutError:
        raise NoAnswer(f"no complete answer within {seconds:g} s") from None
    except http.client.IncompleteRead:
        raise NoAnswer("the connection was closed in the middle of the answer") from None
    except http.client.HTTPException as error:
        raise NoAnswer(f"its answer is not HTTP ({type(error).__name__})") from None
    except Exception as error:
        reason = getattr(error, "reason", error)
        late = isinstance(reason, TimeoutError)
        cause = " ".join(str(reason).split())[:200] or type(error).__name__
        raise NoAnswer(f"no answer within {seconds:g} s" if late else cause) from None


DOWNLOAD = """
import importlib, json, sys
module, name, arguments = json.loads(sys.argv[1])
try:
    getattr(importlib.import_module(module), name)(**arguments)
except Exception as error:
    sys.exit(print(str(error) or type(error).__name__) or 1)
"""


def download(function: str, arguments: Mapping[str, Any], folder: Path, seconds: float = STALLED_S) -> None:
    """Calls `function` ("package.name") of a library in a separate process, to download into `folder`.

    Raises NoAnswer when it fails, or when nothing has arrived for `seconds`: then the process is killed, with the
    library's threads and retries.
    """
    call = json.dumps([*function.rsplit(".", 1), dict(arguments)])
    process = subprocess.Popen([sys.executable, "-P", "-c", DOWNLOAD, call], stdout=subprocess.PIPE, text=True)
    size, since = -1, time.monotonic()
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                output, _ = process.communicate(timeout=min(5.0, seconds / 4))
                break
            if (now := _bytes_below(folder)) != size:
                size, since = now, time.monotonic()
            elif time.monotonic() - since > seconds:
                raise NoAnswer(f"nothing more came within {seconds:g} s")
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise NoAnswer((output.strip().splitlines() or [f"the download ended with code {process.returncode}"])[0])


def _bytes_below(folder: Path) -> int:
    total = 0
    for directory, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # renamed meanwhile
                total += os.lstat(os.path.join(directory, name)).st_size
    return total
