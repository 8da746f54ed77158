"""Conversations from files and datasets, as `sft` reads them."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from infra.errors import InputError
from infra.stage import Context
from stages.ingest_conversations import IngestConversationsConfig, ingest_conversations
from stages.training.supervised import read_conversations


def talk(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": f"What is {number} + 1?"},
        {"role": "assistant", "content": f"<think>one more</think>{number + 1}"},
        {"role": "user", "content": "And again?"},
        {"role": "assistant", "content": str(number + 2)},
    ]


def sharegpt(messages: list[dict[str, str]]) -> list[dict[str, str]]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[message["role"]], "value": message["content"]} for message in messages]


def read(folder, source: dict, **options):
    ctx = Context.local(folder)
    config = IngestConversationsConfig(source={"kind": "files", "name": "mine", "license": "MIT", **source}, **options)
    return ingest_conversations(config, {}, ctx), ctx.out


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
        assert sorted(read_conversations(out), key=str) == sorted(talks, key=str), name
        assert (summary["conversations"], summary["replies"], summary["language_en"]) == (5, 10, 5)


def test_a_limited_ingest_is_the_same_sample_each_time(tmp_path):
    source = lines(tmp_path / "a.jsonl", [{"messages": talk(number), "n": number} for number in range(50)])
    summary, out = read(tmp_path / "one", source | {"id_field": "n"}, max_conversations=10)
    _, again = read(tmp_path / "two", source | {"id_field": "n"}, max_conversations=10)
    assert (summary["conversations"], summary["left_out"]) == (10, 40)
    assert read_conversations(out) == read_conversations(again)
    _, other = read(tmp_path / "three", source | {"id_field": "n"}, max_conversations=10, seed=1)
    assert read_conversations(out) != read_conversations(other)


@pytest.mark.parametrize(
    ("messages", "error"),
    [
        ("no json", "is text and no JSON"),
        ({"role": "user"}, "is no list of messages"),
        ([], "no message of the assistant"),
        ([{"role": "user", "content": "Hello?"}], "no message of the assistant"),
        ([{"role": "tool", "content": "4"}], "message 1 has the role 'tool'.*system, user, assistant"),
        ([{"role": "user", "content": " "}], "message 1, of the user, says nothing"),
        ([*talk(1), {"role": "system", "content": "Now be long."}], "system message behind another"),
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
