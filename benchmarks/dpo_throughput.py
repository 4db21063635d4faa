"""How fast is a training step? Compare the trainer with a literal DPO step, TRL, and the arithmetic floor.

    OMP_NUM_THREADS=2 python -m benchmarks.dpo_throughput --lengths si --vocabulary 8192 --json si-8k.json
    OMP_NUM_THREADS=2 python -m benchmarks.dpo_throughput --contenders literal packed trl --lengths long
    OMP_NUM_THREADS=2 python -m benchmarks.dpo_throughput --task sft --contenders packed trl trl_packed
    OMP_NUM_THREADS=1 python -m benchmarks.dpo_throughput --memory literal packed --vocabulary 32768 --max-tokens 512
    OMP_NUM_THREADS=2 python -m benchmarks.dpo_throughput --contenders packed --profile

Contenders take turns on every global batch, in rotating order, all from the same weights:

- `packed`, `padded`: `Trainer.train_step` as in `python train.py`, with `packing` true and false;
- `packed_bf16`, `packed_compiled`, `packed_selective`, `packed_full`: packed, with `model.autocast=bfloat16`, with
  `trainer.compile=true`, or with `activation_checkpointing` selective or full; `packed_bf16_compiled` and
  `packed_bf16_full` are both;
- `literal`, `trl`, `trl_packed`: see `throughput_peers.py` (TRL needs `pip install -r requirements-bench.txt`);
  `literal_bf16` and so on: the same under bfloat16 autocast.

With `--device cuda` the models are made on the GPU. `--size 135m|1b|3b|7b` takes the shapes of SmolLM2-135M, of Llama
3.2 1B and 3B, and of Llama 2 7B. `mfu_with_head` is the arithmetic of `floor` as a share of the card's bfloat16 peak.

The model is a random Llama with random tokens. Their lengths are those of the published `si` pairs; with `long`,
prompts are 2.6 times as long and make up 70% of the tokens. As in those pairs, the template makes all prompts begin
with the same tokens (`--template 0`: all random, so that no two prompts do). Figures are medians over global batches.
Ratios are medians of the ratios per batch, by wall time and by CPU time (a busy machine blurs the first). The reference
cache costs one forward pass over the data; it is printed, but counted in no contender. `floor` is the time of the
matrix products of a step that computes each pair's prompt once (three passes of each weight over its positions, of the
output embedding over the response rows, of attention over the visible pairs of positions), each at the speed measured
in this run at its own shapes; `shared` counts the common beginning of all prompts of the global batch only once.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.memory import forget_peak, resident_mib
from benchmarks.throughput_peers import LiteralStep, trl_step
from config.settings import DPOSettings, LikelihoodLossSettings, TrainConfig, WandbSettings
from trainers.data.batching import BatchLoader, GlobalBatch
from trainers.data.cutters import PackedCutter, build_cutter
from trainers.data.packing import default_max_tokens, input_lengths, num_positions
from trainers.data.prefixes import shared_prefixes
from trainers.data.token_store import TokenStore, TokenStoreWriter
from trainers.distributed.launch import launch, pick_device
from trainers.distributed.layout import Layout
from trainers.distributed.parallelize import parallelize
from trainers.kernels.attention import use_packed_attention
from trainers.kernels.flops import peak_flops
from trainers.kernels.logps import autocast_dtype
from trainers.objectives import LikelihoodObjective, PreferenceObjective
from trainers.reference import attach_reference, reference_logps, weights_key
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer

# Token counts at these percentiles of the 5,721 published Safer-Instruct pairs with both responses: prompt with its
# template, chosen, rejected.
PERCENTILES = [0, 5, 10, 20, 30, 40, 50, 60, 70, 80, 90, 95, 98, 99, 99.7, 100]
PROMPT = [37, 41, 44, 48, 53, 59, 67, 77, 90, 103, 121, 150, 195, 219, 257, 378]
CHOSEN = [2, 12, 12, 12, 12, 13, 31, 48, 57, 63, 92, 151, 276, 358, 470, 659]
REJECTED = [2, 6, 8, 12, 16, 20, 24, 31, 39, 51, 68, 114, 166, 205, 301, 857]
TEMPLATE = 30  # template tokens before the instruction (of 36 in all), which are the same in all rows
MAX_LENGTH = 512
PROMPT_SCALE = {"si": 1.0, "long": 2.6}
OURS: dict[str, dict[str, Any]] = {
    "packed": {},
    "padded": {"packing": False},
    "packed_bf16": {"autocast": "bfloat16"},
    "packed_compiled": {"compile": True},
    "packed_selective": {"activation_checkpointing": "selective"},
    "packed_full": {"activation_checkpointing": "full"},
    "packed_bf16_compiled": {"autocast": "bfloat16", "compile": True},
    "packed_bf16_full": {"autocast": "bfloat16", "activation_checkpointing": "full"},
}
# Shapes of published models: width, intermediate width, layers, heads, heads of keys and values, vocabulary, tied.
SIZES = {
    "135m": (576, 1536, 30, 9, 3, 49_152, True),
    "1b": (2048, 8192, 16, 32, 8, 128_256, True),
    "3b": (3072, 8192, 28, 24, 8, 128_256, True),
    "7b": (4096, 11008, 32, 32, 32, 32_000, False),
}
BYTES_PER_PARAMETER = 12  # float32 weights, gradients and RMSprop's squares
ROOM_GIB = 40  # memory that `--fit-layers` leaves free for activations and logits
WARM_UP_ROWS = 4  # rows of the first step, which is not counted


def random_rows(folder: Path, arguments: argparse.Namespace, num_rows: int) -> TokenStore:
    """Return random tokens with the lengths of the published pairs; responses are cut to MAX_LENGTH - prompt."""
    random, words = np.random.default_rng(arguments.seed), np.random.default_rng([arguments.seed, 1])
    num_segments = 3 if arguments.task == "dpo" else 2
    template = words.integers(3, arguments.vocabulary, arguments.template).tolist()
    with TokenStoreWriter(folder, key="random rows", num_segments=num_segments) as writer:
        for row in range(num_rows):
            drawn = [int(np.interp(100 * random.random(), PERCENTILES, table)) for table in (PROMPT, CHOSEN, REJECTED)]
            prompt = min(int(drawn[0] * PROMPT_SCALE[arguments.lengths]), MAX_LENGTH - 64)
            lengths = [prompt, *(min(length, MAX_LENGTH - prompt) for length in drawn[1:num_segments])]
            segments = [words.integers(3, arguments.vocabulary, n).tolist() for n in lengths]
            segments[0][: len(template)] = template
            writer.append(f"row-{row}", segments)
        writer.finish({})
    return TokenStore(folder)


def random_model(arguments: argparse.Namespace) -> LlamaForCausalLM:
    """Return a Llama with random weights, made on the device."""
    torch.manual_seed(arguments.seed)
    with torch.device(arguments.device):
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=arguments.vocabulary,
                hidden_size=arguments.width,
                intermediate_size=arguments.intermediate,
                num_hidden_layers=arguments.layers,
                num_attention_heads=arguments.heads,
                num_key_value_heads=arguments.key_value_heads,
                max_position_embeddings=2 * MAX_LENGTH,
                tie_word_embeddings=arguments.tied,
            )
        )


def train_loader(store: TokenStore, arguments: argparse.Namespace, *, packing: bool) -> BatchLoader:
    """Return a loader that takes all rows once, as in train.py."""
    device = pick_device(arguments.device)
    cutter = build_cutter(packing=packing, device=device, pad_token_id=0, max_tokens=arguments.max_tokens)
    return BatchLoader(store, cutter, batch_size=arguments.batch_size, seed=arguments.seed, device=device)


def our_step(
    name: str, policy: LlamaForCausalLM, store: TokenStore, arguments: argparse.Namespace, layout: Layout, folder: Path,
    stack: ExitStack,
) -> tuple[Trainer, list[GlobalBatch]]:  # fmt: skip
    """Return a trainer and its global batches; the reference is cached."""
    settings = train_settings(arguments)
    settings.packing = OURS[name].get("packing", True)
    settings.model.autocast = OURS[name].get("autocast")
    settings.activation_checkpointing = OURS[name].get("activation_checkpointing", False)
    settings.trainer.compile = OURS[name].get("compile", False)
    loader = train_loader(store, arguments, packing=settings.packing)
    if settings.packing:
        use_packed_attention(policy)
    checkpointing = settings.activation_checkpointing
    parallelize(
        policy, layout, trainer=settings.trainer, packing=settings.packing, activation_checkpointing=checkpointing
    )
    objective = (PreferenceObjective if arguments.task == "dpo" else LikelihoodObjective)(settings.loss)
    if objective.needs_reference:
        started = time.perf_counter()
        autocast = autocast_dtype(settings.model.autocast)
        attach_reference(
            policy, [loader], layout=layout, cache_dir=folder / "cache", weights=weights_key(policy), autocast=autocast
        )
        print(f"{name}: reference cache of {len(store)} pairs in {time.perf_counter() - started:.1f} s", flush=True)
    run = stack.enter_context(RunDir.open(folder / name, config={}, manifest={}))
    trainer = Trainer(
        policy=policy, objective=objective, train_loader=loader, eval_loader=None, settings=settings, layout=layout,
        run=run,
    )  # fmt: skip
    return trainer, list(loader.batches())


def train_settings(arguments: argparse.Namespace) -> TrainConfig:
    """Return the published settings, without the warm-up: RMSprop, clipped at 10."""
    loss = DPOSettings(name="dpo")
    if arguments.task == "sft":
        loss = LikelihoodLossSettings(name="sft", reduction="token_mean")
    return TrainConfig(
        exp_name="benchmark", loss=loss, lr=arguments.lr, warmup_steps=0, wandb=WandbSettings(enabled=False),
        device=arguments.device,
    )  # fmt: skip


def reference_of(store: TokenStore, arguments: argparse.Namespace, layout: Layout, folder: Path) -> Tensor | None:
    """Return the precomputed reference for a peer: (N, 2) log-probabilities, from the cache of `packed`."""
    if arguments.task != "dpo":
        return None
    model = random_model(arguments)
    use_packed_attention(model)
    return reference_logps(
        model, store, torch.arange(len(store)), layout=layout, cache_dir=folder / "cache", weights=weights_key(model),
        cutter=PackedCutter(default_max_tokens(layout.device)),
    )  # fmt: skip


def build_steps(
    arguments: argparse.Namespace, layout: Layout, folder: Path, stack: ExitStack
) -> tuple[TokenStore, list[GlobalBatch], dict[str, Callable[[GlobalBatch], float]]]:
    """Return the data, the global batches and each contender's step, all from the same weights."""
    store = random_rows(folder / "rows", arguments, arguments.steps * arguments.batch_size + WARM_UP_ROWS)
    settings = train_settings(arguments)
    steps: dict[str, Callable[[GlobalBatch], float]] = {}
    batches = list(train_loader(store, arguments, packing=True).batches())
    for name in arguments.contenders:
        policy = random_model(arguments)
        if name in OURS:
            steps[name] = step_of(*our_step(name, policy, store, arguments, layout, folder, stack))
            continue
        kind, bfloat16 = name.removesuffix("_bf16"), name.endswith("_bf16")
        if kind == "literal":
            literal = LiteralStep(policy, store, settings, arguments.literal_parts, bfloat16=bfloat16)
            steps[name] = lambda batch, step=literal: step(batch.rows)
        else:
            peer = trl_step(
                policy, store, settings, folder / name, rows_at_once=arguments.trl_rows, bfloat16=bfloat16,
                by_length=arguments.trl_order == "length", packed=kind == "trl_packed",
                reference=reference_of(store, arguments, layout, folder),
            )  # fmt: skip
            steps[name] = lambda batch, step=peer: step(batch.rows)
    return store, batches, steps


def step_of(trainer: Trainer, batches: list[GlobalBatch]) -> Callable[[GlobalBatch], float]:
    """Return the trainer's step as a function from a global batch, which it cuts itself, to the loss."""
    by_start = {batch.start_examples: batch for batch in batches}

    def step(batch: GlobalBatch) -> float:
        # Never step 0, for which the trainer would require policy and reference to be equal.
        trainer.train_step(replace(by_start[batch.start_examples], start_examples=1))
        return trainer.train_metrics.means()["loss/train"]

    return step


class Floor:
    """The seconds that the matrix products of a step need, at the speed measured in this run."""

    def __init__(self, model: LlamaForCausalLM, store: TokenStore, num_positions: int, dtype: torch.dtype) -> None:
        """Measure the products in `dtype`, for `num_positions` positions of a typical micro-batch."""
        self.store, self.width, self.layers = store, model.config.hidden_size, model.config.num_hidden_layers
        self.device, self.dtype = model.device, dtype
        layer = [p.shape for p in model.model.layers[0].parameters() if p.dim() == 2]
        self.head = model.lm_head.weight.shape
        # Seconds per position of each shape: forward, gradient of the input, gradient of the weight.
        self.per_position = self.layers * sum(self.seconds(shape, num_positions) for shape in layer)
        self.per_target = self.seconds(self.head, num_positions // 2)
        self.flops_per_position = 6 * self.layers * sum(rows * columns for rows, columns in layer)
        self.rate = self.flops_per_position / self.per_position

    def seconds(self, shape: tuple[int, int], positions: int, repetitions: int = 5) -> float:
        """Return the median seconds per position of a weight's three products."""
        sizes = ((positions, shape[1]), shape, (positions, shape[0]))
        states, weight, gradient = (torch.randn(n, device=self.device, dtype=self.dtype) for n in sizes)
        times = []
        for _ in range(repetitions + 1):
            started = now(self.device)
            states @ weight.T, gradient @ weight, gradient.T @ states
            times.append(now(self.device) - started)
        return statistics.median(times[1:]) / positions

    def flops(self, rows: Tensor, *, sharing: bool) -> tuple[float, float, float]:
        """Return the operations of one global batch: of the layers' weights, the head, and attention."""
        inputs = input_lengths(self.store.lengths[rows].long())
        prompt, responses = inputs[:, :1], inputs[:, 1:]
        visible = (prompt * (prompt + 1) // 2).sum() + (responses * prompt + responses * (responses + 1) // 2).sum()
        repeated = repeated_prefixes(self.store, rows) * sharing
        visible -= (repeated * (repeated + 1) // 2).sum()
        targets = int(self.store.lengths[rows][:, 1:].sum())
        # Attention: scores and weighted values, 2 x 2 x width operations per visible pair; twice that in backward.
        return (
            self.flops_per_position * int(inputs.sum() - repeated.sum()),
            6.0 * self.head[0] * self.head[1] * targets,
            12.0 * self.width * self.layers * int(visible),
        )

    def __call__(self, rows: Tensor, *, sharing: bool) -> float:
        """Return the floor of one global batch; `sharing`: the common beginning of its prompts is computed once."""
        layers, head, attention = self.flops(rows, sharing=sharing)
        per_flop = self.per_target / (6 * self.head[0] * self.head[1])
        return (layers + attention) / self.rate + head * per_flop


def now(device: torch.device) -> float:
    """Return the time, after waiting for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def repeated_prefixes(store: TokenStore, rows: Tensor) -> Tensor:
    """Return the repeated prefix positions of each row of a global batch, (B,); 0 for the first row of a family."""
    families, lengths = shared_prefixes(store, rows)
    return lengths * (families != torch.arange(len(rows)))


def build_floor(arguments: argparse.Namespace, store: TokenStore, num_positions: int) -> Floor:
    """Return the floor of this model, in the dtype of the contenders."""
    single = argparse.Namespace(**{**vars(arguments), "layers": 1})  # enough, since all layers are alike
    bfloat16 = any("bf16" in name for name in arguments.contenders) and arguments.device != "cpu"
    floor = Floor(random_model(single), store, num_positions, torch.bfloat16 if bfloat16 else torch.float32)
    floor.per_position *= arguments.layers
    floor.flops_per_position *= arguments.layers
    floor.layers = arguments.layers
    return floor


def card_figures(
    arguments: argparse.Namespace, floor: Floor, batches: list[GlobalBatch], seconds: dict[str, list[float]]
) -> dict[str, object]:
    """Return the extra figures of a GPU: the needed arithmetic as a share of its peak, and its peak memory."""
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ours = min((name for name in medians if name in OURS), key=lambda name: medians[name], default=None)
    figures: dict[str, object] = {"best_of_ours": ours}
    for peer in ("literal", "trl"):
        found = [medians[name] for name in medians if name.startswith(peer)]
        if found and ours:
            figures[f"times_{peer}"] = min(found) / medians[ours]
    peak = peak_flops(floor.device)
    if peak and ours:
        needed = statistics.median(sum(floor.flops(batch.rows, sharing=True)) for batch in batches[:-1])
        figures["mfu_with_head"] = needed / medians[ours] / peak
        figures["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
        figures["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        figures["card"], figures["layers"] = torch.cuda.get_device_name(), arguments.layers
    return figures


def measure(arguments: argparse.Namespace, layout: Layout, folder: Path) -> dict[str, object]:
    """Alternate the contenders over the same batches."""
    with ExitStack() as stack:
        store, batches, steps = build_steps(arguments, layout, folder, stack)
        positions = [sum(map(num_positions, batch.microbatches)) for batch in batches]
        floor = build_floor(arguments, store, positions[0] // len(batches[0].microbatches))
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        cpu_seconds: dict[str, list[float]] = {name: [] for name in steps}
        floors: dict[str, list[float]] = {"floor": [], "shared_floor": []}
        differences: dict[str, float] = dict.fromkeys(steps, 0.0)
        names = list(steps)
        # `torch.compile` must see a second size before it generates code for all sizes.
        warm_up = (
            [batches[-1], batches[0]] if layout.device.type == "cuda" else [batches[-1]]
        )  # the last is a small one
        for number, batch in enumerate([*warm_up, *batches[:-1]], start=1 - len(warm_up)):
            losses = {}
            for name in names[number % len(names) :] + names[: number % len(names)]:
                started, cpu_started = now(layout.device), time.process_time()
                losses[name] = steps[name](batch)
                if number > 0:
                    seconds[name].append(now(layout.device) - started)
                    cpu_seconds[name].append(time.process_time() - cpu_started)
            if number > 0:
                floors["floor"].append(floor(batch.rows, sharing=False))
                floors["shared_floor"].append(floor(batch.rows, sharing=True))
                for name, loss in losses.items():
                    differences[name] = max(differences[name], abs(loss - losses[names[0]]))
                print(number, {name: round(values[-1], 2) for name, values in seconds.items()}, flush=True)
    needed = sum(int(input_lengths(store.lengths[batch.rows].long()).sum()) for batch in batches)
    repeated = sum(int(repeated_prefixes(store, batch.rows).sum()) for batch in batches)
    return {
        "seconds": {name: statistics.median(values) for name, values in seconds.items()},
        "rows_per_second": {
            name: statistics.median(arguments.batch_size / value for value in values)
            for name, values in seconds.items()
        },
        "all_seconds": seconds,
        "all_cpu_seconds": cpu_seconds,
        "floor_seconds": floors,
        **{
            f"over_{kind}": {
                name: statistics.median(a / b for a, b in zip(values, floors[kind], strict=True))
                for name, values in seconds.items()
            }
            for kind in floors
        },
        **card_figures(arguments, floor, batches, seconds),
        "matmul_gflops": floor.rate / 1e9,
        "positions_per_needed": sum(positions) / needed,
        "positions_per_shared": sum(positions) / (needed - repeated),
        "loss_difference_to_first": differences,
        "settings": {key: value for key, value in vars(arguments).items() if key != "json"},
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def profile(arguments: argparse.Namespace, layout: Layout, folder: Path) -> dict[str, object]:
    """Print the self time of the operators, or of a GPU's kernels, in a step of each contender, largest first.

    If a GPU's kernels take less time than the step, the GPU waits for the host.
    """
    on_gpu = layout.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * on_gpu
    found: dict[str, object] = {}
    with ExitStack() as stack:
        _, batches, steps = build_steps(arguments, layout, folder, stack)
        for name, step in steps.items():
            for batch in (batches[-1], batches[0]):
                step(batch)
            started = now(layout.device)
            step(batches[0])
            seconds = now(layout.device) - started
            with torch.profiler.profile(activities=activities) as profiler:
                step(batches[0])
                now(layout.device)
            times = {
                row.key: (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e6
                for row in profiler.key_averages()
                if not on_gpu or row.device_type == torch.autograd.DeviceType.CUDA
            }
            total = sum(times.values())
            kind = "kernels" if on_gpu else "operators"
            print(f"{name}: a step takes {seconds:.3f} s; under the profiler its {kind} take {total:.3f} s")
            largest = dict(sorted(times.items(), key=lambda item: -item[1])[:24])
            for key, value in largest.items():
                print(f"  {key[:100]:100}{value:8.4f} s{value / total:8.1%}")
            found[name] = {"step_seconds": seconds, "profiled_seconds": total, "largest": largest}
    return found


def measure_memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Print the GiB that each contender's steps add to a process, including model, gradients and optimizer."""
    own = [word for word in sys.argv[1:] if word not in ("--memory", *arguments.memory)]
    peaks = {}
    for name in arguments.memory:
        command = [sys.executable, "-m", "benchmarks.dpo_throughput", *own, "--contenders", name, "--peak"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[name] = float(output.split()[-1])
    return peaks


def peak_of_one_step(arguments: argparse.Namespace, layout: Layout, folder: Path) -> float:
    """Return the GiB from after the imports to the peak of the second step, when the optimizer has its state."""
    before = resident_mib("VmRSS")
    forget_peak()
    with ExitStack() as stack:
        _, batches, steps = build_steps(arguments, layout, folder, stack)
        for step in steps.values():
            step(batches[0])
            step(batches[1])
    return (resident_mib("VmHWM") - before) / 1024


def print_table(result: dict[str, object]) -> None:
    """Print the medians side by side; ratios to the first contender are taken per batch."""
    all_seconds, cpu = result["all_seconds"], result["all_cpu_seconds"]
    first = next(iter(all_seconds))
    print(
        f"{'':12}{'s/step':>9}{'rows/s':>9}{'x ' + first:>12}{'(from':>8}{'to)':>7}{'by cpu':>8}{'x floor':>9}"
        f"{'x shared':>10}{'loss diff.':>12}"
    )
    for name, values in all_seconds.items():
        ratios = sorted(slow / fast for slow, fast in zip(all_seconds[first], values, strict=True))
        cpu_ratio = statistics.median(slow / fast for slow, fast in zip(cpu[first], cpu[name], strict=True))
        print(
            f"{name:12}{result['seconds'][name]:9.2f}{result['rows_per_second'][name]:9.2f}"
            f"{statistics.median(ratios):12.2f}{ratios[0]:8.2f}{ratios[-1]:7.2f}{cpu_ratio:8.2f}"
            f"{result['over_floor'][name]:9.2f}{result['over_shared_floor'][name]:10.2f}{result['loss_difference_to_first'][name]:12.1e}"
        )
    floors = {kind: statistics.median(values) for kind, values in result["floor_seconds"].items()}
    print(
        f"floor {floors['floor']:.2f} s at {result['matmul_gflops']:.0f} GFLOP/s, with what prompts begin with once "
        f"{floors['shared_floor']:.2f} s; positions computed / needed {result['positions_per_needed']:.4f}, "
        f"with what prompts begin with once {result['positions_per_shared']:.4f}"
    )


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("dpo", "sft"), default="dpo")
    parser.add_argument(
        "--contenders", nargs="+", default=["literal", "packed"], help="ratios are relative to the first"
    )
    parser.add_argument("--memory", nargs="+", default=[], help="measure the memory of these instead")
    parser.add_argument("--profile", action="store_true", help="profile a step instead")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--lengths", choices=tuple(PROMPT_SCALE), default="si")
    parser.add_argument("--template", type=int, default=TEMPLATE, help="tokens that all prompts begin with")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--trl-rows", type=int, default=8, help="rows of one of TRL's micro-batches")
    parser.add_argument(
        "--trl-order", choices=("random", "length"), default="random",
        help="order of a batch's rows: random, as in TRL's trainers, or by length, which none of its settings does",
    )  # fmt: skip
    parser.add_argument("--literal-parts", type=int, default=4, help="micro-batches of the literal step")
    parser.add_argument("--max-tokens", type=int, default=None, help="positions of one of our micro-batches")
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tied", action="store_true", help="output embedding = input embedding")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--size", choices=tuple(SIZES), default=None, help="a published model's shapes")
    parser.add_argument("--fit-layers", action="store_true", help="of that model, as many layers as the card holds")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--print-json", action="store_true", help="the figures as the last line")
    parser.add_argument("--lr", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=None, help="also write the figures here")
    return parser


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line, with every shape of the model filled in."""
    arguments = parser().parse_args(words)
    arguments.intermediate = arguments.width * 11 // 4 // 32 * 32
    arguments.heads = arguments.key_value_heads = max(1, arguments.width // 64)
    if arguments.size is not None:
        (
            arguments.width, arguments.intermediate, arguments.layers, arguments.heads, arguments.key_value_heads,
            arguments.vocabulary, arguments.tied,
        ) = SIZES[arguments.size]  # fmt: skip
    if arguments.fit_layers and torch.cuda.is_available():
        total = torch.cuda.mem_get_info()[1] / BYTES_PER_PARAMETER - ROOM_GIB * 2**30 / BYTES_PER_PARAMETER
        embeddings = arguments.width * arguments.vocabulary * (1 if arguments.tied else 2)
        heads = 2 + 2 * arguments.key_value_heads / arguments.heads
        layer = arguments.width * (heads * arguments.width + 3 * arguments.intermediate)
        arguments.layers = min(arguments.layers, max(1, int((total - embeddings) // layer)))
    return arguments


def main() -> None:
    """Measure, print and write the figures."""
    arguments = parse()
    result: dict[str, object] = {}

    def worker(layout: Layout) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if arguments.peak:
                print(peak_of_one_step(arguments, layout, Path(folder)))
            elif arguments.profile:
                result.update(profile(arguments, layout, Path(folder)))
            else:
                result.update(measure(arguments, layout, Path(folder)))

    if arguments.memory:
        result = {"peak_gib": measure_memory(arguments)}
        for name, value in result["peak_gib"].items():
            print(f"{name:12}{value:8.2f} GiB")
    else:
        launch(worker, TrainConfig(exp_name="benchmark", device=arguments.device))
        if arguments.peak:
            return
        if not arguments.profile:
            print_table(result)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2, default=str) + "\n")
    if arguments.print_json:
        print(json.dumps(result, default=str))


if __name__ == "__main__":
    main()
