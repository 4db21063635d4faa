"""An OpenAI-compatible server on loopback whose answers a test decides."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = str | tuple[int, Any]  # the text of a completion, or (HTTP status, body)


@dataclass
class Loopback:
    """The server's address and what it was asked: one (path, body, headers) a request."""

    url: str
    requests: list[tuple[str, dict[str, Any], dict[str, str]]] = field(default_factory=list)
    most_at_once: int = 0


def completion(text: str | None, finish_reason: str = "stop") -> dict[str, Any]:
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 4, "total_tokens": 15},
    }  # fmt: skip


@contextmanager
def loopback(
    answer: Callable[[str, int], Answer], *, retry_after_ms: int = 1, headers: Mapping[str, str] = {}
) -> Iterator[Loopback]:
    """Serve `answer(prompt, number of the request from 0)`; every reply has `headers`."""
    lock = threading.Lock()
    state = Loopback("")
    active = 0

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:  # http.server's name
            nonlocal active
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                number = len(state.requests)
                state.requests.append((self.path, body, {name.lower(): value for name, value in self.headers.items()}))
                active += 1
                state.most_at_once = max(state.most_at_once, active)
            prompt = body["messages"][0]["content"] if "messages" in body else body["prompt"]
            reply = answer(prompt, number)
            with lock:
                active -= 1
            status, content = (200, completion(reply)) if isinstance(reply, str) else reply
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", str(retry_after_ms))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None: ...

    with serving(Handler) as address:
        state.url = f"{address}/v1"
        yield state


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serve on a free port of loopback, and yield the address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
