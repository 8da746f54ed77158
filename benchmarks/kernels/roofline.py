"""The products' speeds beside what the chip's datasheet allows: FLOP/s over FLOPs a byte of operands and result.

    python -m benchmarks.kernels.roofline

Draws results/AREA.png for every kept result whose rows say their intensity.
"""

from __future__ import annotations

import json
from pathlib import Path

from matplotlib.figure import Figure

FP8_PEAK = 1979.0  # TFLOP/s, dense, of an H100 or H200 SXM
BANDWIDTH = {"H200": 4.8, "H100": 3.35}  # TB/s


def plot(result: Path) -> None:
    """A point a case for us and for every anchor, under the two roofs."""
    found = json.loads(result.read_text())
    rows = [row for row in found["rows"] if "intensity" in row]
    bandwidth = next((speed for name, speed in BANDWIDTH.items() if name in found["device"]), None)
    if not rows or bandwidth is None:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    lowest, highest = (f(row["intensity"] for row in rows) for f in (min, max))
    roof = [lowest / 1.3, FP8_PEAK / bandwidth, max(highest * 1.3, FP8_PEAK / bandwidth * 1.3)]
    axes.plot(roof, [min(FP8_PEAK, bandwidth * x) for x in roof], color="black", linewidth=1, label="datasheet")
    for name, marker in (("ours", "o"), ("deepgemm", "x"), ("cublas_block", "+"), ("bf16", ".")):
        points = [
            (row["intensity"], row["ours"] if name == "ours" else row["anchors"][name])
            for row in rows
            if (name == "ours" and "bf16" not in row["anchors"]) or name in row["anchors"]
        ]
        if points:
            axes.plot(*zip(*points, strict=True), marker, label=name.replace("_", " "), linestyle="none")
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte of float8 operands and result", ylabel="TFLOP/s")
    axes.set(title=f"{result.stem}: {found['device'].rpartition('+ ')[2]}, commit {(found['commit'] or 'unknown')[:7]}")
    axes.grid(which="both", linewidth=0.3)
    figure.legend(loc="outside right upper")
    figure.savefig(result.with_suffix(".png"), dpi=110)
    print(result.with_suffix(".png"))


if __name__ == "__main__":
    for path in sorted((Path(__file__).parent / "results").glob("*.json")):
        plot(path)
