"""A stand-in for the Hugging Face hub on loopback: the answers that its libraries need to list and to fetch files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from tests.loopback_server import serving

COMMIT = "a" * 40
_ASKED = re.compile(
    r"/(?P<api>api/)?(?P<kind>models/|datasets/|)(?P<name>[\w-]+/[\w-]+)(/(?P<what>resolve|tree|revision)/[^/]+)?/?(?P<rest>.*)"
)


@contextmanager
def hub_server(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Serve `root/models/ORG/NAME` and `root/datasets/ORG/NAME`; yield the address, and what was fetched so far."""
    fetched: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:  # http.server's name
            self._answer()

        def do_GET(self) -> None:  # likewise
            self._answer()

        def _answer(self) -> None:
            found = _ASKED.fullmatch(self.path.partition("?")[0])
            if found is None:
                return self._reply(404, b"")
            folder = root / (found["kind"] or "models") / found["name"]
            if found["what"] == "resolve":
                file = folder / found["rest"]
                if not file.is_file():
                    return self._reply(404, b"", **{"X-Error-Code": "EntryNotFound"})
                if self.command == "GET":
                    fetched.append(file.name)
                data = file.read_bytes()
                return self._reply(200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', **{"X-Repo-Commit": COMMIT})
            files = [_entry(folder, path) for path in sorted(folder.rglob("*")) if path.is_file()]
            inside = [one for one in files if one["path"].startswith(found["rest"])]
            about: Any = {"id": found["name"], "sha": COMMIT, "siblings": [{"rfilename": one["path"]} for one in files]}
            return self._reply(200, json.dumps(inside if found["what"] == "tree" else about).encode())

        def _reply(self, status: int, data: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(data))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with serving(Handler) as address:
        yield address, fetched


def _entry(folder: Path, file: Path) -> dict[str, Any]:
    path, size = file.relative_to(folder).as_posix(), file.stat().st_size
    return {"type": "file", "path": path, "size": size, "oid": hashlib.sha1(file.read_bytes()).hexdigest()}
