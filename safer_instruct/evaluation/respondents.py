"""The models of an evaluation: found, checked and identified before any weights are loaded."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open

from config.errors import UserError
from config.paths import find_path
from config.settings import EvaluatedModelSettings, ModelSettings
from safer_instruct.report.training_runs import run_datasets
from safer_instruct.text.examples import text_id
from safer_instruct.text.prompts import render_prompt

DEFAULT_TEMPLATE = "alpaca"
log = logging.getLogger(__name__)


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
    template = _template(name, settings, has_chat_template=bool(tokenizer.chat_template))
    system = settings.system if settings.system is not None else run_setting(name, settings.path, "system")
    prompt = text_id(render_prompt(template, "", tokenizer=tokenizer, system=system).text)
    for path in (settings.path, base if adapter is not None else None):
        if path and find_path(path).exists() and (folder := resolve_archive(path)).is_dir():
            check_weight_files(folder)
            require_finite_weights(name, folder)
    served = {"served_as": settings.served_as, "base_url": settings.base_url}
    return Respondent(name, settings.path, model, template, prompt, model_fingerprint(model), system=system, **served)


def _template(name: str, settings: EvaluatedModelSettings, *, has_chat_template: bool) -> str:
    """Return the template that a model is asked with; note where it is, or may be, another than it was trained with."""
    key = f"models.{name}"
    if settings.template is not None:
        trained = sorted({one.template for one in run_datasets(settings.path).values()})
        if trained and settings.template not in trained:
            log.warning(
                "note: %s.template=%s, but %s.path=%s was trained with template=%s; leave %s.template out to ask as it "
                "was trained", key, settings.template, key, settings.path, " and ".join(trained), key,
            )  # fmt: skip
        return settings.template
    found = run_setting(name, settings.path, "template")
    if not found and has_chat_template:
        log.warning(
            "note: %s is asked with template=%s: no run of train.py round %s.path=%s tells how it was trained, and its "
            "tokenizer has a chat template; write %s.template=chat (or =%s, to say that it is right)",
            key, DEFAULT_TEMPLATE, key, settings.path, key, DEFAULT_TEMPLATE,
        )  # fmt: skip
    return found or DEFAULT_TEMPLATE


def run_setting(name: str, path: str, key: str) -> str:
    """Return `template` or `system` as a model was trained with it; "" for one that is not part of a run of train.py.

    Raises:
        UserError: Its run has several.
    """
    values = {dataset: vars(settings)[key] or "" for dataset, settings in run_datasets(path).items()}
    if len(set(values.values())) > 1:
        listed = ", ".join(f"datasets.{dataset}.{key}={value}" for dataset, value in values.items())
        raise UserError(f"models.{name}.path={path} was trained with {listed}: choose by models.{name}.{key}=NAME")
    return next(iter(values.values()), "")


def require_finite_weights(name: str, folder: Path) -> None:
    """Refuse weights with a NaN or an infinity in them: whatever such a model says means nothing.

    Raises:
        UserError: Naming the first such tensor.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            # NaN and infinity survive a sum, which takes a tenth of the time of `isfinite` and no memory; but the sum
            # of finite numbers may overflow, too.
            sums = ((key, tensors.get_tensor(key).sum()) for key in tensors.keys())  # noqa: SIM118  # no dictionary
            suspects = (key for key, total in sums if not total.isfinite())
            broken = next((key for key in suspects if not tensors.get_tensor(key).isfinite().all()), None)
        if broken is not None:
            raise UserError(
                f"models.{name}: {broken} in {file} holds NaN or infinite numbers, so that no answer of this model "
                "means anything; name an earlier checkpoint (models.NAME.path=RUN/checkpoints/step-N), or train it anew"
            )
