"""Programs that a sandbox must not stand in the way of."""

from __future__ import annotations

LEGAL: dict[str, tuple[str, str, str, str]] = {  # program, stdin, stdout, backends that cannot do it
    "arithmetic": ("print(sum(i * i for i in range(1000)))", "", "332833500\n", ""),
    "a function": ("def f(n):\n    return n if n < 2 else f(n - 1) + f(n - 2)\nprint(f(15))", "", "610\n", ""),
    "unicode": ("print('深度求索', 'naïve', '🙂')", "", "深度求索 naïve 🙂\n", ""),
    "a caught exception": ("try:\n    1 / 0\nexcept ZeroDivisionError:\n    print('caught')", "", "caught\n", ""),
    "large but allowed output": ("print('x' * 60000)", "", "x" * 60000 + "\n", ""),
    "a big integer": ("print(2 ** 4000 % 1000007)", "", f"{2**4000 % 1000007}\n", ""),
    "lines of input": ("n = int(input())\nprint(sum(int(input()) for _ in range(n)))", "3\n1\n2\n3\n", "6\n", "monty"),
    "much input": ("import sys\nprint(len(sys.stdin.read()))", "深" * 300000, "300000\n", "monty"),
    "input that is not read": ("print(1)", "x" * 3000000, "1\n", "monty"),
    "the standard library": (
        "import bisect, collections, datetime, fractions, functools, heapq, itertools, json, math, random, re, string\n"
        "print(math.gcd(12, 18), collections.Counter('aab')['a'], re.sub('a', 'b', 'aa'), fractions.Fraction(2, 4))",
        "",
        "6 2 bb 1/2\n",
        "monty",
    ),
    "inheritance and dataclasses": (
        "import dataclasses\n@dataclasses.dataclass\nclass A:\n    x: int\nclass B(A):\n    pass\nprint(B(3).x)",
        "",
        "3\n",
        "monty",
    ),
    "recursion": (
        "import sys\nsys.setrecursionlimit(3000)\ndef f(n): return n and 1 + f(n - 1)\nprint(f(2500))",
        "",
        "2500\n",
        "monty",
    ),
    "an end of its own choice": ("import sys\nprint(1)\nsys.exit()", "", "1\n", "monty"),
    "files of its own": ("open('a', 'w').write('x')\nprint(open('a').read())", "", "x\n", "wasm monty"),
    "threads": (
        "from concurrent.futures import ThreadPoolExecutor\nprint(sum(ThreadPoolExecutor(4).map(abs, [-1, -2])))",
        "",
        "3\n",
        "wasm monty",
    ),
    "asyncio": ("import asyncio\nasyncio.run(asyncio.sleep(0.01))\nprint(1)", "", "1\n", "wasm"),
    "a temporary folder": (
        "import tempfile\nwith tempfile.TemporaryDirectory() as t: print(len(t) > 4)",
        "",
        "True\n",
        "wasm monty",
    ),
}  # fmt: skip
