"""Routing health: how the experts of every layer are loaded through a run, and a gate that stops a collapsed one.

All figures come from a step's loads after their all-reduce, so every rank holds the same and all stop together. MaxVio
is (max load − mean load) / mean load (2408.15664, section 3), over one step ("batch") or over many ("global"). At worst
all tokens take the same K of E experts, which makes it E/K − 1: limits are shares of that, so they hold at any size.
Legend: L layers with experts (MTP's last), E routed experts, K activated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from infra.errors import FathomError
from model.config import ModelConfig
from model.moe import MoE
from model.router import Router
from stages.training.job import Optimization

ROWS = 100  # of a run's history, at most
LIMITS = ("health_window", "max_dead_share", "max_violation")


class RoutingCollapsed(FathomError):
    """A layer sends its tokens to few experts only, and the others no longer learn."""

    exit_code = 3


def max_violation(loads_LE: Tensor) -> Tensor:
    """MaxVio of each layer, fp32 [L]; 0 where nothing was routed."""
    mean_L = loads_LE.float().mean(-1)
    return (loads_LE.amax(-1) - mean_L) / mean_L.clamp(min=1)


def bias_drift(model: nn.Module) -> Tensor:
    """How far the furthest routing bias of each layer has moved from 0, fp32 [L]; 0 for a router without biases."""
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    drifts = [
        layer.router.bias.abs().max() if isinstance(layer.router, Router) else layer.experts.down.new_zeros(())
        for layer in layers
    ]
    return torch.stack(drifts) if drifts else torch.zeros(0)


def layer_names(model: ModelConfig) -> list[str]:
    """What the rows of a load are called."""
    blocks = [f"layer {layer}" for layer in range(model.n_layers) if model.has_experts(layer)]
    return blocks + [f"MTP {depth}" for depth in range(1, model.n_mtp + 1) if model.is_moe]


class RoutingHealth:
    """Sums a run's loads and judges them at the end of each window of `health_window` steps.

    Beside that it keeps a history of at most ROWS rows over the whole run: the loads of a row's steps, their MaxVio
    (global), the mean of the steps' own (batch), the bias drift, the dead experts (no token in the whole row) and the
    share of what was routed that was dropped. `state_dict` holds all of it: a resumed run has the same history.
    """

    def __init__(self, model: ModelConfig, options: Optimization, steps: int, device: torch.device) -> None:
        self.model, self.options, self.names = model, options, layer_names(model)
        self._row_steps = -(-steps // ROWS)
        shape = (model.n_moe_layers, model.n_routed_experts)
        self._window_LE, self._row_LE = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(2))
        self._batch_L, self._drift_L = (torch.zeros(shape[0], device=device) for _ in range(2))
        self._dropped, self._steps = 0.0, 0  # in the row so far
        self._rows: list[dict[str, Any]] = []

    def update(self, step: int, loads_LE: Tensor, model: nn.Module, dropped: float = 0.0) -> None:
        """Count step number `step` (from 1): tokens routed to each expert, `dropped` of them in all over capacity.

        Raises RoutingCollapsed at the end of a window that is beyond max_dead_share or max_violation.
        """
        if not self.names:
            return
        self._window_LE += loads_LE
        self._row_LE += loads_LE
        self._batch_L += max_violation(loads_LE)
        self._drift_L.copy_(bias_drift(model))
        self._dropped += dropped
        self._steps += 1
        if step % self.options.health_window == 0:
            self._judge(step)
            self._window_LE.zero_()
        if step % self._row_steps == 0:
            self._rows.append(self._row(step))
            self._row_LE.zero_()
            self._batch_L.zero_()
            self._dropped, self._steps = 0.0, 0

    def _judge(self, step: int) -> None:
        options, n_experts = self.options, self.model.n_routed_experts
        worst = n_experts / self.model.n_activated_experts - 1
        dead_L = (self._window_LE == 0).sum(-1)
        figures_L2 = torch.stack([dead_L / n_experts, max_violation(self._window_LE) / max(worst, 1e-9)], dim=1)
        for name, load_E, (dead, violation) in zip(self.names, self._window_LE, figures_L2.tolist(), strict=True):
            if options.max_dead_share is not None and dead > options.max_dead_share:
                experts = ", ".join(str(expert) for expert in (load_E == 0).nonzero().flatten().tolist())
                found = f"experts {experts} of {n_experts} got no token"
                limit = f"max_dead_share={options.max_dead_share:g}"
            elif options.max_violation is not None and violation > options.max_violation:
                busiest = load_E.topk(self.model.n_activated_experts)
                experts = ", ".join(str(expert) for expert in sorted(busiest.indices.tolist()))
                share = float(busiest.values.sum() / load_E.sum())
                found = f"experts {experts} of {n_experts} took {share:.0%} of the tokens"
                limit = f"max_violation={options.max_violation:g}"
            else:
                continue
            raise RoutingCollapsed(
                f"step {step}, {name}: {found} in {options.health_window} steps, beyond {limit}; raise "
                "bias_update_speed or balance_alpha, lower learning_rate.peak or lengthen its warm-up, or set "
                f"{limit.partition('=')[0]}=null to train on"
            )

    def _row(self, step: int) -> dict[str, Any]:
        load_LE = self._row_LE
        return {
            "step": step,
            "load": load_LE.long().tolist(),
            "global_violation": max_violation(load_LE).tolist(),
            "batch_violation": (self._batch_L / self._steps).tolist(),
            "bias_drift": self._drift_L.tolist(),
            "dead": [(load_E == 0).nonzero().flatten().tolist() for load_E in load_LE],
            "drop_rate": self._dropped / float(load_LE.sum()),
        }

    def history(self, step: int) -> dict[str, Any] | None:
        """What routing_health.json holds after `step` steps; None for a dense model."""
        if not self.names:
            return None
        return {
            "layers": self.names,
            "experts": self.model.n_routed_experts,
            "activated": self.model.n_activated_experts,
            "worst_violation": self.model.n_routed_experts / self.model.n_activated_experts - 1,
            "limits": {name: getattr(self.options, name) for name in LIMITS},
            "rows": self._rows + ([self._row(step)] if self._steps else []),
        }

    def state_dict(self) -> dict[str, Any]:
        return self._sums | {"dropped": self._dropped, "steps": self._steps, "rows": list(self._rows)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, sums in self._sums.items():
            sums.copy_(state[name])
        self._dropped, self._steps, self._rows = state["dropped"], state["steps"], list(state["rows"])

    @property
    def _sums(self) -> dict[str, Tensor]:
        return {"window": self._window_LE, "row": self._row_LE, "batch": self._batch_L, "drift": self._drift_L}
