"""AdamW as the papers run it: β = (0.9, 0.95), weight decay 0.1, on matrices only.

In mixed precision the optimiser splits fp32 masters in two: the model holds the nearest bf16, the optimiser's state the
16 bits that rounding took. One pass updates both halves, so mixed precision costs neither a second copy of the weights
nor a cast of them. Moments may be bf16 (DeepSeek-V3, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

import kernels


class AdamW(torch.optim.Optimizer):
    """AdamW (1711.05101) over fp32 weights, those of `split` turned into bf16 with fp32 masters.

    A weight's gradient is its attribute `main_grad` where it has one (an fp32 sum over micro-batches and ranks), else
    its `grad`.
    """

    def __init__(
        self, groups: list[dict[str, Any]], moment_dtype: torch.dtype = torch.float32, split: Iterable[Tensor] = ()
    ) -> None:
        super().__init__(groups, {})
        self.moment_dtype = moment_dtype
        halved = set(split)
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] = torch.zeros(())
                state["exp_avg"] = torch.zeros_like(weight, dtype=moment_dtype)
                state["exp_avg_sq"] = torch.zeros_like(weight, dtype=moment_dtype)
                if weight in halved:
                    weight.data, state["low"] = kernels.split_master(weight.data)

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:  # type: ignore[override]
        """One step on the gradients times `scale`; a weight without a gradient stays as it is."""
        for group in self.param_groups:
            together, alone = [], []
            for weight in group["params"]:
                if _gradient(weight) is not None:
                    # On CPU, torch's own step takes all the small fp32 tensors in one call.
                    plain = not weight.is_cuda and weight.dtype == self.moment_dtype == torch.float32
                    (together if plain else alone).append(weight)
            if together:
                self._step_together(together, group, scale)
            for weight in alone:
                self._step_one(weight, group, scale)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, but every tensor keeps its dtype: torch would cast state to that of the weights."""
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        weights = [weight for group in self.param_groups for weight in group["params"]]
        for number, weight in zip(saved, weights, strict=True):
            ours, theirs = self.state[weight], state_dict["state"][number]
            assert ours.keys() == theirs.keys(), (ours.keys(), theirs.keys())
            for name, value in theirs.items():
                ours[name].copy_(value)
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})

    def master(self, weight: Tensor) -> Tensor:
        """The fp32 value of a weight: itself, or a new tensor where it was split."""
        low = self.state[weight].get("low")
        return weight.data if low is None else kernels.join_master(weight.data, low)

    def join(self) -> None:
        """Give the model its fp32 weights back: the end of training."""
        for weight, state in self.state.items():
            weight.data = self.master(weight)
            state.pop("low", None)

    def _step_together(self, weights: list[Tensor], group: dict[str, Any], scale: float) -> None:
        gradients = [_gradient(weight) for weight in weights]
        if scale != 1:
            torch._foreach_mul_(gradients, scale)
        states = [self.state[weight] for weight in weights]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        torch._fused_adamw_(
            *(weights, gradients, [s["exp_avg"] for s in states], [s["exp_avg_sq"] for s in states], [], steps),
            **{"lr": group["lr"], "beta1": group["betas"][0], "beta2": group["betas"][1], "eps": group["eps"]},
            **{"weight_decay": group["weight_decay"], "amsgrad": False, "maximize": False},
        )

    def _step_one(self, weight: Tensor, group: dict[str, Any], scale: float) -> None:
        state = self.state[weight]
        state["step"] += 1
        kernels.implementation(weight).adamw_step(
            weight,
            state.get("low"),
            _gradient(weight),
            state["exp_avg"],
            state["exp_avg_sq"],
            scale=scale,
            rate=group["lr"],
            decay=group["weight_decay"],
            betas=group["betas"],
            eps=group["eps"],
            step=int(state["step"]),
        )
        torch.autograd.graph.increment_version(weight)  # a kernel's writes are seen by no one else


def build_optimizer(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float = 0.1,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    moment_dtype: torch.dtype = torch.float32,
    split: Iterable[Tensor] = (),
) -> AdamW:
    """AdamW with decoupled decay on every weight of two or more dimensions, embedding and head included.

    Norm gains and biases are not decayed: the papers give one decay for the whole model, and this is the split the
    field reads into it. Group 0 is decayed, group 1 is not.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    common = {"lr": learning_rate, "betas": betas, "eps": eps}
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay, **common},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0, **common},
    ]
    return AdamW(groups, moment_dtype, split)


def _gradient(weight: Tensor) -> Tensor | None:
    return getattr(weight, "main_grad", weight.grad)
