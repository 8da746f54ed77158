"""The program of `symbolic.Comparer`'s process: a JSON pair [gold, said] a line in, 1 or 0 a line out.

It is run by its path and imports nothing of ours. LaTeX alone is read: math-verify's other reader hands text to
sympy's `parse_expr`, which is `eval`.
"""

from __future__ import annotations

import json
import logging
import signal
import sys

MEMORY = 2 << 30  # bytes: a formula that wants more is a bomb


def main() -> None:
    out, sys.stdout = sys.stdout, sys.stderr  # nothing but answers goes to the caller
    logging.disable(logging.CRITICAL)
    from math_verify import LatexExtractionConfig, parse, verify

    def read(text: str) -> list:
        reader = [LatexExtractionConfig()]
        return parse(f"\\boxed{{{text}}}", reader, fallback_mode="no_fallback", parsing_timeout=None)

    print("ready", file=out, flush=True)
    # The caller kills us at the limit. The alarm is for when it was killed itself meanwhile; where there is no alarm,
    # the process ends with its formula.
    alarm = getattr(signal, "alarm", lambda seconds: None)
    for line in sys.stdin:
        alarm(int(float(sys.argv[1])) + 2)
        try:
            gold, said = (read(text) for text in json.loads(line))
            right = verify(gold, said, timeout_seconds=None)
        except Exception:  # whatever a formula breaks in there, it is not shown to be right
            right = False
        alarm(0)
        print(int(right), file=out, flush=True)


if __name__ == "__main__":
    try:
        import resource
    except ImportError:  # not a POSIX system
        pass
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        if hard == resource.RLIM_INFINITY or hard > MEMORY:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    main()
