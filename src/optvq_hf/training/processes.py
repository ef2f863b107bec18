"""Numbers of all processes that train together. Alone, each of these does nothing."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    return world_size() == 1 or dist.get_rank() == 0


class _Sum(torch.autograd.Function):
    """The sum over processes. Its gradient is the sum of the processes' gradients, and so on for higher ones."""

    @staticmethod
    def forward(ctx, tensor):
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx, gradient):
        return _Sum.apply(gradient)


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Differentiable; any shape, the same in every process."""
    return tensor if world_size() == 1 else _Sum.apply(tensor) / world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[torch.nn.Parameter]):
    """What DistributedDataParallel does, once, for a network that is called several times before its gradients are used."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


def gather(rows: torch.Tensor) -> torch.Tensor:
    """The rows of all processes, as many in each, in the order in which the processes take turns (see `data/order.py`)."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, in every process."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor
