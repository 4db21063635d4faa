"""Generation by an OpenAI-compatible server (OpenAI, Azure, vLLM, llama.cpp, `transformers serve`).

Requests run concurrently on an event loop that turns while results are waited for. What goes wrong has three kinds of
answers: a request that can succeed later is sent again (429 when the server says so; 5xx, lost connections, time-outs
and replies that are no completion behind a back-off), a request that this server will never take ends as a generation
with an `error`, and a server that is gone, or a budget that is spent, stops the run with everything kept.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import openai

from config.errors import UserError
from config.settings import OpenAIExpertSettings, ServerSettings
from safer_instruct.generation.calls import KEPT, PROBE_MESSAGES, PROBE_SCHEMA, Failed, Messages, Refused, Run
from safer_instruct.generation.completions import Generation, Request
from safer_instruct.generation.pacing import Budget, retry_after_seconds


@dataclass(frozen=True, slots=True)
class Decoding:
    """How the server is to generate.

    Attributes:
        chat: Prompts are a user's turns of a chat; False: plain text to continue (the reversed model).
        max_new_tokens: Limit of an answer.
        temperature: 0 is greedy.
        top_p: Nucleus; 1 is off, and not sent.
        seed: With (seed, row id) the server is seeded; None: not sent.
        structured_output: auto | always | never.
    """

    chat: bool
    max_new_tokens: int
    temperature: float
    top_p: float = 1.0
    seed: int | None = None
    structured_output: str = "never"


class OpenAIGenerator:
    """Completions with bounded concurrency; each result is yielded as soon as it is there."""

    def __init__(self, settings: ServerSettings, decoding: Decoding, *, key: str, budget: Budget | None = None) -> None:
        """Bind a server; nothing is sent.

        Args:
            settings: Where it is, and how patiently it is asked.
            decoding: What it is asked for.
            key: Prefix of the settings' keys, for messages: expert, generation.server.
            budget: What may be spent; None: anything.
        """
        self.settings = settings
        self.decoding = decoding
        self.budget = budget or Budget()
        self.name = f"openai:{settings.model}"
        # Not the address: the same model behind another port gives the same answers.
        identity = (settings.model, decoding)
        self.fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
        self.takes_schema: bool | None = {"always": True, "never": False}.get(decoding.structured_output)
        self.key = key

    def check(self) -> None:
        """Ask the server for one short completion, so that address, key, model and parameters are known to work.

        Raises:
            UserError: The key's variable is not set, the server cannot be reached, or it refuses the request.
        """
        asyncio.run(self._probe())

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request in the order in which the server answers.

        Raises:
            UserError: The server failed for good, or the budget is spent. What was yielded before is complete, and
                every answer that was on its way has been yielded.
        """
        with asyncio.Runner() as runner:
            answers = Run(self).answers(requests)
            while True:
                try:
                    batch = runner.run(_next(answers))
                except StopAsyncIteration:
                    return
                yield from batch

    def open(self) -> openai.AsyncOpenAI:
        """A client for the event loop that runs. All retries are ours.

        Raises:
            UserError: The key's variable is not set.
        """
        key = os.environ.get(self.settings.api_key_env)
        if not key:
            raise UserError(
                f"{self.key} reads the server's key from the environment variable {self.settings.api_key_env}, which "
                f"is not set: export {self.settings.api_key_env}=... (any text for a server that wants no key), or "
                f"name another variable with {self.key}.api_key_env=NAME"
            )
        url = self.settings.base_url
        return openai.AsyncOpenAI(api_key=key, base_url=url, timeout=self.settings.timeout_seconds, max_retries=0)

    async def attempt(self, client: openai.AsyncOpenAI, id: str, messages: Messages, schema: Any) -> Generation:
        """Send one request; returns its completion.

        Raises:
            Refused: The server will never take it.
            Failed: It may later.
            UserError: Nothing can work: wrong key, unknown model, quota used up.
        """
        try:
            # The client's own time-out restarts with every byte: a server that trickles would never be given up.
            async with asyncio.timeout(self.settings.timeout_seconds):
                raw = await self._send(client, id, messages, schema)
        except (TimeoutError, openai.APITimeoutError):
            raise Failed("timeout") from None
        except openai.APIConnectionError as error:
            raise Failed(f"no_connection ({_cause(error)})") from None
        except openai.APIStatusError as error:
            raise self._status_error(client, error) from None
        try:
            return self._read(id, json.loads(raw.content))
        except (ValueError, LookupError, TypeError, AttributeError):
            raise Failed("malformed_reply", retry_after_seconds(raw.headers)) from None

    def _send(self, client: openai.AsyncOpenAI, id: str, messages: Messages, schema: Any) -> Any:
        options: dict[str, Any] = {"model": self.settings.model, "temperature": self.decoding.temperature}
        if self.decoding.top_p < 1:
            options["top_p"] = self.decoding.top_p
        if self.decoding.seed is not None:
            digest = hashlib.blake2b(f"{self.decoding.seed}/{id}".encode(), digest_size=4).digest()
            options["seed"] = int.from_bytes(digest, "little") >> 1
        if not self.decoding.chat:
            options |= {"prompt": messages[0]["content"], "max_tokens": self.decoding.max_new_tokens}
            return client.completions.with_raw_response.create(**options)
        # OpenAI's newer models refuse `max_tokens`; most other servers know nothing else.
        limit = "max_completion_tokens" if self.settings.base_url is None else "max_tokens"
        options |= {"messages": messages, limit: self.decoding.max_new_tokens}
        if schema is not None:
            named = {"name": "answer", "schema": dict(schema), "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
        return client.chat.completions.with_raw_response.create(**options)

    def _read(self, id: str, body: Any) -> Generation:
        choice, usage = body["choices"][0], body.get("usage") or {}
        text = choice["message"]["content"] if self.decoding.chat else choice["text"]
        if not isinstance(text, str | None):
            raise ValueError("the text of a completion must be a string")
        reason = choice.get("finish_reason")
        prompt_tokens, new_tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        return Generation(
            id=id,
            text=(text or "").encode("utf-8", "replace").decode(),  # JSON can hold half a surrogate pair
            truncated=reason == "length",
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            error="content_filter" if reason == "content_filter" else "",
            cost=self.budget.charge(prompt_tokens, new_tokens),
        )

    def _status_error(self, client: openai.AsyncOpenAI, error: openai.APIStatusError) -> Exception:
        """Sort an HTTP status into Refused, Failed, or a UserError that stops the run."""
        status = error.status_code
        if status == 429 and error.code == "insufficient_quota":
            return UserError(f"{client.base_url}: HTTP 429: the account's quota is used up. {KEPT}")
        if status in (408, 409, 429) or status >= 500:
            wait = retry_after_seconds(error.response.headers)
            return Failed(f"http_{status}", wait, throttled=status == 429)
        if status in (401, 403):
            return UserError(
                f"{client.base_url}: HTTP {status}: the key in {self.settings.api_key_env} is not accepted. {KEPT}"
            )
        if status == 404:
            return UserError(
                f"{client.base_url}: HTTP 404: is there a model {self.settings.model} ({self.key}.model), and does "
                f"the address ({self.key}.base_url) end in /v1? {KEPT}"
            )
        return Refused(f"http_{status}")

    async def _probe(self) -> None:
        run = Run(self, is_probe=True)
        async with self.open() as client:
            said: str | None = None
            try:
                if self.takes_schema is None:
                    self.takes_schema = True
                    said = await self._probe_once(client, run, PROBE_SCHEMA)
                    self.takes_schema = not said
                if said or self.takes_schema is False or not self.decoding.chat:
                    said = await self._probe_once(client, run, None)
            except UserError as error:
                raise UserError(f"a test of the server failed: {error}".replace(f" {KEPT}", "")) from None
            if said:
                raise UserError(
                    f"{client.base_url} refused a test ({said}): is there a model {self.settings.model} "
                    f"({self.key}.model), and does it take temperature={self.decoding.temperature} and "
                    f"{self.decoding.max_new_tokens} new tokens?"
                )

    async def _probe_once(self, client: openai.AsyncOpenAI, run: Run, schema: Any) -> str:
        """Return why the server refuses the test, "" if it does not."""
        try:
            await run.ask(client, "the test", PROBE_MESSAGES, schema)
        except Refused as error:
            return str(error)
        return ""


async def _next(answers: AsyncIterator[list[Generation]]) -> list[Generation]:
    return await anext(answers)


def expert_server(settings: OpenAIExpertSettings, budget: Budget | None = None) -> OpenAIGenerator:
    """The server of `expert=openai`."""
    decoding = Decoding(
        chat=True,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        structured_output=settings.structured_output,
    )
    limits = budget or budget_of(settings)
    return OpenAIGenerator(settings, decoding, key="expert", budget=limits)


def budget_of(settings: OpenAIExpertSettings, *, shards: int = 1) -> Budget:
    """The part of the expert's budget that one of `shards` has, nothing of it spent."""
    return Budget(
        max_cost=None if settings.max_cost is None else settings.max_cost / shards,
        max_tokens=None if settings.max_tokens is None else settings.max_tokens // shards,
        price_prompt=settings.price_prompt,
        price_completion=settings.price_completion,
    )


def _cause(error: BaseException) -> str:
    """Return the innermost cause: `Connection refused` rather than `Connection error.`."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return str(error) or type(error).__name__
