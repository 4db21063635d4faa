"""Where a model runs: in this process (transformers), in vLLM's offline engine, or behind a server.

All are TextGenerators; a setting selects one (`generation=hf`, `vllm`, `openai`), and ledger headers record it. The
reversed model, evaluated models and `expert=local` are all built here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.settings import BackendSettings, ModelSettings
from safer_instruct.generation.completions import (
    Generation,
    Request,
    TextGenerator,
    describe_decoding,
    second_answer,
    second_request,
)
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from safer_instruct.generation.trained_as import AsTrained
from safer_instruct.generation.vllm import VLLMGenerator
from safer_instruct.generation.weights import model_fingerprint
from safer_instruct.text.chat import without_bos
from safer_instruct.text.examples import short_hash
from safer_instruct.text.prompts import Prompt, render_conversation, render_prompt, render_reversed

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

    from safer_instruct.generation.server import OpenAIGenerator


NO_TEMPLATE = ""  # for models whose prompts are already complete, such as classifiers


def model_name(model: ModelSettings) -> str:
    """Return the name of a model for reports: only the last parts of its paths.

    A published dataset must not reveal the user's file system.
    """
    name = Path(model.name_or_path).name
    return f"{name}@{Path(model.archive).name}" if model.archive else name


def reversed_model_identity(model: ModelSettings, generation: BackendSettings) -> tuple[str, str]:
    """Return (name, fingerprint) of the reversed model without loading it."""
    if generation.backend == "openai":
        server = _server(generation)
        return server.name, server.fingerprint
    return model_name(model), model_fingerprint(model)


def build_reversed_model(model: ModelSettings, generation: BackendSettings, device: torch.device) -> TextGenerator:
    """Load the reversed model, or connect to its server.

    Raises:
        UserError: It cannot be loaded or reached, or its prompt template does not fit into its context.
    """
    name, fingerprint = reversed_model_identity(model, generation)
    templates = [render_reversed("")]
    return build_generator(model, generation, device, templates=templates, name=name, fingerprint=fingerprint)


def build_generator(
    model: ModelSettings,
    generation: BackendSettings,
    device: torch.device,
    *,
    templates: Sequence[Prompt],
    name: str,
    fingerprint: str,
    key: str = "generation",
) -> TextGenerator:
    """Load a model, or connect to its server.

    Each of `templates`, prompts with an empty body, must fit into its context; `key` is the name of the `generation`
    settings in the command, for messages.

    Raises:
        UserError: It cannot be loaded or reached, or a template does not fit into its context.
    """
    if generation.backend == "openai":
        server = _server(generation, key)
        server.check()
        return server
    local: Any
    if generation.backend == "vllm":
        local = VLLMGenerator(model, generation, name=name, fingerprint=fingerprint)
    else:
        from safer_instruct.generation.hf import HFGenerator

        tokenizer = load_tokenizer(model)
        loaded = load_causal_lm(model)
        loaded.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
        local = HFGenerator(loaded, tokenizer, generation, name=name, fingerprint=fingerprint)
    for template in templates:
        local.window.require_room(template)
    return local


class TemplatedModel:
    """A model prompted through a template, and loaded at the first request: for `expert=local` and stage=replay."""

    def __init__(
        self,
        model: ModelSettings,
        settings: BackendSettings,
        device: torch.device,
        asked: AsTrained,
        *,
        prompts: Sequence[Prompt],
        key: str = "expert.generation",
    ) -> None:
        """Identify the model; nothing is loaded.

        The template is NO_TEMPLATE if prompts are complete; each of `prompts`, whose bodies are empty, must fit into
        the context; `key` is the name of `settings` in the command, for messages.

        Raises:
            UserError: There is no such model.
        """
        self.name = f"local:{Path(model.name_or_path).name}"
        identity = f"{model_fingerprint(model)}/{asked.identity}/{describe_decoding(settings)}"
        self.fingerprint = short_hash(identity)
        self._model, self._settings, self._device = model, settings, device
        self._asked, self._prompts, self._key = asked, prompts, key
        self._loaded: tuple[TextGenerator, PreTrainedTokenizerBase] | None = None

    def check(self) -> None:
        """Load only the tokenizer, so that a missing folder or chat template is reported before the weights load."""
        tokenizer = load_tokenizer(self._model)
        if self._asked.template != NO_TEMPLATE:
            render_prompt(self._asked.template, "", tokenizer=tokenizer)
        if self._settings.backend == "openai":
            _server(self._settings, self._key).check()

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield one generation per request; those whose answer cannot be read come last, after a second attempt."""
        by_id = {request.id: request for request in requests}
        again: list[Request] = []
        firsts: dict[str, Generation] = {}
        for first in self._generate(requests):
            second = second_request(by_id[first.id], first)
            if second is None:
                yield first
            else:
                again.append(second)
                firsts[first.id] = first
        for answer in self._generate(again) if again else ():
            yield second_answer(firsts[answer.id], answer)

    def _generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        generator, tokenizer = self._loaded or self._load()
        return generator.generate([Request(one.id, self._render(one, tokenizer)) for one in requests])

    def _render(self, request: Request, tokenizer: PreTrainedTokenizerBase) -> Prompt:
        """Put the prompt and the turns after it into a single turn, because few templates support a dialogue."""
        if request.conversation:
            return render_conversation(request.conversation, tokenizer)
        if self._asked.template == NO_TEMPLATE:
            return request.prompt._replace(head=without_bos(request.prompt.head, tokenizer))
        tail = "\n\n".join([request.prompt.tail, *request.turns])
        return in_template(
            self._asked.template, request.prompt._replace(tail=tail), tokenizer, self._asked.system or ""
        )

    def _load(self) -> tuple[TextGenerator, PreTrainedTokenizerBase]:
        tokenizer = load_tokenizer(self._model)
        generator = build_generator(
            self._model,
            self._settings,
            self._device,
            templates=[self._render(Request("", prompt), tokenizer) for prompt in self._prompts],
            name=self.name,
            fingerprint=self.fingerprint,
            key=self._key,
        )
        self._loaded = generator, tokenizer
        return self._loaded


def in_template(template: str, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, system: str = "") -> Prompt:
    """Put a whole prompt into a template as its instruction; only the prompt's own body may be cut."""
    outer = render_prompt(template, prompt.text, tokenizer=tokenizer, system=system)
    if outer.body != prompt.text:  # the template split the instruction: `hh`, with a dialogue in the material
        return outer
    return Prompt(outer.head + prompt.head, prompt.body, prompt.tail + outer.tail)


def _server(generation: BackendSettings, key: str = "generation") -> OpenAIGenerator:
    from safer_instruct.generation.server import Decoding, OpenAIGenerator

    decoding = Decoding(
        chat=False,
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed,
    )
    return OpenAIGenerator(generation.server, decoding, key=f"{key}.server", thought_tags=generation.thought_tags)
