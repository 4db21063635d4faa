"""Compare induction with the HF backend with a plain `generate` loop: tokens per second, and equal texts.

    OMP_NUM_THREADS=1 python -m benchmarks.induction_speed --archive runs/reverse

Responses are joined from the quick start's corpus so that their lengths are log-normal, with a long tail. The plain
loop takes them in the order of the corpus, `--batch-size` rows at a time, left-padded to the longest, and lets
`model.generate` run until the last row of the batch has ended. `sorted` is the HF backend with the same number of rows
in every batch; `budget` is the unchanged backend with as many padded positions per batch as the plain loop's largest.
Decoding is greedy; the three take turns. Target: 2 x the plain loop's tokens per second, and equal texts up to ties.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.settings import GenerationSettings, ModelSettings
from quickstart.checks import read_jsonl
from quickstart.world import World, write_demo_data
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from safer_instruct.text.encoding import prompt_token_ids
from safer_instruct.text.prompts import render_reversed


def long_tailed(count: int, seed: int) -> list[str]:
    """Return responses of the quick start's corpus, joined to log-normal lengths."""
    with tempfile.TemporaryDirectory() as name:
        write_demo_data(World(), seed, Path(name), part="dev")
        texts = [row["response"] for row in read_jsonl(Path(name) / "corpus.jsonl")]
    draw = random.Random(seed)
    return [" ".join(draw.choices(texts, k=max(1, round(draw.lognormvariate(0.3, 0.9))))) for _ in range(count)]


def plain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
) -> dict[str, list[int]]:
    """Run the plain loop that one would write first."""
    found = {}
    for start in range(0, len(prompts), options.batch_size):
        rows = prompts[start : start + options.batch_size]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        with torch.no_grad():
            out = model.generate(ids, attention_mask=mask, max_new_tokens=options.max_new_tokens, do_sample=False)
        for number, tokens in enumerate(out[:, width:].tolist()):
            end = tokens.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in tokens else len(tokens)
            found[str(start + number)] = tokenizer.decode(tokens[:end], skip_special_tokens=True), end
    return found


def ours(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    options: argparse.Namespace,
    *,
    fixed: bool,
) -> dict[str, list[int]]:
    """Run the HF backend."""
    widest = max(map(len, prompts)) + options.max_new_tokens
    settings = GenerationSettings(max_new_tokens=options.max_new_tokens, max_batch_tokens=options.batch_size * widest)
    generator = HFGenerator(model, tokenizer, settings)
    if fixed:
        generator._batches = _fixed(options.batch_size)  # type: ignore[method-assign]
    results = generator.generate_from_tokens({str(i): prompt for i, prompt in enumerate(prompts)})
    return {result.id: (result.text, result.new_tokens) for result in results}


def _fixed(size: int) -> Callable[[Sequence[int]], Iterator[list[int]]]:
    def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
        order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
        return (order[start : start + size] for start in range(0, len(order), size))

    return batches


def main() -> None:
    """Print the table; write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="quickstart/model")
    parser.add_argument("--archive", help="the reversed model's run")
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/induction_speed.json"))
    options = parser.parse_args()
    settings = ModelSettings(name_or_path=options.model, archive=options.archive)
    tokenizer, model = load_tokenizer(settings), load_causal_lm(settings).eval()
    room = model.config.max_position_embeddings - options.max_new_tokens
    prompts = [prompt_token_ids(tokenizer, render_reversed(text), room) for text in long_tailed(options.rows, 0)]
    variants = {
        "plain": lambda: plain(model, tokenizer, prompts, options),
        "sorted": lambda: ours(model, tokenizer, prompts, options, fixed=True),
        "budget": lambda: ours(model, tokenizer, prompts, options, fixed=False),
    }
    times: dict[str, list[float]] = {name: [] for name in variants}
    texts: dict[str, dict] = {}
    for number in range(options.rounds + 1):
        for name, run in variants.items():
            started = time.process_time()
            texts[name] = run()
            if number:  # the first round is a warm-up
                times[name].append(time.process_time() - started)
    lengths = sorted(map(len, prompts))
    num_new = sum(count for _, count in texts["plain"].values())
    print(
        f"{options.rows} prompts, {lengths[0]} to {lengths[-1]} tokens (median {lengths[len(lengths) // 2]}), "
        f"{num_new} new tokens"
    )
    results = {}
    for name in variants:
        seconds = sorted(times[name])[len(times[name]) // 2]
        same = sum(texts[name][key] == value for key, value in texts["plain"].items())
        ratio = sorted(times["plain"])[len(times["plain"]) // 2] / seconds
        results[name] = {"cpu_seconds": seconds, "tokens_per_second": num_new / seconds, "ratio": ratio, "same": same}
        print(
            f"{name:>7}: {num_new / seconds:>8.0f} new tokens/s of processor time, {ratio:.2f} x, "
            f"{same} of {options.rows} texts the same"
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"options": vars(options), "results": results}, default=str, indent=1) + "\n")


if __name__ == "__main__":
    main()
