"""Train every loss for the same steps from the same weights on the quick start's benign pairs, for docs/losses.md.

    python -m benchmarks.losses_table
    python -m benchmarks.losses_table --steps 4 --losses dpo kto

It takes half a minute of one core per loss. Rerun it to resume: figures in the output's `figures.json` are kept. The
chosen response of a pair answers, and the rejected one refuses (`quickstart.world.replay_rows`). The start is the quick
start's model after as many steps of SFT on chosen. Accuracy and margin are of held-out pairs, with each loss's own
reward, from the run's last evaluation; a loss on single answers has no accuracy. The divergence is the mean of
log pi - log start over answers that the trained model samples at temperature 1, in nats per answer.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from config.schema import compose_config
from config.settings import LOSSES, GenerationSettings
from quickstart.checks import read_jsonl
from quickstart.world import World, replay_rows, write_jsonl
from safer_instruct.generation.hf import HFGenerator
from safer_instruct.text.prompts import render_prompt
from train import main

NUM_PAIRS, NUM_PROMPTS, NEW_TOKENS = 1200, 64, 48
# Mixtures and losses on answers need more than their name.
EXTRA = {
    "mixture": ["loss.parts.dpo.weight=0.8", "loss.parts.bco_pair.weight=0.2"],
    "kto": ["datasets.si.split_pairs=true"],
    "apo_zero_unpaired": ["datasets.si.split_pairs=true"],
}
SHARED = [
    "optimizer=AdamW", "warmup_ratio=0.1", "max_grad_norm=1.0", "batch_size=16", "eval_batch_size=64", "max_length=128",
    "max_prompt_length=96", "eval_every=1000000", "do_first_eval=false", "wandb.enabled=false", "n_epochs=null",
    "model=tiny", "datasets=[si]",
]  # fmt: skip


def train(folder: Path, name: str, steps: int, *arguments: str) -> Path:
    """Run `train.py` in this process, unless the run is finished; return the run directory."""
    run = folder / name
    command = [f"loss={name}", f"exp_name={name}", f"run_dir={run}", *SHARED, f"n_examples={16 * steps}", *arguments]
    config = compose_config("config", [*command, f"datasets.si.path={folder / 'pairs.jsonl'}"])
    config.local_dirs = [str(folder / "cache")]
    main(config)
    return run


@torch.no_grad()
def answers_of(run: Path, start: Path, prompts: dict[str, list[int]], tokenizer: Any) -> tuple[float, float]:
    """Return the mean divergence from the start, in nats, and the mean number of tokens of sampled answers."""
    policy, reference = (AutoModelForCausalLM.from_pretrained(one / "LATEST" / "model").eval() for one in (run, start))
    settings = GenerationSettings(max_new_tokens=NEW_TOKENS, temperature=1.0, seed=0)
    longest = max(map(len, prompts.values())) + NEW_TOKENS
    texts = HFGenerator(policy, tokenizer, settings, max_length=longest).generate_from_tokens(prompts)
    differences, lengths = [], []
    for answer in texts:
        tokens = tokenizer(answer.text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, start_at = torch.tensor([prompts[answer.id] + tokens]), len(prompts[answer.id])
        logps = [
            model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[start_at - 1 :].sum().item()
            for model in (policy, reference)
        ]
        differences.append(logps[0] - logps[1])
        lengths.append(len(tokens))
    return sum(differences) / len(differences), sum(lengths) / len(lengths)


def row_of(run: Path) -> dict[str, float]:
    """Return the figures of the run's last evaluation."""
    rows = [row for row in read_jsonl(run / "metrics.jsonl") if "loss/eval" in row]
    means = rows[-1]
    good, bad = means["rewards_eval/chosen"], means["rewards_eval/rejected"]
    return {"accuracy": means.get("rewards_eval/accuracies", float("nan")), "margin": good - bad}


def compare() -> None:
    """Print a Markdown table, and write its figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--losses", nargs="*", default=[name for name, kind in LOSSES.items() if is_compared(kind())])
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--output", type=Path, default=Path("runs/losses_table"))
    arguments = parser.parse_args()
    folder = arguments.output
    rows = replay_rows(World(), 0, num_rows=NUM_PAIRS)
    write_jsonl(folder / "pairs.jsonl", rows)
    start = train(folder, "sft", arguments.steps, "lr=3e-4")
    tokenizer = AutoTokenizer.from_pretrained(start / "LATEST" / "model")
    asked = {row["id"]: row["instruction"] for row in replay_rows(World(), 1, num_rows=NUM_PROMPTS)}
    prompts = {id: tokenizer(render_prompt("alpaca", text, "").text)["input_ids"] for id, text in asked.items()}
    record, of = folder / "figures.json", {"steps": arguments.steps, "lr": arguments.lr}
    known = json.loads(record.read_text()) if record.exists() else {}
    figures: dict[str, dict[str, float]] = known["losses"] if known.items() >= of.items() else {}
    print("| loss | accuracy | margin | KL to the start, nats | tokens of an answer |\n|---|---:|---:|---:|---:|")
    for name in arguments.losses:
        if name not in figures:
            options = [f"model.archive={start}", f"lr={arguments.lr}", *EXTRA.get(name, [])]
            run = train(folder, name, arguments.steps, *options)
            divergence, length = answers_of(run, start, prompts, tokenizer)
            figures[name] = {**row_of(run), "divergence": divergence, "answer_tokens": length}
            record.write_text(json.dumps({**of, "losses": figures}, indent=1))
        one = figures[name]
        accuracy = "-" if one["accuracy"] != one["accuracy"] else f"{one['accuracy']:.3f}"
        values = f"{one['margin']:.3f} | {one['divergence']:.3f} | {one['answer_tokens']:.1f}"
        print(f"| `{name}` | {accuracy} | {values} |", flush=True)


def is_compared(settings: Any) -> bool:
    """Tell whether a loss compares responses."""
    return settings.rows in ("pairs", "answers")


if __name__ == "__main__":
    compare()
