"""How far are training's log-probabilities from plain transformers in float64, on a real model?

    python -m benchmarks.real_logps models/smollm2 --pairs 64

The pairs are from the world of `make real` (an unsafe request, the rules' refusal, the world's response) in the model's
own chat template, cut to 80 tokens because float64 is slow on a CPU. It compares the packed path in float64 and in
float32 with transformers alone in float64, one sequence at a time, computed from the logits. Norms use float64 on both
sides: transformers rounds to float32 inside them, which would be 2e-6 nats here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from config.settings import DatasetSettings, ModelSettings
from preference_datasets import build_stores
from quickstart.real.world import RULES, RealWorld
from quickstart.world import write_jsonl
from safer_instruct.experts.rules import Rules
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from tests.tiny_models import exact_norms
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PackedCutter
from trainers.data.token_store import TokenStore
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.logps import sequence_logps

MAX_LENGTH, MAX_PROMPT_LENGTH = 80, 56


def write_pairs(path: Path, count: int) -> None:
    """Write pairs of unsafe requests: the rules' refusal is chosen, the world's response rejected."""
    rules = Rules.from_yaml(RULES)
    drawn = itertools.islice(RealWorld().draws(random.Random(1), "unsafe", held_out=False), count)
    rows = (
        {"instruction": pair.instruction, "chosen": rules.respond(pair.instruction), "rejected": pair.response}
        | {"label": pair.skill}
        for pair in drawn
    )
    write_jsonl(path, rows)


def encoded_pairs(model: str, count: int, folder: Path) -> TokenStore:
    """Encode this many pairs as training does."""
    write_pairs(folder / "si.jsonl", count)
    settings = DatasetSettings(str(folder / "si.jsonl"), "si", template="chat", eval_fraction=0.0)
    store = build_stores(
        {"si": settings}, loss="preference", tokenizer=load_tokenizer(ModelSettings(name_or_path=model)),
        max_length=MAX_LENGTH, max_prompt_length=MAX_PROMPT_LENGTH, cache_dir=folder,
    ).train  # fmt: skip
    if len(store) != count:
        raise SystemExit(f"{count - len(store)} of {count} pairs were dropped")
    return store


@torch.no_grad()
def plain_logps(model: str, store: TokenStore) -> Tensor:
    """Return log p(response | prompt) by transformers alone in float64, in nats: (pairs, 2)."""
    plain: Any = exact_norms(AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval())

    def logp(prompt: Tensor, response: Tensor) -> float:
        logps = plain(torch.cat([prompt, response]).long()[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return float(logps.gather(1, response.long()[:, None]).sum())

    rows = [store.row(number) for number in range(len(store))]
    return torch.tensor([[logp(row[0], response) for response in row[1:]] for row in rows], dtype=torch.float64)


@torch.no_grad()
def packed_logps(model: str, store: TokenStore, dtype: str) -> Tensor:
    """Return the same with the code path of training: (pairs, 2)."""
    policy: Any = load_causal_lm(ModelSettings(name_or_path=model), dtype=dtype).eval()
    if dtype == "float64":
        exact_norms(policy)
    use_packed_attention(policy)
    found = torch.full((len(store), 2), torch.nan, dtype=torch.float64)
    for batch in BatchLoader(store, PackedCutter(max_tokens=1024), batch_size=16).batches():
        for part in batch.microbatches:
            found[part["row"]] = sequence_logps(policy, part)[0]
    return found


def measure(model: str, num_pairs: int) -> dict[str, float]:
    """Return the largest difference per sequence to plain transformers in float64, in nats, by the dtype of ours."""
    with tempfile.TemporaryDirectory() as folder:
        store = encoded_pairs(model, num_pairs, Path(folder))
        truth = plain_logps(model, store)
        return {
            dtype: float((packed_logps(model, store, dtype) - truth).abs().max()) for dtype in ("float64", "float32")
        }


def main() -> None:
    """Print the differences as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a model folder with a chat template")
    parser.add_argument("--pairs", type=int, default=64)
    options = parser.parse_args()
    print(json.dumps({"pairs": options.pairs, "largest_difference_nats": measure(options.model, options.pairs)}))


if __name__ == "__main__":
    main()
