"""The stages of `benchmarks/gpu.py` other than throughput; each prints one line of JSON at its end.

python -m benchmarks.gpu_checks card --device cuda
python -m benchmarks.gpu_checks correctness --device cpu --lengths 40
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
Figures = dict[str, Any]
PREEMPTED = 75


def seconds_of(function: Callable[[], object], device: torch.device, repetitions: int = 10) -> float:
    """Return the median seconds of a call after three warm-up calls, including the device's work."""
    times = []
    for _ in range(repetitions + 3):
        synchronize(device)
        started = time.perf_counter()
        function()
        synchronize(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def card(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Measure the card's two limits: a large bfloat16 product, and a large copy (bytes read and written)."""
    size = int(arguments.size or 8192)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size * 8, device=device)
    target = torch.empty_like(source)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "card": name,
        "torch": torch.__version__,
        "bf16_tflops": 2 * size**3 / seconds_of(lambda: a @ b, device) / 1e12,
        "copy_tb_per_s": 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device) / 1e12,
    }


def correctness(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Compare packed rows with padded ones: log-probabilities and every gradient, six architectures.

    float32 must agree up to rounding; in bfloat16 the packed path may be twice as far from float32 as the padded path.
    The control, a row whose responses see each other, must be far off; otherwise the comparison detects nothing.
    """
    from tests.tiny_models import SUPPORTED, tiny_model

    float32, ratios, failed = [0.0], [0.0], []
    packable = [name for name in SUPPORTED if tiny_model(name).config._attn_implementation == "sdpa"]
    for name in packable:
        for length in arguments.lengths:
            for segments in (3, 2):
                for shared in (0, 24):
                    case = f"{name} T={length} segments={segments} prefix={shared}"
                    error, ratio = _compare(name, length, segments, shared, device)
                    float32.append(error)
                    ratios.append(ratio)
                    if error > 1e-4 or ratio > 2:
                        failed.append(f"{case}: float32 {error:.1e}, bfloat16 {ratio:.2f} of the padded error")
    return {
        "cases": len(float32) - 1,
        "without_sdpa": sorted(set(SUPPORTED) - set(packable)),  # in this version of transformers
        "worst_float32": max(float32),
        "worst_bfloat16_ratio": max(ratios),
        "control": _control(device),
        "failed": failed[:20],
        "all_within": not failed,
    }


def _compare(name: str, length: int, segments: int, shared: int, device: torch.device) -> tuple[float, float]:
    """Return the relative error in float32, and the bfloat16 error as a multiple of the padded path's."""
    rows = max(2, length // 60)  # keeps sequences shorter than the tiny models' position embeddings
    results: dict[tuple[bool, torch.dtype], list[Tensor]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for packing in (False, True):
            results[packing, dtype] = _logps_and_gradients(name, rows, length, segments, shared, packing, dtype, device)
    truth = results[False, torch.float32]
    float32 = _distance(results[True, torch.float32], truth)
    padded, packed = (_distance(results[packing, torch.bfloat16], truth) for packing in (False, True))
    return float32, packed / max(padded, 1e-6)


def _distance(values: list[Tensor], truth: list[Tensor]) -> float:
    """Return the largest relative L2 difference over all tensors."""
    pairs = zip(values, truth, strict=True)
    return max(float((value - true).norm() / true.norm().clamp(min=1e-12)) for value, true in pairs)


def _logps_and_gradients(
    name: str, rows: int, length: int, segments: int, shared: int, packing: bool, dtype: torch.dtype,
    device: torch.device,
) -> list[Tensor]:  # fmt: skip
    from tests.test_packing import in_order, microbatch, store_of
    from tests.tiny_models import tiny_model
    from trainers.kernels.attention import use_packed_attention
    from trainers.kernels.logps import sequence_logps

    response = max(2, (length // rows - shared) // (segments + 1))
    shapes = [(2 * response, response + i % 3, *([response - i % 2] * (segments - 2))) for i in range(rows)]
    with tempfile.TemporaryDirectory() as folder:
        beginnings = [(shared, 0)] * rows if shared else ()
        store = store_of(Path(folder) / "rows", shapes, shared=beginnings)
        batch = microbatch(store, packing=packing, max_tokens=None if not packing else 1 << 20).to(device)
    model = tiny_model(name).to(device)
    if packing:
        use_packed_attention(model)
    logps, _ = sequence_logps(model, batch, autocast=None if dtype == torch.float32 else dtype)
    logps = in_order(batch, logps)
    weights = torch.linspace(-1, 2, logps.numel(), dtype=torch.float64, device=device).view(logps.shape)
    (logps * weights).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [logps.detach().double(), *(gradient.double() for gradient in gradients)]


def _control(device: torch.device) -> float:
    """Return the error of a pair whose responses are packed as one, so that the rejected one sees the chosen one."""
    from tests.test_packing import microbatch, store_of
    from tests.tiny_models import tiny_model
    from trainers.data.layout import PackedLayout
    from trainers.kernels.attention import use_packed_attention
    from trainers.kernels.logps import sequence_logps

    with tempfile.TemporaryDirectory() as folder:
        batch = microbatch(store_of(Path(folder) / "rows", [(20, 10, 10)] * 4), packing=True).to(device)
    model = tiny_model().to(device)
    use_packed_attention(model)
    right, _ = sequence_logps(model, batch)
    wrong = batch.clone()
    # Inputs of a row: 20 of the prompt, and 9 of each response, whose last token is not an input.
    wrong["layout"] = PackedLayout(torch.tensor([[20, 18, 0]] * 4))
    found, _ = sequence_logps(model, wrong)
    return float((found - right).detach().abs().max())


def resume(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Check that training with a SIGTERM in the middle and a resume is bit-equal to training without a stop.

    `again_bit_equal` and `again_difference` compare the first command with its repetition without a stop. If these
    differ too, the cause is the device's arithmetic and not the resume.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = [
            {"instruction": f"say {word} {i}", "chosen": f"no, not {word}", "rejected": f"{word} " * (1 + i % 7)}
            for i in range(120)
            for word in ("apple", "stone")
        ]
        (folder / "pairs.jsonl").write_text("".join(json.dumps({**row, "label": "none"}) + "\n" for row in rows))
        with ThreadPoolExecutor() as threads:
            again = threads.submit(_train, folder, "again", device, stop=False)
            straight = _train(folder, "straight", device, stop=False)
            stopped = _train(folder, "stopped", device, stop=True)
            resumed = _train(folder, "stopped", device, stop=False)
            again.result()
        weights = {
            run: load_file(folder / "runs" / run / "LATEST" / "model" / "model.safetensors")
            for run in ("straight", "stopped", "again")
        }
        losses = [_losses(folder, run) for run in ("straight", "stopped")]
    pairs = list(zip(*losses, strict=False))
    return {
        "status": [straight, stopped, resumed],
        "stopped_with_75": [straight, stopped, resumed] == [0, PREEMPTED, 0],
        "same_losses": len(losses[0]) == len(losses[1]) and all(abs(a - b) <= 1e-4 * abs(a) for a, b in pairs),
        "bit_equal": _difference(weights["stopped"], weights["straight"]) == 0,
        "difference": _difference(weights["stopped"], weights["straight"]),
        "again_bit_equal": _difference(weights["again"], weights["straight"]) == 0,
        "again_difference": _difference(weights["again"], weights["straight"]),
    }


def _difference(weights: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Return the largest absolute difference between two sets of weights."""
    assert weights.keys() == truth.keys()
    return max(float((weight - truth[name]).abs().max()) for name, weight in weights.items())


def _train(folder: Path, name: str, device: torch.device, *, stop: bool) -> int:
    """Return the exit status of a DPO run in one FSDP process with asynchronous saves."""
    command = [
        sys.executable, str(ROOT / "train.py"), "loss=dpo", "model=tiny", "datasets=[si]",
        "datasets.si.path=pairs.jsonl", f"exp_name={name}", "trainer=FSDPTrainer", "trainer.num_processes=1",
        f"device={device.type}", "batch_size=8", "eval_batch_size=8", "n_epochs=2", "eval_every=200", "lr=1e-4",
        "checkpoint.every_examples=80", "checkpoint.keep_last=2", "wandb.enabled=false", "minimum_log_interval_secs=0",
    ]  # fmt: skip
    process = subprocess.Popen(command, cwd=folder, stdout=sys.stderr, stderr=sys.stderr)
    metrics = folder / "runs" / name / "metrics.jsonl"
    while stop and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("loss/train") >= 12:
            process.send_signal(signal.SIGTERM)
            break
        time.sleep(0.05)
    return process.wait()


def _losses(folder: Path, name: str) -> list[float]:
    rows = map(json.loads, (folder / "runs" / name / "metrics.jsonl").read_text().splitlines())
    return [row["loss/train"] for row in rows if "loss/train" in row]


def with_trainer(
    arguments: argparse.Namespace, device: torch.device, work: Callable[[Any, list[Any]], None], *,
    compiled: bool = False,
) -> None:  # fmt: skip
    """Call `work(trainer, global batches)` with a model of the chosen size, packed batches and bfloat16 autocast."""
    from benchmarks import dpo_throughput as throughput
    from config.settings import TrainConfig
    from trainers.distributed.launch import launch

    options = ["--device", device.type, "--batch-size", "8", "--steps", "4"]
    if arguments.size == "tiny":
        options += ["--width", "64", "--layers", "2", "--vocabulary", "512"]
    else:
        options += ["--size", arguments.size or "1b", "--batch-size", "64"]
    parsed = throughput.parse(options)
    name = "packed_bf16_compiled" if compiled else "packed_bf16"

    def worker(layout: Any) -> None:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            store = throughput.random_rows(Path(folder) / "rows", parsed, 4 * parsed.batch_size)
            policy = throughput.random_model(parsed)
            work(*throughput.our_step(name, policy, store, parsed, layout, Path(folder), stack))

    launch(worker, TrainConfig(exp_name="benchmark", device=device.type))


def waits(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Count how often a training step waits for the device, and print where its time goes."""
    figures: Figures = {}

    def work(trainer: Any, batches: list[Any]) -> None:
        for batch in batches[:2]:
            trainer.train_step(replace(batch, start_examples=1))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            trainer.train_step(replace(batches[2], start_examples=1))
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{Path(one.filename).name}:{one.lineno}" for one in found if "synchroniz" in str(one.message)]
        figures.update({"waits_per_step": len(places), "places": places})
        on_gpu = device.type == "cuda"
        activities = [torch.profiler.ProfilerActivity.CPU, *[torch.profiler.ProfilerActivity.CUDA] * on_gpu]
        with torch.profiler.profile(activities=activities) as profiler:
            trainer.train_step(replace(batches[2], start_examples=1))
            synchronize(device)
        key = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
        print(profiler.key_averages().table(sort_by=key, row_limit=30))

    with_trainer(arguments, device, work)
    return figures


def save(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Measure how long an asynchronous save delays the next training step."""
    from trainers.run.metrics_log import MetricsLog

    stalls: list[float] = []

    def work(trainer: Any, batches: list[Any]) -> None:
        trainer.train_step(replace(batches[0], start_examples=1))
        with MetricsLog(trainer.run, trainer.settings, {}, {}, active=False) as log:
            for batch in batches[1:3]:  # the first save also allocates the pinned buffers
                synchronize(device)
                started = time.perf_counter()
                trainer.save(log)
                stalls.append(time.perf_counter() - started)
                trainer.train_step(replace(batch, start_examples=1))
                trainer.checkpoints.finish()

    with_trainer(arguments, device, work)
    return {"first_stall_seconds": stalls[0], "stall_seconds": stalls[-1]}


def isolated(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Time the parts of a step separately: the head, the gradient norm, and the forward pass of a micro-batch."""
    from trainers.distributed.sharding import clip_grad_norm
    from trainers.kernels.logps import token_logps

    rows, width, vocabulary = (256, 64, 512) if arguments.size == "tiny" else (8192, 2048, 128_256)
    states = torch.randn(rows, width, device=device, requires_grad=True)
    head = torch.nn.Linear(width, vocabulary, bias=False, device=device)
    targets = torch.randint(vocabulary, (rows,), device=device)

    def ours() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            token_logps(head, states, targets).sum().backward()

    def products() -> None:
        weight, inputs = head.weight.detach().bfloat16(), states.detach().bfloat16()
        logits = inputs @ weight.T
        logits @ weight, logits.T @ inputs

    figures: Figures = {"head_seconds": seconds_of(ours, device, 5)}
    figures["head_products_seconds"] = seconds_of(products, device, 5)
    if device.type == "cuda":
        figures.update(_attention_seconds(device))

    def work(trainer: Any, batches: list[Any]) -> None:
        parameters = list(trainer.policy.parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        loss = torch.zeros((), device=device)
        figures["clip_seconds"] = seconds_of(lambda: clip_grad_norm(parameters, 1e9, loss, trainer.layout), device, 5)
        figures["optimizer_seconds"] = seconds_of(trainer.optimizer.step, device, 5)
        figures["parameters"] = sum(parameter.numel() for parameter in parameters)

    with_trainer(arguments, device, work)
    return figures


def _attention_seconds(device: torch.device) -> Figures:
    """Time attention, forward and backward, with both GPU kernels on the heads of a 1B and of a 7B model."""
    from trainers.data.layout import PackedLayout
    from trainers.kernels import attention

    pairs = torch.tensor([[20, 70, 60]] * 54)  # with a template of 30 before the first: 8,130 positions
    prefix_lengths = torch.tensor([30] + [0] * (len(pairs) - 1))
    packed = attention.ForwardPass(PackedLayout(pairs, prefix_lengths, torch.zeros_like(prefix_lengths)), device, None)
    size, figures = packed.layout.num_positions, {}
    for model, heads, key_heads, width in (("1b", 32, 8, 64), ("7b", 32, 32, 128)):
        states = [
            torch.randn(1, count, size, width, device=device, dtype=torch.bfloat16, requires_grad=True)
            for count in (heads, key_heads, key_heads)
        ]
        outputs = {}
        for name, dtype in (("flash", torch.bfloat16), ("flex", torch.float32)):  # the dtype chooses the kernel
            mask = attention.packed_mask(packed, None, dtype)
            mask.dtype = torch.bfloat16

            def attend(mask: Any = mask, states: list[Tensor] = states) -> Tensor:
                return mask.kernel(*states, mask, None)

            def both(attend: Any = attend) -> None:
                attend().sum().backward()

            outputs[name] = attend().detach().double()
            figures[f"attention_{name}_{model}_seconds"] = seconds_of(both, device)
        difference = (outputs["flash"] - outputs["flex"]).norm() / outputs["flex"].norm()
        figures[f"attention_difference_{model}"] = float(difference)
    return figures


def generation(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Time the answers to 64 prompts, 128 tokens each."""
    from benchmarks import dpo_throughput as throughput

    size = ["--width", "64", "--layers", "2", "--vocabulary", "512"] if arguments.size == "tiny" else ["--size", "1b"]
    parsed = throughput.parse(["--device", device.type, *size])
    model = throughput.random_model(parsed).to(torch.bfloat16).eval()
    prompts = torch.randint(3, parsed.vocabulary, (64, 64), device=device)
    tokens = 16 if arguments.size == "tiny" else 128
    options: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "min_new_tokens": tokens}

    def answer() -> None:
        model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=tokens, **options)

    seconds = seconds_of(answer, device, repetitions=1)
    return {"seconds": seconds, "tokens_per_second": 64 * tokens / seconds}


def real_model(arguments: argparse.Namespace, device: torch.device) -> Figures:
    """Train a real pretrained model, SFT then DPO, on pairs that differ in their words alone."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        things = [
            "a river",
            "an old bridge",
            "two cats",
            "a long letter",
            "the first snow",
            "a paper boat",
            "green tea",
        ]
        rows = [
            {"instruction": f"Write sentence {i} about {thing}.", "label": "none",
             "chosen": f"Here is a calm sentence about {thing}: it was a quiet day.", "rejected": f"{thing}! " * 4}
            for i in range(40) for thing in things
        ]  # fmt: skip
        (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        shared = [
            "model=blank_model", f"model.name_or_path={Path(arguments.model).resolve()}", "datasets=[si]",
            "datasets.si.path=pairs.jsonl", "datasets.si.eval_fraction=0.2", f"device={device.type}", "batch_size=32",
            "n_epochs=1", "max_length=256", "max_prompt_length=128", "wandb.enabled=false", "sample_during_eval=false",
            "model.autocast=bfloat16",
        ]  # fmt: skip
        for options in (
            ["loss=sft", "exp_name=sft", "lr=2e-5", "optimizer=AdamW"],
            ["loss=dpo", "exp_name=dpo", "lr=1e-6", "model.archive=runs/sft"],
        ):
            command = [sys.executable, str(ROOT / "train.py"), *shared, *options]
            subprocess.run(command, cwd=folder, check=True, stdout=sys.stderr)
        metrics = [json.loads(line) for line in (folder / "runs/dpo/metrics.jsonl").read_text().splitlines()]
    curve = [row["loss/train"] for row in metrics if "loss/train" in row]
    accuracies = [row["rewards_eval/accuracies"] for row in metrics if "rewards_eval/accuracies" in row]
    return {"reward_accuracy": accuracies[-1], "dpo_losses": curve, "minutes": (time.monotonic() - started) / 60}


STAGES: dict[str, Callable[[argparse.Namespace, torch.device], Figures]] = {
    function.__name__: function
    for function in (card, correctness, resume, waits, save, isolated, generation, real_model)
}


def main() -> None:
    """Run one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=list(STAGES))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", default=None, help="of the model: 1b, 3b, 7b or tiny; of `card`, of its matrices")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[40, 90, 300, 2000], help="positions of a micro-batch"
    )
    parser.add_argument("--model", default=None, help="folder of a real model")
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "2")
    print(json.dumps(STAGES[arguments.stage](arguments, torch.device(arguments.device))), flush=True)


if __name__ == "__main__":
    main()
