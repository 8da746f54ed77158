"""Preferences of the user's own, from JSON Lines, Parquet or any dataset that the `datasets` library can load.

A row has two replies, `chosen` and `rejected`, in one of the forms that published sets have:

    prompt: text or messages    chosen, rejected: text, or the assistant's message
    (no prompt)                 chosen, rejected: whole conversations, which differ in their last turn
    both                        as the second; the prompt is in them

Messages are {role, content}, in ShareGPT's words {from, value}, or either as JSON text where there is no prompt. A pair
that is not as it should be is refused, with its place: nothing is repaired.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Annotated, Any

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus import languages
from stages.corpus.document import fraction
from stages.corpus.sources import Source
from stages.corpus.sources.files import OwnDataset, OwnFiles
from stages.rl.preferences import Preference, write_preferences
from stages.tokens.messages import conversation_text


class _Fields(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="begins the ids of the pairs")
    prompt_field: str = Field("prompt", description="where a source has no such column, replies are conversations")
    chosen_field: str = "chosen"
    rejected_field: str = "rejected"
    margin_field: str | None = Field(None, description="column that says by how much the chosen reply is better")
    license: str = Field(min_length=1, description="SPDX expression, or what the owner calls it")

    @property
    def beside(self) -> tuple[str, ...]:
        return tuple(name for name in (self.prompt_field, self.rejected_field, self.margin_field) if name)

    def pair_text(self, value: Any, field: str, where: str, beside: Mapping[str, Any]) -> str:
        """Prompt, replies and margin of one row as JSON text; InputError if they are no pair to learn from."""
        for name in (self.rejected_field, self.margin_field):
            if name and name not in beside:
                raise InputError(f"{where}: no field {name!r}; set source.rejected_field or source.margin_field")
        prompt = _prompt(beside.get(self.prompt_field), self.prompt_field, where)
        before, chosen = _side(value, prompt, field, where)
        other, rejected = _side(beside[self.rejected_field], prompt, self.rejected_field, where)
        if before != other:
            raise InputError(f"{where}: the two conversations differ before their last turn; a pair has one prompt")
        if chosen == rejected:
            raise InputError(f"{where}: both replies are the same: nothing is preferred; leave the row out")
        margin = beside[self.margin_field] if self.margin_field else None
        if margin is not None and (not isinstance(margin, int | float) or not math.isfinite(margin)):
            raise InputError(f"{where}: the field {self.margin_field!r} is {margin!r}; it must be a finite number")
        pair = {"prompt": json.dumps(before, ensure_ascii=False), "chosen": chosen, "rejected": rejected}
        return json.dumps(pair | {"margin": margin}, ensure_ascii=False)


class PreferenceFiles(OwnFiles, _Fields):
    """Files of the user's own."""


class PreferenceDataset(OwnDataset, _Fields):
    """A dataset that the `datasets` library loads by name, or from a folder."""


class IngestPreferencesConfig(Config):
    source: Annotated[PreferenceFiles | PreferenceDataset, Field(discriminator="kind", title="Source")]
    max_pairs: int | None = Field(None, ge=1, description="Sampled evenly over the source; all when unset.")
    seed: int = 0


def _source(config: IngestPreferencesConfig) -> Source:
    mine = config.source
    reading = {"convert": mine.pair_text, "option": "source.chosen_field", "beside": mine.beside}
    return mine.source(mine.name, "preference", mine.license, mine.chosen_field, **reading)


def _outside(config: IngestPreferencesConfig) -> dict[str, str]:
    return _source(config).versions()


@stage(version=1, makes="preferences", reads=_outside)
def ingest_preferences(config: IngestPreferencesConfig, inputs: Inputs, ctx: Context) -> dict:
    """Read one source of preferences, for dpo or a reward model to learn from."""
    source = _source(config)
    units, rows = source.units(), {}
    for done, unit in enumerate(units, start=1):
        rows |= {f"{source.name}/{raw.key}": raw.text for raw in source.read(unit)}
        ctx.report(done, len(units), "parts")
    chosen = sorted(rows, key=lambda id: fraction(id, f"preference {config.seed}"))[: config.max_pairs]
    if not chosen:
        raise InputError(f"{config.source.path} holds no pair: the source is empty")
    pairs = []
    for id in chosen:
        pair = json.loads(rows[id])
        pairs.append(Preference(id, **pair, language=languages.identify(pair["chosen"]), source=source.name))
    about = {"source": source.name, "license": source.license, "pairs": write_preferences(ctx.out, pairs)}
    counts = Counter(f"language_{pair.language}" for pair in pairs)
    prompts = len({pair.prompt for pair in pairs})
    return about | {"prompts": prompts, "left_out": len(rows) - len(pairs), **dict(sorted(counts.items()))}


def _prompt(value: Any, field: str, where: str) -> list[dict[str, str]]:
    """The messages of a prompt column; none where there is no such column."""
    if value is None:
        return []
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list) or not value:
        raise InputError(f"{where}: the field {field!r} must be text or a list of messages")
    return value


def _side(value: Any, prompt: list[dict[str, str]], field: str, where: str) -> tuple[list[dict[str, str]], str]:
    """(messages of the prompt, what the assistant replies) of one side of a pair."""
    if prompt and isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    if isinstance(value, list) and value and isinstance(value[0], dict):
        begins = value[0].get("role", value[0].get("from"))
        if begins in ("assistant", "gpt"):
            value = [*prompt, *value]
    messages, _ = json.loads(conversation_text(value, field, where))
    *before, last = messages
    if not before or last["role"] != "assistant" or before[-1]["role"] == "assistant":
        raise InputError(
            f"{where}: the field {field!r} must end with one reply of the assistant to a prompt; where replies are "
            "text or one message, name the prompt's column in source.prompt_field"
        )
    if "tool_calls" in last:
        raise InputError(
            f"{where}: the field {field!r} ends with calls of tools; a reply that is preferred must be text"
        )
    return before, last["content"]
