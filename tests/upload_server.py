"""The parts of a Hugging Face hub that an upload talks to, on the loopback, for the real client."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_of_tests"


@dataclass
class UploadHub:
    """What the server knows and got; ``refuse`` maps a path's beginning to the status that it answers with."""

    user: str = "someone"
    url: str = ""
    refuse: dict[str, int] = field(default_factory=dict)
    created: list[str] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def serve_uploads(hub: UploadHub) -> Iterator[UploadHub]:
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
    hub: UploadHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path.startswith("/api/whoami-v2"):
            self._send(200, {"name": self.hub.user, "type": "user", "orgs": [{"name": "some-team"}]})
        else:
            self._send(404, {"error": "not found"})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self._refused():
            return
        if self.path.startswith("/api/repos/create"):
            wanted = json.loads(body)
            repo = f"{wanted.get('organization') or self.hub.user}/{wanted['name']}"
            self.hub.created.append(repo)
            self._send(200, {"url": f"{self.hub.url}/{repo}"})
        elif self.path == "/api/validate-yaml":
            self._send(200, {"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self._send(200, {"files": modes})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.hub.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            repo = self.path.removeprefix("/api/models/").split("/commit/")[0]
            page = f"{self.hub.url}/{repo}/commit/{'0' * 40}"
            self._send(200, {"commitUrl": page, "commitOid": "0" * 40, "pullRequestUrl": None})
        else:
            self._send(404, {"error": "not found"})

    def _refused(self) -> bool:
        status = next((code for start, code in self.hub.refuse.items() if self.path.startswith(start)), None)
        if status is None and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            status = 401
        if status is not None:
            self._send(status, {"error": "refused"})
        return status is not None

    def _send(self, status: int, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
