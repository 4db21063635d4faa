"""Load tokenizers and causal language models; nothing else calls transformers' loaders.

Weights come from a folder in Hugging Face format, from a run or checkpoint of `train.py` (which contains one), or from
a `policy.pt` of the DPO repo. Nothing that could run code is unpickled, and no remote code runs unless
`model.trust_remote_code=true`. Weights that do not fit raise a UserError; no layer is silently left at random.
"""

from __future__ import annotations

import pickle
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
import transformers
from huggingface_hub import constants
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from config.errors import UserError, first_line
from config.paths import find_path
from config.settings import ModelSettings
from safer_instruct.generation.adapters import adapter_in, base_of, merge_adapter, quantization
from safer_instruct.generation.decoding import read_generation_config
from safer_instruct.generation.weights import (
    UNUSABLE,
    check_loading_info,
    check_same_architecture,
    check_tied,
    check_weight_files,
    has_tokenizer,
    is_adapter,
    read_policy_pt,
    refuse_gguf,
    require_as_saved,
    require_finite,
    resolve_archive,
    train_text_alone,
)
from safer_instruct.text.chat import special_token_texts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
HOW_TO_NAME = "Write model.name_or_path=FOLDER, or in evaluate.py models.NAME.path=FOLDER."
PROBE_SECONDS = 10


def load_tokenizer(settings: ModelSettings) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer, with a padding token (EOS if it has none of its own) and without truncation.

    Raises:
        UserError: There is no tokenizer, it has no EOS, or its tokens have no embeddings in the model.
    """
    name = settings.tokenizer_name_or_path or settings.name_or_path
    folder = find_path(name)
    source = folder if has_tokenizer(folder) else _source(name)
    vocabulary = _load_config(settings).get_text_config().vocab_size  # transformers reads the config anyway
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except UNUSABLE as error:
        raise UserError(
            f"{name} holds no tokenizer that can be read ({first_line(error)}). It needs tokenizer.json (or "
            "tokenizer.model and sentencepiece installed); model.tokenizer_name_or_path=FOLDER reads another folder."
        ) from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {name} has no EOS token (eos_token), which must end every response.")
    _require_embeddings(tokenizer, vocabulary, settings)
    _set_in_template(tokenizer, settings.chat_template_kwargs)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    tokenizer.model_max_length = int(1e12)  # we apply our own limits: max_length, max_prompt_length
    return tokenizer


def _require_embeddings(tokenizer: PreTrainedTokenizerBase, vocabulary: int, settings: ModelSettings) -> None:
    """Refuse tokens without an embedding, except special tokens other than BOS and EOS.

    Multimodal families have such tokens for images; no row uses them, as rows that hold a special token are dropped.
    """
    beyond = {text for text, number in tokenizer.get_vocab().items() if number >= vocabulary}
    unused = set(special_token_texts(tokenizer)) - {tokenizer.eos_token, tokenizer.bos_token}
    if beyond - unused:
        raise UserError(
            f"the tokenizer of {settings.tokenizer_name_or_path or settings.name_or_path} has {len(tokenizer)} tokens, "
            f"but the model {settings.name_or_path} has embeddings for {vocabulary}: they do not belong together. "
            "Give the model's own as model.tokenizer_name_or_path."
        )


def _set_in_template(tokenizer: PreTrainedTokenizerBase, values: Mapping[str, Any]) -> None:
    """Write variables into the chat template itself, so that whoever loads a checkpoint renders it the same way."""
    for name, value in values.items():
        if not name.isidentifier() or not isinstance(tokenizer.chat_template, str):
            raise UserError(
                f"model.chat_template_kwargs.{name}={value}: this sets a variable of the tokenizer's chat "
                "template, such as enable_thinking=false; the tokenizer must have one template"
            )
        tokenizer.chat_template = f"{{% set {name} = {value!r} %}}{tokenizer.chat_template}"


def load_causal_lm(settings: ModelSettings, *, dtype: str | None = None) -> PreTrainedModel:
    """Load a causal LM on the CPU, with the weights of `archive` if it is set, and with all dropout disabled.

    If the archive is an adapter, it is merged. A base in 4 bits is loaded on the GPU, if there is one. Without dropout
    the policy computes the same as the reference, so that DPO starts at ln 2. Dropout must be disabled in the config,
    too: functional dropout, such as `attention_dropout`, is not an `nn.Dropout` module and would stay on in training.

    `dtype` defaults to `settings.policy_dtype`.

    Raises:
        UserError: The weights are missing or damaged, or the archive has another architecture or contains code.
    """
    if settings.archive and (adapter := adapter_in(settings.archive)) is not None:
        base = load_causal_lm(replace(settings, archive=None), dtype=dtype)
        return merge_adapter(base, adapter, settings.name_or_path)
    config = _load_config(settings)
    _switch_dropout_off(config)
    options = {
        **_construction(settings, dtype),
        "config": config,
        "ignore_mismatched_sizes": True,  # reported by us, with the names
        "output_loading_info": True,
        **quantization(settings.lora.quantize, DTYPES[dtype or settings.policy_dtype]),
    }
    source = _source(settings.name_or_path)
    generation_config = read_generation_config(source)
    archive = resolve_archive(settings.archive) if settings.archive else None
    weights = archive or source
    if isinstance(weights, Path):
        require_as_saved(weights)
    with _readable_errors(str(archive or settings.name_or_path)):
        if archive is not None and archive.is_file():
            state = read_policy_pt(archive)
            with torch.device("meta"):
                kind = type(AutoModelForCausalLM.from_config(config, trust_remote_code=settings.trust_remote_code))
            model, info = kind.from_pretrained(None, state_dict=state, **options)
        else:
            if isinstance(weights, Path):
                check_weight_files(weights)
            if archive is not None:
                _check_same_architecture(config, archive, settings)
            loaded: Any = AutoModelForCausalLM.from_pretrained(weights, **options)
            model, info = loaded
    check_loading_info(info, weights, settings.name_or_path)
    check_tied(model, weights)
    advice = "the model cannot be used; give an earlier checkpoint, or copy it again"
    require_finite(model.named_parameters(), str(archive or settings.name_or_path), advice)
    return _prepared(model, generation_config)


def meta_causal_lm(settings: ModelSettings, *, dtype: str | None = None) -> PreTrainedModel:
    """Build the model of `load_causal_lm` on the meta device, without weights, which `place_model` fills in.

    The archive is not needed: it changes the weights, not their shapes.

    Raises:
        UserError: There is no usable config.json.
    """
    config = _load_config(settings)
    _switch_dropout_off(config)
    with torch.device("meta"), _readable_errors(settings.name_or_path):
        model = AutoModelForCausalLM.from_config(config, **_construction(settings, dtype))
    return _prepared(model, read_generation_config(_source(settings.name_or_path)))


def _construction(settings: ModelSettings, dtype: str | None) -> dict[str, Any]:
    """Return the arguments that decide how a model computes, whether its weights are loaded or filled in later."""
    options = {
        "dtype": DTYPES[dtype or settings.policy_dtype],
        "attn_implementation": settings.attn_implementation,
        "trust_remote_code": settings.trust_remote_code,
    }
    if options["dtype"] == torch.float64:
        options["experts_implementation"] = "eager"  # the default for a mixture of experts has no float64
    return options


def _prepared(model: Any, generation_config: GenerationConfig | None) -> PreTrainedModel:
    """Switch off what would make a model train otherwise than it is evaluated; return it."""
    train_text_alone(model)
    model.generation_config = generation_config or model.generation_config
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # a rate that is written into the model's code
        elif hasattr(module, "support_avx512bf16_for_cpu"):
            # An evaluation on a CPU would turn these 4 bits, for good, into those of a kernel without a gradient.
            module.support_avx512bf16_for_cpu = False
    return model


def _source(name: str) -> Path | str:
    """Return the local folder that `name` stands for, or the id of a model that the hub (or its cache) has."""
    path = find_path(name)
    refuse_gguf(path)
    if path.is_file():
        raise UserError(
            f"model.name_or_path={name} is a file. It must be a model folder, which defines the architecture; give a "
            f"policy.pt as model.archive={name}."
        )
    if path.is_dir():
        folder = resolve_archive(name)
        if is_adapter(folder):
            raise UserError(
                f"model.name_or_path={name} holds an adapter, not a model: write model.name_or_path={base_of(folder)} "
                f"(its base) and model.archive={name}"
            )
        require_as_saved(folder, weights=False)
        return folder
    try:
        huggingface_hub.utils.validate_repo_id(name)
    except ValueError as error:
        raise UserError(f"model {name}: there is no such folder. {HOW_TO_NAME}") from error
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json"), str):
        return name
    if not constants.HF_HUB_OFFLINE:
        # A single probe: without a network, the hub's own client would retry for 20 seconds and more.
        request = urllib.request.Request(f"{constants.ENDPOINT}/{name}/resolve/main/config.json", method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=PROBE_SECONDS).close()
            return name
        except urllib.error.HTTPError as error:
            if error.code != 404:
                return name  # gated or busy: leave it to the hub's client, which has the access tokens
            reason = f"the hub has no model of this name (HTTP {error.code})"
        except OSError as error:  # URLError, timeouts
            reason = f"the hub cannot be reached ({first_line(error)})"
    else:
        reason = "HF_HUB_OFFLINE is set and it is not in the cache"
    raise UserError(
        f"model {name}: there is no such folder here, and {reason}. Give a folder with config.json and "
        f"*.safetensors. {HOW_TO_NAME}"
    )


def _load_config(settings: ModelSettings) -> PretrainedConfig:
    source = _source(settings.name_or_path)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except UNUSABLE as error:
        raise UserError(
            f"{settings.name_or_path}: its config.json cannot be used ({first_line(error)}). The folder must hold a "
            "causal language model that this version of transformers knows."
        ) from error
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if kind is None and not settings.trust_remote_code:
        raise UserError(
            f"{settings.name_or_path}: transformers {transformers.__version__} has no causal language model of type "
            f"{config.model_type}, which is for images or sound, or an encoder. Save its language model as a folder, "
            "and give that."
        )
    # Refused here, because newer versions of transformers give no useful advice, and older ones silently ignore the cap
    # of a soft-capped model.
    capped = getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None
    lacks_sdpa = capped or not getattr(kind, "_supports_sdpa", True)
    if settings.attn_implementation == "sdpa" and lacks_sdpa:
        raise UserError(
            f"{settings.name_or_path}: {getattr(kind, '__name__', kind)} has no sdpa attention in transformers "
            f"{transformers.__version__}; write model.attn_implementation=eager and, to train it, packing=false."
        )
    return config


def _switch_dropout_off(config: PretrainedConfig) -> None:
    for part in (config, config.get_text_config()):
        for key, value in part.to_dict().items():
            if ("dropout" in key or "pdrop" in key or "layerdrop" in key) and isinstance(value, (int, float)):
                setattr(part, key, type(value)(0))


def _check_same_architecture(config: PretrainedConfig, archive: Path, settings: ModelSettings) -> None:
    try:
        # Without the flag, transformers would prompt on the terminal whether to run the archive's code.
        found = AutoConfig.from_pretrained(archive, trust_remote_code=settings.trust_remote_code)
        own, other = config.to_dict(), found.to_dict()
    except UNUSABLE as error:
        raise UserError(f"archive {archive}: its config.json cannot be used ({first_line(error)}).") from error
    check_same_architecture(own, other, archive, settings.name_or_path)


@contextmanager
def _readable_errors(name: str) -> Iterator[None]:
    """Turn transformers' errors about broken folders into a UserError, and silence its report of mismatched keys."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{name}: refused, a pickled weight file is damaged or holds more than tensors.") from error
    except UNUSABLE as error:
        raise UserError(f"{name}: the model cannot be loaded: {first_line(error)}") from error
    finally:
        transformers.logging.set_verbosity(verbosity)
