"""What `make real` measures besides the evaluation: this machine, the reversed tuning, and what was unlearned.

    python quickstart/real/measure.py speed MODEL FILE
    python quickstart/real/measure.py reversed OUTPUT MODEL
    python quickstart/real/measure.py answers OUTPUT MODEL

reversed: for held-out responses whose instruction is known, the nats per token of that instruction under the tuned
model, the untrained model with the same prompt, and a unigram model; ROUGE-L of the induced instructions against the
true ones; round-trip scores.
answers: nats per token of right answers to held-out harmless instructions, under the starting model and each trained
model; the increase is what training unlearned.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(REPOSITORY))  # so that the repository's modules can be imported

import torch
from torch import Tensor

from config.console import open_console
from config.files import write_text
from config.settings import DatasetSettings, ModelSettings
from preference_datasets import build_stores
from quickstart.checks import read_jsonl
from safer_instruct.generation.models import load_causal_lm, load_tokenizer
from safer_instruct.induction.ledger import scan_records, shard_path
from safer_instruct.induction.stages import INDUCE, SCORE
from safer_instruct.measures.statistics import mean_interval
from safer_instruct.text.prompts import reversed_target
from trainers.data.batching import BatchLoader
from trainers.data.cutters import PaddedCutter
from trainers.data.token_store import TokenStore
from trainers.kernels.logps import sequence_logps

MAX_LENGTH, MAX_PROMPT_LENGTH = 256, 192  # tokens, as in experiment=real_reverse
MODELS = ("reversed", "untrained")
TRAINED = ("sft", "dpo", "sft_more", "si_sft", "si_dpo")  # runs to measure right answers under
PROBE_TOKENS, PROBE_ROWS, PROBE_NEW_TOKENS = 512, 16, 8


def main() -> None:
    """Take one of the three measurements, and write it as JSON."""
    open_console()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "reversed", "answers"))
    parser.add_argument("paths", nargs=2, help="MODEL FILE, or OUTPUT MODEL")
    options = parser.parse_args()
    first, second = options.paths
    if options.what == "speed":
        result, path = measure_speed(first), Path(second)
    elif options.what == "reversed":
        result, path = measure_reversed(Path(first), second), Path(first) / "reversed.json"
    else:
        result, path = measure_answers(Path(first), second), Path(first) / "answers.json"
    write_text(path, json.dumps(result, indent=2) + "\n")


def measure_speed(model_path: str) -> dict[str, float]:
    """Return the seconds per trained and per generated token, from one step and one short batch of answers."""
    model: Any = load_causal_lm(ModelSettings(name_or_path=model_path))
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.arange(PROBE_TOKENS)[None] % vocabulary
    prompts = tokens[:, : 4 * PROBE_ROWS * 4].view(PROBE_ROWS, -1)

    def train() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()

    def generate() -> None:
        limits = {"min_new_tokens": PROBE_NEW_TOKENS, "max_new_tokens": PROBE_NEW_TOKENS}
        model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts), do_sample=False, **limits)

    seconds = {name: _second_call(call) for name, call in (("train", train), ("generate", generate))}
    return {
        "train_seconds_per_token": seconds["train"] / PROBE_TOKENS,
        "generate_seconds_per_token": seconds["generate"] / (PROBE_ROWS * PROBE_NEW_TOKENS),
    }


def _second_call(call: Any) -> float:
    """Return the seconds of a second call, after one to warm up."""
    call()
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure_reversed(output: Path, model_path: str) -> dict[str, Any]:
    """Return three measures of the reversed tuning by model, each as (mean, low, high) with a 95% interval."""
    rows = read_jsonl(output / "inputs" / "held_out.jsonl")
    truth = {row["id"]: reversed_target(row["instruction"], row["input"]) for row in rows}
    folders = {name: output / f"held_out_{name}" / "ledger" for name in MODELS}
    overlaps, scores = {}, {}
    for name, ledgers in folders.items():
        overlaps[name] = mean_interval([rouge_l(text, truth[id]) for id, text in _induced(ledgers)])
        scores[name] = mean_interval(list(_scores(ledgers)))
    return {
        "num_responses": len(truth),
        "nats_per_token": held_out_nats(output, model_path),
        "rouge_l": overlaps,
        "round_trip": scores,
    }


def _induced(ledgers: Path) -> Iterator[tuple[str, str]]:
    for record, _ in scan_records(shard_path(ledgers, INDUCE, 0, 1)):
        yield record["id"], record["instruction"] or ""


def _scores(ledgers: Path) -> Iterator[float]:
    """Yield the round-trip scores; 0 for an instruction without one (empty, or a template), which explains nothing."""
    for record, _ in scan_records(shard_path(ledgers, SCORE, 0, 1)):
        yield record["scores"][0] or 0.0


def held_out_nats(output: Path, model_path: str) -> dict[str, tuple[float, float, float]]:
    """Return the nats per token of held-out instructions under the tuned, the untrained and a unigram model."""
    tokenizer = load_tokenizer(ModelSettings(name_or_path=model_path))
    store, trained = (_tokens(output, name, tokenizer, loss="reverse") for name in ("held_out", "reverse"))
    targets = [store.row(number)[1] for number in range(len(store))]
    lengths = [len(target) for target in targets]
    archives = {"reversed": str(output / "reverse"), "untrained": None}
    nats = {name: model_nats(ModelSettings(model_path, archive=path), store) for name, path in archives.items()}
    vocabulary = len(tokenizer)
    nats["unigram"] = unigram_nats([trained.row(number)[1] for number in range(len(trained))], targets, vocabulary)
    return {name: ratio_interval(values, lengths) for name, values in nats.items()}


def measure_answers(output: Path, model_path: str) -> dict[str, Any]:
    """Return the nats per token of held-out right answers by model, as (ratio, low, high) with a 95% interval."""
    template = json.loads((output / "real.json").read_text(encoding="utf-8"))["template"]
    tokenizer = load_tokenizer(ModelSettings(name_or_path=model_path))
    store = _tokens(output, "answers", tokenizer, loss="sft", template=template)
    lengths = [len(store.row(number)[1]) for number in range(len(store))]
    archives = {"base": None} | {name: str(output / name) for name in TRAINED}
    nats = {name: model_nats(ModelSettings(model_path, archive=path), store) for name, path in archives.items()}
    return {name: ratio_interval(values, lengths) for name, values in nats.items()}


def _tokens(output: Path, name: str, tokenizer: Any, *, loss: str, **settings: Any) -> TokenStore:
    """Return the tokens of one input file in Alpaca's schema."""
    file = str(output / "inputs" / f"{name}.jsonl")
    return build_stores(
        {name: DatasetSettings(file, "alpaca", eval_fraction=0.0, **settings)},
        loss=loss,
        tokenizer=tokenizer,
        max_length=MAX_LENGTH,
        max_prompt_length=MAX_PROMPT_LENGTH,
        cache_dir=Path(".cache"),
    ).train


@torch.no_grad()
def model_nats(settings: ModelSettings, store: TokenStore) -> list[float]:
    """Return -log p(instruction | response) of each row of a store, in nats."""
    model = load_causal_lm(settings).eval()
    nats = torch.zeros(len(store), dtype=torch.float64)
    for batch in BatchLoader(store, PaddedCutter(pad_token_id=0), batch_size=8).batches():
        for part in batch.microbatches:
            nats[part["row"]] = -sequence_logps(model, part)[0]
    return [float(one) for one in nats]


def unigram_nats(training: Sequence[Tensor], rows: Sequence[Tensor], vocabulary: int) -> list[float]:
    """Return the nats of each row under the training tokens' frequencies, with add-one smoothing."""
    counts = torch.bincount(torch.cat(list(training)).long(), minlength=vocabulary).double() + 1
    logps = (counts / counts.sum()).log()
    return [-float(logps[row.long()].sum()) for row in rows]


def ratio_interval(totals: Sequence[float], lengths: Sequence[int]) -> tuple[float, float, float]:
    """Return sum(totals) / sum(lengths) with its 95% interval over rows (linearised: Student's t of the residuals)."""
    ratio, mean_length = sum(totals) / sum(lengths), sum(lengths) / len(lengths)
    rows = zip(totals, lengths, strict=True)
    return mean_interval([ratio + (total - ratio * length) / mean_length for total, length in rows])


def rouge_l(text: str, reference: str) -> float:
    """Return ROUGE-L (Lin 2004): F1 of the longest common subsequence of words, ignoring case and punctuation."""
    first, second = (_words(one) for one in (text, reference))
    lengths = [0] * (len(second) + 1)
    for word in first:
        before = 0  # the entry of the row above, one to the left
        for place, other in enumerate(second, start=1):
            above = lengths[place]
            lengths[place] = before + 1 if word == other else max(above, lengths[place - 1])
            before = above
    return 2 * lengths[-1] / (len(first) + len(second)) if first and second else 0.0


def _words(text: str) -> list[str]:
    return "".join(char if char.isalnum() else " " for char in text.lower()).split()


if __name__ == "__main__":
    main()
