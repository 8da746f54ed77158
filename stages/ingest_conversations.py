"""Conversations of the user's own, from JSON Lines, Parquet or any dataset that the `datasets` library can load.

A conversation is a list of messages {role, content}, or in ShareGPT's words {from, value}, or either as JSON text. Its
roles are system (at most one, in front), user, assistant, and tool for the replies to an assistant's `tool_calls`; the
tools that are offered stand in a column of their own, as JSON schemas (`stages.tokens.tools`). `sft` renders it by the
checkpoint's chat template and learns what the assistant says, its calls among it. One that is not as it should be is
refused, with its place: nothing is repaired. With `problems`, one that asks a problem held out there is left out, and
`contaminated.jsonl` names it and the problem: a model that learns from the rest can be judged by those problems.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from infra.config import Config, Field
from infra.errors import InputError
from infra.stage import Context, Inputs, optional, stage
from stages.corpus import languages
from stages.corpus.document import fraction
from stages.corpus.sources import Raw, Source
from stages.corpus.sources.files import OwnDataset, OwnFiles
from stages.problems.contamination import HeldOut
from stages.problems.problem import read_problems
from stages.tokens.messages import conversation_text
from stages.tokens.tools import calls_text
from stages.tokens.traces import think_answer
from stages.training.supervised import CONVERSATIONS


class _Fields(Config):
    name: str = Field(pattern=r"^[A-Za-z0-9_.-]+$", description="begins the ids of the conversations")
    messages_field: str = Field("messages", description="the column that holds the list of messages")
    tools_field: str | None = Field(None, description="the column that holds the list of tools; none: none is offered")
    license: str = Field(min_length=1, description="SPDX expression, or what the owner calls it")

    @property
    def beside(self) -> tuple[str, ...]:
        return (self.tools_field,) if self.tools_field else ()

    def text(self, value: Any, field: str, where: str, beside: Mapping[str, Any]) -> str:
        if self.tools_field and self.tools_field not in beside:
            raise InputError(f"{where}: no field {self.tools_field!r}; set source.tools_field to another, or to none")
        return conversation_text(value, field, where, beside.get(self.tools_field or ""))


class ConversationFiles(OwnFiles, _Fields):
    """Files of the user's own."""


class ConversationDataset(OwnDataset, _Fields):
    """A dataset that the `datasets` library loads by name, or from a folder."""


class IngestConversationsConfig(Config):
    source: Annotated[ConversationFiles | ConversationDataset, Field(discriminator="kind", title="Source")]
    traces: Literal["as_is", "think_answer"] = Field(
        "as_is",
        description="think_answer: replies are reasoning traces and take our form, for reinforcement to go on from; "
        "those with another form are left out",
    )
    max_conversations: int | None = Field(None, ge=1, description="Sampled evenly over the source; all when unset.")
    seed: int = 0


def _source(config: IngestConversationsConfig) -> Source:
    mine = config.source
    reading = {"convert": mine.text, "option": "source.messages_field", "beside": mine.beside}
    return mine.source(mine.name, "conversation", mine.license, mine.messages_field, **reading)


def _outside(config: IngestConversationsConfig) -> dict[str, str]:
    return _source(config).versions()


@stage(version=2, takes={"problems": optional("problems")}, makes="conversations", reads=_outside)
def ingest_conversations(config: IngestConversationsConfig, inputs: Inputs, ctx: Context) -> dict:
    """Read one source of conversations, for a checkpoint to learn from."""
    source = _source(config)
    rows = {f"{source.name}/{raw.key}": raw.text for raw in _read(source, ctx)}
    read = len(rows)
    if config.traces == "think_answer":
        rows = {id: text for id, row in rows.items() if (text := _in_our_form(row))}
    contaminated: dict[str, str] = {}
    if problems := inputs.get("problems"):
        heldout = HeldOut(read_problems(problems.path / "heldout.jsonl"))
        contaminated = {id: problem for id, row in rows.items() if (problem := _asks(row, heldout))}
        rows = {id: row for id, row in rows.items() if id not in contaminated}
        lines = (json.dumps({"id": id, "problem": problem}) for id, problem in contaminated.items())
        (ctx.out / "contaminated.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    chosen = sorted(rows, key=lambda id: fraction(id, f"conversation {config.seed}"))[: config.max_conversations]
    if not chosen:
        form = "" if config.traces == "as_is" else " with a chain and a solution in every reply"
        clean = " that asks no held-out problem" if contaminated else ""
        raise InputError(f"{config.source.path} holds no conversation{form}{clean}: there is nothing to learn in it")
    table, counts = [], Counter()
    for id in chosen:
        messages, tools = json.loads(rows[id])
        replies = [message for message in messages if message["role"] == "assistant"]
        language = languages.identify(" ".join(reply["content"] for reply in replies))
        row = {"id": id, "problem": None, "language": language, "family": source.name}
        row["messages"] = json.dumps(messages, ensure_ascii=False)
        row["tools"] = json.dumps(tools, ensure_ascii=False) if tools else None
        table.append(row)
        calls = [reply.get("tool_calls", []) for reply in replies]
        learnt = sum(len(reply["content"] + calls_text(made)) for reply, made in zip(replies, calls, strict=True))
        counts.update({"replies": len(replies), "tool_calls": sum(map(len, calls)), "characters_learnt": learnt})
        counts[f"language_{language}"] += 1
    pq.write_table(pa.Table.from_pylist(table, CONVERSATIONS), ctx.out / "conversations-00000.parquet")
    about = {"source": source.name, "license": source.license, "conversations": len(table)}
    if problems:
        about["contaminated"] = len(contaminated)
    return about | {"left_out": read - len(table), **dict(sorted(counts.items()))}


def _read(source: Source, ctx: Context) -> Iterator[Raw]:
    units = source.units()
    for done, unit in enumerate(units, start=1):
        yield from source.read(unit)
        ctx.report(done, len(units), "parts")


def _in_our_form(row: str) -> str | None:
    """The conversation with all its replies as `<think>…</think><answer>…</answer>`; None if one has no such form."""
    messages, tools = json.loads(row)
    for message in messages:
        if message["role"] == "assistant":
            reply = think_answer(message["content"])
            if reply is None:
                return None
            message["content"] = reply
    return json.dumps([messages, tools], ensure_ascii=False)


def _asks(row: str, heldout: HeldOut) -> str | None:
    """The id of a held-out problem that the user asks in the conversation."""
    messages, _ = json.loads(row)
    asked = (heldout.asked_in(message["content"]) for message in messages if message["role"] == "user")
    return next(filter(None, asked), None)
