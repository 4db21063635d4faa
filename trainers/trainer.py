"""The training loop, shared by all objectives (sft, reverse, preference) and all layouts (one process or FSDP)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.errors import UserError
from config.settings import TrainConfig
from trainers.data.batching import BatchLoader, GlobalBatch, passes_multiple
from trainers.data.packing import longest_sequence
from trainers.distributed.following import WeightAverage
from trainers.distributed.layout import Layout, gather_objects, sum_over_processes
from trainers.distributed.preemption import Preempted
from trainers.distributed.sharding import (
    clip_grad_norm,
    forward_function,
    reduce_gradients_in_backward,
    reshard,
    same_logits,
    weights_are_finite,
)
from trainers.kernels.logps import autocast_dtype, sequence_logps
from trainers.objectives.output import (
    LossOutput,
    NotFiniteError,
    Objective,
    add_metrics,
    coarsest_dtype,
    not_finite_step,
)
from trainers.optimizers import build_optimizer, learning_rate, set_learning_rate, tables_of
from trainers.reference import MovingReference
from trainers.run.checkpoint import CheckpointWriter
from trainers.run.early_stop import is_over, refusal_rates
from trainers.run.metrics import MetricSums
from trainers.run.metrics_log import MetricsLog
from trainers.run.progress_line import ProgressLine, saying
from trainers.run.resume import load_checkpoint
from trainers.run.run_dir import RunDir
from trainers.run.saved import RunProgress, require_measured
from trainers.run.speed import Speed

Sampler = Callable[[PreTrainedModel], list[dict[str, Any]]]  # -> rows for `samples.jsonl`


class Agreement(NamedTuple):
    """What the processes agree on before their passes over a batch, in one all-reduce of host numbers (no GPU sync)."""

    own_units: float  # of this process's micro-batches
    num_units: float  # of the global batch
    stop: bool  # at least one process was asked to stop
    log: bool  # the next row of metrics is due, by rank 0's clock


@dataclass(kw_only=True, eq=False)
class Trainer:
    """Trains a policy on the batches of a loader; `train` starts a run or resumes an interrupted one.

    The constructor loads the newest checkpoint of the run's directory, if there is one. It raises a UserError for a
    model, an optimizer or a checkpoint that cannot be used.
    """

    policy: PreTrainedModel  # placed by `place_model`, with its initial weights, also when resuming
    objective: Objective  # the loss that is minimised
    train_loader: BatchLoader  # batches of the whole run, with the reference columns if the objective needs them
    eval_loader: BatchLoader | None  # yields the same batches at each evaluation; None: no evaluation
    settings: TrainConfig
    layout: Layout  # rank, world size and device of this process
    run: RunDir  # locked
    sampler: Sampler | None = None  # called at each evaluation if `sample_during_eval`, in every process
    tokenizer: PreTrainedTokenizerBase | None = None  # saved with the weights
    identity: Mapping[str, str] | None = None  # besides the config, what must not change on resume: name -> value

    def __post_init__(self) -> None:
        """Load the newest checkpoint, if there is one."""
        settings, layout = self.settings, self.layout
        autocast = autocast_dtype(settings.model.autocast)
        self.logps_of = forward_function(self.policy, sequence_logps, autocast=autocast, add_to_grad=True)
        self.checkpoints = CheckpointWriter(self.run, settings.checkpoint, layout, self.tokenizer)
        self.optimizer = build_optimizer(self.policy.parameters(), settings, tables_of(self.policy))
        self.ema = WeightAverage(self.policy, settings.ema)
        self.reference = MovingReference(self.policy, settings, layout)
        self.train_metrics = MetricSums()
        self.last_log = time.monotonic()
        self.progress = self._restore(dict(self.identity or {}))
        self.objective.state = self.progress.objective
        self.reference.progress = self.progress
        self.saved = (self.progress.examples, self.progress.evaluated_at)  # state of the newest checkpoint
        self.speed = Speed(self.policy, layout)

    def _restore(self, identity: dict[str, str]) -> RunProgress:
        policy, optimizer, shards = self.policy, self.optimizer, self.shards()
        found = load_checkpoint(self.run, policy=policy, optimizer=optimizer, layout=self.layout, shards=shards)
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
                f"the run in {self.run.path} cannot be resumed, because its inputs have changed:\n  "
                + "\n  ".join(changed)
                + "\nRestore them, or start a new run with another exp_name."
            )
        self.train_metrics.load(unlogged)
        return progress

    def train(self) -> None:
        """Train to the end of the data, with an evaluation before (if configured) and evaluations and saves on the way.

        Raises:
            Preempted: the run was asked to stop; its last step is saved.
            NotFiniteError: see `train_step`; the steps before it are saved.
        """
        progress, is_main = self.progress, self.layout.is_main
        with (
            MetricsLog(self.run, self.settings, asdict(self.settings), progress.log, active=is_main) as log,
            closing(ProgressLine(self.train_loader.total_examples, progress.examples, active=is_main)) as line,
        ):
            try:
                self._train(log, line)
            except NotFiniteError:
                self._save_and_wait(log)  # raises another NotFiniteError if the weights themselves are not finite
                raise
            except Preempted:
                self._save_and_wait(log)
                message = f"stopped as asked after {progress.examples} examples; rerun the same command to resume"
                raise Preempted(message if is_main else "") from None

    def _train(self, log: MetricsLog, line: ProgressLine) -> None:
        settings, progress = self.settings, self.progress
        if self._evaluation_is_due():
            self._evaluate_and_log(log)
            self.save(log)
        batches = self.reference.batches(self.train_loader)
        asked_at, before = time.monotonic(), progress.examples
        while not is_over(progress, settings.early_stop) and (batch := next(batches, None)):
            agreed = self.train_step(batch, time.monotonic() - asked_at)
            line.update(progress.examples, self._log_training(log) if agreed.log else None)
            if passes_multiple(before, progress.examples, settings.eval_every):
                self._evaluate_and_log(log)
            if passes_multiple(before, progress.examples, settings.checkpoint.every_examples or settings.eval_every):
                self.save(log)
            if agreed.stop:
                raise Preempted
            asked_at, before = time.monotonic(), progress.examples
        line.update(progress.examples, self._log_training(log))
        if progress.evaluated_at != progress.examples:
            self._evaluate_and_log(log)
        self._save_and_wait(log)

    def _evaluation_is_due(self) -> bool:
        """Return whether to begin with an evaluation: the first of the run, or one that a stop request interrupted."""
        progress = self.progress
        if progress.examples == 0:
            return self.settings.do_first_eval
        before = self.train_loader.previous(progress.examples)
        due = passes_multiple(before, progress.examples, self.settings.eval_every)
        return due and progress.evaluated_at != progress.examples

    def train_step(self, batch: GlobalBatch, wait_seconds: float = 0.0) -> Agreement:
        """Take one optimizer step on a global batch; the loss is the exact mean over the units of all micro-batches.

        Raises:
            NotFiniteError: if the loss or gradient is not finite and `on_non_finite=stop`. The weights are then
                unchanged.
        """
        started = time.monotonic()
        state = dict(self.objective.state)
        self.policy.train()
        agreed = self._agree(batch)
        outputs, loss_sum = self.accumulate_gradients(batch, agreed.num_units)
        grad_norm, total_loss = clip_grad_norm(
            self.policy.parameters(), self.settings.max_grad_norm, loss_sum, self.layout
        )
        if math.isfinite(grad_norm) and math.isfinite(total_loss):
            lr = learning_rate(self.progress.updates, self.train_loader.steps, self.settings)
            set_learning_rate(self.optimizer, lr)
            self.optimizer.step()
            self.ema.update()
            add_metrics(self.train_metrics, "train", outputs, loss_sum, agreed.own_units)
            self.train_metrics.add("grad_norm", grad_norm, 1.0)
            self.train_metrics.add("learning_rate", lr, 1.0)
        else:  # not taken: it leaves nothing in the means of later steps
            self.objective.state.clear()
            self.objective.state.update(state)
            if self.settings.on_non_finite == "stop":
                raise self._not_finite(batch, outputs, total_loss, grad_norm)
            self.progress.skipped += 1
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.examples += batch.num_examples
        self.progress.updates += 1
        self.speed.add(self.train_metrics, batch, step_seconds=time.monotonic() - started, wait_seconds=wait_seconds)
        return agreed

    def _agree(self, batch: GlobalBatch) -> Agreement:
        own_units = float(sum(map(self.objective.num_units, batch.microbatches)))
        log_due = time.monotonic() - self.last_log >= self.settings.minimum_log_interval_secs
        told = [own_units, float(bool(self.layout.stop)), float(log_due and self.layout.is_main)]
        num_units, stop, log = sum_over_processes(torch.tensor(told, dtype=torch.float64)).tolist()
        return Agreement(own_units, num_units, stop=stop > 0, log=log > 0)

    def accumulate_gradients(self, batch: GlobalBatch, num_units: float) -> tuple[list[LossOutput], Tensor]:
        """Add the gradient of the global batch's mean loss to the gradients of the policy.

        Returns the objective's output for each pass of this process (`LossOutput.detached`), and the sum of losses.
        """
        outputs = []
        self.objective.begin_batch(self.logps_of, batch.passes, self.layout.device)
        for number, (microbatch, counts) in enumerate(batch.passes, start=1):
            # Reduce gradients across processes only in the last pass, to save a reduce-scatter per micro-batch.
            reduce = self.settings.trainer.reduce_every_microbatch or number == len(batch.passes)
            reduce_gradients_in_backward(self.policy, reduce)
            output = self.objective(self.logps_of, microbatch.to(self.layout.device, non_blocking=True))
            if counts and self.reference.is_policy(batch.start_examples):
                dtype = coarsest_dtype(self.policy.dtype, self.settings, self.layout)
                self.objective.check_first_batch(output, longest_sequence(microbatch), dtype)
            (output.loss_sum * float(counts) / num_units).backward()
            outputs.append(output.detached(counts=counts))
        return outputs, torch.stack([output.loss_sum for output in outputs]).sum()

    def _not_finite(
        self, batch: GlobalBatch, outputs: list[LossOutput], loss: float, grad_norm: float
    ) -> NotFiniteError:
        """Drop the gradient and return the error that names the examples. A collective: every process must call it."""
        self.optimizer.zero_grad(set_to_none=True)
        own = []
        for microbatch, output in zip(batch.microbatches, outputs, strict=False):  # fillers have outputs too
            own += microbatch["row"][~output.is_finite().cpu()].tolist()
        rows = [row for part in gather_objects(own) for row in part]
        named = [f"{self.train_loader.store.ids(row)} (row {row})" for row in rows or batch.rows.tolist()]
        return not_finite_step(named, len(rows) > 0, self.progress.examples, loss, grad_norm)

    def _log_training(self, log: MetricsLog) -> str | None:
        """Log the means since the last row; return the ones that the progress line shows, or None if there are none."""
        self.last_log = time.monotonic()
        means = self.train_metrics.means()
        if not means:
            return None
        log.write({**means, **self._counters()})
        shown = {"loss": means.get("loss/train"), "accuracy": means.get("rewards_train/accuracies")}
        return ", ".join(f"{name} {value:.4g}" for name, value in shown.items() if value is not None)

    def _counters(self) -> dict[str, int]:
        counters = {"counters/examples": self.progress.examples, "counters/updates": self.progress.updates}
        return {**counters, "counters/skipped": self.progress.skipped} if self.progress.skipped else counters

    def evaluate(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Return the means over the whole evaluation set, and samples; the random state is left as it was.

        Raises:
            Preempted: the run was asked to stop; the whole evaluation is repeated on resume.
            UserError: the metric of `checkpoint.keep_best` or `sweep_metric` is not measured.
        """
        devices = [self.layout.device] if self.layout.device.type == "cuda" else []
        means: dict[str, float] = {}
        samples: list[dict[str, Any]] = []
        self.policy.eval()
        self.reference.prepare_evaluation(self.eval_loader)
        with torch.random.fork_rng(devices=devices), torch.no_grad(), self.ema.evaluated():
            if self.eval_loader is not None:
                means = self._evaluation_means(self.eval_loader)
            if self.settings.sample_during_eval and self.sampler is not None:
                with same_logits(self.policy, self.layout):
                    samples = self.sampler(self.policy)
                means |= refusal_rates(samples)
        reshard(self.policy)
        require_measured(self.settings, means)
        return means, samples

    def _evaluation_means(self, loader: BatchLoader) -> dict[str, float]:
        sums = MetricSums()
        for batch in loader.batches():
            agreed = self._agree(batch)
            if agreed.stop:
                raise Preempted
            outputs = []
            self.objective.begin_batch(self.logps_of, batch.passes, self.layout.device)
            for microbatch, counts in batch.passes:
                output = self.objective(self.logps_of, microbatch.to(self.layout.device, non_blocking=True))
                outputs.append(output.detached(counts=counts))
            loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
            add_metrics(sums, "eval", outputs, loss_sum, agreed.own_units)
        return sums.means()

    def _evaluate_and_log(self, log: MetricsLog) -> None:
        with saying("evaluation", active=self.layout.is_main):
            means, samples = self.evaluate()
        self.progress.evaluated_at, self.progress.evaluation = self.progress.examples, means
        if means:
            log.write({**means, **self._counters()})
        log.write_samples(samples, self.progress.examples)

    def save(self, log: MetricsLog) -> None:
        """Start writing a checkpoint, unless `debug` is set, no step was taken yet, or this state is already saved."""
        moment = (self.progress.examples, self.progress.evaluated_at)
        if self.settings.debug or not self.progress.examples or self.saved == moment:
            return
        if not weights_are_finite(self.policy):
            raise NotFiniteError(
                f"the weights hold NaN or infinite numbers after {self.progress.examples} examples: a past step made "
                "them, not the next batch. They were not saved; the newest checkpoint is an earlier one. Lower lr, use "
                "model.policy_dtype=float32, or an eps that 16 bits do not round to 0: optimizer_args.eps=1e-4"
            )
        self.progress.log = log.state()
        self.checkpoints.save(
            policy=self.policy, optimizer=self.optimizer, progress=self.progress, unlogged=self.train_metrics.state(),
            shards=self.shards(), published=self.ema.saved,
        )  # fmt: skip
        self.saved = moment

    def shards(self) -> dict[str, dict[str, Tensor]]:
        """Return the sharded state besides weights and optimizer (average, reference): kind -> parameter -> tensor."""
        return self.ema.shards() | self.reference.shards()

    def _save_and_wait(self, log: MetricsLog) -> None:
        self.save(log)
        self.checkpoints.finish()
