"""Servers on this machine that answer badly, or not at all."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

Answer = Callable[[socket.socket], None]
HEAD = b"HTTP/1.1 %b\r\nContent-Type: %b\r\nContent-Length: %d\r\nConnection: close\r\n%b\r\n"


def _page(status: bytes, kind: bytes, body: bytes, more: bytes = b"", missing: int = 0) -> Answer:
    return lambda connection: connection.sendall(HEAD % (status, kind, len(body) + missing, more) + body)


def _silent(connection: socket.socket) -> None:
    time.sleep(120)


def _dripping(connection: socket.socket) -> None:
    for byte in HEAD % (b"200 OK", b"application/json", 1000, b"") + b"{" * 1000:
        connection.sendall(bytes([byte]))
        time.sleep(0.2)


def _healthy_then_hanging() -> Answer:
    seen: list[int] = []

    def answer(connection: socket.socket) -> None:
        seen.append(1)
        if len(seen) > 1:
            _silent(connection)
        _page(b"200 OK", b"application/json", b'{"data": {}}')(connection)

    return answer


BAD: dict[str, Callable[[], Answer | None]] = {
    "refused": lambda: None,
    "silent": lambda: _silent,
    "dripping": lambda: _dripping,
    "html": lambda: _page(b"200 OK", b"text/html", b"<html>Please log in to the hotel's network</html>"),
    "status 500": lambda: _page(b"500 Internal Server Error", b"text/plain", b"oh"),
    "not http": lambda: lambda connection: connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\x00\xff\r\n\r\n"),
    "redirect loop": lambda: _page(b"302 Found", b"text/plain", b"", b"Location: /graphql\r\n"),
    "closed mid-stream": lambda: _page(b"200 OK", b"application/json", b'{"data"', missing=500),
    "healthy then hanging": _healthy_then_hanging,
}


@contextmanager
def server(kind: str) -> Iterator[str]:
    """The address of a server that answers as BAD[kind] says."""
    answer = BAD[kind]()
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"

        def serve(connection: socket.socket) -> None:
            assert answer is not None
            with suppress(OSError), connection:
                connection.recv(2**16)
                answer(connection)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    threading.Thread(target=serve, args=(listening.accept()[0],), daemon=True).start()

        if answer is not None:
            listening.listen()
            threading.Thread(target=accept, daemon=True).start()
        yield url
        with suppress(OSError):
            listening.shutdown(socket.SHUT_RDWR)
