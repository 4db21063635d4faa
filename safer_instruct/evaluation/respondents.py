"""The models of an evaluation: found, checked and identified before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from config.paths import find_path
from config.settings import EvaluatedModelSettings, ModelSettings
from safer_instruct.text.examples import text_id
from safer_instruct.text.prompts import render_prompt


@dataclass(frozen=True, slots=True)
class Respondent:
    """One model to be evaluated: checked and identified, its weights not loaded."""

    name: str
    path: str
    model: ModelSettings  # behind a server, too: its tokenizer has the template, and its files are its identity
    template: str
    prompt: str  # hash of the template's text, system prompt included: another wording is asked again
    fingerprint: str
    served_as: str | None = None  # its name at a server, where that is not the one of `generation.server`
    base_url: str | None = None  # of a server of its own
    system: str = ""  # what it is told before each prompt


def check_model(name: str, settings: EvaluatedModelSettings) -> Respondent:
    """Check everything about a model that can be wrong before its weights are loaded.

    Loads the tokenizer, tries the template, and reads the weight files once to check and once to hash them.

    Raises:
        UserError: No model or no tokenizer there, weights that are damaged or not finite, or a template that the
            tokenizer does not have.
    """
    from safer_instruct.generation.adapters import adapter_in, base_of
    from safer_instruct.generation.models import load_tokenizer
    from safer_instruct.generation.trained_as import as_trained
    from safer_instruct.generation.weights import check_weight_files, has_tokenizer, model_fingerprint, resolve_archive

    adapter = adapter_in(settings.path)
    base = settings.base or (base_of(adapter) if adapter is not None else None)
    model = ModelSettings(
        name_or_path=base or settings.path,
        archive=settings.path if base else None,
        tokenizer_name_or_path=str(adapter) if adapter is not None and has_tokenizer(adapter) else None,
        policy_dtype=settings.dtype,
    )
    tokenizer = load_tokenizer(model)
    keys = {"key": f"models.{name}", "path_key": f"models.{name}.path"}
    template, told = as_trained(settings.path, tokenizer, settings.template, settings.system, **keys)
    system = told or ""
    prompt = text_id(render_prompt(template, "", tokenizer=tokenizer, system=system).text)
    for path in (settings.path, base if adapter is not None else None):
        if path and find_path(path).exists() and (folder := resolve_archive(path)).is_dir():
            check_weight_files(folder)
            require_finite_weights(name, folder)
    served = {"served_as": settings.served_as, "base_url": settings.base_url}
    return Respondent(name, settings.path, model, template, prompt, model_fingerprint(model), system=system, **served)


NO_ANSWER = (
    "no answer of this model means anything; name an earlier checkpoint (models.NAME.path=RUN/checkpoints/step-N), or "
    "train it anew"
)


def require_finite_weights(name: str, folder: Path) -> None:
    """Refuse weights with a NaN or an infinity in them: whatever such a model says means nothing.

    Raises:
        UserError: Naming the first such tensor.
    """
    from safer_instruct.generation.weights import require_finite

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found = ((key, tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118  # no dictionary
            require_finite(found, f"models.{name}: {file}", NO_ANSWER)
