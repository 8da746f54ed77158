"""Conversations from files and datasets, as `sft` reads them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from infra.artifact import Artifact
from infra.errors import InputError
from infra.stage import Context
from stages.import_problems import ImportProblemsConfig, import_problems
from stages.ingest_conversations import IngestConversationsConfig, ingest_conversations
from stages.problems.problem import read_problems
from stages.sft import SftConfig, sft
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import render
from stages.training.supervised import read_conversations


def talk(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {number} + 1?"},
        {"role": "assistant", "content": f"<think>one more</think>{number + 1}"},
        {"role": "user", "content": "And again?"},
        {"role": "assistant", "content": str(number + 2)},
    ]


def add(arguments) -> dict:
    return {"id": "1", "type": "function", "function": {"name": "add", "arguments": arguments}}


TOOLS = [{"type": "function", "function": {"name": "add", "description": "", "parameters": {"type": "object"}}}]
ASKED = [
    {"role": "user", "content": "What is 2 + 3?"},
    {"role": "assistant", "content": "", "tool_calls": [add({"a": 2, "b": 3})]},
    {"role": "tool", "content": "5", "tool_call_id": "1"},
    {"role": "assistant", "content": "5"},
]


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def read(folder, source: dict, inputs: dict | None = None, **options):
    ctx = Context.local(folder)
    config = IngestConversationsConfig(source={"kind": "files", "name": "mine", "license": "MIT", **source}, **options)
    return ingest_conversations(config, inputs or {}, ctx), ctx.out


def lines(path, rows) -> dict:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"path": str(path), "format": "jsonl"}


def test_every_form_of_a_conversation_gives_the_same_messages(tmp_path):
    talks = [talk(number) for number in range(5)]
    pq.write_table(pa.table({"messages": talks}), tmp_path / "a.parquet", row_group_size=2)
    Dataset.from_dict({"messages": talks}).to_parquet(tmp_path / "data" / "train.parquet")
    sources = {
        "jsonl": lines(tmp_path / "a.jsonl", [{"messages": messages} for messages in talks]),
        "sharegpt": lines(tmp_path / "b.jsonl", [{"messages": sharegpt(messages)} for messages in talks]),
        "text": lines(tmp_path / "c.jsonl", [{"turns": json.dumps(messages)} for messages in talks])
        | {"messages_field": "turns"},
        "parquet": {"path": str(tmp_path / "a.parquet"), "format": "parquet"},
        "dataset": {"kind": "dataset", "path": str(tmp_path / "data")},
    }
    for name, source in sources.items():
        summary, out = read(tmp_path / f"run-{name}", source)
        found = read_conversations(out)
        assert sorted((messages for messages, _ in found), key=str) == sorted(talks, key=str), name
        assert not any(tools for _, tools in found)
        assert (summary["conversations"], summary["replies"], summary["language_en"]) == (5, 10, 5)


def test_a_limited_ingest_is_the_same_sample_each_time(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"messages": talk(number), "n": number} for number in range(50)])
    summary, out = read(tmp_path / "one", source | {"id_field": "n"}, max_conversations=10)
    _, again = read(tmp_path / "two", source | {"id_field": "n"}, max_conversations=10)
    assert (summary["conversations"], summary["left_out"]) == (10, 40)
    assert read_conversations(out) == read_conversations(again)
    _, other = read(tmp_path / "three", source | {"id_field": "n"}, max_conversations=10, seed=1)
    assert read_conversations(out) != read_conversations(other)


def test_conversations_that_ask_a_held_out_problem_are_left_out_and_named(tmp_path):
    rows = [{"question": f"What is {number} + 1?", "answer": str(number + 1)} for number in range(40)]
    lines(tmp_path / "problems.jsonl", rows)
    about = {"name": "sums", "path": str(tmp_path / "problems.jsonl"), "license": "MIT"}
    ctx = Context.local(tmp_path / "problems")
    assert (n_heldout := import_problems(ImportProblemsConfig(**about), {}, ctx)["n_heldout"]) > 1
    inputs = {"problems": Artifact.local(ctx.out, "problems")}
    source = lines(tmp_path / "a.jsonl", [{"messages": talk(number), "n": number} for number in range(40)])
    summary, out = read(tmp_path / "run", source | {"id_field": "n"}, inputs)
    assert (summary["contaminated"], summary["conversations"]) == (n_heldout, 40 - n_heldout)
    heldout = {problem.question: problem.id for problem in read_problems(ctx.out / "heldout.jsonl")}
    assert not heldout.keys() & {messages[1]["content"] for messages, _ in read_conversations(out)}
    named = [json.loads(line) for line in (out / "contaminated.jsonl").read_text().splitlines()]
    asked = {f"mine/{number}": talk(number)[1]["content"] for number in range(40)}
    assert {row["problem"] for row in named} == set(heldout.values())
    assert all(heldout[asked[row["id"]]] == row["problem"] for row in named)
    leaked = [{"messages": [{"role": "user", "content": next(iter(heldout))}, {"role": "assistant", "content": "1"}]}]
    with pytest.raises(InputError, match="no conversation that asks no held-out problem"):
        read(tmp_path / "none", lines(tmp_path / "b.jsonl", leaked), inputs)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("no json", "is text and no JSON"),
        ({"role": "user"}, "is no list of messages"),
        ([], "no message of the assistant"),
        ([{"role": "user", "content": "Hello?"}], "no message of the assistant"),
        ([{"role": "judge", "content": "4"}], "message 1 has the role 'judge'.*system, user, assistant, tool"),
        ([{"role": "user", "content": " "}], "message 1, of the user, says nothing"),
        ([*talk(1), {"role": "system", "content": "Now be long."}], "system message behind another"),
        ([*talk(1), {"role": "tool", "content": "4"}], "message 6, is of a tool, and no call"),
        ([*ASKED[:3], *ASKED[2:]], "message 4, is of a tool, and no call"),
        ([{"role": "assistant", "tool_calls": [{"name": "add"}]}], "call 1 has no function with a name"),
        ([{"role": "assistant", "tool_calls": [add("1")]}], "arguments of call 1 are no object"),
        ([{"role": "assistant", "tool_calls": [add("{")]}], "arguments of call 1 are text and no JSON"),
        ([{"role": "assistant", "tool_calls": "add"}], "tool_calls is no list"),
        ([*ASKED[:2], {"role": "tool", "content": None}], "of the tool: its content must be text"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_place(tmp_path, messages, error):
    source = lines(tmp_path / "a.jsonl", [{"messages": talk(0)}, {"messages": messages}])
    with pytest.raises(InputError, match=rf"a\.jsonl at byte \d+: the field 'messages'.*{error}"):
        read(tmp_path / "run", source)


def test_a_missing_column_is_named_with_its_option(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"turns": talk(0)}])
    with pytest.raises(InputError, match=r"no field 'messages' \(it has turns\); set source.messages_field"):
        read(tmp_path / "run", source)


def test_tools_and_calls_are_kept_whatever_form_they_come_in(tmp_path):
    as_text = [ASKED[0], {**ASKED[1], "content": None, "tool_calls": [add('{"a": 2, "b": 3}')]}, *ASKED[2:]]
    nulls = [{"tool_calls": None, "tool_call_id": None, **message} for message in as_text]  # as Parquet fills them up
    Dataset.from_dict({"messages": [nulls], "tools": [json.dumps(TOOLS)]}).to_parquet(tmp_path / "data" / "a.parquet")
    sources = {
        "jsonl": lines(tmp_path / "a.jsonl", [{"messages": ASKED, "tools": TOOLS}]),
        "text": lines(tmp_path / "b.jsonl", [{"messages": json.dumps(as_text), "tools": json.dumps(TOOLS)}]),
        "parquet": {"path": str(tmp_path / "data" / "a.parquet"), "format": "parquet"},
        "dataset": {"kind": "dataset", "path": str(tmp_path / "data")},
    }
    for name, source in sources.items():
        summary, out = read(tmp_path / f"run-{name}", source | {"tools_field": "tools"})
        assert read_conversations(out) == [(ASKED, TOOLS)], name
        assert (summary["replies"], summary["tool_calls"]) == (2, 1)
    with pytest.raises(InputError, match=r"no field 'functions'; set source\.tools_field"):
        read(tmp_path / "run-absent", sources["jsonl"] | {"tools_field": "functions"})


@pytest.mark.parametrize(
    ("tools", "error"),
    [
        ([{"type": "function", "function": {"name": "sub"}}], "calls 'add', which is not among the tools"),
        ([{"name": "add"}], "tool 1 has no function with a name"),
        ("[", "the tools are text and no JSON"),
        ({}, "the tools are no list"),
    ],
)
def test_tools_that_do_not_fit_are_refused(tmp_path, tools, error):
    source = lines(tmp_path / "a.jsonl", [{"messages": ASKED, "tools": tools}])
    with pytest.raises(InputError, match=error):
        read(tmp_path / "run", source | {"tools_field": "tools"})


def test_artifacts_from_before_tools_are_read(tmp_path):
    row = {"id": "1", "messages": json.dumps(talk(1)), "problem": None, "language": "en", "family": "mine"}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "conversations-00000.parquet")
    assert read_conversations(tmp_path) == [(talk(1), [])]


@pytest.mark.slow
def test_sft_learns_the_calls_of_an_ingested_conversation(tmp_path, bandit_base):
    _, out = read(
        tmp_path / "run", lines(tmp_path / "a.jsonl", [{"messages": ASKED, "tools": TOOLS}]) | {"tools_field": "tools"}
    )
    ids, mask = render(ASKED, load_tokenizer(bandit_base), tools=TOOLS)
    inputs = {
        "checkpoint": Artifact.local(bandit_base, "checkpoint"),
        "conversations": Artifact.local(out, "conversations"),
    }
    summary = sft(SftConfig(steps=1, batch_size=1, sequence_length=len(ids)), inputs, Context.local(tmp_path / "sft"))
    assert (summary["learnt_tokens"], summary["conversations"]) == (sum(mask), 1)
