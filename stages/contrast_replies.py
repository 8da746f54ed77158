"""Preferences from conversations: the reply that a prompt got, against one that another prompt got.

No rule says what a good general reply is, but conversations say what belongs together: a reward model that learns from
these pairs judges whether a reply answers its prompt (so were dialogue systems taught to choose among replies: Lowe et
al. 2015, The Ubuntu Dialogue Corpus, 1506.08909). Every reply is chosen as often as it is rejected, so that nothing
tells which it is but its prompt: neither length nor words nor form.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus.document import fraction
from stages.rl.preferences import Preference, write_preferences
from stages.training.supervised import conversation_rows


class ContrastRepliesConfig(Config):
    pairs_per_prompt: int = Field(1, ge=1, title="Pairs a prompt", description="Each rejects another reply")
    seed: int = Field(0, title="Seed", description="Decides which replies meet")


class Opening(NamedTuple):
    """How a conversation begins: the messages of its prompt as JSON text, and the first reply."""

    id: str
    prompt: str
    reply: str
    language: str


@stage(version=1, takes={"conversations": "conversations"}, makes="preferences")
def contrast_replies(config: ContrastRepliesConfig, inputs: Inputs, ctx: Context) -> dict:
    """Pair the first reply of each conversation with first replies of others."""
    rows = conversation_rows(inputs["conversations"].path)
    order = sorted(rows, key=lambda row: fraction(row["id"], f"contrast {config.seed}"))
    ring = _distinct(opening for row in order if (opening := _opening(row)))
    pairs = [
        Preference(f"{one.id}/{distance}", one.prompt, one.reply, other.reply, one.language, "contrast_replies")
        for distance in range(1, min(config.pairs_per_prompt, len(ring) - 1) + 1)
        for one, other in zip(ring, ring[distance:] + ring[:distance], strict=True)
    ]
    if not pairs:
        raise InputError(
            f"{inputs['conversations'].id}: no two of {len(rows)} conversations have different prompts and different "
            "replies in words: give more"
        )
    counts = Counter(f"language_{pair.language}" for pair in pairs)
    return {
        "pairs": write_preferences(ctx.out, pairs),
        "prompts": len(ring),
        "left_out": len(rows) - len(ring),
        **dict(sorted(counts.items())),
    }


def _opening(row: dict[str, Any]) -> Opening | None:
    """None where tools are offered: replies are then calls, which other prompts' tools may not have."""
    messages = json.loads(row["messages"])
    first = next(place for place, message in enumerate(messages) if message["role"] == "assistant")
    if first == 0 or row.get("tools") or "tool_calls" in messages[first]:
        return None
    return Opening(
        row["id"], json.dumps(messages[:first], ensure_ascii=False), messages[first]["content"], row["language"]
    )


def _distinct(openings: Iterable[Opening]) -> list[Opening]:
    """Those whose prompt and whose reply no earlier one has: a reply to the same prompt would be right too."""
    kept: list[Opening] = []
    prompts, replies = set(), set()
    for one in openings:
        if one.prompt not in prompts and one.reply not in replies:
            kept.append(one)
            prompts.add(one.prompt)
            replies.add(one.reply)
    return kept
