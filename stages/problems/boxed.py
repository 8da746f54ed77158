r"""Answers in LaTeX or plain text, as maths sets with `\boxed{…}` have them, against a gold answer.

A gold answer that is a number is compared exactly, in microseconds, and only with an answer that is written as one:
`17 \cdot 24` is no answer to 17 times 24, though a computer algebra system calls it equal. Everything else (surds,
intervals, sets, polynomials) is left to math-verify, which would also take an answer that restates the question.

The answer is the last `\boxed{…}` with balanced braces, or the whole text; nothing is searched in prose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fractions import Fraction
from importlib.util import find_spec
from typing import Any

from infra.errors import ConfigError
from stages.problems.problem import Problem
from stages.problems.symbolic import equivalent

_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|(?P<open>\{)|(?P<close>\})", re.DOTALL)
# Full-width ASCII, and the other signs of Chinese writers and of Unicode, in LaTeX's own spelling.
_SIGNS = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)} | str.maketrans(
    {"、": ",", "。": ".", "\u3000": " ", "−": "-", "–": "-", "×": "*", "÷": "/", "°": r"^\circ "}
    | {"π": r"\pi ", "∞": r"\infty ", "≤": r"\le ", "≥": r"\ge ", "∪": r"\cup ", "±": r"\pm "}
)
_TRIFLES = re.compile(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[!,;: ]|~")  # they change the looks alone
_MATH = re.compile(r"\$\$(.*)\$\$|\$(.*)\$|\\\((.*)\\\)|\\\[(.*)\\\]", re.DOTALL)
_FRACTION = re.compile(r"\\[dt]?frac *\{([^{}]*)\} *\{([^{}]*)\}")
NESTED = 4  # fractions in fractions that are read
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"
_NUMBER = re.compile(
    rf"""(?:[a-zA-Z]=)?(?P<sign>[+-]?)(?:\\\$)?
    (?: (?P<decimal>{_INTEGER}(?:\.[0-9]+)?|\.[0-9]+)
      | (?:(?P<whole>[0-9]+)\ ?)?\\frac\{{(?P<minus>-?)(?P<over>{_INTEGER})\}}\{{(?P<under>{_INTEGER})\}}
      | (?:(?P<wholes>[0-9]+)\ )?(?P<top>{_INTEGER})/(?P<bottom>{_INTEGER})
    )
    (?P<percent>\\?%)?(?:\\(?:text|textrm|mathrm|mbox)\{{[^{{}}]*\}}|\^\{{?\\circ\}}?)?""",
    re.VERBOSE,
)


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{…}` whose braces balance, the innermost of nested ones; None without any."""
    boxes = _boxes(text)[0]
    return text[slice(*max(boxes))] if boxes else None


def cut(text: str) -> str:
    """The content of the last box, or the whole text."""
    box = last_box(text)
    return text if box is None else box


def plain(text: str) -> str:
    r"""Simple LaTeX as the verifiers of our families read it: `\text{knight}`, `3 \times \frac{8}{2}`."""
    text = re.sub(r"\\(?:left|right)(?![a-zA-Z])|\\!", "", text)
    text = re.sub(r"\\[,;: ]|\\q?quad(?![a-zA-Z])|~", " ", text)
    text = re.sub(r"\\(?:text|textbf|textrm|mathrm|mathbf|mbox) *\{([^{}]*)\}", r"\1", text)
    for _ in range(NESTED):
        text = _FRACTION.sub(r"((\1)/(\2))", text)
    return re.sub(r"\\(?:times|cdot)(?![a-zA-Z])", "*", re.sub(r"\\div(?![a-zA-Z])", "/", text))


def _boxes(text: str) -> tuple[list[tuple[int, int]], bool]:
    """(where the contents of the closed boxes begin and end, whether every brace has its partner), in one pass."""
    boxes: list[tuple[int, int]] = []
    stack: list[int | None] = []
    balanced = True
    for match in _BRACE.finditer(text):
        if match["box"] or match["open"]:
            stack.append(match.end() if match["box"] else None)
        elif match["close"]:
            balanced = balanced and bool(stack)
            start = stack.pop() if stack else None
            if start is not None:
                boxes.append((start, match.start()))
    return boxes, balanced and not stack


def tidy(text: str) -> str:
    """One spelling for the many of the same answer: signs, spaces, math delimiters, a full stop at the end."""
    text = _TRIFLES.sub("", text.translate(_SIGNS)).strip().removesuffix(".").strip()
    if wrapped := _MATH.fullmatch(text):
        text = next(group for group in wrapped.groups() if group is not None)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\frac *([0-9]) *([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"√\{?([0-9]+)\}?", r"\\sqrt{\1}", text)
    return " ".join(text.split())


def readings(text: str) -> frozenset[Fraction]:
    """The exact values of a tidy text that is one number, a fraction or a mixed number, maybe with its unit.

    50 % may be meant as 50 or as 1/2, so it has two values; text that is no such number has none.
    """
    # A space between digits is kept, and one behind a comma: `12, 345` is two numbers.
    match = _NUMBER.fullmatch(re.sub(r"(?<![0-9,]) +| +(?![0-9])", "", text))
    if match is None:
        return frozenset()
    top, bottom = match["over"] or match["top"], match["under"] or match["bottom"]
    if top is None:
        value = Fraction(match["decimal"].replace(",", ""))
    elif int(bottom.replace(",", "")) == 0:
        return frozenset()
    else:
        value = Fraction(int(top.replace(",", "")), int(bottom.replace(",", "")))
        value += int(match["whole"] or match["wholes"] or 0)
    if (match["sign"] == "-") != (match["minus"] == "-"):
        value = -value
    return frozenset({value, value / 100} if match["percent"] else {value})


def boxed(text: str, arguments: Mapping[str, Any]) -> bool:
    """Whether `text`, as `cut` cuts it out, is the gold answer `arguments["value"]` in any spelling of it."""
    gold, said = tidy(str(arguments["value"])), tidy(text)
    if said == gold:
        return bool(said)
    if values := readings(gold):
        return not values.isdisjoint(readings(said))
    # What could close the frame that math-verify reads from, and offer it several answers, is no answer.
    return _boxes(said)[1] and not re.search(r"\$|\\boxed|\\fbox|\\[()\[\]]", said) and equivalent(gold, said)


def require(problems: Iterable[Problem]) -> None:
    """Raise `ConfigError` if a problem needs math-verify and it is not installed."""
    if find_spec("math_verify") is None:
        for problem in problems:
            if problem.verifier == "boxed" and not readings(tidy(str(problem.arguments["value"]))):
                raise ConfigError(
                    f"{problem.id}: judging answers like {problem.answer!r} needs math-verify; "
                    "pip install 'fathom-line[math]', or leave out problems whose answers are not numbers"
                )
