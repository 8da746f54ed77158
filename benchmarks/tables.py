"""Writes the benchmark tables of DOCUMENTS anew from the kept results, so that no figure there is typed by hand.

    python benchmarks/tables.py            rewrite them
    python benchmarks/tables.py --check    exit 1 if one would change

A table stands between `<!-- results: AREA/NAME -->` and `<!-- end of results -->` and shows
benchmarks/AREA/results/NAME.json: a row a case and metric, ours, and our ratio to every anchor.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (ROOT / "README.md", ROOT / "benchmarks/kernels/README.md")
TABLE = re.compile(r"(<!-- results: (\w+)/(\w+) -->\n).*?(<!-- end of results -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    """The rows of a result as Markdown, and what they were measured on and with."""
    anchors = list(dict.fromkeys(name for row in result["rows"] for name in row["anchors"]))
    header = ["case", "metric", "Fathom", *(f"× {name.replace('_', ' ')}" for name in anchors)]
    lines = [header, ["-"] * len(header)]
    for row in result["rows"]:
        ratios = [ratio(row["ours"], row["anchors"].get(name)) for name in anchors]
        lines.append([row["case"], row["metric"].replace("_", " "), figure(row["ours"]), *ratios])
    body = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    commit = (result["commit"] or "unknown")[:7]
    return f"{body}\n\n{result['device']}, commit {commit}: `{result['command']}`\n"


def ratio(ours: float, anchor: float | None) -> str:
    return "" if anchor is None else f"{ours / anchor:.2f} ({figure(anchor)})"


def figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def rewritten(text: str) -> str:
    def fresh(match: re.Match[str]) -> str:
        path = ROOT / "benchmarks" / match[2] / "results" / f"{match[3]}.json"
        return match[1] + "\n" + table(json.loads(path.read_text())) + "\n" + match[4]

    return TABLE.sub(fresh, text)


def main() -> int:
    texts = {document: document.read_text() for document in DOCUMENTS}
    changed = {document: new for document, text in texts.items() if (new := rewritten(text)) != text}
    if "--check" in sys.argv[1:]:
        return int(bool(changed))
    for document, new in changed.items():
        document.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
