"""Pictures of a ladder: IsoFLOP curves, optimal scale and tokens, hyper-parameter grids, the held-out prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from stages.scaling.hyper import Grid
from stages.scaling.isoflop import IsoFlop, Laws
from stages.scaling.laws import near_optimal


def plot_isoflop(path: Path, ladder: Sequence[IsoFlop], laws: Laws) -> None:
    """Loss against scale, one colour a budget, with the parabolas and their minima (open where not bracketed)."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    for number, (budget, curve, optimum) in enumerate(zip(ladder, laws.curves, laws.optima, strict=True)):
        colour = colormaps["viridis"](0.9 * number / max(1, len(ladder) - 1))
        scales = np.geomspace(budget.scales_S.min(), budget.scales_S.max(), 100)
        axes.plot(budget.scales_S, budget.losses_S, "o", color=colour, markersize=4, label=f"C = {budget.compute:.1e}")
        axes.plot(scales, curve.at(scales)[0], color=colour, linewidth=1)
        face = colour if optimum.bracketed else "none"
        axes.plot(optimum.scale, optimum.loss, "*", markersize=13, markeredgecolor="black", markerfacecolor=face)
    axes.set(xscale="log", xlabel="M, non-embedding FLOPs per token", ylabel="bits per byte, validation")
    axes.set_title("IsoFLOP curves and their minima", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def plot_optima(path: Path, laws: Laws, held_out: float) -> None:
    """M_opt and D_opt against compute with their power laws and the 95 % band, out to the held-out compute."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    computes = np.geomspace(laws.optima[0].compute, held_out, 50)
    bands = [laws.scale_at(compute) for compute in computes]
    low, high = (np.array([getattr(band, end) for band in bands]) for end in ("low", "high"))
    panels = (
        ("M_opt, FLOPs per token", [o.scale for o in laws.optima], laws.scale, laws.scale_exponent, (low, high)),
        (
            "D_opt, tokens",
            [o.tokens for o in laws.optima],
            laws.tokens,
            laws.tokens_exponent,
            (computes / high, computes / low),
        ),
    )
    for axes, (label, values, law, exponent, band) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.fill_between(computes, *band, alpha=0.2)
        axes.plot(computes, [law.at(compute) for compute in computes], linewidth=1)
        axes.plot([o.compute for o in laws.optima], values, "o", color="black", markersize=4)
        axes.axvline(held_out, color="gray", linestyle=":")
        axes.set(xscale="log", yscale="log", ylabel=label)
        _compute_ticks(axes, [*(o.compute for o in laws.optima), held_out])
        axes.set_title(f"∝ C^{exponent.value:.3f} [{exponent.low:.3f}, {exponent.high:.3f}]", fontsize=10)
    figure.savefig(path, dpi=110)


def plot_grids(path: Path, grids: Sequence[Grid]) -> None:
    """Loss over the budget's best, in per cent, by learning rate and batch; near-optimal settings have a frame."""
    figure = Figure(figsize=(1 + 3.4 * len(grids), 3.6), layout="constrained")
    for axes, grid in zip(figure.subplots(1, len(grids), squeeze=False)[0], grids, strict=True):
        rates, batches = np.unique(grid.rates_G), np.unique(grid.batches_G)
        places = np.searchsorted(rates, grid.rates_G), np.searchsorted(batches, grid.batches_G)
        worse_RB = np.full((len(rates), len(batches)), np.nan)
        worse_RB[places] = 100 * (grid.losses_G / grid.losses_G.min() - 1)
        shown = np.where(np.isfinite(worse_RB), worse_RB, np.nan)
        axes.imshow(
            shown, origin="lower", cmap="viridis_r", vmin=0, vmax=min(20.0, np.nanmax(shown) or 1.0), aspect="auto"
        )
        for row, column, near in zip(*places, near_optimal(grid.losses_G), strict=True):
            value = worse_RB[row, column]
            text = f"+{value:.1f} %" if np.isfinite(value) else "diverged"
            style = {"boxstyle": "round", "facecolor": "white", "edgecolor": "red" if near else "none", "alpha": 0.8}
            axes.text(column, row, text, ha="center", va="center", fontsize=8, bbox=style)
        axes.set_xticks(range(len(batches)), [f"{batch:.0f}" for batch in batches])
        axes.set_yticks(range(len(rates)), [f"{rate:.1e}" for rate in rates])
        axes.set(xlabel="B, tokens", ylabel="peak learning rate")
        axes.set_title(f"C = {grid.compute:.1e}, best {grid.losses_G.min():.3f}", fontsize=10)
    figure.savefig(path, dpi=110)


def plot_held_out(path: Path, ladder: Sequence[IsoFlop], laws: Laws, compute: float, measured: float) -> None:
    """The loss at the optimum against compute, its law with the 95 % band, and the run that the law did not see."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    computes = np.geomspace(laws.optima[0].compute, compute, 50)
    bands = [laws.loss_at(each, of_a_run=False) for each in computes]
    axes.fill_between(computes, [b.low for b in bands], [b.high for b in bands], alpha=0.2, label="95 % of the law")
    axes.plot(computes, [b.value for b in bands], linewidth=1, label="E + A·C^−γ")
    for budget in ladder:
        axes.plot(np.full(len(budget.losses_S), budget.compute), budget.losses_S, ".", color="gray", markersize=4)
    axes.plot([o.compute for o in laws.optima], [o.loss for o in laws.optima], "o", color="black", label="optima")
    predicted = laws.loss_at(compute)
    around = [[predicted.value - predicted.low], [predicted.high - predicted.value]]
    axes.errorbar([compute], [predicted.value], around, fmt="_", capsize=4, label="predicted run, 95 %")
    axes.plot([compute], [measured], "*", color="tab:red", markersize=12, label="measured")
    axes.set(xscale="log", ylabel="bits per byte, validation")
    _compute_ticks(axes, [*(o.compute for o in laws.optima), compute])
    axes.set_title("the held-out run", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def _compute_ticks(axes: Axes, computes: Sequence[float]) -> None:
    """Ticks where something was run, rather than at powers of ten of which there may be one."""
    axes.set_xticks(computes, [f"{compute:.1e}" for compute in computes], rotation=30)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("C, FLOPs")
