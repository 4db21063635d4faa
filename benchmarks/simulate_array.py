"""How long does a job array take, with shards of unequal speed on a limited number of GPUs and some preemptions?

    python -m benchmarks.simulate_array                   the plan of docs/scale.md: 10 million responses, 64 GPUs

A shard's time is start-up + rows / rate, times a log-normal factor (slow nodes, long responses). The scheduler keeps
`--gpus` shards running, in order. A running task is preempted after an exponential time of mean `--preempt-hours` (0:
never). It loses what was generated since its last finished batch, waits `--requeue-minutes`, starts up again and
resumes from its ledger. The expert's stages run in another array, without GPUs, as fast as its token limit allows.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class Array:
    """The cost of the GPU array.

    Attributes:
        hours: Time from the first start to the last end.
        gpu_hours: GPU time of all tasks, including start-ups and lost work.
        preemptions: Number of preemptions.
        lost_gpu_hours: GPU time of start-ups after a preemption and of repeated work.
        last_ten_percent_hours: Time from the end of 90% of the shards to the end of the last.
    """

    hours: float
    gpu_hours: float
    preemptions: int
    lost_gpu_hours: float
    last_ten_percent_hours: float


def simulate(options: argparse.Namespace) -> Array:
    """Run the array once."""
    draw = random.Random(options.seed)
    startup, batch = options.startup_minutes / 60, options.batch_minutes / 60
    work = options.rows / options.shards / options.rows_per_second / 3600
    waiting = [(0.0, shard, work * draw.lognormvariate(0, options.spread)) for shard in range(options.shards)]
    heapq.heapify(waiting)  # of (earliest start, shard, hours of work left)
    free = [0.0] * options.gpus
    heapq.heapify(free)
    ends, gpu_hours, lost, preemptions = [], 0.0, 0.0, 0
    while waiting:
        ready, shard, left = heapq.heappop(waiting)
        begin = max(ready, heapq.heappop(free))
        until = draw.expovariate(1 / options.preempt_hours) if options.preempt_hours else float("inf")
        if until >= startup + left:
            end = begin + startup + left
            ends.append(end)
        else:
            end = begin + until
            redone = min(batch * draw.random(), max(0.0, until - startup))
            done = max(0.0, until - startup - redone)
            preemptions += 1
            lost += min(until, startup) + redone
            heapq.heappush(waiting, (end + options.requeue_minutes / 60, shard, left - done))
        gpu_hours += end - begin
        heapq.heappush(free, end)
    ends.sort()
    return Array(ends[-1], gpu_hours, preemptions, lost, ends[-1] - ends[int(0.9 * len(ends))])


def expert(options: argparse.Namespace) -> dict[str, float]:
    """Count calls, tokens, cost and hours of the paid stages."""
    asked = options.rows * options.pass_share
    kept = asked * options.keep_share
    prompt = asked * options.filter_prompt_tokens + kept * options.respond_prompt_tokens
    answer = asked * options.filter_answer_tokens + kept * options.respond_answer_tokens
    return {
        "calls": asked + kept,
        "pairs": kept,
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "cost": (prompt * options.price_prompt + answer * options.price_completion) / 1e6,
        "hours": (prompt + answer) / options.tokens_per_minute / 60,
    }


def main() -> None:
    """Print the plan; write it as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--shards", type=int, default=1000)
    parser.add_argument("--gpus", type=int, default=64)
    parser.add_argument(
        "--rows-per-second", type=float, default=60.0, help="rate of one GPU (assumed; measure your own)"
    )
    parser.add_argument("--startup-minutes", type=float, default=4.0, help="queue, imports, corpus, weights")
    parser.add_argument("--batch-minutes", type=float, default=1.1, help="4096 rows: what a preemption can undo")
    parser.add_argument("--spread", type=float, default=0.25, help="sigma of the log-normal factor of a shard's time")
    parser.add_argument("--preempt-hours", type=float, default=4.0, help="mean time to a preemption; 0: never")
    parser.add_argument("--requeue-minutes", type=float, default=5.0)
    parser.add_argument("--pass-share", type=float, default=0.9, help="share of the rows that reach the expert")
    parser.add_argument("--keep-share", type=float, default=0.6, help="share of these that it keeps")
    parser.add_argument("--filter-prompt-tokens", type=float, default=330)
    parser.add_argument("--filter-answer-tokens", type=float, default=30)
    parser.add_argument("--respond-prompt-tokens", type=float, default=130)
    parser.add_argument("--respond-answer-tokens", type=float, default=80)
    parser.add_argument("--price-prompt", type=float, default=0.15, help="per million tokens (assumed)")
    parser.add_argument("--price-completion", type=float, default=0.60, help="per million tokens (assumed)")
    parser.add_argument("--tokens-per-minute", type=float, default=10e6, help="the account's limit (assumed)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/benchmarks/simulate_array.json"))
    options = parser.parse_args()
    array, paid = simulate(options), expert(options)
    ideal = options.rows / options.rows_per_second / 3600 / options.gpus
    print(f"induction: {array.hours:.2f} h on {options.gpus} GPUs (nothing but generation: {ideal:.2f} h)")
    print(
        f"  {array.gpu_hours:.1f} GPU hours, {array.preemptions} preemptions, {array.lost_gpu_hours:.1f} GPU hours "
        f"lost to them; the last tenth of the shards takes {array.last_ten_percent_hours:.2f} h"
    )
    print(
        f"expert: {paid['calls'] / 1e6:.1f} M calls, {paid['prompt_tokens'] / 1e9:.2f} + "
        f"{paid['completion_tokens'] / 1e9:.2f} G tokens, cost {paid['cost']:.0f}, {paid['hours']:.1f} h, "
        f"{paid['pairs'] / 1e6:.1f} M pairs"
    )
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(
        json.dumps({"options": vars(options), "array": asdict(array), "expert": paid}, default=str) + "\n"
    )


if __name__ == "__main__":
    main()
