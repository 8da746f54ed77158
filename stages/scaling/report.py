"""What a ladder found, as a summary, as JSON and as a page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from infra.artifact import Scalar
from stages.scaling import published
from stages.scaling.hyper import Grid, HyperLaws
from stages.scaling.isoflop import IsoFlop, Laws, fit_laws
from stages.scaling.laws import Estimate, PowerLaw, near_optimal
from stages.scaling.parametric import Parametric

SYNTHETIC_NOISE = 0.003


@dataclass(frozen=True)
class Findings:
    """Everything measured and fitted; `held_out` is the row of the run that no law saw."""

    ladder: tuple[IsoFlop, ...]
    laws: Laws
    grids: tuple[Grid, ...]
    hyper: HyperLaws | None  # None without a grid
    parametric: Parametric
    held_out: dict[str, Any]
    rows: tuple[dict[str, Any], ...]
    most_epochs: float  # of the run that reads the most tokens

    @property
    def predicted(self) -> Estimate:
        return self.laws.loss_at(self.held_out["compute"])

    @property
    def relative_error(self) -> float:
        """Of the prediction: positive where the run came out better than predicted."""
        return self.predicted.value / self.held_out["bits_per_byte"] - 1


def summarize(found: Findings) -> dict[str, Scalar]:
    """The scalars of the artifact, the most important first."""
    predicted, measured = found.predicted, found.held_out["bits_per_byte"]
    summary: dict[str, Scalar] = {
        "held_out_relative_error": round(found.relative_error, 5),
        "held_out_inside": measured in predicted,
        "held_out_measured": round(measured, 4),
        **_flat("held_out_predicted", predicted),
        **_flat("scale_exponent", found.laws.scale_exponent),
        **_flat("tokens_exponent", found.laws.tokens_exponent),
    }
    if found.hyper:
        summary |= _flat("rate_exponent", found.hyper.rate_exponent)
        summary |= _flat("batch_exponent", found.hyper.batch_exponent)
    summary |= _flat("loss_exponent", found.laws.loss_exponent)
    return summary | {
        "loss_offset": round(found.laws.loss.E, 4),
        "parametric_scale_exponent": round(found.parametric.scale_exponent, 4),
        "run_noise": round(found.laws.noise, 5),
        "budgets": len(found.ladder),
        "budgets_bracketed": sum(optimum.bracketed for optimum in found.laws.optima),
        "points": len(found.rows),
        "most_epochs": round(found.most_epochs, 2),
        "train_flops": float(sum(row["train_flops"] for row in found.rows)),
    }


def content(found: Findings) -> dict[str, Any]:
    """All figures of the page, for machines."""
    laws, synthetic = found.laws, _synthetic()
    return {
        "held_out": {
            **{"run": found.held_out, "predicted": asdict(found.predicted), "relative_error": found.relative_error},
            "inside": found.held_out["bits_per_byte"] in found.predicted,
            "predicted_by_parametric": found.parametric.at(found.held_out["scale"], found.held_out["tokens"]),
        },
        "optima": [asdict(optimum) for optimum in laws.optima],
        "laws": {
            "scale": {**asdict(laws.scale), "exponent": asdict(laws.scale_exponent)},
            "tokens": {**asdict(laws.tokens), "exponent": asdict(laws.tokens_exponent)},
            "loss": {**asdict(laws.loss), "exponent": asdict(laws.loss_exponent), "offset": asdict(laws.loss_offset)},
            "hyper": found.hyper and asdict(found.hyper),
            "parametric": {**asdict(found.parametric), "scale_exponent": found.parametric.scale_exponent},
        },
        "run_noise": laws.noise,
        "most_epochs": found.most_epochs,
        "published": {
            "settings": [asdict(setting) for setting in published.settings()],
            "exponents_by_data": published.BY_DATA,
            "synthetic": {"noise": SYNTHETIC_NOISE, "scale_exponent": asdict(synthetic), "truth": published.SCALE.b},
        },
    }


def markdown(found: Findings) -> str:
    """The page."""
    return "\n".join([*_held_out(found), *_laws(found), *_optima(found), *_grids(found), *_published()]) + "\n"


def _held_out(found: Findings) -> list[str]:
    run, predicted, scale = found.held_out, found.predicted, found.laws.scale_at(found.held_out["compute"])
    verdict = "inside" if run["bits_per_byte"] in predicted else "**outside**"
    largest = found.ladder[-1].compute
    return [
        "# Scaling laws",
        "",
        f"A run of {run['compute']:.3g} FLOPs, {run['compute'] / largest:.3g} × the largest budget of the ladder, was "
        f"predicted to reach **{predicted.value:.4f}** bits per byte of validation text, 95 % prediction interval "
        f"{predicted.low:.4f}–{predicted.high:.4f}. It reached **{run['bits_per_byte']:.4f}**: the prediction is "
        f"{found.relative_error:+.2%} off, and the run is {verdict} the interval. The parametric fit gives "
        f"{found.parametric.at(run['scale'], run['tokens']):.4f}.",
        "",
        f"Its scale M was predicted as {_interval(scale, '.3g')} FLOPs per token and run at {run['scale']:.3g} "
        f"(depth {run['n_layers']}, width {run['d_model']}), learning rate {run['peak']:.2e}, batch "
        f"{run['batch_tokens']} tokens, {run['steps']} steps.",
        "",
    ]


def _laws(found: Findings) -> list[str]:
    laws, hyper = found.laws, found.hyper
    rows: list[tuple[str, PowerLaw, Estimate, PowerLaw]] = [
        ("M_opt", laws.scale, laws.scale_exponent, published.SCALE),
        ("D_opt", laws.tokens, laws.tokens_exponent, published.TOKENS),
    ]
    if hyper:
        rows.append(("η_opt", hyper.rate, hyper.rate_exponent, published.RATE))
        rows.append(("B_opt", hyper.batch, hyper.batch_exponent, published.BATCH))
    lines = ["| law a·C^b | a | b | 95 % interval | b of DeepSeek LLM |", "|-|-|-|-|-|"]
    for name, law, exponent, theirs in rows:
        interval = "not varied" if exponent.low is None else f"{exponent.low:.3f} to {exponent.high:.3f}"
        lines.append(f"| {name} | {law.a:.4g} | {law.b:.4f} | {interval} | {theirs.b} |")
    loss = laws.loss
    return [
        *lines,
        "",
        f"Loss at the optimum: {loss.E:.4f} + {loss.A:.4g}·C^−{loss.gamma:.4f} (exponent "
        f"{_interval(laws.loss_exponent, '.3f')}, offset {_interval(laws.loss_offset, '.3f')}). "
        f"Parametric fit: M_opt ∝ C^{found.parametric.scale_exponent:.4f}. The noise of one run is {laws.noise:.2%} of "
        "its loss. Intervals are a bootstrap of that noise; they presume that the forms hold.",
        "",
        f"{len(found.rows)} runs. The one that reads the most tokens reads the training text {found.most_epochs:.2f} "
        "times. Exponents differ with data, tokenizer and shapes (DeepSeek LLM, table 4): theirs stand beside ours for "
        "orientation, not as a target.",
        "",
    ]


def _optima(found: Findings) -> list[str]:
    lines = ["| C | M_opt | D_opt | bits per byte | minimum inside the scales |", "|-|-|-|-|-|"]
    for optimum in found.laws.optima:
        inside = "yes" if optimum.bracketed else "no: an end of the range stands in"
        lines.append(
            f"| {optimum.compute:.3g} | {optimum.scale:.3g} | {optimum.tokens:.3g} | {optimum.loss:.4f} | {inside} |"
        )
    return [*lines, ""]


def _grids(found: Findings) -> list[str]:
    if not found.grids:
        return []
    lines = ["| C of a grid | η near-optimal | B near-optimal, tokens | at the grid's edge |", "|-|-|-|-|"]
    for grid in found.grids:
        near_G = near_optimal(grid.losses_G)
        rates = ", ".join(f"{rate:.2e}" for rate in np.unique(grid.rates_G[near_G]))
        batches = ", ".join(f"{batch:.3g}" for batch in np.unique(grid.batches_G[near_G]))
        lines.append(f"| {grid.compute:.3g} | {rates} | {batches} | {', '.join(grid.edges) or 'no'} |")
    return [*lines, ""]


def _published() -> list[str]:
    lines = [
        "## Against what DeepSeek LLM publishes",
        "",
        "The paper publishes formulas and settings, not the runs behind them. The formulas at the two models' C = M·D, "
        "M counted from their shapes:",
        "",
        "| model | C | η | η by formula | B, tokens | B by formula |",
        "|-|-|-|-|-|-|",
    ]
    for s in published.settings():
        rate_error, batch_error = s.rate_by_formula / s.rate - 1, s.batch_by_formula / s.batch - 1
        lines.append(
            f"| {s.name} | {s.compute:.3g} | {s.rate:.2e} | {s.rate_by_formula:.2e} ({rate_error:+.1%}) "
            f"| {s.batch:.3g} | {s.batch_by_formula:.3g} ({batch_error:+.1%}) |"
        )
    synthetic = _synthetic()
    return [
        *lines,
        "",
        f"The same fits on synthetic points, drawn from the published M_opt with {SYNTHETIC_NOISE:.1%} noise, a loss "
        f"level and a curvature of our own: exponent {_interval(synthetic, '.4f')}, published {published.SCALE.b}. "
        "These points are not the paper's data.",
    ]


def _synthetic() -> Estimate:
    return fit_laws(published.synthetic_ladder(SYNTHETIC_NOISE, seed=0)).scale_exponent


def _interval(found: Estimate, form: str) -> str:
    return f"{found.value:{form}} ({found.low:{form}} to {found.high:{form}})"


def _flat(name: str, found: Estimate) -> dict[str, Scalar]:
    return {
        name: round(found.value, 4),
        f"{name}_low": None if found.low is None else round(found.low, 4),
        f"{name}_high": None if found.high is None else round(found.high, 4),
    }
