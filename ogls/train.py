"""One training round: a plain loop over optimizer steps, each over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ogls.batching import Batch, TrainItem, collate, micro_batches
from ogls.config import TrainConfig
from ogls.errors import NonFiniteLoss
from ogls.losses import LossInputs, LossOutput, PolicyInputs, distillation, nll, policy_gradient
from ogls.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


class Trainer:
    """AdamW over the policy's trainable weights; its state is carried from round to round."""

    def __init__(self, policy: Policy, config: TrainConfig, state: Mapping[str, Tensor] | None = None):
        import torch

        self.policy, self.config = policy, config
        self.names = sorted(policy.parameters)
        self.optimizer = torch.optim.AdamW(
            [policy.parameters[n] for n in self.names], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step = 0
        if state:
            self._restore(state)

    def round(
        self, items: Sequence[TrainItem], seed: int, progress: Callable[[int, int], None] = lambda *_: None
    ) -> list[dict[str, Any]]:
        """Train on the items and return one `updates` row an optimizer step.

        Raises NonFiniteLoss, naming the rollout, before any weight has seen the loss that is not finite.
        """
        config, rows = self.config, []
        size = config.batch_rollouts
        total = config.epochs * -(-len(items) // size)
        for epoch in range(config.epochs):
            order = np.random.default_rng([seed, epoch]).permutation(len(items))
            for start in range(0, len(items), size):
                chosen = [items[i] for i in order[start : start + size]]
                rows.append({"epoch": epoch, **self.update(chosen)})
                progress(len(rows), total)
        return rows

    def update(self, items: Sequence[TrainItem]) -> dict[str, Any]:
        """One optimizer step. Sums are divided by the whole step's token counts, so its loss and gradient
        do not depend on how it is split into micro-batches."""
        import torch

        config, parameters = self.config, [self.policy.parameters[n] for n in self.names]
        weight = config.tail_weight if config.objective in ("distil", "grpo") else 1.0
        tokens, tail_tokens = sum(i.trained for i in items), sum(i.tail for i in items)
        # Weights count over their sum in the step, so that uniform ones are a plain mean over tokens.
        trained_weight = sum(float(i.trained if i.weights is None else i.weights.sum()) for i in items)
        token_loss = tail_nll = 0.0
        for micro in micro_batches(items, config.micro_batch_tokens):
            batch = collate(micro, self.policy.device)
            out = self.losses(batch)
            self._check_finite(batch, out)
            token_losses = out.token_loss if batch.weights is None else out.token_loss * batch.weights
            parts = token_losses.sum() / max(trained_weight, 1e-9), out.tail_nll.sum() / max(tail_tokens, 1)
            (parts[0] + weight * parts[1]).backward()
            token_loss, tail_nll = token_loss + parts[0].item(), tail_nll + parts[1].item()
        norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm).item()
        if not np.isfinite(norm):
            raise NonFiniteLoss(f"the gradient's norm is {norm} at step {self.step + 1}, in rollouts {_keys(items)}")
        self.step += 1
        rate = config.learning_rate * min(1.0, self.step / max(config.warmup_steps, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return {
            "step": self.step,
            "loss": token_loss + weight * tail_nll,
            "token_loss": token_loss,
            "tail_nll": tail_nll if tail_tokens else None,
            "grad_norm": norm,
            "learning_rate": rate,
            "rollouts": len(items),
            "tokens": tokens,
            "tail_tokens": tail_tokens,
        }

    def losses(self, batch: Batch) -> LossOutput:
        """Per-token losses of a micro-batch; the head sees only the places that have one."""
        policy = self.policy
        hidden = policy.hidden(batch.ids, batch.mask).last_hidden_state
        logits = policy.logits(hidden[batch.row, batch.place])
        tail_logits = policy.logits(hidden[batch.tail_row, batch.tail_place])
        if batch.old_logprobs is not None:
            grpo = self.config.grpo
            sampled = PolicyInputs(logits, batch.token_ids, batch.old_logprobs, batch.advantages)
            surrogate = policy_gradient(sampled, grpo.clip_low, grpo.clip_high)
            return LossOutput(surrogate, nll(tail_logits, batch.tail_ids))
        full = batch.target_state
        target = batch.target_logprobs if full is None else policy.logits(full)
        inputs = LossInputs(
            logits=logits,
            target_ids=batch.target_ids,
            target_logprobs=logits.new_zeros(0, logits.shape[1]) if target is None else target,
            target_tail=batch.target_tail,
            tail_logits=tail_logits,
            tail_ids=batch.tail_ids,
        )
        c = self.config
        return distillation(inputs, c.divergence, c.jsd_beta, c.tail_bucket, c.token_clip, c.pointwise_clip)

    def _check_finite(self, batch: Batch, out: LossOutput) -> None:
        for name, values, rows in (
            ("loss", out.token_loss, batch.row),
            ("tail NLL", out.tail_nll, batch.tail_row),
        ):
            bad = (~values.isfinite()).nonzero()[:, 0]
            if len(bad):
                problem, sample = batch.keys[int(rows[bad[0]])]
                raise NonFiniteLoss(
                    f"the {name} of {len(bad)} of {len(values)} tokens is not finite, first in rollout "
                    f"({problem}, {sample}); nothing of this stage is saved. "
                    "Look at its target (ogls query), or lower train.learning_rate"
                )

    def state(self) -> dict[str, Tensor]:
        """Optimizer state by tensor name, for safetensors."""
        import torch

        tensors = {"step": torch.tensor(self.step)}
        for name in self.names:
            for kind, value in self.optimizer.state.get(self.policy.parameters[name], {}).items():
                tensors[f"{kind}:{name}"] = torch.as_tensor(value).detach().cpu().clone().contiguous()
        return tensors

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        self.step = int(tensors["step"])
        places = {name: i for i, name in enumerate(self.names)}
        state: dict[int, dict[str, Any]] = {}
        for key, value in tensors.items():
            kind, found, name = key.partition(":")
            if found:
                state.setdefault(places[name], {})[kind] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _keys(items: Sequence[TrainItem]) -> str:
    named = ", ".join(f"({p}, {s})" for p, s in sorted(i.key for i in items)[:3])
    return named + (f" and {len(items) - 3} more" if len(items) > 3 else "")
