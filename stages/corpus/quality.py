"""A quality classifier taught without labels: fastText tells real text from the same text spoiled in six ways.

fastText needs words, so Chinese characters are set apart by spaces; with pairs of words as features this does as well
as a segmenter at a tenth of the time. One thread: with more, the same data give another model.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_AROUND_HAN = re.compile("(?<=[\u3400-\u9fff\uf900-\ufaff])|(?=[\u3400-\u9fff\uf900-\ufaff])")
_SPACE = re.compile(r"\s+")
REAL, SPOILED = "__label__real", "__label__spoiled"
PROBE = 1500  # characters that the classifier reads
NOISE = "�#@*~^|§¤¬±¶"
MENU = {
    "en": (
        "Home",
        "Login",
        "Register",
        "Contact us",
        "Next page",
        "Share",
        "Click here",
        "Read more",
        "All rights reserved",
    ),
    "zh": ("首页", "登录", "注册", "联系我们", "下一页", "分享", "点击这里", "阅读更多", "版权所有"),
}


def one_line(text: str) -> str:
    """Text as the classifier reads it: one line, lower case, Chinese characters apart, no label syntax."""
    text = text[:PROBE].lower().replace("__label__", " ")
    return " ".join(_AROUND_HAN.sub(" ", text).split())


def _pieces(text: str) -> tuple[list[str], str]:
    """Words and what joins them; Chinese is taken in runs of two characters."""
    if len(_HAN.findall(text)) > 0.3 * len(_SPACE.sub("", text)):
        bare = _SPACE.sub("", text)
        return [bare[i : i + 2] for i in range(0, len(bare), 2)], ""
    return text.split(), " "


def _shuffle(text: str, language: str, rng: Random) -> str:
    pieces, joint = _pieces(text)
    rng.shuffle(pieces)
    return joint.join(pieces)


def _repeat(text: str, language: str, rng: Random) -> str:
    pieces, joint = _pieces(text)
    start = rng.randrange(max(len(pieces) - 8, 1))
    return joint.join(pieces[start : start + rng.randint(3, 8)] * 12)


def _noise(text: str, language: str, rng: Random) -> str:
    return "".join(rng.choice(NOISE) if rng.random() < 0.12 else character for character in text)


def _menu(text: str, language: str, rng: Random) -> str:
    pieces, joint = _pieces(text)
    parts = []
    for start in range(0, len(pieces), 12):
        parts += [
            rng.choice(MENU[language]),
            " | ",
            rng.choice(MENU[language]),
            " ",
            joint.join(pieces[start : start + 5]),
        ]
    return " ".join(parts)


def _keywords(text: str, language: str, rng: Random) -> str:
    pieces, _ = _pieces(text)
    return ("，" if language == "zh" else ", ").join(rng.sample(pieces, max(len(pieces) // 2, 1)))


def _scraps(text: str, language: str, rng: Random) -> str:
    pieces, joint = _pieces(text)
    starts = [rng.randrange(len(pieces)) for _ in range(max(len(pieces) // 4, 4))]
    return " ".join(joint.join(pieces[start : start + 3]) + "..." for start in starts)


SPOIL: Mapping[str, Callable[[str, str, Random], str]] = {
    "shuffled": _shuffle,
    "repeated": _repeat,
    "noise": _noise,
    "menu": _menu,
    "keywords": _keywords,
    "scraps": _scraps,
}


def examples(texts: Sequence[tuple[str, str, str]], seed: int) -> list[tuple[str, str, str]]:
    """(label, language, line) for every (id, text, language): the text, and one spoiled copy of it."""
    lines = []
    kinds = sorted(SPOIL)
    for id, text, language in texts:
        rng = Random(f"{seed}/{id}")
        text = text[: 2 * PROBE]
        spoiled = SPOIL[rng.choice(kinds)](text, language, rng)
        lines += [(REAL, language, one_line(text)), (SPOILED, language, one_line(spoiled))]
    return lines


def train(lines: Sequence[tuple[str, str, str]], path: Path, seed: int) -> Any:
    """A fastText model; `path` is a scratch file for its input. The same lines give the same model."""
    import fasttext

    path.write_text("".join(f"{label} {line}\n" for label, _, line in lines), encoding="utf-8")
    settings = {"lr": 0.5, "epoch": 8, "wordNgrams": 2, "dim": 16, "bucket": 50_000, "minCount": 2}
    return fasttext.train_supervised(str(path), loss="softmax", seed=seed, thread=1, verbose=0, **settings)


def load(path: Path) -> Any:
    import fasttext

    return fasttext.load_model(str(path))


def scores(model: Any, texts: Sequence[str]) -> list[float]:
    """The probability of being real text, for each text."""
    if not texts:
        return []
    return _real(model, [one_line(text) for text in texts])


def _real(model: Any, lines: list[str]) -> list[float]:
    labels, chances = model.predict(lines)
    return [
        float(chance[0]) if label[0] == REAL else 1 - float(chance[0])
        for label, chance in zip(labels, chances, strict=True)
    ]


def accuracy(model: Any, lines: Sequence[tuple[str, str, str]]) -> dict[str, float]:
    """Share of right verdicts on `lines`, by language."""
    right: dict[str, list[bool]] = {}
    for (label, language, _), chance in zip(lines, _real(model, [line for _, _, line in lines]), strict=True):
        right.setdefault(language, []).append((chance >= 0.5) == (label == REAL))
    return {language: sum(verdicts) / len(verdicts) for language, verdicts in sorted(right.items())}
