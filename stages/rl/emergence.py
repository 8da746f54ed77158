"""Signs of reasoning that nobody rewarded: reflection, verification and backtracking in a chain of thought.

DeepSeek-R1 (Nature 2025, extended data figure 1) follows the frequency of ten English words that three people chose as
signs of reflection; those are REFLECTION["en"], the Chinese ones say the same. Verification and backtracking are told
apart by phrases (Gandhi et al. 2025, Cognitive Behaviors that Enable Self-Improving Reasoners, name the behaviours).
A word is a sign and no proof: "but" also joins sentences. Read the curves against their beginning, not their height.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

REFLECTION = {
    "en": ("wait", "mistake", "however", "but", "retry", "error", "verify", "wrong", "evaluate", "check"),
    "zh": ("等等", "等一下", "出错", "错误", "错了", "不过", "然而", "但是", "重试", "重新", "验证", "评估", "检查"),
}
VERIFICATION = {
    "en": ("verify", "verifies", "verifying", "check", "checks", "checking", "double-check", "make sure", "confirm"),
    "zh": ("验证", "验算", "检验", "检查", "核对", "确认"),
}
BACKTRACKING = {
    "en": ("wait", "no,", "let me try again", "try again", "start over", "going back", "on second thought", "retry"),
    "zh": ("等等", "等一下", "不对", "不是这样", "重新", "再试", "重来", "换个思路", "换一种"),
}


def _signs(phrases: Mapping[str, Iterable[str]]) -> re.Pattern[str]:
    """English phrases as whole words in any case, Chinese ones wherever they stand; the longest of several wins."""
    english = "|".join(re.escape(phrase) for phrase in sorted(phrases["en"], key=len, reverse=True))
    chinese = "|".join(sorted(phrases["zh"], key=len, reverse=True))
    return re.compile(rf"(?<![a-z])(?:{english})(?![a-z])|{chinese}", re.IGNORECASE)


SIGNS = {
    "reflections": _signs(REFLECTION),
    "verification": _signs(VERIFICATION),
    "backtracking": _signs(BACKTRACKING),
}
MEASURES = tuple(SIGNS)


def count(chain: str, sign: str) -> int:
    """How often a chain gives that sign of MEASURES."""
    return sum(1 for _ in SIGNS[sign].finditer(chain))


def measure(chain: str) -> dict[str, float]:
    """What one chain adds to the means over a batch: its reflection words, and whether it verifies and backtracks."""
    return {
        "reflections": float(count(chain, "reflections")),
        "verification": float(count(chain, "verification") > 0),
        "backtracking": float(count(chain, "backtracking") > 0),
    }
