"""A Hugging Face hub of one repository on the loopback, for the real client, with faults to order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the server holds and how it misbehaves; tests change it while it runs."""

    repo: str
    files: dict[str, bytes]
    url: str = ""
    refuse_api: tuple[int, dict[str, str]] | None = None  # status and headers for every api request
    refuse_files: tuple[int, dict[str, str]] | None = None
    fail: dict[str, int] = field(default_factory=dict)  # file -> status of its download
    cut: dict[str, int] = field(default_factory=dict)  # file -> bytes after which the first transfer is cut off
    downloads: list[tuple[str, str | None]] = field(default_factory=list)  # (file, Range header)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the server until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        repo = re.escape(self.hub.repo)
        if re.fullmatch(rf"/api/models/{repo}(/revision/main)?", path):
            self._api(
                {"id": self.hub.repo, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.hub.files]}
            )
        elif re.fullmatch(rf"/api/models/{repo}/tree/{COMMIT}", path):
            self._api(
                [
                    {"type": "file", "path": name, "size": len(data), "oid": _etag(data)}
                    for name, data in self.hub.files.items()
                ]
            )
        elif match := re.fullmatch(rf"/{repo}/resolve/{COMMIT}/(.+)", path):
            self._file(match[1], body)
        else:
            self._send(404, {"X-Error-Code": "RepoNotFound"}, b"")

    def _api(self, value: Any) -> None:
        if self.hub.refuse_api:
            self._send(*self.hub.refuse_api, b"")
        else:
            self._send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def _file(self, name: str, body: bool) -> None:
        if self.hub.refuse_files:
            self._send(*self.hub.refuse_files, b"")
            return
        data = self.hub.files[name]
        headers = {"ETag": f'"{_etag(data)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if not body:
            self._send(200, headers, data, body=False)
            return
        wanted = self.headers.get("Range")
        self.hub.downloads.append((name, wanted))
        if name in self.hub.fail:
            self._send(self.hub.fail[name], {}, b"")
        elif wanted:
            start = int(wanted.removeprefix("bytes=").rstrip("-"))
            self._send(206, {**headers, "Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}, data[start:])
        else:
            self._send(200, headers, data, cut=self.hub.cut.pop(name, None))

    def _send(
        self, status: int, headers: dict[str, str], data: bytes, *, body: bool = True, cut: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data[:cut])
            self.wfile.flush()
        if cut is not None:
            self.close_connection = True


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
