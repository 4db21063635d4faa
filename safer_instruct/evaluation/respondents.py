"""Find, check and identify the models of an evaluation before any weights are loaded."""

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
    """One model to evaluate, checked and identified; its weights are not loaded."""

    name: str
    path: str
    model: ModelSettings  # even with a server: its tokenizer has the template, and its files identify it
    template: str
    prompt: str  # hash of the template's text with the system prompt: if its wording changes, prompts are asked again
    fingerprint: str
    served_as: str | None = None  # its name on the server; None: that of `generation.server`
    base_url: str | None = None  # its own server; None: that of `generation.server`
    system: str = ""  # system prompt


def check_model(name: str, settings: EvaluatedModelSettings) -> Respondent:
    """Check everything about a model that can be wrong before its weights are loaded.

    Loads the tokenizer, tries the template, and reads the weight files twice: to check and to hash them.

    Raises:
        UserError: The model or tokenizer is missing, the weights are damaged or not finite, or the tokenizer does not
            have the template.
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
    "the answers of this model would mean nothing; name an earlier checkpoint "
    "(models.NAME.path=RUN/checkpoints/step-N), or train it again"
)


def require_finite_weights(name: str, folder: Path) -> None:
    """Reject weights that hold a NaN or an infinity: the answers of such a model mean nothing.

    Raises:
        UserError: Names the first such tensor.
    """
    from safer_instruct.generation.weights import require_finite

    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            found = ((key, tensors.get_tensor(key)) for key in tensors.keys())  # noqa: SIM118  # no dictionary
            require_finite(found, f"models.{name}: {file}", NO_ANSWER)
