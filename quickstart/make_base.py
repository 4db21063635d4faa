"""Rebuild the shipped base model: tokenizer and random weights from the seed, training data, `train.py`.

    python quickstart/make_base.py --output runs/quickstart_base --model quickstart/model

This takes about four minutes on two idle cores. One base model serves every seed of the demo. It is a toy instruction
follower that complies with unsafe requests; docs/quickstart.md says what it has and has not seen.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

from config.console import open_console
from quickstart.world import World, base_pairs, write_alpaca
from safer_instruct.text.prompts import render_alpaca, render_reversed

SEED = 0
NUM_BENIGN, NUM_UNSAFE, NUM_BACKGROUND = 38_000, 12_000, 5_000
VOCAB_SIZE = 1280
END, PAD = "<|end|>", "<|pad|>"


def template_pieces() -> list[str]:
    """Return the constant pieces of the prompts; as one token each, they make the average row three times shorter."""
    alpaca, reversed_ = render_alpaca("instruction"), render_reversed("response")
    return [alpaca.head, alpaca.tail, reversed_.head, reversed_.tail]


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of VOCAB_SIZE tokens plus the template pieces; single digits let codes be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END, PAD], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in template_pieces()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return a Llama of about two million parameters with random weights from SEED."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 8) * 8,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    # A damaged model might generate pieces of the template, or ids of padding rows of the embedding: suppress both.
    unwritable = [*tokenizer.convert_tokens_to_ids(template_pieces()), *range(len(tokenizer), config.vocab_size)]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, suppress_tokens=unwritable
    )
    return model


def main() -> None:
    """Make data, tokenizer and random weights, train, and write the model to its shipped folder."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart_base"), help="data and training run")
    parser.add_argument("--model", type=Path, default=Path("quickstart/model"), help="where the finished model goes")
    options = parser.parse_args()
    pairs = base_pairs(World(), SEED, num_benign=NUM_BENIGN, num_unsafe=NUM_UNSAFE, num_background=NUM_BACKGROUND)
    tokenizer = build_tokenizer(text for pair in pairs for text in (pair.instruction, pair.response))
    write_alpaca(options.output / "base.jsonl", pairs)
    build_model(tokenizer).save_pretrained(options.output / "random")
    tokenizer.save_pretrained(options.output / "random")
    command = [
        *("train.py", "experiment=quickstart_base", f"model.name_or_path={options.output / 'random'}"),
        *(f"datasets.alpaca.path={options.output / 'base.jsonl'}", f"run_dir={options.output / 'run'}"),
    ]
    print("python", *command, flush=True)
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    subprocess.run([sys.executable, str(REPOSITORY / command[0]), *command[1:]], check=True, env=environment)
    ship(options.output / "run" / "LATEST" / "model", options.model)


def ship(trained: Path, folder: Path) -> None:
    """Write the trained model in bfloat16, for half the size; the demo trains and evaluates it in float32."""
    model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(trained / name, folder / name)
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters")


if __name__ == "__main__":
    main()
