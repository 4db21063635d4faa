"""Training over several processes equals training in one: losses, weights, reference, evaluation, checkpoints."""

import json
import os
import signal
from collections import Counter
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from torch.nn.attention.varlen import varlen_attn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from transformers import AutoModelForCausalLM

from config.errors import UserError
from config.settings import (
    CheckpointSettings,
    DPOSettings,
    GenerationSettings,
    LikelihoodLossSettings,
    TrainerSettings,
)
from safer_instruct.generation.hf import HFGenerator
from tests.conftest import byte_level_tokenizer, tiny_llama
from tests.ranks import Ranks, read, run_ranks
from tests.tiny_models import PACKABLE, WITH_SDPA, tiny_model
from tests.tiny_runs import tiny_settings, tiny_trainer
from trainers.distributed.launch import launch
from trainers.distributed.parallelize import KEPT_BY_SELECTIVE, find_blocks
from trainers.distributed.sharding import same_logits
from trainers.kernels.shortcuts import use_fast_norms
from trainers.run.run_dir import RunDir
from trainers.trainer import Trainer


class OperatorCalls(TorchDispatchMode):
    """How often each operator is called."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[func] += 1
        return func(*args, **(kwargs or {}))


pytestmark = pytest.mark.timeout(1800)  # the first test waits for the runs of all
LOSSES = {
    "dpo": DPOSettings(name="dpo", nll_weight=0.3),
    "sft": LikelihoodLossSettings(name="sft"),
    "reverse": LikelihoodLossSettings(name="reverse", reduction="token_mean"),
}
LAYOUTS = {  # name -> processes, replicas
    "fsdp 2": (2, 1),
    "fsdp 4": (4, 1),
    "hsdp 2x2": (4, 2),
}
STEPS = 20
IDS = torch.arange(3, 15)[None]


def settings_of(loss: str, accumulation: int, processes: int, replicas: int, **changes):
    """20 steps over 46 rows of unequal lengths in batches of 5: the last of an epoch has 1 row, fewer than ranks."""
    name = "BasicTrainer" if processes == 1 else "FSDPTrainer"
    settings = tiny_settings(
        loss=LOSSES[loss], batch_size=5, eval_batch_size=5, n_epochs=2, optimizer="AdamW", lr=3e-4,
        gradient_accumulation_steps=accumulation, eval_every=60,
        trainer=TrainerSettings(name=name, num_processes=processes, num_replicas=replicas),
    )  # fmt: skip
    return replace(settings, **changes)


def train(layout, folder: Path, run_name: str, settings, model: str = "llama"):
    path = folder / run_name
    opened = layout.main_only(lambda: RunDir.open(path, config=asdict(settings), manifest={}))
    with opened or RunDir(path, None) as run:
        tiny_trainer(folder, layout, run, settings, model=model, num_rows=46).train()


def train_all(layout, runs):
    """Runs one behind the other in the same processes: FSDP's first steps cost more than all that follow."""
    for run in runs:
        train(layout, *run)


def start_all(settings, runs) -> None:
    """Starts `train` for each of the runs, which share the trainer of `settings`."""
    if settings.trainer.name == "BasicTrainer":
        launch(lambda layout: train_all(layout, runs), settings)
    else:
        run_ranks(train_all, settings.trainer.num_processes, settings, runs)


def start(folder: Path, run_name: str, settings, model: str = "llama") -> None:
    start_all(settings, [(folder, run_name, settings, model)])


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [value for row in rows for name, value in row.items() if name in ("loss/train", "loss/eval")]


def weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "LATEST" / "model" / "model.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """<layout>/<loss> <accumulation>, and bfloat16/run: the runs that tests compare; "one" is one process."""
    folder = tmp_path_factory.mktemp("runs")
    for layout, (processes, replicas) in {"one": (1, 1), **LAYOUTS}.items():
        of_layout = [
            (folder / layout, f"{loss} {accumulation}", settings_of(loss, accumulation, processes, replicas))
            for loss in LOSSES
            for accumulation in (1, 3)
        ]
        settings = of_layout[0][2]
        if layout == "fsdp 2":
            model = replace(settings.model, fsdp_policy_mp="bfloat16")
            of_layout.append((folder / "bfloat16", "run", replace(settings, model=model)))
        for path, *_ in of_layout:
            path.mkdir(exist_ok=True)
        start_all(settings, of_layout)
    return folder


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_twenty_steps_equal_those_of_one_process(runs, loss, accumulation):
    name = f"{loss} {accumulation}"
    expected, one = losses(runs / "one" / name), weights(runs / "one" / name)
    assert len(expected) == STEPS + 3
    for layout in LAYOUTS:
        assert losses(runs / layout / name) == pytest.approx(expected, abs=1e-5), layout
        difference = (weights(runs / layout / name) - one).abs()
        print(f"{name} {layout}: mean {difference.mean():.2e} largest {difference.max():.2e}")
        assert difference.mean() < 1e-6, layout


def deviation(run: Path, other: Path) -> float:
    """Mean absolute difference of the final weights."""
    return (weights(run) - weights(other)).abs().mean().item()


def train_and_keep_logits(layout, folder, settings):
    """A run of each architecture; rank 0 leaves the logits of the trained policy, sharded as it is, in logits.pt."""
    kept, original = {}, Trainer.train

    def train_and_keep(self):
        original(self)
        with torch.no_grad():
            kept["logits"] = self.policy.eval()(IDS).logits

    Trainer.train = train_and_keep
    for name in WITH_SDPA:
        train(layout, folder, name, settings, name)
        if layout.is_main:
            torch.save(kept["logits"], folder / name / "logits.pt")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    """<architecture>: a run on two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    settings = settings_of("sft", 2, 2, 1, n_epochs=1, activation_checkpointing=True)
    run_ranks(train_and_keep_logits, 2, settings, folder, settings)
    return folder


@pytest.mark.parametrize("name", PACKABLE)
def test_every_architecture_is_sharded_materialised_and_saved(tmp_path, sharded, name):
    """Losses of one process; and what is saved has, to the last bit, the logits of the sharded model in training."""
    start(tmp_path, "one", settings_of("sft", 2, 1, 1, n_epochs=1, activation_checkpointing=True), name)
    assert losses(sharded / name) == pytest.approx(losses(tmp_path / "one"), rel=1e-6, abs=1e-5)
    saved = AutoModelForCausalLM.from_pretrained(sharded / name / "LATEST" / "model")
    assert type(saved) is type(tiny_model(name))
    use_fast_norms(saved)  # as the model in training has them: to the last bit
    with torch.no_grad():
        logits = saved.eval()(IDS).logits
    assert torch.equal(logits, read(sharded / name, "logits.pt"))


def die_after(layout, folder, run_name, settings, model, steps):
    """A run whose processes are all killed at the begin of a step; the checkpoints before it are complete."""
    original, count = Trainer.train_step, [0]

    def counted(self, *arguments):
        count[0] += 1
        if count[0] > steps:
            self.checkpoints.wait()
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(self, *arguments)

    Trainer.train_step = counted
    train(layout, folder, run_name, settings, model)


@pytest.mark.parametrize("loss", ["dpo", "sft"])
def test_a_run_goes_on_under_any_layout(tmp_path, runs, loss):
    """Started on 2 processes, then on 4, as 2 replicas of 2, as one of 1 shard, and finished in one process."""
    checkpoint = CheckpointSettings(every_examples=5, keep_last=2)
    for processes, replicas, steps in ((2, 1, 5), (4, 1, 3), (4, 2, 4), (1, 1, 3)):
        changes = {"trainer": TrainerSettings("FSDPTrainer", processes, replicas), "checkpoint": checkpoint}
        settings = settings_of(loss, 1, 2, 1, **changes)
        died = Ranks(die_after, processes, settings, tmp_path, "moved", settings, "llama", steps).join()
        assert died == [-signal.SIGKILL] * processes
    start(tmp_path, "moved", settings_of(loss, 1, 1, 1, checkpoint=checkpoint))
    straight = runs / "one" / f"{loss} 1"
    assert losses(tmp_path / "moved") == pytest.approx(losses(straight), abs=1e-5)
    assert deviation(tmp_path / "moved", straight) < 1e-6


def test_the_reference_cache_is_the_same_file_for_any_number_of_processes(runs):
    """Which is found by all losses of a layout."""
    files = []
    for layout in ("one", *LAYOUTS):
        entries = [path for path in (runs / layout / "cache" / "reference").iterdir() if path.is_dir()]
        files.append({path.name: (path / "logps.f64").read_bytes() for path in entries})
    assert len(files[0]) == 2  # training and evaluation
    assert all(one == files[0] for one in files[1:])


def test_bfloat16_compute_keeps_float32_masters(runs):
    """Losses within what bfloat16 rounds, a first reward of 0, and weights that move by less than bfloat16 resolves."""
    exact, run = runs / "one" / "dpo 1", runs / "bfloat16" / "run"
    assert losses(run) == pytest.approx(losses(exact), rel=0.03)
    assert losses(run) != pytest.approx(losses(exact), rel=1e-6)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Not 0.0 as in float32: the cache's batches have other shapes, which bfloat16 rounds otherwise (beta x 0.05 nats).
    assert rows[0]["rewards_eval/margins"] == pytest.approx(0.0, abs=5e-3)
    final = weights(run)
    assert final.dtype == torch.float32
    assert not torch.equal(final.bfloat16().float(), final)


def count_reductions(layout, folder, runs):
    """Leaves the number of reduce-scatters of each step in <run>/reductions.pt."""
    original, counts = Trainer.accumulate_gradients, []

    def profiled(self, *arguments):
        with torch.profiler.profile() as profile:
            result = original(self, *arguments)
        counts.append(sum(event.count for event in profile.key_averages() if "reduce_scatter" in event.key))
        return result

    Trainer.accumulate_gradients = profiled
    for name, settings in runs.items():
        train(layout, folder, name, settings)
        if layout.is_main:
            torch.save(torch.tensor(counts), folder / name / "reductions.pt")
        counts.clear()


def test_gradients_are_reduced_once_a_step_unless_it_is_asked_for(tmp_path):
    """A reduction for each micro-batch: 5 rows in 2 processes, cut in at least 2, make at least twice as many."""
    once, cut = (settings_of("sft", accumulation, 2, 1, n_examples=10) for accumulation in (1, 2))
    often = replace(cut, trainer=replace(cut.trainer, reduce_every_microbatch=True))
    run_ranks(count_reductions, 2, once, tmp_path, {"once": once, "cut": cut, "often": often})
    counts = {name: read(tmp_path / name, "reductions.pt") for name in ("once", "cut", "often")}
    assert torch.equal(counts["once"], counts["cut"])
    assert min(counts["once"]) > 0
    assert torch.all(counts["often"] >= 2 * counts["cut"])
    assert losses(tmp_path / "often") == pytest.approx(losses(tmp_path / "cut"), abs=1e-6)


def one_process(layout, folder, settings):
    """Leaves whether the policy is sharded, and of each block whether it is again behind its forward pass."""
    with RunDir.open(folder / "run", config=asdict(settings), manifest={}) as run:
        trainer = tiny_trainer(folder, layout, run, settings, num_rows=46)
        is_sharded = isinstance(trainer.policy, FSDPModule)
        numbers = [is_sharded]
        if is_sharded:
            groups = [module._get_fsdp_state()._fsdp_param_group for module in find_blocks(trainer.policy, None)]
            numbers += [group._reshard_after_forward for group in groups]
        (folder / "numbers.json").write_text(json.dumps(numbers))
        trainer.train()


def test_one_process_is_not_sharded_unless_fsdp_has_another_task(tmp_path):
    """And is, to the last bit, what `trainer=BasicTrainer` is; a compute dtype keeps FSDP, without resharding."""
    start(tmp_path, "basic", settings_of("dpo", 2, 1, 1, n_epochs=1))
    alone = settings_of("dpo", 2, 2, 1, n_epochs=1, trainer=TrainerSettings("FSDPTrainer", 1))
    run_ranks(one_process, 1, alone, tmp_path, alone)
    assert json.loads((tmp_path / "numbers.json").read_text()) == [False]
    assert torch.equal(weights(tmp_path / "run"), weights(tmp_path / "basic"))
    assert losses(tmp_path / "run") == losses(tmp_path / "basic")
    mixed = replace(alone, model=replace(alone.model, fsdp_policy_mp="bfloat16"))
    (tmp_path / "mixed").mkdir()
    run_ranks(one_process, 1, mixed, tmp_path / "mixed", mixed)
    is_sharded, *resharded = json.loads((tmp_path / "mixed" / "numbers.json").read_text())
    assert is_sharded
    assert resharded
    assert not any(resharded)


def sample(layout, folder):
    """Generates under `same_logits` with other weights in each process."""
    tokenizer = byte_level_tokenizer(add_bos=True)
    model = tiny_llama(len(tokenizer), seed=layout.rank)
    settings = GenerationSettings(max_new_tokens=40, temperature=1.0)
    prompts = {"a": [1, 5, 9], "b": [1, 7, 8, 9, 30], "c": [1, 40]}
    with same_logits(model, layout):
        outputs = HFGenerator(model, tokenizer, settings).generate_from_tokens(prompts)
        texts = sorted((one.id, one.text) for one in outputs)
    (folder / f"texts-{layout.rank}.json").write_text(json.dumps(texts))


def test_processes_that_would_sample_apart_do_not(tmp_path):
    """Different weights stand for rounding that differs: every process follows rank 0, token by token."""
    run_ranks(sample, 2, settings_of("sft", 1, 2, 1), tmp_path)
    first, second = (json.loads((tmp_path / f"texts-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    launch(lambda layout: sample(layout, tmp_path), tiny_settings())  # rank 0 alone
    assert json.loads((tmp_path / "texts-0.json").read_text()) == first


def test_blocks_are_found_and_a_wrong_name_lists_the_candidates():
    for name, expected in {"llama": "LlamaDecoderLayer", "gpt_neox": "GPTNeoXLayer", "gpt2": "GPT2Block"}.items():
        model = tiny_model(name)
        assert {type(block).__name__ for block in find_blocks(model, None)} == {expected}
        assert find_blocks(model, expected) == find_blocks(model, None)
    with pytest.raises(UserError, match=r"block_name=LlamaBlock: .* its lists hold LlamaDecoderLayer \(2\)"):
        find_blocks(tiny_model(), "LlamaBlock")
    with pytest.raises(UserError, match="has no list of blocks"):
        find_blocks(torch.nn.Linear(2, 2), None)


@pytest.mark.parametrize("how", ["selective", "full"])
def test_the_variable_length_kernel_is_kept_by_selective_checkpointing(how):
    """Counted on the meta device: the kernel itself is a GPU's."""
    q, k, v = (torch.empty(8, 2, 16, device="meta", dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    starts = torch.empty(3, device="meta", dtype=torch.int32)
    options = {"context_fn": partial(create_selective_checkpoint_contexts, KEPT_BY_SELECTIVE)}

    def attend(q, k, v):
        return varlen_attn(q.sin(), k, v, starts, starts, 4, 4).sum()

    with OperatorCalls() as calls:
        checkpoint(attend, q, k, v, use_reentrant=False, **(options if how == "selective" else {})).backward()
    assert calls.counts[torch.ops.aten.sin.default] == 2
    assert calls.counts[torch.ops.torch_attn._varlen_attn.default] == (1 if how == "selective" else 2)
