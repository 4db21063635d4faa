"""Generation by vLLM, on the GPUs of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from config.errors import UserError
from config.settings import BackendSettings, ModelSettings
from safer_instruct.generation.completions import Generation, Request, row_seed, without_thought
from safer_instruct.generation.decoding import TextDecoder
from safer_instruct.generation.models import load_tokenizer
from safer_instruct.generation.weights import is_adapter, require_as_saved, resolve_archive
from safer_instruct.generation.window import Window
from safer_instruct.text.prompts import Unusable


class VLLMGenerator:
    """vLLM's offline engine, given our own token ids and a seed for each row.

    The engine does its own scheduling and batching. Its kernels are not batch-invariant, so a row's text can change
    where two tokens are nearly tied.
    """

    def __init__(self, model: ModelSettings, settings: BackendSettings, *, name: str, fingerprint: str) -> None:
        """Start the engine.

        Raises:
            UserError: vLLM is not installed, the weights are a policy.pt, or the context leaves no room for a prompt.
        """
        try:
            import vllm
        except ImportError as error:
            raise UserError(
                "generation=vllm needs the package vllm, which is not installed (pip install vllm, "
                "on a machine with a GPU); generation=hf needs nothing more"
            ) from error
        source = resolve_archive(model.archive or model.name_or_path)
        if source.is_file() or is_adapter(source):
            raise UserError(
                f"model.archive={model.archive}: vLLM reads model folders, not policy.pt files or adapters; save one "
                "with train.py (of an adapter: checkpoint.merge=true), or use generation=hf"
            )
        require_as_saved(source)
        self.name = name
        self.fingerprint = fingerprint
        self._settings = settings
        self._parameters = vllm.SamplingParams
        self._engine = vllm.LLM(
            model=str(source),
            tokenizer=model.tokenizer_name_or_path or model.name_or_path,
            dtype=model.policy_dtype,
            tensor_parallel_size=settings.vllm.tensor_parallel,
            gpu_memory_utilization=settings.vllm.memory_fraction,
            max_model_len=settings.vllm.max_length,
            trust_remote_code=model.trust_remote_code,
            seed=settings.seed,
        )
        context = self._engine.llm_engine.model_config.max_model_len
        tokenizer = load_tokenizer(model)
        self.window = Window(tokenizer, context=context, max_new_tokens=settings.max_new_tokens, name=name)
        self._text = TextDecoder(tokenizer, settings.thought_tags)

    def check(self) -> None:
        """Do nothing: the engine is already running."""

    def generate(self, requests: Sequence[Request]) -> Iterator[Generation]:
        """Yield the generations once the engine has finished all `requests`; unusable prompts get an error first."""
        settings = self._settings
        rows = []
        for request in requests:
            try:
                rows.append((request, *self.window.encode(request.prompt)))
            except Unusable as unusable:
                yield Generation(request.id, "", error=unusable.reason)
        shared = {"max_tokens": settings.max_new_tokens, "temperature": settings.temperature, "top_p": settings.top_p}
        parameters = [self._parameters(**shared, seed=row_seed(settings.seed, request.id)) for request, _, _ in rows]
        prompts = [{"prompt_token_ids": ids} for _, ids, _ in rows]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False) if prompts else []
        for (request, ids, cut), output in zip(rows, outputs, strict=True):
            answer = output.outputs[0]
            ended = answer.finish_reason == "stop"  # by a token that is no part of the text
            generation = Generation(
                id=request.id,
                text=self._text(answer.token_ids[:-1] if ended else answer.token_ids),
                truncated=not ended,
                prompt_tokens=len(ids),
                new_tokens=len(answer.token_ids),
                prompt_cut=cut,
            )
            yield without_thought(generation, settings.thought_tags, request.prompt)
