"""The trainer: a loop over optimizer steps, each over micro-batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from ogls.config import TrainConfig
from ogls.errors import ModelError, NonFiniteLoss
from ogls.models.head import nll
from ogls.models.policy import Policy
from ogls.progress import Progress, no_progress
from ogls.training.batching import Batch, TrainItem, chunks, collate, format_keys
from ogls.training.choose import find_loss
from ogls.training.contract import LossInputs, LossOutput
from ogls.training.losses import TAIL_NLL
from ogls.training.means import MetricMeans
from ogls.training.ranks import Ranks
from ogls.training.schedule import MicroBatch, order_steps, split_step

if TYPE_CHECKING:
    from torch import Tensor


def require_trainable(dtype: str) -> None:
    """Raise ModelError if a model of this data type cannot be trained."""
    if dtype == "float16":
        raise ModelError(
            "model.dtype = float16 cannot be trained: most gradients are too small for it; use bfloat16 or float32"
        )


class Trainer:
    """Trains the trainable weights of a policy with AdamW.

    `state` is the result of `Trainer.state()` in an earlier round; without it, the optimizer and the warm-up of the
    learning rate start at step 0. `temperature` is the sampling temperature of the rollouts, for the policy gradient; 0
    counts as 1. `target_logits` maps the states of full-vocabulary targets to logits [n, V], by default with the head
    of the policy; its V may be smaller, and then only its ids are compared. `ranks` are the processes that train
    together; each calls every method with the same arguments. Raises ModelError for a policy in float16, ConfigError
    for a user's loss that cannot be loaded.
    """

    def __init__(
        self,
        policy: Policy,
        config: TrainConfig,
        state: Mapping[str, Tensor] | None = None,
        temperature: float = 1.0,
        target_logits: Callable[[Tensor], Tensor] | None = None,
        ranks: Ranks | None = None,
    ):
        import torch

        require_trainable(str(policy.head.dtype).removeprefix("torch."))
        self.policy, self.config, self.temperature = policy, config, temperature or 1.0
        self.target_logits = target_logits or policy.logits
        self.ranks = ranks or Ranks()
        self.loss = find_loss(config)
        self.tail_loss = self.loss if self.loss.needs_only_tokens else TAIL_NLL
        self.names = sorted(policy.parameters)
        self.optimizer = torch.optim.AdamW(
            [policy.parameters[n] for n in self.names], lr=config.learning_rate, weight_decay=config.weight_decay
        )
        self.step = 0
        if state:
            self.restore(None, state)

    def train_round(
        self,
        items: Sequence[TrainItem],
        seed: int,
        progress: Progress = no_progress,
        finished: Sequence[dict[str, Any]] = (),
        after_step: Callable[[list[dict[str, Any]]], None] = lambda rows: None,
    ) -> list[dict[str, Any]]:
        """Train on all items for train.epochs epochs. Return the rows of the table `updates`, one per optimizer step.

        The order of the items depends on `seed` and the epoch. `finished` are the rows of the steps that were done
        before an interruption (see `restore`); `after_step` is called with all rows after each further step. Raises
        NonFiniteLoss, with the key of the rollout, before a non-finite loss or gradient changes a weight.
        """
        steps, rows = order_steps(items, self.config, seed), list(finished)
        for epoch, step in steps[len(rows) :]:
            rows.append({"epoch": epoch, **self.optimizer_step(step)})
            after_step(rows)
            progress(len(rows), len(steps))
        return rows

    def _own_batches(self, items: Sequence[TrainItem]) -> tuple[list[MicroBatch], int]:
        """The micro-batches of this rank, and how many further ones it has to take part in without items."""
        shares = split_step(items, self.config.micro_batch_tokens, self.ranks.size)
        own = shares[self.ranks.rank]
        return own, max(map(len, shares)) - len(own) if self.ranks.in_step else 0

    def _run_idle(self) -> Tensor:
        """Run the body on one token, so that other ranks can gather its layers: a zero with a gradient."""
        import torch

        ids = torch.zeros(1, 1, dtype=torch.long, device=self.policy.device)
        return self.policy.run_body(ids, torch.ones_like(ids), use_cache=False).last_hidden_state.sum() * 0

    def with_own_logprobs(self, items: Sequence[TrainItem]) -> list[TrainItem]:
        """Replace the log-probs of the policy gradient by those of the current policy at the sampling temperature.

        Before the first step the policy is the one that sampled, so its ratio is exactly 1. Recorded log-probs are at
        temperature 1, and those of another engine or of a 16-bit model are rounded differently.
        """
        import torch

        computed: dict[Any, Tensor] = {}
        batches, idle = self._own_batches([item for item in items if item.old_logprobs is not None])
        with torch.no_grad():
            for micro in batches:
                batch = collate(micro, self.policy.device)
                hidden = self.policy.run_body(batch.ids, batch.mask, use_cache=False).last_hidden_state
                states = self._at_temperature(hidden[batch.row, batch.position])
                parts = [
                    -nll(states[part], self.policy.head, batch.token_ids[part])
                    for part in chunks(len(states), self.config.head_tokens)
                ]
                logprobs = torch.cat(parts).cpu().split([item.trained for item in micro])
                computed |= {item.key: own.numpy() for item, own in zip(micro, logprobs, strict=True)}
            for _ in range(idle):
                self._run_idle()
        merged = {key: torch.from_numpy(own) for part in self.ranks.gather(computed) for key, own in part.items()}
        return [replace(i, old_logprobs=merged[i.key]) if i.key in merged else i for i in items]

    def optimizer_step(self, items: Sequence[TrainItem]) -> dict[str, Any]:
        """Run one optimizer step on the items. Return its row of the table `updates` without the epoch.

        The loss is the weighted mean of the token losses plus train.tail_weight (1 for rft and sft) times the mean tail
        NLL, in nats per token. Sums are divided by the token counts of the whole step, so loss and gradient do not
        depend on the split into micro-batches. Raises NonFiniteLoss if a loss or the gradient norm is not finite.
        """
        import torch

        config, parameters = self.config, [self.policy.parameters[n] for n in self.names]
        weight = 1.0 if self.loss.needs_only_tokens else config.tail_weight
        tokens, tail_tokens = sum(i.trained for i in items), sum(i.tail for i in items)
        # Token weights are divided by their sum in the step, so uniform weights give the mean over tokens.
        trained_weight = sum(float(i.trained if i.weights is None else i.weights.sum()) for i in items)
        scales = 1 / max(trained_weight, 1e-9), weight / max(tail_tokens, 1)
        batches, idle = self._own_batches(items)
        sums, means = [0.0, 0.0], MetricMeans()
        for parameter in parameters:
            parameter.grad = None  # of a step that ended in an error
        with self.policy.checkpointing(config.gradient_checkpointing):
            for micro in batches:
                added = self._backward(collate(micro, self.policy.device), *scales, means)
                sums = [a + b for a, b in zip(sums, added, strict=True)]
            for _ in range(idle):
                self._run_idle().backward()
        self.ranks.sum_gradients(parameters)
        sums, means = self._sum_over_ranks(sums, means)
        token_loss, tail_nll = sums[0] * scales[0], sums[1] / max(tail_tokens, 1)
        norm = self.ranks.whole(torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)).item()
        if not np.isfinite(norm):
            raise NonFiniteLoss(
                f"the gradient norm is {norm} at step {self.step + 1}, in rollouts {format_keys(items)}; "
                "nothing of this stage is saved. Start a new run from the last adapter (adapter.start), and lower "
                "train.learning_rate in it"
            )
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
            "metrics": means.to_column(),
        }

    def _sum_over_ranks(self, sums: list[float], means: MetricMeans) -> tuple[list[float], MetricMeans]:
        """The sums of the losses and the metrics of all ranks, added up in their order: the same on each."""
        total, merged = [0.0, 0.0], MetricMeans()
        for part, others in self.ranks.gather((sums, means)):
            total = [a + b for a, b in zip(total, part, strict=True)]
            merged.merge(others)
        return total, merged

    def _backward(self, batch: Batch, token_scale: float, tail_scale: float, means: MetricMeans) -> tuple[float, float]:
        """Add the gradient of a micro-batch, and its metrics to `means`.

        Returns the sums (nats) of its weighted token losses and of its tail NLLs.

        The head is not trained, so the backward pass of the body needs only the gradient of the losses with respect to
        its states. That gradient is computed in chunks of train.head_tokens tokens, so logits [*, V] of only one chunk
        are in memory, and the head runs once.
        """
        import torch

        hidden = self.policy.run_body(batch.ids, batch.mask, use_cache=False).last_hidden_state
        states, tail_states = hidden[batch.row, batch.position], hidden[batch.tail_row, batch.tail_position]
        leaf, tail_leaf = states.detach().requires_grad_(), tail_states.detach().requires_grad_()
        sums = [0.0, 0.0]
        for part in chunks(len(leaf), self.config.head_tokens):
            output = self.token_losses(batch, part, leaf[part])
            self._check_finite("loss", batch, output.loss, batch.row[part])
            loss = output.loss if batch.weights is None else output.loss * batch.weights[part]
            (loss.sum() * token_scale).backward()
            sums[0] += loss.sum().item()
            means.add(output)
        for part in chunks(len(tail_leaf), self.config.head_tokens):
            tail = self.tail_loss(self._inputs(tail_leaf[part], batch.tail_ids[part]))
            self._check_finite("tail NLL", batch, tail.loss, batch.tail_row[part])
            (tail.loss.sum() * tail_scale).backward()
            sums[1] += tail.loss.sum().item()
            means.add(tail)
        pairs = [(s, g.grad) for s, g in ((states, leaf), (tail_states, tail_leaf)) if g.grad is not None]
        torch.autograd.backward([s for s, _ in pairs], [g for _, g in pairs])
        return sums[0], sums[1]

    def token_losses(self, batch: Batch, part: slice, states: Tensor) -> LossOutput:
        """Return the losses [n] (nats) and the metrics of the trained tokens `part` of a micro-batch.

        `states` [n, D] are the states of the policy that predict these tokens.
        """
        fields: dict[str, Any] = {}
        if batch.target_state is not None:
            fields["target_logprobs"] = target = self.target_logits(batch.target_state[part])
            fields["head"] = self.policy.head[: target.shape[-1]]
        else:
            stored = {name: getattr(batch, name) for name in ("target_ids", "target_logprobs", "target_tail")}
            fields |= {name: value[part] for name, value in stored.items() if value is not None}
        if batch.old_logprobs is not None:
            fields |= {"old_logprobs": batch.old_logprobs[part], "advantages": batch.advantages[part]}
            states = self._at_temperature(states)
        return self.loss(self._inputs(states, batch.token_ids[part], **fields))

    def _inputs(self, states: Tensor, token_ids: Tensor, **fields: Tensor) -> LossInputs:
        return LossInputs(states, fields.pop("head", self.policy.head), token_ids, settings=self.config, **fields)

    def _at_temperature(self, states: Tensor) -> Tensor:
        """States [n, D] whose logits are those of `states` divided by the sampling temperature."""
        return states if self.temperature == 1 else states.float() / self.temperature

    def _check_finite(self, name: str, batch: Batch, values: Tensor, rows: Tensor) -> None:
        """Raise NonFiniteLoss if a value [n] is not finite; `rows` [n] are the sequences of the values in the batch."""
        bad = (~values.isfinite()).nonzero()[:, 0]
        if len(bad):
            problem, sample = batch.keys[int(rows[bad[0]])]
            raise NonFiniteLoss(
                f"the {name} of {len(bad)} of {len(values)} tokens is not finite, first in rollout "
                f"({problem}, {sample}); nothing of this stage is saved. "
                "Inspect its target (ogls query), or start a new run from the last adapter (adapter.start), and lower "
                "train.learning_rate in it"
            )

    def weights(self) -> dict[str, Tensor]:
        """Return a copy of the trained weights on the CPU, by name."""
        return {name: self.ranks.whole(weight) for name, weight in self.policy.parameters.items()}

    def state(self) -> dict[str, Tensor]:
        """Return the optimizer state on the CPU, for safetensors: `step`, and a tensor `KIND:PARAMETER` for each kind
        of AdamW's state and each parameter."""
        import torch

        tensors = {"step": torch.tensor(self.step)}
        for name in self.names:
            for kind, value in self.optimizer.state.get(self.policy.parameters[name], {}).items():
                tensors[f"{kind}:{name}"] = self.ranks.whole(torch.as_tensor(value))
        return tensors

    def restore(self, weights: Mapping[str, Tensor] | None, state: Mapping[str, Tensor]) -> None:
        """Load the result of `state()` and, unless it is None, that of `weights()`."""
        import torch

        parameters = self.policy.parameters
        with torch.no_grad():
            for name, value in (weights or {}).items():
                parameters[name].copy_(self.ranks.part(value, parameters[name]))
        self.step = int(state["step"])
        index_of = {name: i for i, name in enumerate(self.names)}
        by_index: dict[int, dict[str, Any]] = {}
        for key, value in state.items():
            kind, separator, name = key.partition(":")
            if separator:
                by_index.setdefault(index_of[name], {})[kind] = self.ranks.part(value, parameters[name])
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": by_index})
