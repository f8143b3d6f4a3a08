"""Local servers: a small Hub to push to, and servers that answer badly or not at all."""

from __future__ import annotations

import base64
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

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
    """The address of a server that answers with BAD[kind]."""
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


class Hub(ThreadingHTTPServer):
    """The part of the Hub that a push needs: it records the files of one repository and all requests.

    Attributes:
        public: whether the repository exists already and is public.
        refusing: parts of paths that are answered with 401; `silent`: not at all.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _HubHandler)
        self.files: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.created: dict[str, Any] = {}
        self.public = False
        self.refusing = self.silent = "nothing"
        self.large: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        """The value for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"


class _HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *arguments: Any) -> None:
        """Logs nothing."""

    def do_GET(self) -> None:
        private = not self.server.public
        answers = {"/api/whoami-v2": {"name": "me"}, "/api/models/me/writers": {"id": "me/writers", "private": private}}
        self._answer(answers.get(self.path.partition("?")[0]))

    def do_PUT(self) -> None:
        self.server.large[self.path.rpartition("/")[2]] = self._body()
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
            self._answer({"commitUrl": f"{self.server.address}/me/writers/commit/1", "commitOid": "1"})
            return
        request = json.loads(body)
        if self.path == "/api/repos/create":
            self.server.created = request
            self._answer({"url": f"{self.server.address}/me/writers"})
        elif "/preupload/" in self.path:
            kinds = {True: "lfs", False: "regular"}
            files = [
                {"path": file["path"], "uploadMode": kinds[file["path"].endswith("safetensors")], "shouldIgnore": False}
                for file in request["files"]
            ]
            self._answer({"files": files})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.server.address}/large/{one['oid']}"}}}
                for one in request["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        else:
            self._answer({})

    def _body(self) -> bytes:
        if re.search(self.server.silent, self.path):
            time.sleep(20)
        self.server.tokens.add(self.headers.get("Authorization", ""))
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _answer(self, content: dict[str, Any] | None) -> None:
        refused = content is None or re.search(self.server.refusing, self.path)
        text = json.dumps({"error": "not yours"} if refused else content).encode()
        with suppress(OSError):  # a client that gave up waiting
            self.send_response(401 if refused else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)


@contextmanager
def hub() -> Iterator[Hub]:
    """A Hub that ends with the block."""
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
