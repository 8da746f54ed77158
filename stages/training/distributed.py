"""Data parallelism in its plainest form: every rank holds the model, one flat buffer holds all gradients.

The gradients of all parameters are views of one fp32 buffer, with a short tail for the step's statistics (loss sums,
expert loads). A step therefore costs one all-reduce, one norm, one scaling and one fill, however many tensors.
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
    """All gradients of a model, fp32, in one buffer, followed by `n_statistics` numbers that are summed with them."""

    def __init__(self, parameters: Sequence[nn.Parameter], n_statistics: int = 0) -> None:
        self._size = sum(parameter.numel() for parameter in parameters)
        self._flat = torch.zeros(self._size + n_statistics, device=parameters[0].device)
        offset = 0
        for parameter in parameters:
            assert parameter.dtype == torch.float32, f"master weights are fp32, got {parameter.dtype}"
            parameter.grad = self._flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()

    @property
    def gradients(self) -> Tensor:
        return self._flat[: self._size]

    @property
    def statistics(self) -> Tensor:
        return self._flat[self._size :]

    def zero(self) -> None:
        self._flat.zero_()

    def reduce(self, ranks: Ranks) -> None:
        """Sum gradients and statistics over ranks. Losses must already be divided by the whole step's counts."""
        ranks.all_reduce(self._flat)

    def clip(self, max_norm: float) -> float:
        """Scale the gradients so that their joint L2 norm is at most `max_norm`; the norm before that."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if norm > max_norm:
            self.gradients.mul_(max_norm / norm)
        return norm
