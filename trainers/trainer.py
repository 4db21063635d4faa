"""The one training loop: sft, reverse and preference objectives, on whatever layout the model has."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from config.errors import UserError
from config.settings import TrainConfig
from trainers.attention import use_packed_attention
from trainers.batching import BatchLoader, GlobalBatch
from trainers.checkpoint import Progress, load_checkpoint, save_checkpoint
from trainers.logps import autocast_dtype, check_head, sequence_logps
from trainers.metrics import MetricsLog, MetricSums, ProgressLine
from trainers.objectives import TOLERANCE_PER_TOKEN, LossOutput, Objective
from trainers.optimizers import build_optimizer, learning_rate
from trainers.packing import longest_sequence, num_tokens
from trainers.parallel import Layout, clip_grad_norm, sum_over_processes
from trainers.run_dir import RunDir

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
            policy: with its initial weights, on a resumed run too.
            objective: what is minimised.
            train_loader: batches of the whole run, with the reference columns if the objective needs them.
            eval_loader: the same batches at each evaluation; None: no evaluation.
            settings: see `config/settings.py`.
            layout: this process's place.
            run: the locked run directory.
            sampler: model -> rows for `samples.jsonl`, called at each evaluation if `sample_during_eval`.
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
        self.tokenizer = tokenizer
        self.policy = policy
        self.policy.to(layout.device)  # type: ignore[arg-type]  # transformers wraps `to` without its self
        check_head(self.policy)
        if train_loader.packing:
            use_packed_attention(self.policy)
        self.autocast = autocast_dtype(settings.model.autocast)
        self.logps_of = partial(sequence_logps, self.policy, autocast=self.autocast)
        if settings.activation_checkpointing:
            # The reentrant kind needs inputs with gradients and breaks with frozen embeddings.
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.optimizer = build_optimizer(self.policy.parameters(), settings)
        self.train_metrics = MetricSums(layout.device)
        self.last_log = time.monotonic()
        self.progress = self._restore(dict(identity or {}))
        self.saved_at = self.progress.examples  # the examples seen by the newest checkpoint; 0: there is none

    def _restore(self, identity: dict[str, str]) -> Progress:
        progress = load_checkpoint(self.run, policy=self.policy, optimizer=self.optimizer)
        if progress is None:
            return Progress(identity=identity)
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
        self.train_metrics.load(progress.unlogged)
        return progress

    def train(self) -> None:
        """Runs to the end of the data: first evaluation, steps, evaluations, checkpoints, last evaluation and save."""
        settings, progress = self.settings, self.progress
        total = self.train_loader.total_examples
        with MetricsLog(self.run, settings, asdict(settings), progress.log) as self.log:
            self.line = ProgressLine(total, progress.examples)
            if settings.do_first_eval and progress.examples == 0:
                self.evaluate()
            for batch, wait_seconds in self._timed_batches():
                self.train_step(batch, wait_seconds)
                self.log_training()
                if self._passed(settings.eval_every, batch):
                    self.evaluate()
                if self._passed(settings.checkpoint.every_examples or settings.eval_every, batch):
                    self.save()
            self.log_training(always=True)
            if progress.evaluated_at != progress.examples:
                self.evaluate()
            self.save()
            self.line.close()

    def _timed_batches(self) -> Iterator[tuple[GlobalBatch, float]]:
        """Batches from the run's position on, each with the seconds that it was waited for."""
        batches = self.train_loader.batches(self.progress.examples)
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            if batch is None:
                return
            yield batch, time.monotonic() - started

    def _passed(self, every: int, batch: GlobalBatch) -> bool:
        """Whether this batch carried the examples seen over a multiple of `every`."""
        examples = self.progress.examples
        return examples // every > (examples - batch.num_examples) // every

    def train_step(self, batch: GlobalBatch, wait_seconds: float = 0.0) -> None:
        """One optimizer step on one global batch; its loss is the exact mean over the units of all micro-batches.

        Raises:
            UserError: if loss or gradient is not finite and `on_non_finite=stop`. The weights are then still those of
                before the step, and are saved.
        """
        started = time.monotonic()
        self.policy.train()
        outputs, loss_sum, num_units = self.accumulate_gradients(batch)
        grad_norm = clip_grad_norm(self.policy.parameters(), self.settings.max_grad_norm)
        # The one wait for the device in a step: whether to take it is a decision of the host.
        if bool(torch.isfinite(grad_norm) & torch.isfinite(loss_sum)):
            lr = learning_rate(self.progress.updates, self.train_loader.steps, self.settings)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
            self.add_metrics(self.train_metrics, "train", outputs, loss_sum, num_units)
            self.train_metrics.add("grad_norm", grad_norm, 1.0)
            self.train_metrics.add("learning_rate", torch.tensor(lr), 1.0)
        else:
            self._refuse_step(batch, outputs, loss_sum, grad_norm)
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.examples += batch.num_examples
        self.progress.updates += 1
        tokens = torch.stack([num_tokens(microbatch) for microbatch in batch.microbatches]).sum()
        seconds = time.monotonic() - started + wait_seconds
        self.train_metrics.add("examples_per_second", torch.tensor(batch.num_examples), seconds)
        self.train_metrics.add("tokens_per_second", tokens, seconds)
        self.train_metrics.add("data_wait_seconds", torch.tensor(wait_seconds), 1.0)

    def accumulate_gradients(self, batch: GlobalBatch) -> tuple[list[LossOutput], Tensor, float]:
        """Adds the gradient of the global batch's mean loss to the policy's.

        Returns:
            what the objective said of each micro-batch (detached), the sum of losses (scalar), and the number of units
            of the whole global batch.
        """
        num_units = self._count_units(batch.microbatches)
        outputs = []
        for microbatch in batch.microbatches:
            output = self.objective(self.logps_of, microbatch.to(self.layout.device, non_blocking=True))
            if batch.start_examples == 0:
                self.objective.check_first_batch(output, longest_sequence(microbatch), self._coarser_dtype())
            (output.loss_sum / num_units).backward()
            outputs.append(LossOutput(output.loss_sum.detach(), output.metrics))
        return outputs, torch.stack([output.loss_sum for output in outputs]).sum(), num_units

    def _coarser_dtype(self) -> torch.dtype:
        """The dtype with the larger rounding error, of policy and reference: `model.reference_dtype` may differ."""
        reference = f"torch.{self.settings.model.reference_dtype}"
        dtypes = [self.policy.dtype, *(dtype for dtype in TOLERANCE_PER_TOKEN if str(dtype) == reference)]
        dtypes += [] if self.autocast is None else [self.autocast]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    def _count_units(self, microbatches: list[TensorDict]) -> float:
        """Units of the global batch, over all processes; counted on the host, before any backward pass."""
        local = torch.stack([self.objective.num_units(microbatch) for microbatch in microbatches]).sum()
        return sum_over_processes(local.double()).item()

    @staticmethod
    def add_metrics(
        sums: MetricSums, split: str, outputs: list[LossOutput], loss_sum: Tensor, num_units: float
    ) -> None:
        """Adds the loss by its units, and every other metric by its examples."""
        sums.add(f"loss/{split}", loss_sum, num_units)
        for output in outputs:
            for name, values in output.metrics.items():
                sums.add(name.format(split=split), values.double().sum(), values.numel())

    def _refuse_step(self, batch: GlobalBatch, outputs: list[LossOutput], loss_sum: Tensor, grad_norm: Tensor) -> None:
        """Skips a step that is not finite, or stops the run before it."""
        if self.settings.on_non_finite == "skip":
            self.progress.skipped += 1
            return
        rows = []
        for microbatch, output in zip(batch.microbatches, outputs, strict=True):
            values = torch.stack([values.double() for values in output.metrics.values()])
            rows += microbatch["row"][~torch.isfinite(values).all(dim=0).cpu()].tolist()
        culprits = rows or batch.rows.tolist()
        shown = ", ".join(f"{self.train_loader.store.ids(row)} (row {row})" for row in culprits[:8])
        more = f" and {len(culprits) - 8} more" if len(culprits) > 8 else ""
        self.optimizer.zero_grad(set_to_none=True)
        self.save()
        raise UserError(
            f"the step after {self.progress.examples} examples is not finite: loss {loss_sum.item():.3g}, gradient "
            f"norm {grad_norm.item():.3g}; {'examples' if rows else 'one or more of the examples'} {shown}{more}. It "
            "was not taken. Lower lr or max_grad_norm (with another exp_name), use model.policy_dtype=float32, or go "
            "on without such steps: the same command with on_non_finite=skip."
        )

    def log_training(self, *, always: bool = False) -> None:
        """A row with the means since the last one, if `minimum_log_interval_secs` have passed."""
        now = time.monotonic()
        if not always and now - self.last_log < self.settings.minimum_log_interval_secs:
            self.line.update(self.progress.examples)
            return
        self.last_log = now
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
        """Means over the whole evaluation set, and samples; neither leaves a trace in the random numbers."""
        self.progress.evaluated_at = self.progress.examples
        devices = [self.layout.device] if self.layout.device.type == "cuda" else []
        self.policy.eval()
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            if self.eval_loader is not None:
                self.log.write({**self._evaluation_means(self.eval_loader), **self._counters()})
            if self.settings.sample_during_eval and self.sampler is not None:
                self.log.write_samples(self.sampler(self.policy), self.progress.examples)

    def _evaluation_means(self, loader: BatchLoader) -> dict[str, float]:
        sums = MetricSums(self.layout.device)
        for batch in loader.batches():
            num_units = self._count_units(batch.microbatches)
            device = self.layout.device
            outputs = [self.objective(self.logps_of, one.to(device, non_blocking=True)) for one in batch.microbatches]
            loss_sum = torch.stack([output.loss_sum for output in outputs]).sum()
            self.add_metrics(sums, "eval", outputs, loss_sum, num_units)
        return sums.means()

    def save(self) -> None:
        """A checkpoint of this moment; none under `debug`, none before the first step, none twice."""
        if self.settings.debug or self.saved_at == self.progress.examples:
            return
        self.progress.unlogged = self.train_metrics.state()
        self.progress.log = self.log.state()
        save_checkpoint(
            self.run, policy=self.policy, tokenizer=self.tokenizer, optimizer=self.optimizer,
            progress=self.progress, settings=self.settings.checkpoint,
        )  # fmt: skip
        self.saved_at = self.progress.examples
