"""Data parallelism in its plainest form: every rank holds the model, one flat buffer holds all gradients.

The gradients of all parameters are views of one fp32 buffer, with a short tail for the step's statistics (loss sums,
expert loads). A step therefore costs one all-reduce, one norm and one fill, however many tensors.
At tiny sizes on CPU, two ranks of one thread train faster than one rank of two threads.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """Who this process is in a job, and the device it computes on."""

    rank: int
    world: int
    device: torch.device

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


@contextmanager
def process_group() -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes (none set: a single process); leave it at the end."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if world > 1:
        dist.init_process_group("nccl" if cuda else "gloo", rank=rank, world_size=world)
    try:
        yield Ranks(rank, world, device)
    finally:
        if world > 1:
            dist.destroy_process_group()


class GradientBucket:
    """The gradients of a step, and `n_statistics` numbers that are summed with them, in one fp32 buffer.

    A bf16 weight's gradient comes in bf16. With `sums` (several micro-batches or ranks make a step) `collect` adds it
    to the buffer, as the weight's `main_grad`; else it stays where autograd left it and is never copied.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], n_statistics: int = 0, sums: bool = True) -> None:
        self._low = [parameter for parameter in parameters if parameter.dtype == torch.bfloat16]
        self._sums = sums
        held = [p for p in parameters if sums or p.dtype != torch.bfloat16]
        self._size = sum(parameter.numel() for parameter in held)
        self._flat = torch.zeros(self._size + n_statistics, device=parameters[0].device)
        offset = 0
        for parameter in held:
            view = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            if parameter.dtype == torch.bfloat16:
                parameter.main_grad = view
            else:
                parameter.grad = view
            offset += parameter.numel()

    @property
    def statistics(self) -> Tensor:
        return self._flat[self._size :]

    def zero(self) -> None:
        self._flat.zero_()
        for parameter in self._low:
            parameter.grad = None

    def collect(self) -> list[Tensor]:
        """After each backward pass; returns the gradients that stay where autograd left them."""
        if not self._sums:
            return [parameter.grad for parameter in self._low]
        for parameter in self._low:
            if parameter.grad is not None:
                parameter.main_grad += parameter.grad
                parameter.grad = None
        return []

    def take(self, gradients: list[Tensor]) -> None:
        """What `collect` returned, where the pass was replayed: autograd was not there to leave it."""
        for parameter, gradient in zip(self._low, gradients, strict=False):
            parameter.grad = gradient

    def reduce(self, ranks: Ranks) -> None:
        """Sum gradients and statistics over ranks. Losses must already be divided by the whole step's counts."""
        assert self._sums or ranks.world == 1, "several ranks need sums"
        ranks.all_reduce(self._flat)

    def norm(self) -> float:
        """The joint L2 norm of the gradients."""
        norm = torch.linalg.vector_norm(self._flat[: self._size])
        apart = [] if self._sums else [weight.grad for weight in self._low if weight.grad is not None]
        if apart:
            norm = torch.linalg.vector_norm(torch.stack([norm, *torch._foreach_norm(apart, dtype=torch.float32)]))
        return float(norm)


def clip_factor(norm: float, max_norm: float) -> float:
    """What gradients of that joint norm are multiplied by so that it is at most `max_norm`."""
    return max_norm / norm if norm > max_norm else 1.0
