"""Every kernel against its anchors on one GPU, each area in a process of its own with a time limit: a kernel that hangs
costs its area, not the machine.

    python -m benchmarks.kernels [AREA …] [--out FOLDER]

Anchors that are not installed are left out: DeepGEMM (built beside the project, on PYTHONPATH) and Liger. Prints time,
speed and the ratio to every anchor, writes results/AREA.json, and draws a roofline of the products.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.kernels import attention, loss, memory, products, roofline

AREAS: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
    **products.AREAS,
    "memory": memory.memory,
    "loss": loss.loss,
    **attention.AREAS,
}
SECONDS = 240  # of an area, the kernels' compilation included


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("areas", nargs="*", default=list(AREAS), help=f"of {', '.join(AREAS)}")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--commit", help="of the tree, where it is no checkout")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if unknown := set(arguments.areas) - set(AREAS):
        parser.error(f"no area {', '.join(sorted(unknown))}: give some of {', '.join(AREAS)}")
    if arguments.one:
        for area in arguments.areas:
            rows = list(AREAS[area]())
            path = arguments.out / f"{area}.json"
            record.write(path, f"python -m benchmarks.kernels {area}", rows, arguments.commit)
            roofline.plot(path)
        return 0
    failed = []
    for area in arguments.areas:
        command = [sys.executable, "-m", "benchmarks.kernels", area, "--one", "--out", str(arguments.out)]
        command += ["--commit", arguments.commit] if arguments.commit else []
        try:
            if subprocess.run(command, timeout=SECONDS).returncode:
                failed.append(area)
        except subprocess.TimeoutExpired:
            failed.append(f"{area} (longer than {SECONDS} s)")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
