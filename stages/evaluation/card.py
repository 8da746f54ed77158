"""What a model card says of a report: its heading, and the weaknesses that its figures show, in sentences."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from stages.evaluation.measures import Measure

SECTIONS = {"evaluation": "Held-out problems", "probes": "Probes", "benchmarks": "Benchmarks"}  # by a report's kind
# measure -> what it says of the model, with its percentage and interval put in
SHARES = {
    "chain_mixed": "mixes languages in {} of its chains of thought",
    "chain_foreign": "thinks in another language than the question's in {} of its chains",
    "json_fits": "answers in the JSON that was asked for in {} of the cases",
    "json_right": "gives that JSON with the right result in {} of the cases",
    "tool_called": "calls a tool where one is needed in {} of the cases",
    "tool_right": "calls the right tool with the right arguments in {} of the cases",
    "two_turns_right": "answers a follow-up that needs the turn before it in {} of the cases",
    "format": "keeps to the reply format in {} of its samples",
    "language_consistency": "keeps to the question's language in {} of the words of its chains",
}
GAINS = {
    "few_shot_gain": "Worked examples in the prompt move its accuracy by {}",
    "two_turns_gain": "Asking over two turns rather than in one moves its accuracy by {}",
}


def limitations(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """Sentences, each a list item, that only measured figures can put there."""
    lines = []
    for report in reports:
        measures: Mapping[str, Measure] = report["measures"]
        lines += [f"- It {told.format(_percent(measures[name]))}." for name, told in SHARES.items() if name in measures]
        lines += [f"- {told.format(_points(measures[name]))}." for name, told in GAINS.items() if name in measures]
        lines += _weakest(measures)
        if too_long := report.get("too_long"):
            lines.append(f"- {too_long} probes leave no room for a reply in its context and count as failed.")
        if cut := report.get("cut"):
            lines.append(f"- {cut} benchmark prompts exceed its context and lost their beginning.")
    return lines


def _weakest(measures: Mapping[str, Measure]) -> list[str]:
    """The family or language with the lowest pass@1, where there are several."""
    parts = {name.removeprefix("pass_1_"): m for name, m in measures.items() if name.startswith("pass_1_")}
    if len(parts) < 2:
        return []
    name = min(parts, key=lambda part: parts[part].value)
    return [f"- Of families and languages it is weakest at {name}: pass@1 {_percent(parts[name])}."]


def _percent(measure: Measure) -> str:
    if measure.low is None or measure.high is None:
        return f"{measure.value:.1%}"
    return f"{measure.value:.1%} ({measure.low:.1%} to {measure.high:.1%})"


def _points(measure: Measure) -> str:
    assert measure.low is not None and measure.high is not None
    return f"{100 * measure.value:+.1f} points ({100 * measure.low:+.1f} to {100 * measure.high:+.1f})"
