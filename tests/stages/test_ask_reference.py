"""General conversations from reference documents, and their share in fine-tuning."""

import json
from collections import Counter

import pyarrow.parquet as pq
import pytest

from infra.artifact import Artifact
from infra.errors import InputError
from infra.stage import Context
from stages.ask_reference import AskReferenceConfig, ask_reference, parse
from stages.corpus.document import Document, write_documents
from stages.corpus.sources.api_reference import _describe
from stages.sft import draw
from stages.training.supervised import Conversation

BODY = '''
    """Where the stream is pushed to."""

    def __init__(self):
        r"""
        :param _Ip: The address; it may be: v4.
        or <b>v6</b>.
        :type Ip: str
        :param _Port: The port of the destination.
        :type Port: int
        """
'''
ZH = "Address\n推流的目的地址，供转推使用。\nIp：目的地址，可以是四版或六版的。\nPort：目的地址的端口号，一个正整数。"
EN = _describe("Address", BODY, "en")


def documents(folder, *pairs):
    folder.mkdir()
    write_documents(folder, [Document(id, text, "en", "reference", "x", "Apache-2.0") for id, text in pairs])
    return Artifact.local(folder, "documents")


def test_a_reference_document_is_read_back_as_it_was_described():
    assert parse(EN, "en") == (
        "Address",
        "Where the stream is pushed to.",
        {"Ip": "The address; it may be: v4.\nor v6.", "Port": "The port of the destination."},
    )
    assert list(parse(ZH, "zh")[2]) == ["Ip", "Port"]


def test_classes_and_fields_are_asked_for_and_translated_where_both_languages_have_them(tmp_path):
    given = (
        documents(tmp_path / "en", ("api_reference_en/s/v1/Address", EN), ("python_docs/x", "no: reference")),
        documents(tmp_path / "zh", ("api_reference_zh/s/v1/Address", ZH), ("api_reference_zh/s/v1/Again", ZH)),
    )
    config = AskReferenceConfig(per_document=9)
    summary = ask_reference(config, {"documents": given}, Context.local(tmp_path))
    rows = pq.read_table(tmp_path / "out" / "conversations-00000.parquet").to_pylist()
    kinds = Counter((row["family"], row["language"]) for row in rows)
    # What the second Chinese class says again is asked for once.
    assert kinds == {
        **{("reference_class", "en"): 1, ("reference_class", "zh"): 1},
        **{("reference_field", "en"): 2, ("reference_field", "zh"): 2},
        **{("reference_translation", "en"): 2, ("reference_translation", "zh"): 2},
    }
    assert sum(kinds.values()) == summary["conversations"]
    talks = {tuple(message["content"] for message in json.loads(row["messages"])) for row in rows}
    assert ("What is Port in Address?", "The port of the destination.") in talks
    assert ("Address里的Port是什么？", "目的地址的端口号，一个正整数。") in talks
    assert ("Into Chinese: The port of the destination.", "目的地址的端口号，一个正整数。") in talks
    assert ("译成英文：目的地址的端口号，一个正整数。", "The port of the destination.") in talks


def test_an_envelope_an_untranslated_text_and_a_text_that_is_too_long_are_not_asked_for(tmp_path):
    texts = {
        "GetRequest": "GetRequest\nThe parameters of the call Get.",
        "Mixed": "Mixed\n查询所有主机的列表和状态\nLong: " + "many words " * 50 + "\nGood: The name of the host.",
    }
    given = documents(tmp_path / "en", *((f"api_reference_en/s/{name}", text) for name, text in texts.items()))
    summary = ask_reference(AskReferenceConfig(per_document=9), {"documents": (given,)}, Context.local(tmp_path))
    assert (summary["conversations"], summary["field_en"]) == (1, 1)
    with pytest.raises(InputError, match="lower min_characters or raise max_characters"):
        ask_reference(AskReferenceConfig(min_characters=390), {"documents": (given,)}, Context.local(tmp_path))
    other = documents(tmp_path / "other", ("python_docs/x", "text"))
    with pytest.raises(InputError, match="no document of api_reference_en"):
        ask_reference(AskReferenceConfig(), {"documents": (other,)}, Context.local(tmp_path))


def test_a_share_larger_than_the_pool_reads_all_of_it_before_any_of_it_again():
    pool = [Conversation([{"role": "user", "content": str(n)}]) for n in range(4)]
    drawn, passes = draw(pool, 10, seed=1)
    seen = Counter(conversation.messages[0]["content"] for conversation in drawn)
    assert (len(drawn), passes, set(seen.values())) == (10, 2.5, {2, 3})
    assert drawn != draw(pool, 10, seed=2)[0]
