"""Where a model runs: in this process (transformers), in vLLM's offline engine, or behind a server.

All are TextGenerators; which one is a setting (`generation=hf`, `vllm`, `openai`) and part of a ledger's header.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from config.settings import BackendSettings, ModelSettings
from safer_instruct.generation.completions import TextGenerator
from safer_instruct.generation.models import load_causal_lm, load_tokenizer, model_fingerprint
from safer_instruct.generation.vllm import VLLMGenerator
from safer_instruct.text.prompts import Prompt, render_reversed

if TYPE_CHECKING:
    import torch


def reversed_model_identity(model: ModelSettings, generation: BackendSettings) -> tuple[str, str]:
    """Return (name, fingerprint) of the reversed model; nothing is loaded.

    Of paths only the last parts are told: a dataset that is passed on must not tell about the user's machine.
    """
    if generation.backend == "openai":
        server = _server(generation)
        return server.name, server.fingerprint
    name = Path(model.name_or_path).name
    return f"{name}@{Path(model.archive).name}" if model.archive else name, model_fingerprint(model)


def build_reversed_model(model: ModelSettings, generation: BackendSettings, device: torch.device) -> TextGenerator:
    """Load the reversed model, or reach its server.

    Raises:
        UserError: It cannot be loaded or reached, or the template of its prompt has no room in its context.
    """
    name, fingerprint = reversed_model_identity(model, generation)
    return build_generator(model, generation, device, template=render_reversed(""), name=name, fingerprint=fingerprint)


def build_generator(
    model: ModelSettings,
    generation: BackendSettings,
    device: torch.device,
    *,
    template: Prompt,
    name: str,
    fingerprint: str,
) -> TextGenerator:
    """Load a model, or reach its server.

    Args:
        model: Where it is; of a model behind a server nothing is read.
        generation: How it is run.
        device: Of backend=hf.
        template: A prompt with an empty body, for which there must be room.
        name: Shown in reports.
        fingerprint: Identifies the model in ledgers.

    Raises:
        UserError: It cannot be loaded or reached, or the template has no room in its context.
    """
    if generation.backend == "openai":
        server = _server(generation)
        server.check()
        return server
    if generation.backend == "vllm":
        return VLLMGenerator(model, generation, template=template, name=name, fingerprint=fingerprint)
    from safer_instruct.generation.hf import HFGenerator

    tokenizer = load_tokenizer(model)
    loaded = load_causal_lm(model)
    loaded.to(device)  # type: ignore[arg-type]  # transformers' decorator hides the signature
    generator = HFGenerator(loaded, tokenizer, generation, name=name, fingerprint=fingerprint)
    generator.require_room(template)
    return generator


def _server(generation: BackendSettings) -> Any:
    from safer_instruct.generation.server import Decoding, OpenAIGenerator

    decoding = Decoding(
        chat=False,
        max_new_tokens=generation.max_new_tokens,
        temperature=generation.temperature,
        top_p=generation.top_p,
        seed=generation.seed,
    )
    return OpenAIGenerator(generation.server, decoding, key="generation.server")
