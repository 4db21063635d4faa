"""The one training loop: sft, reverse and preference objectives, on whatever layout the model has."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.errors import UserError
from config.settings import TrainConfig
from trainers.data.batching import BatchLoader, GlobalBatch
from trainers.data.packing import longest_sequence, num_positions, num_tokens
from trainers.distributed.layout import Layout, gather_objects, sum_over_processes
from trainers.distributed.preemption import Preempted
from trainers.distributed.sharding import (
    clip_grad_norm,
    forward_function,
    reduce_gradients_in_backward,
    reshard,
    same_logits,
)
from trainers.kernels.flops import peak_flops, training_flops_per_token
from trainers.kernels.logps import autocast_dtype, sequence_logps
from trainers.objectives import TOLERANCE_PER_TOKEN, LossOutput, Objective
from trainers.optimizers import build_optimizer, learning_rate
from trainers.run.checkpoint import CheckpointWriter, RunProgress
from trainers.run.metrics import MetricSums, peak_memory_gib
from trainers.run.metrics_log import MetricsLog
from trainers.run.progress_line import ProgressLine
from trainers.run.resume import load_checkpoint
from trainers.run.run_dir import RunDir

Sampler = Callable[[PreTrainedModel], list[dict[str, Any]]]


class Trainer:
    """Trains a policy on batches of a loader; `train` continues a run that was cut short, or begins one."""

    def __init__(
        self,
        *,
        policy: PreTrainedModel,
        objective: Objective,
        train_loader: BatchLoader,
        eval_loader: BatchLoader | None,
        settings: TrainConfig,
        layout: Layout,
        run: RunDir,
        sampler: Sampler | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        identity: Mapping[str, str] | None = None,
    ) -> None:
        """Prepares a run and, if its directory has a checkpoint, puts that in place.

        Args:
            policy: laid out (`place_model`), with its initial weights, on a resumed run too.
            objective: what is minimised.
            train_loader: batches of the whole run, with the reference columns if the objective needs them.
            eval_loader: the same batches at each evaluation; None: no evaluation.
            settings: see `config/settings.py`.
            layout: this process's place.
            run: the locked run directory.
            sampler: model -> rows for `samples.jsonl`, called at each evaluation if `sample_during_eval`, in every
                process with the same result.
            tokenizer: saved beside the weights.
            identity: what a resumed run must agree on besides its config, such as the key of the data: name -> value.

        Raises:
            UserError: for a model, an optimizer or a checkpoint that cannot be used.
        """
        self.settings = settings
        self.layout = layout
        self.run = run
        self.objective = objective
        self.train_loader = train_loader
        self.eval_loader = eval_loader
        self.sampler = sampler
        self.policy = policy
        self.autocast = autocast_dtype(settings.model.autocast)
        self.logps_of = forward_function(policy, sequence_logps, autocast=self.autocast, add_to_grad=True)
        self.checkpoints = CheckpointWriter(run, settings.checkpoint, layout, tokenizer)
        self.optimizer = build_optimizer(self.policy.parameters(), settings)
        self.train_metrics = MetricSums()
        self.last_log = time.monotonic()
        self.log_due = self.stop_asked = False  # as all processes have agreed for the step in hand
        self.progress = self._restore(dict(identity or {}))
        self.saved = (self.progress.examples, self.progress.evaluated_at)  # what the newest checkpoint has seen
        self.peak_flops = peak_flops(layout.device)
        self.flops_per_token = training_flops_per_token(policy)

    def _restore(self, identity: dict[str, str]) -> RunProgress:
        found = load_checkpoint(self.run, policy=self.policy, optimizer=self.optimizer, layout=self.layout)
        if found is None:
            return RunProgress(identity=identity)
        progress, unlogged = found
        changed = [
            f"{name}: {progress.identity.get(name)} at its start, {value} now"
            for name, value in identity.items()
            if progress.identity.get(name) != value
        ]
        if changed:
            raise UserError(
                f"the run in {self.run.path} cannot go on, what it stands on has changed:\n  "
                + "\n  ".join(changed)
                + "\nPut that back, or start anew with another exp_name."
            )
        self.train_metrics.load(unlogged)
        return progress

    def train(self) -> None:
        """Runs to the end of the data: first evaluation, steps, evaluations, checkpoints, last evaluation and save.

        Raises:
            Preempted: the run was asked to stop; it is saved as of its last step.
        """
        progress, is_main = self.progress, self.layout.is_main
        with MetricsLog(self.run, self.settings, asdict(self.settings), progress.log, active=is_main) as self.log:
            self.line = ProgressLine(self.train_loader.total_examples, progress.examples, active=is_main)
            try:
                self._train()
            except Preempted:
                self.save()
                self.checkpoints.finish()
                message = f"stopped as asked after {progress.examples} examples; the same command goes on from there"
                raise Preempted(message if is_main else "") from None
            finally:
                self.line.close()

    def _train(self) -> None:
        settings, progress = self.settings, self.progress
        if self._evaluation_is_due():
            self.evaluate()
            self.save()
        for batch, wait_seconds in self._timed_batches():
            self.train_step(batch, wait_seconds)
            self.log_training()
            if self._passed(settings.eval_every, batch.num_examples):
                self.evaluate()
            if self._passed(settings.checkpoint.every_examples or settings.eval_every, batch.num_examples):
                self.save()
            if self.stop_asked:
                raise Preempted
        self.log_training(always=True)
        if progress.evaluated_at != progress.examples:
            self.evaluate()
        self.save()
        self.checkpoints.finish()

    def _evaluation_is_due(self) -> bool:
        """Whether the run begins with an evaluation: its first one, or one that a request to stop cut short."""
        progress = self.progress
        if progress.examples == 0:
            return self.settings.do_first_eval
        last = progress.examples - self.train_loader.previous(progress.examples)
        return self._passed(self.settings.eval_every, last) and progress.evaluated_at != progress.examples

    def _timed_batches(self) -> Iterator[tuple[GlobalBatch, float]]:
        """Batches from the run's position on, each with the seconds that it was waited for."""
        batches = self.train_loader.batches(self.progress.examples)
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.monotonic() - started

    def _passed(self, every: int, num_examples: int) -> bool:
        """Whether the last batch, of `num_examples`, carried the examples seen over a multiple of `every`."""
        examples = self.progress.examples
        return examples // every > (examples - num_examples) // every

    def train_step(self, batch: GlobalBatch, wait_seconds: float = 0.0) -> None:
        """One optimizer step on one global batch; its loss is the exact mean over the units of all micro-batches.

        Raises:
            UserError: if loss or gradient is not finite and `on_non_finite=stop`. The weights are then still those of
                before the step, and are saved.
        """
        started = time.monotonic()
        self.policy.train()
        outputs, loss_sum, num_units = self.accumulate_gradients(batch)
        grad_norm, total_loss = clip_grad_norm(
            self.policy.parameters(), self.settings.max_grad_norm, loss_sum, self.layout
        )
        if math.isfinite(grad_norm) and math.isfinite(total_loss):
            lr = learning_rate(self.progress.updates, self.train_loader.steps, self.settings)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.add_metrics(self.train_metrics, "train", outputs, loss_sum, num_units)
            self.train_metrics.add("grad_norm", grad_norm, 1.0)
            self.train_metrics.add("learning_rate", lr, 1.0)
        else:
            self._refuse_step(batch, outputs, total_loss, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.examples += batch.num_examples
        self.progress.updates += 1
        self._add_speed(batch, time.monotonic() - started, wait_seconds)

    def _add_speed(self, batch: GlobalBatch, step_seconds: float, wait_seconds: float) -> None:
        """Rates of the whole run: sums over processes are divided by their summed seconds."""
        seconds, world_size = step_seconds + wait_seconds, self.layout.world_size
        tokens = sum(int(num_tokens(microbatch)) for microbatch in batch.microbatches)
        metrics = self.train_metrics
        metrics.add("examples_per_second", batch.num_examples, seconds)
        metrics.add("tokens_per_second", tokens * world_size, seconds)
        metrics.add("data_wait_seconds", wait_seconds, 1.0)
        if self.peak_flops is not None:
            positions = sum(num_positions(microbatch) for microbatch in batch.microbatches)
            metrics.add("mfu", self.flops_per_token * positions / self.peak_flops, seconds)
        metrics.peak("memory/peak", peak_memory_gib(self.layout.device))

    def accumulate_gradients(self, batch: GlobalBatch) -> tuple[list[LossOutput], Tensor, float]:
        """Adds the gradient of the global batch's mean loss to the policy's.

        Returns:
            what the objective said of each micro-batch of this process (detached; of a pass that counts nothing, the
            names of its metrics without values), their sum of losses (scalar), and their number of units.
        """
        own, num_units = self._count_units(batch.microbatches)
        outputs = []
        passes = len(batch.microbatches) + batch.num_idle
        for number, microbatch in enumerate(self._passes(batch, self.train_loader)):
            # Summed over the processes once, in the last pass: not a reduce-scatter for each micro-batch.
            reduce = self.settings.trainer.reduce_every_microbatch or number == passes - 1
            reduce_gradients_in_backward(self.policy, reduce)
            output = self.objective(self.logps_of, microbatch.to(self.layout.device, non_blocking=True))
            counts = number < len(batch.microbatches)
            if batch.start_examples == 0 and counts:
                self.objective.check_first_batch(output, longest_sequence(microbatch), self._coarser_dtype())
            (output.loss_sum * float(counts) / num_units).backward()
            outputs.append(_detached(output, counts))
        return outputs, torch.stack([output.loss_sum for output in outputs]).sum(), own

    @staticmethod
    def _passes(batch: GlobalBatch, loader: BatchLoader) -> list[TensorDict]:
        """This process's micro-batches, and fillers up to the number of passes that every process makes."""
        return [*batch.microbatches, *([loader.filler()] * batch.num_idle if batch.num_idle else [])]

    def _coarser_dtype(self) -> torch.dtype:
        """The dtype with the larger rounding error, of what policy and reference are kept in and computed in."""
        model = self.settings.model
        in_tf32 = "float16" if self.settings.tf32 and self.layout.device.type == "cuda" else None  # as many bits
        names = {f"torch.{name}" for name in (model.reference_dtype, self._compute_dtype(), model.autocast, in_tf32)}
        dtypes = [self.policy.dtype, *(dtype for dtype in TOLERANCE_PER_TOKEN if str(dtype) in names)]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _compute_dtype(self) -> str | None:
        return self.settings.model.fsdp_policy_mp if self.layout.mesh is not None else None

    def _count_units(self, microbatches: list[TensorDict]) -> tuple[float, float]:
        """Units of this process's micro-batches, and of the global batch.

        Counted on the host, before any backward pass. What all processes must decide alike travels along: whether to
        stop, and whether to log (rank 0's clock tells).
        """
        own = sum(float(self.objective.num_units(microbatch)) for microbatch in microbatches)
        log_due = time.monotonic() - self.last_log >= self.settings.minimum_log_interval_secs
        told = [own, float(bool(self.layout.stop)), float(log_due and self.layout.is_main)]
        num_units, stop, log = sum_over_processes(torch.tensor(told, dtype=torch.float64)).tolist()
        self.stop_asked, self.log_due = stop > 0, log > 0
        return own, num_units

    @staticmethod
    def add_metrics(
        sums: MetricSums, split: str, outputs: list[LossOutput], loss_sum: Tensor, num_units: float
    ) -> None:
        """Adds the loss by its units, and every other metric by its examples."""
        sums.add(f"loss/{split}", loss_sum, num_units)
        for output in outputs:
            for name, values in output.metrics.items():
                sums.add(name.format(split=split), values.double().sum(), values.numel())

    def _refuse_step(self, batch: GlobalBatch, outputs: list[LossOutput], loss: float, grad_norm: float) -> None:
        """Skips a step that is not finite, or stops the run before it."""
        if self.settings.on_non_finite == "skip":
            self.progress.skipped += 1
            return
        own = []
        for microbatch, output in zip(batch.microbatches, outputs, strict=False):  # fillers have outputs, too
            values = torch.stack([values.double() for values in output.metrics.values()])
            own += microbatch["row"][~torch.isfinite(values).all(dim=0).cpu()].tolist()
        rows = [row for part in gather_objects(own) for row in part]
        culprits = rows or batch.rows.tolist()
        shown = ", ".join(f"{self.train_loader.store.ids(row)} (row {row})" for row in culprits[:8])
        more = f" and {len(culprits) - 8} more" if len(culprits) > 8 else ""
        self.optimizer.zero_grad(set_to_none=True)
        self.save()
        self.checkpoints.finish()
        raise UserError(
            f"the step after {self.progress.examples} examples is not finite: loss {loss:.3g}, gradient "
            f"norm {grad_norm:.3g}; {'examples' if rows else 'one or more of the examples'} {shown}{more}. It "
            "was not taken. Lower lr or max_grad_norm (with another exp_name), use model.policy_dtype=float32, or go "
            "on without such steps: the same command with on_non_finite=skip."
        )

    def log_training(self, *, always: bool = False) -> None:
        """A row with the means since the last one, if `minimum_log_interval_secs` have passed."""
        if not always and not self.log_due:
            self.line.update(self.progress.examples)
            return
        self.last_log = time.monotonic()
        means = self.train_metrics.means()
        if not means:
            return
        self.log.write({**means, **self._counters()})
        shown = {"loss": means.get("loss/train"), "accuracy": means.get("rewards_train/accuracies")}
        note = ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)
        self.line.update(self.progress.examples, note)

    def _counters(self) -> dict[str, int]:
        counters = {"counters/examples": self.progress.examples, "counters/updates": self.progress.updates}
        return {**counters, "counters/skipped": self.progress.skipped} if self.progress.skipped else counters

    def evaluate(self) -> None:
        """Means over the whole evaluation set, and samples; neither leaves a trace in the random numbers.

        Raises:
            Preempted: in the middle, with nothing written: the evaluation is made anew when the run goes on.
        """
        devices = [self.layout.device] if self.layout.device.type == "cuda" else []
        means: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        self.policy.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            if self.eval_loader is not None:
                means = self._evaluation_means(self.eval_loader)
            if self.settings.sample_during_eval and self.sampler is not None:
                with same_logits(self.policy, self.layout):
                    samples = self.sampler(self.policy)
        reshard(self.policy)
        self._require_metric(self.settings.checkpoint.keep_best, means)
        self.progress.evaluated_at, self.progress.evaluation = self.progress.examples, means
        if means:
            self.log.write({**means, **self._counters()})
        self.log.write_samples(samples, self.progress.examples)

    @staticmethod
    def _require_metric(name: str | None, means: dict[str, float]) -> None:
        if name is not None and name not in means:
            raise UserError(
                f"checkpoint.keep_best={name}: an evaluation of this run does not measure it; choose one of "
                f"{', '.join(sorted(means)) or 'none: nothing is held out'}."
            )

    def _evaluation_means(self, loader: BatchLoader) -> dict[str, float]:
        sums = MetricSums()
        for batch in loader.batches():
            num_units, _ = self._count_units(batch.microbatches)
            if self.stop_asked:
                raise Preempted
            outputs = []
            for number, microbatch in enumerate(self._passes(batch, loader)):
                output = self.objective(self.logps_of, microbatch.to(self.layout.device, non_blocking=True))
                outputs.append(_detached(output, number < len(batch.microbatches)))
            loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
            self.add_metrics(sums, "eval", outputs, loss_sum, num_units)
        return sums.means()

    def save(self) -> None:
        """Begins a checkpoint of this moment; none under `debug`, none before the first step, none twice."""
        moment = (self.progress.examples, self.progress.evaluated_at)
        if self.settings.debug or not self.progress.examples or self.saved == moment:
            return
        self.progress.log = self.log.state()
        self.checkpoints.save(
            policy=self.policy,
            optimizer=self.optimizer,
            progress=self.progress,
            unlogged=self.train_metrics.state(),
        )
        self.saved = moment


def _detached(output: LossOutput, counts: bool) -> LossOutput:
    """Without the graph; of a pass that counts nothing, no loss, and the metrics' names without values."""
    if counts:
        return LossOutput(output.loss_sum.detach(), output.metrics)
    metrics = {name: values[:0] for name, values in output.metrics.items()}
    return LossOutput(torch.zeros_like(output.loss_sum), metrics)
