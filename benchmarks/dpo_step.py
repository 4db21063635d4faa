"""How fast is one DPO step? The trainer's own step against a literal one, on the same pairs and the same weights.

    OMP_NUM_THREADS=1 python -m benchmarks.dpo_step --json dpo_step.json

- `trainer`: `Trainer.train_step` as `python train.py loss=dpo` runs it: cached reference, micro-batches of rows of
  like length under a token limit, output embedding on response rows only.
- `literal`: random order, every sequence padded to the longest of the batch, chosen and rejected in one forward pass,
  float32 logits of all positions, and a reference model that runs at every step. Written here from the method's
  description (Rafailov et al. 2023).

The two take turns, on every batch, in an order that alternates. The table shows medians over batches; the ratio is the
median of the ratios batch by batch, by the clock and by processor time (a busy machine blurs the first). Tokens are
real ones: no padding, a prompt counted in both of its sequences. What the cache costs once is printed beside it and is
in neither.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from config.settings import PreferenceLossSettings, TrainConfig, WandbSettings
from trainers.batching import BatchLoader
from trainers.objectives import PreferenceObjective
from trainers.parallel import Layout, launch
from trainers.reference import attach_reference
from trainers.run_dir import RunDir
from trainers.token_store import TokenStore, TokenStoreWriter
from trainers.trainer import Trainer

# Tokens of the published Safer-Instruct pairs that have both responses (5,721 of them): prompt with its template,
# chosen, rejected, at these percentiles.
PERCENTILES = [0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.7, 100]
PROMPT = [37, 41, 44, 48, 53, 59, 67, 77, 90, 103, 121, 150, 195, 219, 257, 378]
CHOSEN = [2, 12, 12, 12, 12, 13, 31, 48, 57, 63, 92, 151, 276, 358, 470, 659]
REJECTED = [2, 6, 8, 12, 16, 20, 24, 31, 39, 51, 68, 114, 166, 205, 301, 857]
MAX_LENGTH = 512


def random_pairs(folder: Path, *, num_rows: int, vocabulary: int, seed: int) -> TokenStore:
    """Random tokens with the lengths of the published pairs; responses are cut to MAX_LENGTH - prompt."""
    random = np.random.default_rng(seed)
    with TokenStoreWriter(folder, key="random pairs", num_segments=3) as writer:
        for row in range(num_rows):
            drawn = [int(np.interp(100 * random.random(), PERCENTILES, table)) for table in (PROMPT, CHOSEN, REJECTED)]
            lengths = [drawn[0], *(min(length, MAX_LENGTH - drawn[0]) for length in drawn[1:])]
            writer.append(f"row-{row}", [random.integers(3, vocabulary, length).tolist() for length in lengths])
        writer.finish({})
    return TokenStore(folder)


def random_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """A Llama with random weights."""
    torch.manual_seed(arguments.seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocabulary,
            hidden_size=arguments.width,
            intermediate_size=arguments.width * 11 // 4,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.width // 64,
            max_position_embeddings=MAX_LENGTH,
        )
    )


class LiteralStep:
    """The step as the method's description reads, with `parts` equal slices of the padded batch as micro-batches."""

    def __init__(self, policy: LlamaForCausalLM, store: TokenStore, settings: TrainConfig, parts: int) -> None:
        """The reference is a copy of the policy, in memory all the time."""
        self.policy, self.reference = policy, copy.deepcopy(policy).eval()
        self.optimizer = torch.optim.RMSprop(policy.parameters(), lr=settings.lr)
        self.store, self.settings, self.parts = store, settings, parts

    def pad(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, attention mask and labels, (2B, T): all chosen, then all rejected."""
        pairs = [self.store.row(row) for row in rows.tolist()]
        sequences = [(prompt, response) for side in (1, 2) for prompt, response in ((p[0], p[side]) for p in pairs)]
        width = max(len(prompt) + len(response) for prompt, response in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, (prompt, response) in enumerate(sequences):
            length = len(prompt) + len(response)
            ids[i, :length] = torch.cat([prompt, response])
            labels[i, len(prompt) : length] = response
            mask[i, :length] = 1
        return ids, mask, labels

    @staticmethod
    def logps(model: LlamaForCausalLM, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Summed log-probabilities of the labels, (2B,)."""
        logits = model(ids, attention_mask=mask).logits.to(torch.float32)[:, :-1]
        labels = labels[:, 1:].clone()
        targets = labels != -100
        labels[~targets] = 0
        per_token = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
        return (per_token * targets).sum(-1)

    def __call__(self, rows: Tensor) -> float:
        """One step; returns the mean loss."""
        self.policy.train()
        ids, mask, labels = self.pad(rows)
        total = 0.0
        for part in torch.arange(len(rows)).chunk(self.parts):
            index = torch.cat([part, part + len(rows)])
            arguments = (ids[index], mask[index], labels[index])
            with torch.no_grad():
                reference_chosen, reference_rejected = self.logps(self.reference, *arguments).chunk(2)
            chosen, rejected = self.logps(self.policy, *arguments).chunk(2)
            margins = (chosen - rejected) - (reference_chosen - reference_rejected)
            loss = -F.logsigmoid(self.settings.loss.beta * margins).sum() / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def measure(arguments: argparse.Namespace, layout: Layout, folder: Path) -> dict[str, object]:
    """Alternates the two steps over the same batches."""
    settings = TrainConfig(
        exp_name="benchmark", loss=PreferenceLossSettings(name="dpo"), lr=1e-6, wandb=WandbSettings(enabled=False)
    )
    steps = arguments.steps + arguments.warmup
    store = random_pairs(
        folder / "pairs", num_rows=steps * arguments.batch_size, vocabulary=arguments.vocabulary, seed=arguments.seed
    )
    loader = BatchLoader(
        store, batch_size=arguments.batch_size, seed=arguments.seed, shuffle=True, num_epochs=1, num_examples=None,
        num_microbatches=1, max_tokens_per_microbatch=arguments.max_tokens, pad_token_id=0,
    )  # fmt: skip
    policy = random_model(arguments)
    literal = LiteralStep(copy.deepcopy(policy), store, settings, arguments.literal_parts)
    started = time.perf_counter()
    attach_reference(policy, [loader], cache_dir=folder / "cache")
    reference_seconds = time.perf_counter() - started
    seconds: dict[str, list[float]] = {"trainer": [], "literal": []}
    tokens, positions, losses, cpu_ratios = [], {"trainer": 0, "literal": 0}, [], []
    with RunDir.open(folder / "run", config={}, manifest={}) as run:
        trainer = Trainer(
            policy=policy, objective=PreferenceObjective(settings.loss), train_loader=loader, eval_loader=None,
            settings=settings, layout=layout, run=run,
        )  # fmt: skip
        for number, batch in enumerate(loader.batches()):
            times, cpu_times, loss = {}, {}, {}
            for name in ("trainer", "literal") if number % 2 else ("literal", "trainer"):
                started, cpu_started = time.perf_counter(), time.process_time()
                if name == "trainer":
                    trainer.train_step(batch)
                    loss[name] = trainer.train_metrics.means()["loss/train"]
                else:
                    loss[name] = literal(batch.rows)
                times[name] = time.perf_counter() - started
                cpu_times[name] = time.process_time() - cpu_started
            losses.append(abs(loss["trainer"] - loss["literal"]))
            if number < arguments.warmup:
                continue
            cpu_ratios.append(cpu_times["literal"] / cpu_times["trainer"])
            lengths = store.lengths[batch.rows].long()
            tokens.append(int((2 * lengths[:, 0] + lengths[:, 1] + lengths[:, 2]).sum()))
            positions["trainer"] += sum(microbatch["input_ids"].numel() for microbatch in batch.microbatches)
            positions["literal"] += 2 * len(lengths) * int((lengths[:, 0] + lengths[:, 1:].amax(1)).max())
            for name, value in times.items():
                seconds[name].append(value)
    ratios = [slow / fast for slow, fast in zip(seconds["literal"], seconds["trainer"], strict=True)]
    return {
        "tokens_per_second": {
            name: statistics.median(n / s for n, s in zip(tokens, values, strict=True))
            for name, values in seconds.items()
        },
        "seconds_per_step": {name: statistics.median(values) for name, values in seconds.items()},
        "positions_per_real_token": {name: count / sum(tokens) for name, count in positions.items()},
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "cpu_ratio": statistics.median(cpu_ratios),
        "cpu_ratios": cpu_ratios,
        "largest_loss_difference": max(losses),
        "reference_cache_seconds_per_step_worth": reference_seconds / steps,
        "parameters": sum(parameter.numel() for parameter in policy.parameters()),
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def print_table(result: dict[str, object]) -> None:
    """The medians, side by side."""
    columns = ("seconds_per_step", "tokens_per_second", "positions_per_real_token")
    print(f"{'':10}" + "".join(f"{column:>28}" for column in columns))
    for name in ("literal", "trainer"):
        print(f"{name:10}" + "".join(f"{result[column][name]:28,.2f}" for column in columns))
    spread = sorted(result["ratios"])
    print(f"tokens/s, trainer over literal: {result['ratio']:.2f} (from {spread[0]:.2f} to {spread[-1]:.2f})")
    spread = sorted(result["cpu_ratios"])
    print(f"the same by processor time: {result['cpu_ratio']:.2f} (from {spread[0]:.2f} to {spread[-1]:.2f})")
    print(f"losses of the two differ by at most {result['largest_loss_difference']:.1e}")
    print(f"reference cache: {result['reference_cache_seconds_per_step_worth']:.2f} s per step's rows, once")


def main() -> None:
    """Parses, measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--literal-parts", type=int, default=4, help="micro-batches of the literal step")
    parser.add_argument("--max-tokens", type=int, default=2048, help="padded positions of one of our micro-batches")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="write the figures there, too")
    arguments = parser.parse_args()
    result: dict[str, object] = {}

    def worker(layout: Layout) -> None:
        with tempfile.TemporaryDirectory() as folder:
            result.update(measure(arguments, layout, Path(folder)))

    launch(worker, TrainConfig(exp_name="benchmark", device="cpu"))
    print_table(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2, default=str) + "\n")


if __name__ == "__main__":
    main()
