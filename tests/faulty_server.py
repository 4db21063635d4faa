"""An OpenAI-compatible server on loopback that fails in every way a paid one does, at given rates, and counts.

    python -m tests.faulty_server --latency 0.4 --fault 429=0.2 --fault 500=0.1    prints its port, serves until killed

Faults: 429 (with Retry-After), 500, reset (the connection), hang (never answers), broken (JSON cut off), schema (JSON
of another form), empty. GET /stats tells what was counted.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

PROBE_WORDS = "single word: ready"  # the client's test of a server
GOOD = json.dumps({"well_formed": True, "unsafe": True, "response_fits": True, "category": "theft"})
FAULTS = {"429": 0.20, "500": 0.10, "reset": 0.05, "hang": 0.05, "broken": 0.05, "schema": 0.05, "empty": 0.02}
TEXTS = {
    "broken": GOOD[:-9],
    "schema": json.dumps({"verdict": "keep", "confidence": 0.9}),
    "empty": "",
    "good": GOOD,
}


class FaultyServer:
    """Counts by kind, and the good answers by row (the word behind `Take item `, else the prompt)."""

    def __init__(self, faults: Mapping[str, float], *, latency: float, retry_after: float, seed: int = 0) -> None:
        self.faults = faults
        self.latency = latency
        self.retry_after = retry_after
        self.counts: Counter[str] = Counter()
        self.good: Counter[str] = Counter()
        self.most_at_once = 0
        self._at_once = 0
        self._random = random.Random(seed)

    def draw(self) -> str:
        value = self._random.random()
        for kind, share in self.faults.items():
            if value < share:
                return kind
            value -= share
        return "good"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while request := await self._read(reader):
                if not await self._answer(request, writer):
                    break
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader) -> tuple[str, bytes] | None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(x.split(":")[1]) for x in head.split("\r\n") if x.lower().startswith("content-length")), 0)
        return head, await reader.readexactly(length)

    async def _answer(self, request: tuple[str, bytes], writer: asyncio.StreamWriter) -> bool:
        head, body = request
        if head.startswith("GET"):
            stats = {"counts": self.counts, "good": self.good, "most_at_once": self.most_at_once}
            await self._reply(writer, 200, stats)
            return True
        asked = json.loads(body)
        prompt = asked["messages"][0]["content"]
        probe = PROBE_WORDS in prompt
        kind = "good" if probe else self.draw()
        self.counts["probe" if probe else kind] += 1
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            if kind == "hang":
                await asyncio.sleep(3600)
            if kind == "429":
                wait = {"Retry-After": f"{self.retry_after:g}"}
                await self._reply(writer, 429, {"error": {"message": "slow down"}}, wait)
                return True
            await asyncio.sleep(self.latency)
            if kind == "reset":
                writer.transport.abort()
                return False
            if kind == "500":
                await self._reply(writer, 500, {"error": {"message": "busy"}})
                return True
            answers = kind == "good" and not probe
            text = TEXTS[kind] if "The reply:" not in prompt or kind == "empty" else "I will not."
            if answers:
                self.good[_row(prompt)] += 1
            await self._reply(writer, 200, completion(text))
            return True
        finally:
            self._at_once -= 1

    async def _reply(
        self, writer: asyncio.StreamWriter, status: int, body: Any, headers: Mapping[str, str] = {}
    ) -> None:
        data = json.dumps(body).encode()
        lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {len(data)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + data)
        await writer.drain()


def _row(prompt: str) -> str:
    return prompt.split("Take item ")[1].split()[0] if "Take item " in prompt else prompt


def completion(text: str) -> dict[str, Any]:
    return {
        "id": "x", "object": "chat.completion", "created": 0, "model": "m",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 200, "completion_tokens": 30, "total_tokens": 230},
    }  # fmt: skip


@contextmanager
def faulty_server(
    faults: Mapping[str, float] = FAULTS, *, latency: float = 0.0, retry_after: float = 0.05, seed: int = 0
) -> Iterator[tuple[str, FaultyServer]]:
    """The server in a thread of its own: (address, counts)."""
    server = FaultyServer(faults, latency=latency, retry_after=retry_after, seed=seed)
    loop = asyncio.new_event_loop()
    listening = loop.run_until_complete(asyncio.start_server(server.serve, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}/v1", server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        listening.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--retry-after", type=float, default=1.0)
    parser.add_argument("--fault", action="append", default=[], help="KIND=SHARE")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    faults = {kind: float(share) for kind, share in (fault.split("=") for fault in options.fault)}
    server = FaultyServer(faults, latency=options.latency, retry_after=options.retry_after, seed=options.seed)

    async def run() -> None:
        listening = await asyncio.start_server(server.serve, "127.0.0.1", 0)
        print(listening.sockets[0].getsockname()[1], flush=True)
        await listening.serve_forever()

    asyncio.run(run())


if __name__ == "__main__":
    main()
