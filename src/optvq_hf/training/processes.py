"""Communication between the processes of a run. With one process, these functions do nothing."""

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist


if TYPE_CHECKING:
    from accelerate import Accelerator

T = TypeVar("T")


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_first() -> bool:
    """Whether this process has rank 0."""
    return world_size() == 1 or dist.get_rank() == 0


def start_together(**settings: Any) -> "Accelerator":
    """An Accelerator with these settings, whose processes know of each other, also on machines without GPUs.

    Raises:
        ValueError: As [`check_together`].
    """
    from accelerate import Accelerator

    # accelerate 1.15 would start each process alone there.
    on_cpu = "WORLD_SIZE" in os.environ and not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, **settings)
    check_together(accelerator.num_processes)
    return accelerator


def check_together(num_processes: int) -> None:
    """Raises ValueError if more processes were started than the `num_processes` that know of each other."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != num_processes:
        raise ValueError(
            f"{started} processes were started, but each works alone; on a machine without GPUs set ACCELERATE_USE_CPU=true"
        )


class _Sum(torch.autograd.Function):
    """All-reduce (sum) over processes. Its gradient is the all-reduced gradient, also for higher orders."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return _Sum.apply(gradient)


def mean_over_processes(tensor: torch.Tensor) -> torch.Tensor:
    """Averages a tensor, of the same shape in every process, over all processes; differentiable."""
    return tensor if world_size() == 1 else _Sum.apply(tensor) / world_size()


@torch.no_grad()
def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Averages gradients over all processes, for a network that is called several times per step."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([gradient.numel() for gradient in gradients])
    torch._foreach_copy_(gradients, [part.view_as(gradient) for part, gradient in zip(parts, gradients)])


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Gathers rows, the same number from every process, interleaved as the processes read them (see `data/order.py`)."""
    if world_size() == 1:
        return rows
    parts = [torch.empty_like(rows) for _ in range(world_size())]
    dist.all_gather(parts, rows.contiguous())
    return torch.stack(parts, dim=1).flatten(0, 1)


def gather_objects(value: Any) -> list[Any]:
    """The values of all processes, by rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def on_first(work: Callable[[], T]) -> T:
    """What `work` returns in rank 0, in every process. If it fails, rank 0 raises its error; the others exit with code 1."""
    if world_size() == 1:
        return work()
    outcome: list[Any] = [None]
    failure = None
    if is_first():
        try:
            outcome = [(work(),)]
        except Exception as error:
            failure = error
    dist.broadcast_object_list(outcome, src=0)
    if failure is not None:
        raise failure
    if outcome[0] is None:
        sys.exit(1)
    return outcome[0][0]


def broadcast(tensor: torch.Tensor) -> torch.Tensor:
    """Copies rank 0's tensor to every process."""
    if world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor
