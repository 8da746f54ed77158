"""Exact value of a small arithmetic expression written by a model: hostile text, so no `eval` anywhere.

Grammar: unsigned integers, `+ - * /`, parentheses. No powers, no names, no unary signs. Length, digits and nesting
are bounded before any arithmetic happens, so the cost of judging one answer is bounded too.
"""

from __future__ import annotations

import dataclasses
from fractions import Fraction

MAX_LENGTH = 80
MAX_DIGITS = 6
MAX_DEPTH = 8
# What a Chinese writer types for the same signs.
SAME_SIGN = str.maketrans("＋－−×＊÷／（）０１２３４５６７８９", "+--**//()0123456789")
DIGITS = "0123456789"


class ExpressionError(ValueError):
    """The text lies outside the grammar, its bounds, or divides by zero."""


@dataclasses.dataclass(frozen=True)
class Value:
    value: Fraction
    numbers: tuple[int, ...]  # the literals, in reading order


def evaluate(text: str) -> Value:
    """The exact value of `text` and the integers it uses; raises `ExpressionError`."""
    if len(text) > MAX_LENGTH:
        raise ExpressionError("too long")
    reader = _Reader(text.translate(SAME_SIGN).replace(" ", ""))
    value = reader.sum(depth=0)
    if reader.position != len(reader.text):
        raise ExpressionError(f"unexpected {reader.peek()!r}")
    return Value(value, tuple(reader.numbers))


class _Reader:
    """Recursive descent over one line; `depth` counts open parentheses."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.numbers: list[int] = []

    def peek(self) -> str:
        return self.text[self.position : self.position + 1]

    def take(self) -> str:
        sign = self.peek()
        self.position += 1
        return sign

    def sum(self, depth: int) -> Fraction:
        value = self.product(depth)
        while self.peek() and self.peek() in "+-":
            value = value + self.product(depth) if self.take() == "+" else value - self.product(depth)
        return value

    def product(self, depth: int) -> Fraction:
        value = self.atom(depth)
        while self.peek() and self.peek() in "*/":
            sign, right = self.take(), self.atom(depth)
            if sign == "/" and right == 0:
                raise ExpressionError("division by zero")
            value = value * right if sign == "*" else value / right
        return value

    def atom(self, depth: int) -> Fraction:
        if self.peek() == "(":
            if depth == MAX_DEPTH:
                raise ExpressionError("nested too deep")
            self.take()
            value = self.sum(depth + 1)
            if self.take() != ")":
                raise ExpressionError("parenthesis not closed")
            return value
        start = self.position
        while self.peek() and self.peek() in DIGITS:
            self.take()
        if not 0 < self.position - start <= MAX_DIGITS:
            raise ExpressionError(f"number expected at {start}")
        self.numbers.append(int(self.text[start : self.position]))
        return Fraction(self.numbers[-1])
