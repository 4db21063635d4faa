"""The peers that `dpo_throughput.py` compares the trainer with: a literal DPO step, and TRL's trainers at their best.

Every peer is a function that takes one optimizer step on the rows of a global batch, and returns the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaForCausalLM

from config.settings import TrainConfig
from trainers.data.token_store import TokenStore


class LiteralStep:
    """A step as the DPO repo describes it, with `parts` equal slices of the padded batch as micro-batches.

    Rows are in random order, every sequence is padded to the longest of the whole batch, chosen and rejected share one
    forward pass, logits of all positions are float32, and a reference model runs at every step. Written from the
    method's description (Rafailov et al. 2023).
    """

    def __init__(
        self, policy: LlamaForCausalLM, store: TokenStore, settings: TrainConfig, parts: int, *, bfloat16: bool = False
    ) -> None:
        """Copy the policy as the reference, which stays in memory; `bfloat16`: use autocast."""
        self.bfloat16 = bfloat16
        self.policy, self.reference = policy, copy.deepcopy(policy).eval()
        self.optimizer = torch.optim.RMSprop(policy.parameters(), lr=settings.lr)
        self.store, self.settings, self.parts = store, settings, parts

    def pad(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return token ids, attention mask and labels, (2B, T) each: all chosen, then all rejected."""
        pairs = [self.store.row(row) for row in rows.tolist()]
        sequences = [(prompt, response) for side in (1, 2) for prompt, response in ((p[0], p[side]) for p in pairs)]
        width = max(len(prompt) + len(response) for prompt, response in sequences)
        ids = torch.zeros(len(sequences), width, dtype=torch.int64)
        labels = torch.full_like(ids, -100)
        mask = torch.zeros_like(ids)
        for i, (prompt, response) in enumerate(sequences):
            length = len(prompt) + len(response)
            ids[i, :length] = torch.cat([prompt, response])
            labels[i, len(prompt) : length] = response
            mask[i, :length] = 1
        return ids, mask, labels

    @staticmethod
    def logps(model: LlamaForCausalLM, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        """Return the summed log-probabilities of the labels, (2B,)."""
        logits = model(ids, attention_mask=mask).logits.to(torch.float32)[:, :-1]
        labels = labels[:, 1:].clone()
        targets = labels != -100
        labels[~targets] = 0
        per_token = logits.log_softmax(-1).gather(2, labels.unsqueeze(2)).squeeze(2)
        return (per_token * targets).sum(-1)

    def __call__(self, rows: Tensor) -> float:
        """Take one step, and return the mean loss."""
        self.policy.train()
        ids, mask, labels = self.pad(rows)
        total = 0.0
        for part in torch.arange(len(rows)).chunk(self.parts):
            index = torch.cat([part, part + len(rows)])
            arguments = tuple(tensor[index].to(self.policy.device) for tensor in (ids, mask, labels))
            with torch.autocast(self.policy.device.type, dtype=torch.bfloat16, enabled=self.bfloat16):
                with torch.no_grad():
                    reference_chosen, reference_rejected = self.logps(self.reference, *arguments).chunk(2)
                chosen, rejected = self.logps(self.policy, *arguments).chunk(2)
            margins = (chosen - rejected) - (reference_chosen - reference_rejected)
            loss = -F.logsigmoid(self.settings.loss.beta * margins).sum() / len(rows)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


def trl_step(
    policy: LlamaForCausalLM, store: TokenStore, settings: TrainConfig, folder: Path, *, rows_at_once: int,
    by_length: bool, reference: Tensor | None, packed: bool, bfloat16: bool = False,
) -> Callable[[Tensor], float]:  # fmt: skip
    """Return TRL's own `training_step`, clipping and optimizer as a step on a global batch; no gradient checkpointing.

    Args:
        policy: The model.
        store: The store of pairs (DPOTrainer) or of prompts and responses (SFTTrainer).
        settings: The settings of our trainer.
        folder: TRL's `output_dir`.
        rows_at_once: Rows of a micro-batch.
        by_length: Sort the rows of a batch, so that rows of a micro-batch have similar lengths. TRL has no setting for
            this: `group_by_length` makes batches of similar length instead, and DPOTrainer has no column for it.
        reference: (N, 2) log-probabilities, as TRL would have precomputed them; None: SFTTrainer.
        packed: Use SFTTrainer's padding-free collator, whose sequences transformers separates by their positions.
        bfloat16: TRL's `bf16`.
    """
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    size = policy.config.vocab_size
    tokenizer = _tokenizer(PreTrainedTokenizerFast, size)
    shared = {
        "output_dir": str(folder), "per_device_train_batch_size": rows_at_once, "gradient_checkpointing": False,
        "bf16": bfloat16, "report_to": "none", "optim": "rmsprop", "learning_rate": settings.lr, "max_length": 512,
        "use_cpu": policy.device.type == "cpu",
        "max_grad_norm": settings.max_grad_norm, "gradient_accumulation_steps": 1, "save_strategy": "no",
    }  # fmt: skip

    def example(row: int) -> dict[str, object]:
        prompt, *responses = (segment.tolist() for segment in store.row(row))
        if reference is None:
            return {
                "input_ids": prompt + responses[0],
                "labels": [-100] * len(prompt) + responses[0],
                "seq_lengths": [len(prompt) + len(responses[0])],
            }
        chosen, rejected = reference[row].tolist()
        ids = {"prompt_ids": prompt, "chosen_ids": responses[0], "rejected_ids": responses[1]}
        return {**ids, "ref_chosen_logps": chosen, "ref_rejected_logps": rejected}

    dataset = Dataset.from_list([example(row) for row in range(8)])
    if reference is None:
        trainer = SFTTrainer(
            policy, args=SFTConfig(**shared, dataset_kwargs={"skip_prepare_dataset": True}), train_dataset=dataset,
            processing_class=tokenizer,
        )  # fmt: skip
        collate = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=packed)
    else:
        prepared = type("Prepared", (DPOTrainer,), {"_prepare_dataset": lambda self, dataset, *_, **__: dataset})
        dataset = dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"])
        trainer = prepared(
            policy, args=DPOConfig(**shared, precompute_ref_log_probs=True, beta=settings.loss.beta),
            train_dataset=dataset, processing_class=tokenizer,
        )  # fmt: skip
        collate = trainer.data_collator
    # `bf16` alone does not affect `training_step`: only Trainer.train passes the model to accelerate, which autocasts.
    model = trainer.accelerator.prepare_model(policy)
    optimizer = torch.optim.RMSprop(policy.parameters(), lr=settings.lr)

    def step(rows: Tensor) -> float:
        policy.train()
        if by_length:
            lengths = store.lengths[rows].long()
            rows = rows[torch.argsort(lengths[:, 0] + lengths[:, 1:].amax(1))]
        parts = rows.split(rows_at_once)
        total = 0.0
        for part in parts:
            inputs = collate([example(row) for row in part.tolist()])
            trainer.current_gradient_accumulation_steps = len(parts)
            total += float(trainer.training_step(model, inputs, num_items_in_batch=None))
        trainer.accelerator.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return total

    return step


def _tokenizer(kind: type, size: int) -> object:
    """Return a minimal tokenizer that TRL accepts, with `size` words."""
    from tokenizers import Tokenizer, models

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    return kind(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w0")
