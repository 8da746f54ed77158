"""Which layers compute in float8, and their quantised weights.

As in DeepSeek-V3 (section 3.3.1) all linear layers and experts do; embedding, head, router, norms and attention keep
their precision, and so do weights, gradients and the optimiser's state. A model that is not training computes with the
weights as they are, unless it should always compute in float8: W8A8, as V3 is served. Decoding, MLA's absorbed products
belong to its attention and stay as they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

from infra.errors import ConfigError
from kernels import fp8


class Float8:
    """The quantised weights of one module, made again, in the same memory, after a weight has changed: once a step,
    however many micro-batches it has."""

    def __init__(self, always: bool) -> None:
        self.always = always
        self._made: dict[int, _Made] = {}  # by the weight

    def refresh(self) -> None:
        """Quantise again what has been asked for before and has changed."""
        for made in list(self._made.values()):
            self.of(made.weight)

    def of(self, weight: Tensor) -> fp8.Weight:
        state = weight.data_ptr(), weight._version
        made = self._made.get(id(weight))
        if made is None or made.state != state:
            quantize = fp8.quantizer(weight.device).quantize_weight
            quantized = quantize(weight.detach(), into=None if made is None else made.quantized)
            made = self._made[id(weight)] = _Made(weight, state, quantized)
        return made.quantized


class _Made(NamedTuple):
    weight: Tensor
    state: tuple[int, int]
    quantized: fp8.Weight


def in_float8(module: nn.Module) -> bool:
    """Whether a module that can compute in float8 does so now."""
    return module.float8 is not None and (module.training or module.float8.always)


def use_float8(model: nn.Module, always: bool = False) -> None:
    """Have every linear layer and expert of `model` train in float8, but for the head; `always`: and infer in it.

    Raises ConfigError if a width is no multiple of 16.
    """
    head = getattr(model, "head", None)
    sharded = any(hasattr(module, "unshard") for module in model.modules())  # FSDP2: weights may lie gathered by now
    for name, module in model.named_modules():
        if not hasattr(module, "float8") or module is head:
            continue
        float8 = Float8(always)
        for part, weight in module.named_parameters(recurse=False):
            if weight.ndim > 1 and any(size % fp8.ALIGNMENT for size in weight.shape[-2:]):
                raise ConfigError(
                    f"{name}.{part} is {list(weight.shape)}: float8 wants both its widths to be multiples of "
                    f"{fp8.ALIGNMENT}; change the model's widths, or leave fp8 out"
                )
            if not sharded:
                weight.quantized = float8.of
        module.float8 = float8
    _watch_optimizers()


@cache
def _watch_optimizers() -> None:
    """Have an optimiser's step change the versions of its weights: torch's fused ones leave them as they are."""

    def stepped(optimizer: Optimizer, *_: Any) -> None:
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        increment_version([weight for weight in weights if hasattr(weight, "quantized")])

    register_optimizer_step_post_hook(stepped)


def refresh(model: nn.Module) -> None:
    """`Float8.refresh` of the whole model: a pass that is replayed as a CUDA graph asks for no weight itself."""
    for module in model.modules():
        if isinstance(getattr(module, "float8", None), Float8):
            module.float8.refresh()
