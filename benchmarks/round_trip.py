"""Does the round-trip score help in the quick start's world, where the true instruction of each response is known?

    python -m benchmarks.round_trip --seed 0

The reversed model of the quick start writes one instruction per response, and then four; the base model of the quick
start, which follows instructions, scores them (`stage=score`). A pair is right if its instruction means the same as the
true one, by the world's rules; a pair from the corpus's noise (benign or cut-off text) is wrong. It compares the pairs
with the best scores with a random choice of the same size (the mean over all pairs that pass the cheap checks). No
expert is asked, because its rules know the world and would hide the difference.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from config.settings import CorpusSettings
from quickstart.checks import read_jsonl
from quickstart.world import World, write_demo_data
from safer_instruct.experts.rules import Rules
from safer_instruct.induction.ledger import read_ledger
from safer_instruct.induction.stages import cheap_check, with_instructions
from safer_instruct.text.corpus import read_corpus
from safer_instruct.text.examples import Example

RULES = "quickstart/rules.yaml"
SHARES = (0.9, 0.8, 0.7, 0.5)


def induced_pairs(output: Path, corpus: Path) -> list[Example]:
    """Return the pairs that pass the cheap checks, with their best candidates and scores."""
    examples = read_corpus(CorpusSettings(path=str(corpus), id_column="id")).examples
    ledgers = [read_ledger(output / "ledger" / f"{stage}-00000-of-00001.jsonl")[1] for stage in ("induce", "score")]
    return [pair for pair in with_instructions(examples, *ledgers) if not cheap_check(pair)]


def precisions(pairs: list[Example], truth: dict[str, dict[str, Any]], rules: Rules) -> dict[str, Any]:
    """Return the share of right pairs among all, and among those with the best scores."""

    def is_right(pair: Example) -> bool:
        row = truth[pair.id]
        meaning = rules.meaning(pair.instruction or "")
        return not row["noise"] and meaning is not None and meaning == rules.meaning(row["instruction"])

    ranked = sorted(pairs, key=lambda pair: -(pair.provenance["round_trip"] or float("-inf")))
    right = [is_right(pair) for pair in ranked]
    best = {f"{share:.0%}": sum(right[: round(share * len(right))]) / round(share * len(right)) for share in SHARES}
    return {"pairs": len(right), "all": sum(right) / len(right), "best": best}


def main() -> None:
    """Print the table; write the numbers as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--candidates", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--output", type=Path, default=Path("runs/benchmarks/round_trip"))
    options = parser.parse_args()
    folder, seed = options.output / str(options.seed), options.seed
    data = folder / "data"
    if not (data / "corpus.jsonl").exists():
        write_demo_data(World(), seed, data, part="dev")
    train = ["train.py", "experiment=quickstart_reverse", f"seed={seed}", f"run_dir={folder}/reverse"]
    train += [f"datasets.alpaca.path={data}/reverse.jsonl", "wandb.mode=disabled"]
    subprocess.run([sys.executable, *train], check=True, stdout=subprocess.DEVNULL)
    truth = {row["id"]: row for row in read_jsonl(data / "corpus_truth.jsonl")}
    rules, results = Rules.from_yaml(RULES), {}
    for count in options.candidates:
        output = folder / f"si{count}"
        induce = ["induce.py", "model=tiny", f"model.archive={folder}/reverse", f"corpus.path={data}/corpus.jsonl"]
        induce += ["corpus.id_column=id", "generation.temperature=0.7", "generation.max_new_tokens=48"]
        induce += [f"generation.seed={seed}", f"generation.num_candidates={count}", f"output={output}"]
        induce += ["roundtrip.model.name_or_path=quickstart/model"]
        for stage in ("induce", "score"):
            subprocess.run([sys.executable, *induce, f"stage={stage}"], check=True, stdout=subprocess.DEVNULL)
        pairs = induced_pairs(output, data / "corpus.jsonl")
        unsafe = [pair for pair in pairs if not truth[pair.id]["noise"]]
        results[count] = {"all": precisions(pairs, truth, rules), "unsafe": precisions(unsafe, truth, rules)}
        for name, result in results[count].items():
            best = "  ".join(f"{share}: {value:.3f}" for share, value in result["best"].items())
            print(f"{count} candidate(s), {name}: {result['pairs']} pairs, right {result['all']:.3f}; best {best}")
    (options.output / f"seed{seed}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
