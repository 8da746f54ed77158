"""Small programming tasks: write a function of a list of integers or of a string, told as steps in plain words.

A task is drawn as steps, each with its words in both languages, its line of Python, and what it does, so the tests come
from our own steps and never from text that is run here. The chain says the line of each step; the answer is the
function.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from random import Random
from typing import Any

from stages.problems.family import Family, Numbers, Written
from stages.problems.problem import Language

N_TESTS, LEAST_ANSWERS = 8, 4


@dataclasses.dataclass(frozen=True)
class Step:
    """`en` and `zh` say it, `line` is its Python (`x`: what came before, `{k}`: a number), `act` does it."""

    en: str
    zh: str
    line: str
    act: Callable[[Any, int], Any]


LIST_STEPS = {
    "add": Step("add {k} to each", "每个加{k}", "[n + {k} for n in x]", lambda x, k: [n + k for n in x]),
    "times": Step("multiply each by {k}", "每个乘{k}", "[n * {k} for n in x]", lambda x, k: [n * k for n in x]),
    "above": Step(
        "keep those above {k}", "留下大于{k}的", "[n for n in x if n > {k}]", lambda x, k: [n for n in x if n > k]
    ),
    "even": Step(
        "keep the even ones", "留下偶数", "[n for n in x if n % 2 == 0]", lambda x, k: [n for n in x if n % 2 == 0]
    ),
    "odd": Step("keep the odd ones", "留下奇数", "[n for n in x if n % 2]", lambda x, k: [n for n in x if n % 2]),
    "reverse": Step("reverse the order", "倒过来", "x[::-1]", lambda x, k: x[::-1]),
    "sort": Step("sort from small to large", "从小到大排", "sorted(x)", lambda x, k: sorted(x)),
    "drop": Step("drop the first {k}", "去掉前{k}个", "x[{k}:]", lambda x, k: x[k:]),
    "once": Step(
        "keep the first of equal ones", "去掉重复", "list(dict.fromkeys(x))", lambda x, k: list(dict.fromkeys(x))
    ),
}
LIST_ENDS = {
    "list": Step("return the list", "返回列表", "x", lambda x, k: x),
    "sum": Step("return the sum", "返回总和", "sum(x)", lambda x, k: sum(x)),
    "count": Step("return how many", "返回个数", "len(x)", lambda x, k: len(x)),
    "largest": Step(
        "return the largest, 0 if none", "返回最大的，没有则0", "max(x, default=0)", lambda x, k: max(x, default=0)
    ),
}
TEXT_STEPS = {
    "upper": Step("make it upper case", "变成大写", "x.upper()", lambda x, k: x.upper()),
    "reverse": Step("reverse it", "倒过来", "x[::-1]", lambda x, k: x[::-1]),
    "drop": Step("drop its first {k} letters", "去掉前{k}个字母", "x[{k}:]", lambda x, k: x[k:]),
    "twice": Step("repeat it {k} times", "重复{k}遍", "x * {k}", lambda x, k: x * k),
    "no_vowels": Step(
        "remove a, e, i, o, u", "删去a、e、i、o、u", '"".join(c for c in x if c not in "aeiou")',
        lambda x, k: "".join(c for c in x if c not in "aeiou"),
    ),
    "sort": Step("sort its letters", "字母排序", '"".join(sorted(x))', lambda x, k: "".join(sorted(x))),
}  # fmt: skip
TEXT_ENDS = {
    "text": Step("return it", "返回结果", "x", lambda x, k: x),
    "length": Step("return its length", "返回长度", "len(x)", lambda x, k: len(x)),
    "letters": Step("return how many different letters", "返回不同字母的个数", "len(set(x))", lambda x, k: len(set(x))),
}
KINDS = {"list": (LIST_STEPS, LIST_ENDS), "text": (TEXT_STEPS, TEXT_ENDS)}
LEVELS = {1: 1, 2: 2, 3: 3}  # level -> steps before the last


def draw(rng: Random, level: int) -> Numbers:
    """A task whose tests have at least LEAST_ANSWERS different answers: a constant shall not pass for a function."""
    while True:
        kind = rng.choice(("list", "list", "text"))
        steps, ends = KINDS[kind]
        chosen = [(name, rng.randint(2, 4)) for name in rng.sample(sorted(steps), LEVELS[level])]
        given = [example(rng, kind, size) for size in range(N_TESTS)]
        numbers = {"kind": kind, "steps": chosen, "end": rng.choice(sorted(ends)), "given": given}
        if len({str(reference(numbers, each)) for each in given}) >= LEAST_ANSWERS:
            return numbers


def example(rng: Random, kind: str, size: int) -> list[int] | str:
    """An input; the first is empty, for that is where programs break."""
    if kind == "text":
        return "".join(rng.choice("aabcdeeghikloorstu") for _ in range(size))
    return [rng.randint(-9, 9) for _ in range(size)]


def told(numbers: Numbers) -> list[tuple[Step, int]]:
    steps, ends = KINDS[numbers["kind"]]
    return [*((steps[name], k) for name, k in numbers["steps"]), (ends[numbers["end"]], 0)]


def reference(numbers: Numbers, given: list[int] | str) -> Any:
    """What the function must return."""
    value: Any = given
    for step, k in told(numbers):
        value = step.act(value, k)
    return value


def write(numbers: Numbers, language: Language, rng: Random) -> Written:
    steps = told(numbers)
    words = [(step.en if language == "en" else step.zh).format(k=k) for step, k in steps]
    lines = [step.line.format(k=k) for step, k in steps]
    if language == "en":
        what = {"list": "a list x of integers", "text": "a text x of small letters"}[numbers["kind"]]
        question = f"Write a Python function f of {what}: {', '.join(words[:-1])}, then {words[-1]}."
        chain = "; ".join(f"{said}: {line}" for said, line in zip(words, lines, strict=True))
    else:
        what = {"list": "整数列表x", "text": "小写字母串x"}[numbers["kind"]]
        question = f"写Python函数f，参数为{what}：{'，'.join(words[:-1])}，然后{words[-1]}。"
        chain = "；".join(f"{said}：{line}" for said, line in zip(words, lines, strict=True))
    body = [f"    x = {line}" for line in lines[:-1]] + [f"    return {lines[-1]}"]
    calls = [[[given], reference(numbers, given)] for given in numbers["given"]]
    return Written(question, chain, "\n".join(["def f(x):", *body]), {"function": "f", "calls": calls})


def content(numbers: Numbers) -> str:
    """The task without its tests: the same steps with other numbers in them are another task."""
    steps = ",".join(
        f"{name}{k if '{k}' in KINDS[numbers['kind']][0][name].line else ''}" for name, k in numbers["steps"]
    )
    return f"{numbers['kind']}:{steps},{numbers['end']}"


FUNCTIONS = Family("functions", "code", len(LEVELS), draw, write, content)
