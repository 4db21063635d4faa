"""Does the loader's memory grow with the dataset, and how long does a second start take?

It writes a synthetic preference file of each size and tokenises it once. Then a fresh process builds the stores (a
cache hit), makes a BatchLoader and takes batches from it.

    python -m benchmarks.token_store --rows 1000 1000000
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.memory import resident_mib

os.environ.setdefault("HF_HUB_OFFLINE", "1")
NUM_BATCHES = 50


def write_rows(path: Path, num_rows: int) -> None:
    """Write short arithmetic questions, with one right and one wrong answer each."""
    with path.open("w") as file:
        for i in range(num_rows):
            a, b = i % 1009, i // 1009
            row = {
                "instruction": f"What is {a} plus {b}?",
                "chosen": f"It is {a + b}.",
                "rejected": f"It is {a - b - 1}.",
            }
            file.write(json.dumps(row | {"label": ""}) + "\n")


def write_tokenizer(folder: Path) -> None:
    """Return a byte-level BPE tokenizer of 320 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<pad>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["What is 12 plus 30? It is 42."], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>").save_pretrained(folder)


def measure(folder: Path) -> dict:
    """Measure one start in this process: seconds to the first batch, and memory beyond the imports."""
    from transformers import PreTrainedTokenizerFast

    from config.settings import DatasetSettings
    from preference_datasets import build_stores
    from trainers.data.batching import BatchLoader
    from trainers.data.cutters import PaddedCutter

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    settings = DatasetSettings(path=str(folder / "rows.jsonl"), schema="si", template="plain")
    before, start = resident_mib("VmRSS"), time.perf_counter()
    stores = build_stores(
        {"si": settings},
        loss="preference",
        tokenizer=tokenizer,
        max_length=64,
        max_prompt_length=32,
        cache_dir=folder / "cache",
        n_eval_examples=256,
    )
    loader = BatchLoader(stores.train, PaddedCutter(pad_token_id=0, num_microbatches=2), batch_size=64, seed=0)
    batches = loader.batches()
    next(batches)
    seconds = time.perf_counter() - start
    for _ in range(min(NUM_BATCHES, loader.steps) - 1):
        next(batches)
    batches.close()
    return {
        "train_rows": len(stores.train),
        "seconds": round(seconds, 2),
        "grown_mb": round(resident_mib("VmRSS") - before, 1),
        "peak_mb": round(resident_mib("VmHWM"), 1),
    }


def child(folder: Path) -> dict:
    """Run `measure` in a fresh process."""
    command = [sys.executable, "-m", "benchmarks.token_store", "--measure", str(folder)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def main() -> None:
    """Print the table; write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 1_000_000])
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/token_store.json"))
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(measure(options.measure)))
        return
    results = []
    for rows in options.rows:
        with tempfile.TemporaryDirectory() as name:
            write_rows(Path(name) / "rows.jsonl", rows)
            write_tokenizer(Path(name))
            results.append({"rows": rows, "first": child(Path(name)), "second": child(Path(name))})
    print(f"{'rows':>10} {'first s':>8} {'grown MB':>9} {'peak MB':>8} {'second s':>9} {'grown MB':>9} {'peak MB':>8}")
    for result in results:
        first, second = result["first"], result["second"]
        print(
            f"{result['rows']:>10} {first['seconds']:>8} {first['grown_mb']:>9} {first['peak_mb']:>8} "
            f"{second['seconds']:>9} {second['grown_mb']:>9} {second['peak_mb']:>8}"
        )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps({"cpus": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
