"""Generation by an OpenAI-compatible server (OpenAI, Azure, vLLM, llama.cpp, `transformers serve`).

Requests run concurrently on an event loop that runs while the caller waits for results. Failures are handled in three
ways. A request that may succeed later is retried: a 429 when the server says so; a 5xx, a lost connection, a time-out
or a malformed reply after a back-off. A request that the server will never accept ends as a generation with an `error`.
A server that is gone, an account without credit, or a spent budget stops the run, and finished rows are kept. Status
and error code decide which case applies, never the wording of a message.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import openai

from config.errors import UserError, first_line
from config.settings import THOUGHT_TAGS, OpenAIExpertSettings, ServerSettings
from safer_instruct.generation.calls import PROBE, PROBE_SCHEMA, Run
from safer_instruct.generation.completions import Generation, Request, row_seed, without_thought
from safer_instruct.generation.faults import (
    KEPT,
    Failed,
    Refused,
    cause_of,
    is_about_account,
    is_about_row,
    is_address,
    own_words,
)
from safer_instruct.generation.pacing import Budget, retry_after_seconds
from safer_instruct.generation.replies import (
    error_fields,
    error_inside,
    error_status,
    message_texts,
    read_finish,
    token_count,
    utf8,
)
from safer_instruct.text.display import without_password
from safer_instruct.text.examples import short_hash

log = logging.getLogger(__name__)
# One line per request would bury everything else, and would contain the address with its password.
for library in ("openai", "httpx", "httpx2"):  # the client's transport is one of the two, by its version
    logging.getLogger(library).setLevel(logging.WARNING)

UNSUPPORTED = {"unsupported_parameter", "unsupported_value"}
DROPPABLE = {"temperature", "top_p", "seed", "response_format"}
LIMITS = ("max_tokens", "max_completion_tokens")  # of new tokens: older and newer name
RETRIED = (408, 409, 424, 425, 429, 498, 499)  # besides 5xx; 424 and 498 are those of TGI and Groq that are busy


@dataclass(frozen=True, slots=True)
class Decoding:
    """The decoding settings sent to the server."""

    chat: bool  # True: prompts are user turns of a chat; False: plain text to continue (the reversed model)
    max_new_tokens: int  # limit per answer
    temperature: float  # 0 is greedy
    top_p: float = 1.0  # nucleus sampling; 1 turns it off, and is not sent
    seed: int | None = None  # combined with the row id to seed each request; None: not sent
    structured_output: str = "never"  # auto | always | never


class OpenAIGenerator:
    """Completions with bounded concurrency; each result is yielded as soon as it arrives."""

    def __init__(
        self,
        settings: ServerSettings,
        decoding: Decoding,
        *,
        key: str,
        budget: Budget | None = None,
        thought_tags: Sequence[str] = THOUGHT_TAGS,
    ) -> None:
        """Bind a server; nothing is sent.

        `key` is the prefix of the settings in messages (expert, generation.server); without a `budget`, spending is
        unlimited.
        """
        self.settings = settings
        self.decoding = decoding
        self.budget = budget or Budget()
        self.name = f"openai:{settings.model}"
        # The address is not included: the same model at another port gives the same answers.
        tags = [] if tuple(thought_tags) == THOUGHT_TAGS else list(thought_tags)
        identity = (settings.model, decoding, *tags)
        self.fingerprint = short_hash(repr(identity))
        self.takes_schema: bool | None = {"always": True, "never": False}.get(decoding.structured_output)
        self.key = key
        self.address = without_password(settings.base_url or "https://api.openai.com/v1")
        self._thought_tags = thought_tags
        self._unsupported: set[str] = set()  # parameters that this server's model does not accept

    def check(self) -> None:
        """Request one short completion, to verify that address, key, model and parameters work.

        Raises:
            UserError: The key's variable is not set, the server cannot be reached, or it refuses the request.
        """
        asyncio.run(self._probe())

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request in the order in which the server answers.

        Raises:
            UserError: The server failed for good, or the budget is spent. By then every answer that was in flight has
                been yielded.
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
        """Return a client for the running event loop. It neither retries (we do) nor follows redirects.

        Raises:
            UserError: The key's variable is not set or does not hold a key, or the address is malformed.
        """
        variable, key = self.settings.api_key_env, self._key()
        if not key:
            raise UserError(
                f"{self.key} reads the server's key from the environment variable {variable}, which is not set: export "
                f"{variable}=... (any text for a server that needs no key), or name another variable with "
                f"{self.key}.api_key_env=NAME"
            )
        if not (key.isascii() and key.isprintable()) or " " in key:
            raise UserError(f"the environment variable {variable} holds no key: a key has no spaces and is ASCII")
        if self.settings.base_url is not None and not is_address(self.settings.base_url):
            raise UserError(f"{self.key}.base_url={self.address}: not an address; write http://HOST:PORT/v1")
        try:
            return openai.AsyncOpenAI(
                api_key=key,
                base_url=self.settings.base_url,
                timeout=self.settings.timeout_seconds,
                max_retries=0,
                # A redirect would send the prompt to an address that nobody has named, or turn it into a GET.
                http_client=openai.DefaultAsyncHttpxClient(follow_redirects=False),
            )
        except Exception as error:  # of its own kinds, and of whatever reads the certificates
            raise UserError(
                f"{self.key}: no client can be made for {self.address} ({without_password(first_line(error))}); look "
                "at the variables HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, SSL_CERT_FILE, SSL_CERT_DIR of the environment"
            ) from None

    def _key(self) -> str:
        return os.environ.get(self.settings.api_key_env, "").strip()  # files of secrets often end in a newline

    async def attempt(self, client: openai.AsyncOpenAI, request: Request) -> Generation:
        """Send one request, and return its completion.

        Raises:
            Refused: The server will never accept it.
            Failed: It may succeed later.
            UserError: No request can succeed: wrong key, unknown model, quota used up.
        """
        options = self._options(request)
        create = client.chat.completions if self.decoding.chat else client.completions
        try:
            # The client's own time-out restarts with every byte, so a server that trickles would never time out.
            async with asyncio.timeout(self.settings.timeout_seconds):
                raw = await create.with_raw_response.create(**options)
        except (TimeoutError, openai.APITimeoutError):
            raise Failed("timeout") from None
        except openai.APIConnectionError as error:
            raise Failed(f"no_connection ({cause_of(error)})") from None
        except openai.APIStatusError as error:
            fields = error_fields(error.body)
            if self._leave_out(fields, options):
                return await self.attempt(client, request)
            status = error_status(fields, error.status_code)
            raise self._status_error(status, fields, error.response.headers, request) from None
        try:
            body = json.loads(raw.content)
            if (inside := error_inside(body)) is None:
                generation = self._read(request.id, body)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise Failed("malformed_reply", retry_after_seconds(raw.headers)) from None
        if inside is not None:
            raise self._status_error(*inside, raw.headers, request)
        return without_thought(generation, self._thought_tags, request.prompt)

    def _options(self, request: Request) -> dict[str, Any]:
        decoding = self.decoding
        options: dict[str, Any] = {"model": self.settings.model, "temperature": decoding.temperature}
        if decoding.top_p < 1:
            options["top_p"] = decoding.top_p
        if decoding.seed is not None:
            options["seed"] = row_seed(decoding.seed, request.id, 4)
        # OpenAI's newer models reject `max_tokens`; most other servers accept nothing else.
        is_openai = decoding.chat and self.settings.base_url is None
        limit = next(name for name in LIMITS if name not in self._unsupported and not (is_openai and name == LIMITS[0]))
        options[limit] = decoding.max_new_tokens
        if decoding.chat:
            turns = zip(("user", "assistant", "user"), (request.prompt.text, *request.turns), strict=False)
            options["messages"] = [{"role": role, "content": text} for role, text in turns if text.strip()]
        else:
            options["prompt"] = request.prompt.text
        if decoding.chat and request.schema is not None:
            named = {"name": "answer", "schema": dict(request.schema), "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": named}
        return {name: value for name, value in options.items() if name not in self._unsupported}

    def _leave_out(self, error: Mapping[str, Any], options: dict[str, Any]) -> bool:
        """Remember a parameter that the model does not accept; return whether the request can be sent without it."""
        name = str(error.get("param"))
        if str(error.get("code")) not in UNSUPPORTED or name not in options or name not in {LIMITS[0], *DROPPABLE}:
            return False
        if name not in self._unsupported:
            self._unsupported.add(name)
            instead = f"; {LIMITS[1]} takes its place" if name == LIMITS[0] else ""
            log.warning("warning: %s takes no %s, which is left out%s", self.name, name, instead)
        return True

    def _read(self, id: str, body: Any) -> Generation:
        choice, usage = body["choices"][0], body.get("usage") or {}
        prompt_tokens, new_tokens = (token_count(usage.get(name)) for name in ("prompt_tokens", "completion_tokens"))
        cost = self.budget.charge(prompt_tokens, new_tokens)
        truncated, error = read_finish(choice.get("finish_reason"))
        text = thought = ""
        if not error:
            text, thought = message_texts(choice["message"]) if self.decoding.chat else (choice["text"], "")
        return Generation(
            id=id,
            text=utf8(text),
            truncated=truncated,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            error=error,
            cost=cost,
            thought=utf8(thought),
        )

    def _status_error(
        self, status: int, fields: dict[str, Any], headers: Mapping[str, str], request: Request
    ) -> Exception:
        """Classify an error as Refused, Failed, or a UserError that stops the run."""
        codes = (str(fields.get("code")), str(fields.get("type")))
        words = own_words(fields, request, self._key())
        said = f"HTTP {status}{f': {words}' if words else ''}"
        if is_about_account(status, codes):
            return UserError(
                f"{self.address}: {said}: the account's quota is used up, or it has no credit left. {KEPT}"
            )
        if status in RETRIED or status >= 500:
            return Failed(f"http_{status}", retry_after_seconds(headers), throttled=status == 429, words=words)
        if status == 401:
            return self.refusal_error(Refused(status, words))
        if status == 404:
            return UserError(
                f"{self.address}: {said}: is there a model {self.settings.model} ({self.key}.model), and does "
                f"the address ({self.key}.base_url) end in /v1? {KEPT}"
            )
        return Refused(status, words, about_row=is_about_row(status, codes))

    def refusal_error(self, refused: Refused) -> UserError:
        """Return the error to show when the server refuses every request."""
        if refused.status in (401, 403):
            why = f"the key in {self.settings.api_key_env} is not accepted"
            why += ", or its account may not do this (any more)" if refused.status == 403 else ""
        elif refused.status < 400:
            why = f"it redirects to another address: give the final one as {self.key}.base_url"
        else:
            why = (
                f"is there a model {self.settings.model} ({self.key}.model), does it take "
                f"temperature={self.decoding.temperature} and {self.decoding.max_new_tokens} new tokens, and is the "
                "account in order?"
            )
        return UserError(f"{self.address} refuses every request ({refused}): {why}. {KEPT}".replace("?.", "?"))

    async def _probe(self) -> None:
        run, refused = Run(self, is_probe=True), None
        schemas = {None: (PROBE_SCHEMA, None), True: (PROBE_SCHEMA,), False: (None,)}[self.takes_schema]
        async with self.open() as client:
            try:
                for schema in schemas:
                    try:
                        await run.ask(client, replace(PROBE, schema=schema))
                    except Refused as error:
                        refused = error
                    else:
                        self.takes_schema = schema is not None
                        return
                assert refused is not None
                raise self.refusal_error(refused)
            except UserError as error:
                said = f"a test of the server failed: {error}".replace(f" {KEPT}", "")
                if schema is not None and "HTTP 5" in said:
                    said += f" Perhaps it takes no JSON schema: {self.key}.structured_output=never asks without one."
                raise UserError(said) from None


async def _next(answers: AsyncIterator[list[Generation]]) -> list[Generation]:
    return await anext(answers)


def expert_server(settings: OpenAIExpertSettings, budget: Budget | None = None) -> OpenAIGenerator:
    """Return the server of `expert=openai`."""
    decoding = Decoding(
        chat=True,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        structured_output=settings.structured_output,
    )
    limits = budget or budget_of(settings)
    return OpenAIGenerator(settings, decoding, key="expert", budget=limits, thought_tags=settings.thought_tags)


def budget_of(settings: OpenAIExpertSettings, *, shards: int = 1) -> Budget:
    """Return one shard's equal part of the expert's budget, with nothing spent yet."""
    return Budget(
        max_cost=None if settings.max_cost is None else settings.max_cost / shards,
        max_tokens=None if settings.max_tokens is None else settings.max_tokens // shards,
        price_prompt=settings.price_prompt,
        price_completion=settings.price_completion,
    )
