"""The exponential moving average of the weights, kept on the CPU and brought up to date beside training.

V3 (section 3.2.2) keeps one to learn early how the model will do once the learning rate has decayed, at no cost in GPU
memory or time: after each step e ← d·e + (1 − d)·w, in fp32. On CUDA the weights are copied into pinned memory by a
stream of their own, and a thread averages while the next step computes.

    follow(weights)     after the weights have changed
    before_change()     before they change again
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class WeightAverage:
    """The average of some named weights, which begins as a copy of them. `decay` is d."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.decay = decay
        self._average = {name: weight.detach().to("cpu", torch.float32, copy=True) for name, weight in weights.items()}
        self._device = next(iter(weights.values())).device
        self._pending: Future[None] | None = None
        if self._device.type == "cuda":
            self._stream = torch.cuda.Stream(self._device)
            self._pinned = [torch.empty_like(average, pin_memory=True) for average in self._average.values()]
            self._thread = ThreadPoolExecutor(1, "weight-average")

    @torch.no_grad()
    def follow(self, weights: Iterable[Tensor]) -> None:
        """Move the average towards `weights`, given in the order of the names."""
        self._settle()
        if self._device.type != "cuda":
            self._move(weights)
            return
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for pinned, weight in zip(self._pinned, weights, strict=True):
                pinned.copy_(weight, non_blocking=True)
                weight.record_stream(self._stream)
        copied = self._stream.record_event()
        self._pending = self._thread.submit(self._move_after, copied)

    def before_change(self) -> None:
        """Hold the optimiser's step back until the last copy has left the device; the CPU does not wait."""
        if self._pending is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    @contextmanager
    @torch.no_grad()
    def lent(self, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
        """`parameters`, which were followed, hold the average inside and their own values again after."""
        self._settle()
        own = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        try:
            for name, parameter in parameters.items():
                parameter.copy_(self._average[name])
            yield
        finally:
            for name, parameter in parameters.items():
                parameter.copy_(own[name])

    def state_dict(self) -> dict[str, Tensor]:
        self._settle()
        return self._average

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self._settle()
        assert state.keys() == self._average.keys(), (state.keys(), self._average.keys())
        for name, average in self._average.items():
            average.copy_(state[name])

    @torch.no_grad()
    def _move(self, weights: Iterable[Tensor]) -> None:
        for average, weight in zip(self._average.values(), weights, strict=True):
            average.lerp_(weight.float(), 1 - self.decay)

    def _move_after(self, copied: torch.cuda.Event) -> None:
        copied.synchronize()
        self._move(self._pinned)

    def _settle(self) -> None:
        """Wait for the average to be that of every step so far; raise what its thread failed with."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()
