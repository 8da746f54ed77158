"""Work on a GPU that is recorded once and replayed: Python launches thousands of kernels a step, and where they are
small it takes longer than they do."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch import Tensor

Inputs = tuple[Tensor | None, ...]


class Replayed:
    """`function(*inputs, **options)`, recorded as a CUDA graph when inputs of the same form come for the second time
    with the same options.

    The function may not wait for the device, and no shape in it may depend on a value. What it reads beside its inputs
    and what it writes must stay where it is; the tensors that it returns are overwritten by the next call of their form
    (with `shared` memory: of any). The first call is not recorded: it compiles, tunes and allocates.
    """

    def __init__(self, function: Callable[..., list[Tensor]], shared: bool = False) -> None:
        self._function = function
        self._seen: set[tuple] = set()
        self._recorded: dict[tuple, tuple[torch.cuda.CUDAGraph, Inputs, list[Tensor]]] = {}
        self._stream = torch.cuda.Stream()  # a graph is recorded on a stream of its own; so is what comes before it
        self._pool = torch.cuda.graph_pool_handle() if shared else None

    def __call__(self, *inputs: Tensor | None, **options: Hashable) -> list[Tensor]:
        form = *(None if x is None else (x.shape, x.dtype) for x in inputs), *options.items()
        if form not in self._seen:
            self._seen.add(form)
            return self._aside(lambda: self._function(*inputs, **options))
        if form not in self._recorded:
            self._recorded[form] = self._record(inputs, options)
        graph, held, outputs = self._recorded[form]
        for mine, given in zip(held, inputs, strict=True):
            if mine is not None:
                mine.copy_(given, non_blocking=True)
        graph.replay()
        return outputs

    def _record(
        self, inputs: Inputs, options: dict[str, Hashable]
    ) -> tuple[torch.cuda.CUDAGraph, Inputs, list[Tensor]]:
        held = tuple(None if x is None else x.clone() for x in inputs)
        if self._pool is None:
            torch.cuda.empty_cache()  # the graph's memory is its own
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            outputs = self._function(*held, **options)
        return graph, held, outputs

    def _aside(self, call: Callable[[], list[Tensor]]) -> list[Tensor]:
        current = torch.cuda.current_stream()
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            outputs = call()
        current.wait_stream(self._stream)
        return outputs
