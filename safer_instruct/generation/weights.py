"""Find and check weights: a run, a checkpoint, a model folder or a `policy.pt`. No code in a pickle is ever run."""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open

from config.checksums import require_untouched
from config.errors import UserError, first_line
from config.paths import find_path, saved_checkpoints
from config.reading import read_mapping
from config.run_keys import checkpoint_owner
from config.settings import ModelSettings

# Entries of config.json that may differ between models of the same architecture.
FREE_CONFIG_KEYS = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id",
    "eos_token_id", "pad_token_id", "max_position_embeddings", "task_specific_params", "model_type",
}  # fmt: skip
# Exceptions of transformers and peft for an unusable folder, whose files can make them fail in many ways.
UNUSABLE = (
    OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, ImportError,
    RuntimeError, SafetensorError, StrictDataclassError,
)  # fmt: skip
WHOLE_NUMBERS = {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL"}  # safetensors' names
WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")


def resolve_archive(path: str) -> Path:
    """Return the HF folder, adapter folder or `policy.pt` file that `path` stands for.

    Args:
        path: A run (its LATEST), a checkpoint (its model/, or else its adapter/), an HF folder, a peft adapter folder,
            or a `policy.pt`.

    Raises:
        UserError: The path does not exist, or has no weights.
    """
    found = find_path(path)
    refuse_gguf(found)
    if not found.exists():
        raise UserError(
            f"{path}: there is no such file or folder. Give a run, a checkpoint, a model folder or a policy.pt."
        )
    if found.is_file():
        return found
    # A run killed between the two renames of its first checkpoint has no LATEST, so try the last checkpoint, too.
    checkpoints = (found / "LATEST", *saved_checkpoints(found)[-1:], found)
    for folder in (*(path / kind for path in checkpoints for kind in ("model", "adapter")), found):
        if (folder / "config.json").is_file() or is_adapter(folder):
            return folder
    if (found / "policy.pt").is_file():  # the DPO repo's LATEST/policy.pt
        return found / "policy.pt"
    what = "a run without a checkpoint yet" if (found / "config.yaml").is_file() else "no model"
    raise UserError(
        f"{path} holds {what}: there is neither LATEST (a run), nor model/ (a checkpoint), nor config.json (a model "
        "folder), nor adapter_config.json (an adapter), nor policy.pt in it."
    )


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds a peft adapter without the weights of a whole model."""
    has_weights = any(any(folder.glob(pattern)) for pattern in ("model*.safetensors", "pytorch_model*.bin"))
    return (folder / "adapter_config.json").is_file() and not has_weights


def model_fingerprint(settings: ModelSettings) -> str:
    """Return 32 hex digits that change with the weights, the architecture or the tokenizer; nothing is loaded.

    Reads every weight file once (a few GB/s). A model on the hub is identified only by its name.
    """
    digest = xxhash.xxh3_128()
    names = [settings.name_or_path, settings.tokenizer_name_or_path, settings.archive]
    for name in (name for name in names if name):
        path = find_path(name)
        if not path.exists():
            digest.update(name.encode())
            continue
        # A tokenizer's folder need not hold a model.
        found = path if name == settings.tokenizer_name_or_path and has_tokenizer(path) else resolve_archive(name)
        files = [found] if found.is_file() else sorted(file for file in found.iterdir() if file.is_file())
        files = [file for file in files if file.name != "README.md"]  # the card describes the run, not the model
        for file in files:
            digest.update(file.name.encode())
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
    digest.update(f"{settings.policy_dtype} {settings.attn_implementation}".encode())
    if settings.chat_template_kwargs:
        digest.update(json.dumps(settings.chat_template_kwargs, sort_keys=True).encode())
    return digest.hexdigest()


def refuse_gguf(path: Path) -> None:
    """Refuse a GGUF file, or a folder that has only such files: most hold weights quantized to a few bits.

    Raises:
        UserError: It is GGUF.
    """
    is_gguf = path.suffix == ".gguf" or (not (path / "config.json").is_file() and any(path.glob("*.gguf")))
    if is_gguf and path.exists():
        raise UserError(
            f"{path} is GGUF, the format of llama.cpp: give the folder it was converted from, with config.json and "
            "*.safetensors. Without one, transformers can read the file (gguf_file=FILE): see scripts/get_smollm2.py."
        )


def require_as_saved(path: Path, *, weights: bool = True) -> None:
    """Refuse a file or folder in a run's checkpoint if it has changed since the run saved it; any other path passes.

    With `weights`, weight files are hashed, too, which reads all of them.

    Raises:
        UserError: A file has changed, or the checkpoint belongs to another run.
    """
    real = path.resolve()
    checkpoint = next((folder for folder in real.parents[:2] if folder.parent.name == "checkpoints"), None)
    owner = None
    if checkpoint is not None and (config := checkpoint.parents[1] / "config.yaml").is_file():
        owner = checkpoint_owner(read_mapping(config, "copy the run again"), checkpoint.name)
    require_untouched(real, owner=owner, contents=lambda name: weights or not name.endswith(WEIGHT_SUFFIXES))


def run_config(path: str) -> dict[str, Any]:
    """Read the settings of the train.py run at or above a path (a checkpoint, a model); {} if there is none."""
    folder = find_path(path)
    for candidate in (folder, *folder.resolve().parents[:3]):
        file = candidate / "config.yaml"
        if file.is_file():
            config = read_mapping(file, "copy the run again")
            # The DPO repo writes a config.yaml too, with other keys: its `datasets` is a list.
            return config if isinstance(config.get("datasets"), dict) else {}
    return {}


def check_weight_files(folder: Path) -> None:
    """Open every safetensors file in a folder, which checks header and length, and look for missing shards.

    Raises:
        UserError: A file is missing, damaged or truncated, or there is an adapter beside the weights.
    """
    if (folder / "adapter_config.json").is_file() and not is_adapter(folder):
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json), which transformers adds to the weights beside it where "
            "peft is installed, and leaves out where it is not. If the weights are merged already, move "
            "adapter_config.json away; if not, merge it (merge_and_unload and save_pretrained of peft)."
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(f"{index}: damaged ({type(error).__name__}). Copy it again.") from error
        missing = [name for name in shards if not (folder / name).is_file()]
        if missing:
            raise UserError(f"{folder}: {len(missing)} of {len(shards)} weight files are missing, first {missing[0]}.")
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as tensors:
                kinds = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  # no dictionary
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{file}: damaged or truncated ({file.stat().st_size} bytes; {first_line(error)}). Copy it again."
            ) from error
        whole = next((key for key, kind in kinds.items() if key.endswith(".weight") and kind in WHOLE_NUMBERS), None)
        if whole and "quantization_config" not in read_mapping(folder / "config.json"):
            raise UserError(
                f"{file}: {whole} holds integers ({kinds[whole]}), and config.json does not say how they were "
                "quantized (quantization_config); give the weights before quantization"
            )


def check_same_architecture(own: Mapping[str, Any], other: Mapping[str, Any], archive: Path, name: str) -> None:
    """Compare a model's config with an archive's: RoPE or the number of heads can differ even if all shapes agree.

    Raises:
        UserError: They differ; the message names the entries.
    """
    if own["model_type"] != other["model_type"]:
        raise UserError(
            f"archive {archive} is of another architecture: it is a {other['model_type']} model, and {name} is a "
            f"{own['model_type']} model. Set model.name_or_path to the model that it was trained from."
        )
    ignored = {key for key in own if "drop" in key} | FREE_CONFIG_KEYS
    differing = [key for key in sorted(own.keys() & other.keys() - ignored) if own[key] != other[key]]
    if differing:
        listed = "; ".join(f"{key}: {other[key]} there, {own[key]} here" for key in differing[:5])
        raise UserError(
            f"archive {archive} is of another architecture than {name}: {listed}. Set model.name_or_path to the model "
            "that it was trained from."
        )


def has_tokenizer(folder: Path) -> bool:
    """Return whether a folder holds a tokenizer."""
    return any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))


def read_policy_pt(path: Path) -> dict[str, torch.Tensor]:
    """Return the `state` of a DPO repo checkpoint, memory-mapped; no code in it is ever run.

    Raises:
        UserError: It is truncated, not a PyTorch file, holds anything but tensors, or has no `state`.
    """
    with path.open("rb") as file:
        is_zip = file.read(2) == b"PK"
    if is_zip and not zipfile.is_zipfile(path):
        raise UserError(f"{path}: truncated ({path.stat().st_size} bytes; its end is missing). Copy it again.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error) or "global" in str(error):
            raise UserError(
                f"{path}: refused. It holds Python objects besides tensors, which could run code when read; no code "
                "was run. Save the weights alone: torch.save({'state': model.state_dict()}, path)"
            ) from error
        raise UserError(f"{path}: truncated, or not a PyTorch file ({path.stat().st_size} bytes).") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged, or not a PyTorch file ({first_line(error)}). Copy it again.") from error
    state = content.get("state", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not state or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{path}: expected a dictionary with an entry `state` (name -> tensor), as the DPO repo saves.")
    return state


def require_finite(tensors: Iterable[tuple[str, torch.Tensor]], where: str, advice: str) -> None:
    """Refuse weights that contain NaN or infinity, since the output of such a model is meaningless.

    Raises:
        UserError: A tensor is not finite; the message names the first one.
    """
    for name, tensor in tensors:
        # The sum propagates NaN and infinity, in a tenth of the time of `isfinite` and without extra memory. It may
        # also overflow for finite numbers, hence the second check.
        if not tensor.sum().isfinite() and not tensor.isfinite().all():
            raise UserError(f"{where}: {name} holds NaN or infinite numbers, so that {advice}")


def check_loading_info(info: Mapping[str, Any], source: Path | str, name: str) -> None:
    """Refuse weights that do not match the model exactly: transformers would fill the gaps with random numbers.

    Raises:
        UserError: Tensors are missing, unexpected, or of another shape; the message names some.
    """
    problems = []
    for kind, words in (("missing_keys", "are missing"), ("unexpected_keys", "are not part of the model")):
        if names := sorted(info[kind]):
            problems.append(f"{len(names)} tensors {words}, such as {', '.join(names[:3])}")
    if info["mismatched_keys"]:
        key, there, here = min(info["mismatched_keys"])
        problems.append(
            f"{len(info['mismatched_keys'])} tensors have another shape, such as {key}: {list(there)} there, "
            f"{list(here)} in the model"
        )
    if problems:
        raise UserError(
            f"the weights of {source} do not fit the architecture of {name}: {'; '.join(problems)}. Set "
            "model.name_or_path to the model that they were trained from."
        )


def check_tied(model: Any, source: Path | str) -> None:
    """Refuse tie_word_embeddings=true over two different tables: transformers loads both, but saves the wrong config.

    Raises:
        UserError: The config and the weights disagree; the message says which entry to correct.
    """
    head, is_tied = model.get_output_embeddings(), getattr(model.config, "tie_word_embeddings", False)  # not all say it
    if head is not None and is_tied and head.weight is not model.get_input_embeddings().weight:
        raise UserError(
            f"{source}: config.json says tie_word_embeddings: true, but input and output embedding are two different "
            "tensors in its weights. Set it to false, which is what these weights are."
        )


def train_text_alone(model: Any) -> None:
    """Freeze the non-language parts of a multi-modal model: they get no gradient, so no optimizer state either."""
    if model.config.get_text_config() is not model.config:
        trained = {*model.get_decoder().parameters(), *model.get_output_embeddings().parameters()}
        for parameter in model.parameters():
            parameter.requires_grad_(parameter in trained)
