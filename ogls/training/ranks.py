"""The processes that train together, each a rank: one process, DDP or FSDP2.

Every rank knows all rollouts of an optimizer step and trains on its share of them. Sums over tokens are divided by the
counts of the whole step, so the gradient is the sum over the ranks, whatever their number.

DDP: each rank has all weights; the gradients of the trained weights are summed once an optimizer step. FSDP2: weights,
gradients and optimizer state are split over the ranks. A layer is gathered when it runs, so all ranks run the same
number of micro-batches, and gradients are summed in each.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ogls.config import ModelConfig, RunConfig
from ogls.errors import ConfigError, ModelError
from ogls.models.load import resolve_device
from ogls.models.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor


def count_ranks(config: RunConfig) -> int:
    """Return the number of processes that train. Raises ConfigError if there are too few devices or rollouts for it."""
    import torch

    train = config.train
    if train.parallel == "none":
        return 1
    devices = torch.cuda.device_count() if resolve_device(config.model).type == "cuda" else 0
    if not devices and not train.processes:
        raise ConfigError(
            f"train.parallel = {train.parallel} on the CPU: set train.processes to the number of processes"
        )
    if devices and train.processes > devices:
        raise ConfigError(
            f"train.processes = {train.processes}, but torch sees {devices} CUDA devices: lower it (0: one process for "
            "each device), or set model.device = cpu"
        )
    count = train.processes or devices
    if count > train.batch_rollouts:
        raise ConfigError(
            f"{count} processes share the rollouts of a step, train.batch_rollouts = {train.batch_rollouts}, so "
            f"{count - train.batch_rollouts} of them have no work: lower train.processes"
        )
    return count


class Ranks:
    """One process that trains alone. The subclasses train with others; then every method is called by all ranks."""

    rank, size = 0, 1
    in_step = False  # whether all ranks must run the same number of micro-batches

    def model_config(self, model: ModelConfig) -> ModelConfig:
        """The settings to load the model with, before `place`."""
        return model

    def place(self, policy: Policy) -> None:
        """Prepare a policy that has been loaded, for training on these ranks."""

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Add up the gradients of the ranks, at the end of an optimizer step."""

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank. They are pickled on the way."""
        return [value]

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight, or a part of the optimizer state, as one tensor on the CPU."""
        return tensor.detach().cpu().clone().contiguous()

    def part(self, value: Tensor, parameter: Tensor) -> Tensor:
        """What this rank has of a tensor that belongs to a trained weight."""
        return value


class DataParallel(Ranks):
    """DDP: the frozen base and the trained weights on every rank."""

    def __init__(self, rank: int, size: int, device: str = "cpu"):
        self.rank, self.size, self.device = rank, size, device

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Add up the gradients of the ranks. A weight that no rank has a gradient of keeps none."""
        import torch
        import torch.distributed as dist

        used = torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32, device=parameters[0].device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        pending = []
        for parameter, has_gradient in zip(parameters, used.tolist(), strict=True):
            if has_gradient:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                pending.append(dist.all_reduce(parameter.grad, async_op=True))
        for work in pending:
            work.wait()

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, by rank."""
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values


class Sharded(DataParallel):
    """FSDP2: every layer is split over the ranks and gathered when it runs."""

    in_step = True

    def model_config(self, model: ModelConfig) -> ModelConfig:
        """Load on the CPU: `place` moves one layer at a time to the device, and keeps this rank's part of it."""
        return model.model_copy(update={"device": "cpu"})

    def place(self, policy: Policy) -> None:
        """Split the body of the policy over the ranks. The head, and embeddings tied to it, stay whole on each.

        Raises ModelError if the layers of the model are not known.
        """
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, fully_shard

        names = set(getattr(policy.body, "_no_split_modules", None) or ())
        layers = [module for module in policy.body.modules() if type(module).__name__ in names]
        if not layers:
            raise ModelError(
                "train.parallel = fsdp: transformers does not say which modules are the layers of this model "
                "(_no_split_modules); set train.parallel = ddp"
            )
        mesh = init_device_mesh(self.device, (self.size,))
        for layer in layers:
            # Apart from the frozen weights: trained ones are fp32 whatever the type of the model, and a group of
            # FSDP2 has one type.
            if trained := _modules_of_adapters(layer):
                fully_shard(trained, mesh=mesh)
            fully_shard(layer, mesh=mesh)
        head = policy.model.get_output_embeddings().to(self.device)
        fully_shard(policy.body, mesh=mesh, ignored_params={head.weight})
        for module in policy.body.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)  # sums, not means over the ranks
                module.set_force_sum_reduction_for_comms(True)
        policy.head, policy.device = head.weight.detach(), torch.device(self.device)
        policy.find_parameters()

    def sum_gradients(self, parameters: list[Tensor]) -> None:
        """Nothing to do: the backward pass of each micro-batch has added them up."""

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor gathered from all ranks, on the CPU. A tensor that is not split is copied."""
        from torch.distributed.tensor import DTensor

        return super().whole(tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def part(self, value: Tensor, parameter: Tensor) -> Tensor:
        """This rank's part of a tensor with the shape of a trained weight; another tensor as it is."""
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
            return value
        value = value.to(parameter.device)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)


KINDS: Mapping[str, type[DataParallel]] = {"ddp": DataParallel, "fsdp": Sharded}


def _modules_of_adapters(layer: Any) -> list[Any]:
    """The modules of a layer that have trained weights of their own, if other weights of the layer are frozen."""
    if all(p.requires_grad for p in layer.parameters()):
        return []
    return [m for m in layer.modules() if any(p.requires_grad for p in m.parameters(recurse=False))]
