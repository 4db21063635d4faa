"""Generation by an OpenAI-compatible server (OpenAI, Azure, vLLM, llama.cpp, `transformers serve`)."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import Any

import openai
from openai.types.chat import ChatCompletion

from config.errors import UserError
from config.settings import OpenAIExpertSettings
from safer_instruct.generation import Generation, Request

PROBE = "Reply with the single word: ready"
PROBE_RETRIES = 2  # an unreachable server is to be said within seconds


class OpenAIGenerator:
    """Chat completions with bounded concurrency; each result is yielded as soon as it is there.

    A request that the server refuses because of its content (HTTP 400, 413, 422), or answers with something that is
    no completion, ends as a generation with an `error`. Everything else that outlasts the client's retries (429, 5xx,
    time-outs, lost connections) raises a UserError, after the answers that are on their way have been yielded.
    """

    def __init__(self, settings: OpenAIExpertSettings) -> None:
        self.settings = settings
        self.name = f"openai:{settings.model}"
        # Not the address: the same model behind another port gives the same answers.
        identity = (settings.model, settings.temperature, settings.max_new_tokens)
        self.fingerprint = hashlib.blake2b(repr(identity).encode(), digest_size=8).hexdigest()
        self._opened: openai.OpenAI | None = None

    def check(self) -> None:
        """Ask the server for one short completion, so that address, key, model and parameters are known to work.

        Raises:
            UserError: The key's variable is not set, the server cannot be reached, or it refuses the request.
        """
        client = self._client().with_options(max_retries=min(PROBE_RETRIES, self.settings.max_retries))
        try:
            self._create(client, PROBE)
        except openai.APIConnectionError as error:
            raise UserError(
                f"expert.base_url: no answer from {client.base_url} ({_cause(error)}); start the server or give its "
                "address, for example expert.base_url=http://127.0.0.1:8000/v1"
            ) from None
        except openai.APIStatusError as error:
            # Nothing of the corpus was sent, so the server's own words may be shown.
            raise UserError(f"{client.base_url} refused a test: {self._advice(error)} {error.message}") from None
        except (ValueError, openai.APIResponseValidationError):
            raise UserError(
                f"expert.base_url: {client.base_url} answers, but not with a chat completion; the address of an "
                "OpenAI-compatible server usually ends in /v1"
            ) from None

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request in the order in which the server answers.

        Raises:
            UserError: The server failed for good. What was yielded before is complete and can be kept.
        """
        client = self._client()
        waiting = iter(requests)
        failure: UserError | None = None
        with ThreadPoolExecutor(max_workers=self.settings.concurrency) as pool:
            pending: set[Future[Generation]] = set()
            while True:
                if failure is None:
                    free = self.settings.concurrency - len(pending)
                    pending |= {pool.submit(self._complete, client, request) for request in islice(waiting, free)}
                if not pending:
                    break
                finished, pending = wait(pending, return_when=FIRST_COMPLETED)
                for future in finished:
                    try:
                        generation = future.result()
                    except UserError as error:
                        failure = failure or error
                    else:
                        yield generation
        if failure is not None:
            raise failure

    def _client(self) -> openai.OpenAI:
        if self._opened is None:
            key = os.environ.get(self.settings.api_key_env)
            if not key:
                raise UserError(
                    f"expert=openai reads its key from the environment variable {self.settings.api_key_env}, which is "
                    f"not set: export {self.settings.api_key_env}=... (any text for a server that wants no key), or "
                    "name another variable with expert.api_key_env=NAME"
                )
            self._opened = openai.OpenAI(
                api_key=key,
                base_url=self.settings.base_url,
                timeout=self.settings.timeout_seconds,
                max_retries=self.settings.max_retries,
            )
        return self._opened

    def _create(self, client: openai.OpenAI, text: str) -> ChatCompletion:
        """Send one request; raises a ValueError if the answer is no chat completion."""
        # OpenAI's newer models refuse `max_tokens`; most other servers know nothing else.
        limit = "max_completion_tokens" if self.settings.base_url is None else "max_tokens"
        options: dict[str, Any] = {limit: self.settings.max_new_tokens}
        completion = client.chat.completions.create(
            model=self.settings.model,
            messages=[{"role": "user", "content": text}],
            temperature=self.settings.temperature,
            **options,
        )
        if not isinstance(completion, ChatCompletion) or not completion.choices:
            raise ValueError("the server's answer is no chat completion")
        return completion

    def _complete(self, client: openai.OpenAI, request: Request) -> Generation:
        try:
            completion = self._create(client, request.prompt.text)
        except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
            return Generation(request.id, "", error=f"http_{error.status_code}")
        except openai.APIStatusError as error:
            if error.status_code == 413:
                return Generation(request.id, "", error="http_413")
            raise UserError(f"{client.base_url}: {self._advice(error)} {self._kept(request)}") from None
        except openai.APIConnectionError as error:
            raise UserError(f"{client.base_url}: no answer ({_cause(error)}). {self._kept(request)}") from None
        except (ValueError, openai.APIResponseValidationError):
            return Generation(request.id, "", error="malformed_reply")
        choice, usage = completion.choices[0], completion.usage
        return Generation(
            id=request.id,
            text=choice.message.content or "",
            truncated=choice.finish_reason == "length",
            prompt_tokens=usage.prompt_tokens if usage else 0,
            new_tokens=usage.completion_tokens if usage else 0,
            error="content_filter" if choice.finish_reason == "content_filter" else "",
        )

    def _advice(self, error: openai.APIStatusError) -> str:
        status = f"HTTP {error.status_code}"
        if error.status_code in (401, 403):
            return f"{status}: the key in {self.settings.api_key_env} is not accepted."
        if error.status_code in (400, 404):
            return f"{status}: is there a model {self.settings.model}, and does the address end in /v1?"
        if error.status_code == 429:
            return f"{status}: too many requests; lower expert.concurrency (now {self.settings.concurrency})."
        return f"{status}: the server failed."

    def _kept(self, request: Request) -> str:
        # The server's own words may quote the request, so only the row's id is shown.
        return (
            f"This was row {request.id} after {self.settings.max_retries} retries. Finished rows are kept: the same "
            "command goes on from there."
        )


def _cause(error: BaseException) -> str:
    """Return the innermost cause: `Connection refused` rather than `Connection error.`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
