"""Activation checkpointing by name: outputs that are cheap to make again are not kept for the backward pass.

| name | made again in the backward pass |
|-|-|
| rms_norm | the output of every RMSNorm |
| mla_up | MLA's queries, keys and values per head, from its latents |
| swiglu | the input of every down-projection, from the up-projection's output |
| block | all of a block, by `torch.utils.checkpoint` |

The first three are DeepSeek-V3's (section 3.2.3). What holds on to those outputs are their consumers, matrix products
and attention, which are far dearer than what is made again: checkpointing a region would run them twice. Here autograd
is watched instead (`saved_tensors_hooks`): where it asks to keep an output of a chosen operation, or a view of one, a
recipe is kept, the operation and its inputs. Gradients are the same to the last bit.

A block made again must choose the same experts, and near a tie another rounding would choose others. On CUDA it does
since the same kernels meet the same bits: nothing in a forward pass draws lots or depends on the order of atomics, and
weights and routing biases move after the backward pass. Elsewhere torch's topk chooses, and what it chose is kept.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

Recomputed = Literal["rms_norm", "mla_up", "swiglu", "block"]


def plain(name: Recomputed, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs). A module that holds this as its `recompute` keeps everything."""
    return function(*inputs)


class Recompute:
    """What a model's modules call the named operations through. Its `tape` is the context of a forward pass."""

    def __init__(self, names: Iterable[Recomputed]) -> None:
        self.names = frozenset(names)
        self._on_tape = False
        self._outputs: dict[int, _Output] = {}  # of this forward pass, by the address of their storage

    def attach(self, model: nn.Module) -> None:
        """Have every module of `model` that makes a named output make it through here."""
        for module in model.modules():
            if hasattr(module, "recompute"):
                module.recompute = self

    @contextmanager
    def tape(self) -> Iterator[None]:
        if not self.names:
            yield
            return
        self._on_tape = True
        try:
            with saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._on_tape = False
            self._outputs.clear()

    def __call__(self, name: Recomputed, function: Callable[..., Any], *inputs: Any) -> Any:
        """function(*inputs): a tensor or a tuple of them, functions of the inputs and of nothing that changes."""
        if not (self._on_tape and name in self.names and torch.is_grad_enabled()):
            return function(*inputs)
        if name == "block":
            # The choice of experts where topk makes it: the kernel on CUDA is no operation that this could see.
            kept = partial(create_selective_checkpoint_contexts, [torch.ops.aten.topk.default])
            return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=kept)
        outputs = function(*inputs)
        recipe = _Recipe(function, [self._pack(each.detach()) if isinstance(each, Tensor) else each for each in inputs])
        for index, output in enumerate(outputs if isinstance(outputs, tuple) else (outputs,)):
            self._outputs[_address(output)] = _Output(weakref.ref(output), recipe, index)
        return outputs

    def _pack(self, tensor: Tensor) -> Any:
        output = self._outputs.get(_address(tensor))
        if output is None or output.alive() is None:  # a dead output's address may be another tensor's by now
            return tensor
        output.recipe.views += 1
        return _View(output.recipe, output.index, tensor.size(), tensor.stride(), tensor.storage_offset())


class _Recipe:
    """How to make some outputs again. They live from the first to the last view that asks for them."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs, self.views = function, inputs, 0
        self._versions = [each._version for each in inputs if isinstance(each, Tensor)]
        self._made: tuple[Tensor, ...] | None = None
        self._left = 0

    def make(self) -> tuple[Tensor, ...]:
        if self._made is None:
            versions = [each._version for each in self.inputs if isinstance(each, Tensor)]
            assert versions == self._versions, "an input of a recomputed operation was changed in place"
            with torch.no_grad():
                made = self.function(*map(_unpack, self.inputs))
            self._made, self._left = made if isinstance(made, tuple) else (made,), self.views
        made, self._left = self._made, self._left - 1
        if self._left == 0:
            self._made = None
        return made


class _Output(NamedTuple):
    """An output by its recipe; `alive()` gives the tensor, or None once it is gone."""

    alive: Callable[[], Tensor | None]
    recipe: _Recipe
    index: int


class _View(NamedTuple):
    """What is kept in place of an output, or of a view of one."""

    recipe: _Recipe
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


def makes_again(recompute: Callable[..., Any], name: Recomputed) -> bool:
    """Whether a module's `recompute` drops the outputs of that name."""
    return isinstance(recompute, Recompute) and name in recompute.names


def _unpack(kept: Any) -> Any:
    if not isinstance(kept, _View):
        return kept
    return kept.recipe.make()[kept.index].as_strided(kept.size, kept.stride, kept.offset)


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
