"""The corpus stages on real text: what they keep, that the same config gives the same bytes, and how they refuse."""

import hashlib
import json
import platform

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import PreTrainedTokenizerFast

from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from stages.corpus import parallel
from stages.corpus.document import Document, read_documents, write_documents
from stages.corpus.sources import api_reference
from stages.deduplicate import DeduplicateConfig, deduplicate
from stages.filter import FilterConfig, filter
from stages.ingest import IngestConfig, ingest
from stages.mix import MixConfig, allocate, mix
from stages.tokenize import TokenizeConfig, tokenize
from stages.tokens.bpe import load_tokenizer
from stages.tokens.shards import SPLITS, TokenShards
from stages.train_tokenizer import TrainTokenizerConfig, train_tokenizer


def run(stage, config, inputs, folder, workers=1):
    context = Context.local(folder, workers)
    summary = stage(stage.config_type.parse(config) if isinstance(config, dict) else config, inputs, context)
    return Artifact.local(context.out, stage.makes, summary)


def digests(artifact):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(artifact.path.iterdir())}


def builtin(name, **limits):
    return {"source": {"kind": "builtin", "name": name}, **limits}


SOURCES = {
    "zh": builtin("api_reference_zh", max_bytes=250_000),
    "docs": builtin("python_docs", max_bytes=250_000),
    "code": builtin("python_code", max_bytes=150_000),
    "math": {"source": {"kind": "worked_problems", "n": 600}, "min_characters": 5},
}
MIX = {
    "shares": [
        {"domain": "math", "weight": 0.2},
        {"language": "zh", "weight": 0.4},
        {"language": "en", "weight": 0.3},
        {"language": "code", "weight": 0.1},
    ],
    "budget_bytes": 250_000,
    "max_epochs": 1.5,
}


def whole_line(folder):
    made = {name: run(ingest, config, {}, folder / name) for name, config in SOURCES.items()}
    documents = {"documents": tuple(made.values())}
    made["deduplicate"] = run(deduplicate, {}, documents, folder / "deduplicate")
    made["filter"] = run(filter, {}, {"documents": made["deduplicate"]}, folder / "filter")
    made["mix"] = run(mix, MIX, {"documents": made["filter"]}, folder / "mix")
    mixed = {"documents": made["mix"]}
    made["train_tokenizer"] = run(train_tokenizer, {"vocab_size": 1000}, mixed, folder / "tokenizer")
    inputs = mixed | {"tokenizer": made["train_tokenizer"]}
    made["tokenize"] = run(tokenize, {"validation_fraction": 0.05}, inputs, folder / "tokens")
    return made


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    return whole_line(tmp_path_factory.mktemp("line"))


def test_the_same_configs_give_the_same_bytes_in_every_stage(line, tmp_path):
    again = whole_line(tmp_path)
    for name, artifact in line.items():
        assert digests(artifact) == digests(again[name]), name


def test_ingested_documents_know_their_language_source_and_licence(line):
    expected = {"zh": ("zh", "Apache-2.0"), "docs": ("en", "PSF-2.0"), "code": ("code", "PSF-2.0")}
    for name, (language, license) in expected.items():
        documents = list(read_documents(line[name].path))
        assert {(d.language, d.license) for d in documents} == {(language, license)}
        assert all(d.id.startswith(f"{d.source}/") for d in documents)
        assert len({d.id for d in documents}) == len(documents)
        assert 0.8 * SOURCES[name]["max_bytes"] < line[name].summary["bytes"] <= SOURCES[name]["max_bytes"]


def test_a_limited_ingest_samples_the_whole_source(line):
    services = {document.id.split("/")[1] for document in read_documents(line["zh"].path)}
    assert len(services) >= 8
    assert max(services) > "s"
    assert min(services) < "f"


def test_no_heldout_problem_enters_the_corpus(line):
    from stages.problems.registry import generate

    heldout = {p.question for p in generate(["countdown", "gcd"], ["en", "zh"], 300, 0, "heldout")}
    assert not heldout & {d.text.split("\n")[0] for d in read_documents(line["math"].path)}


def test_every_removed_duplicate_is_named_with_what_it_copies(line):
    table = pq.read_table(line["deduplicate"].path / "duplicates.parquet").to_pylist()
    kept = {d.id for d in read_documents(line["deduplicate"].path)}
    summary = line["deduplicate"].summary
    assert len(table) == summary["removed_exact"] + summary["removed_near"] > 0
    assert all(row["id"] not in kept for row in table)
    assert summary["documents"] == len(kept) == summary["documents_in"] - len(table)


def test_planted_copies_go_and_what_only_looks_alike_stays(tmp_path):
    base = "查询指定地域内的云服务器实例列表，并返回实例的数量、状态、名称和创建时间，最多返回一百个实例。"
    texts = {
        "a": base,
        "exact": base.replace("，", ","),
        "near": base + "好的吧",
        "far": base[:20] + "完全不同的一段话，说的是另外一件事情，与云服务器没有任何关系可言。",
        "m1": "1 + 2 = ?\n3",
        "m2": "1 + 2 = ?\n3",
        "m3": "1 + 2 = ?\n4",
    }
    documents = [Document(k, t, "zh", "math" if k[0] == "m" else "docs", "s", "MIT") for k, t in texts.items()]
    (tmp_path / "in").mkdir()
    write_documents(tmp_path / "in", documents)
    inputs = {"documents": (Artifact.local(tmp_path / "in", "documents"),)}
    out = run(deduplicate, {}, inputs, tmp_path)
    assert {d.id for d in read_documents(out.path)} == {"near", "far", "m1", "m3"}
    rows = {row["id"]: row for row in pq.read_table(out.path / "duplicates.parquet").to_pylist()}
    assert {id: row["kind"] for id, row in rows.items()} == {"a": "near", "exact": "exact", "m2": "exact"}
    assert rows["a"]["kept"] == rows["exact"]["kept"] == "near"
    assert 0.8 <= rows["a"]["jaccard"] < 1
    assert rows["m2"]["kept"] == "m1"


def test_every_dropped_document_has_a_reason_and_the_counts_agree(line):
    table = pq.read_table(line["filter"].path / "dropped.parquet").to_pylist()
    summary = line["filter"].summary
    assert summary["documents_in"] == summary["documents"] + len(table)
    counted = {key.removeprefix("reason_"): n for key, n in summary.items() if key.startswith("reason_")}
    assert sum(counted.values()) == len(table) > 0
    assert all(counted[row["reason"]] > 0 for row in table)
    assert all(row["domain"] != "math" for row in table)
    assert summary["quality_accuracy_zh"] > 0.7


def test_the_mixture_has_the_weights_it_was_given(line):
    summary = line["mix"].summary
    for name, share in {"share_zh_*": 0.4, "share_en_*": 0.3, "share_code_*": 0.1, "share_*_math": 0.2}.items():
        if summary[name.replace("share", "epochs")] < 1.5:  # not short of text
            assert summary[name] >= share - 0.05
    assert abs(summary["bytes"] - MIX["budget_bytes"]) < 30_000
    rows = json.loads((line["mix"].path / "mixture.json").read_text())
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1, abs=0.01)
    ids = [d.id for d in read_documents(line["mix"].path)]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("available", "budget", "epochs", "expected"),
    [
        ({"a": 100, "b": 100}, None, 1, {"a": 100, "b": 33}),  # a runs out first
        ({"a": 300, "b": 100}, 200, 1, {"a": 150, "b": 50}),
        ({"a": 100, "b": 300}, 200, 1, {"a": 100, "b": 100}),  # what a lacks goes to b
        ({"a": 100, "b": 300}, 400, 2, {"a": 200, "b": 200}),
        ({"a": 10, "b": 10}, 1000, 1, {"a": 10, "b": 10}),
    ],
)
def test_bytes_are_shared_by_weight_and_shortages_are_passed_on(available, budget, epochs, expected):
    assert allocate({"a": 0.75, "b": 0.25}, available, budget, epochs) == expected


def test_a_weight_without_text_is_refused_by_name(line, tmp_path):
    with pytest.raises(ConfigError, match=r"poetry"):
        run(mix, {"shares": [{"domain": "poetry", "weight": 1}]}, {"documents": line["filter"]}, tmp_path)


def test_the_tokenizer_compresses_both_languages_and_transformers_reads_it(line):
    summary = line["train_tokenizer"].summary
    ours, theirs = load_tokenizer(line["tokenize"].path), PreTrainedTokenizerFast.from_pretrained(line["tokenize"].path)
    assert summary["vocab_size"] == ours.vocab_size == len(theirs) == 1000
    assert all(value > 1 for key, value in summary.items() if key.startswith("bytes_per_token"))
    text = "def f(x): 返回实例的数量 12345 <think>\n"
    assert ours.encode(text) == theirs.encode(text, add_special_tokens=False)


def test_tokens_are_the_documents_between_bos_and_eos(line):
    tokenizer = load_tokenizer(line["tokenize"].path)
    texts = {d.id: d.text for d in read_documents(line["mix"].path)}
    seen, tokens = {}, 0
    for split in SPLITS:
        shards = TokenShards(line["tokenize"].path, split)
        for reference, ids in shards.documents():
            assert ids[0] == tokenizer.bos
            assert ids[-1] == tokenizer.eos
            assert tokenizer.decode(ids) == texts[reference.id]
            assert reference.bytes == len(texts[reference.id].encode())
            seen[reference.id] = split
        tokens += shards.n_tokens
    assert seen.keys() == texts.keys()
    assert all(seen[id.partition("#")[0]] == split for id, split in seen.items() if "#" in id)
    summary = line["tokenize"].summary
    assert tokens == summary["train_tokens"] + summary["validation_tokens"]
    assert summary["train_tokens_zh"] > 0
    assert summary["validation_tokens_zh"] > 0


@pytest.mark.slow
def test_two_ray_workers_write_the_bytes_that_one_process_writes(line, tmp_path, monkeypatch):
    monkeypatch.setattr(parallel, "RAY_BYTES", 0)
    sources = {"documents": tuple(line[name] for name in SOURCES)}
    again = run(deduplicate, {}, sources, tmp_path, workers=2)
    assert digests(again) == digests(line["deduplicate"])


# --- files of the user's own, and what is wrong with them


def files(path, format="jsonl", **more):
    source = {"kind": "files", "name": "mine", "path": str(path), "format": format, "license": "CC0-1.0", **more}
    return {"source": source}


LONG = "A sentence of the user's own, long enough to be a document; 用户自己的一句话。"


def test_json_lines_are_read_whole_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.corpus.sources.files.BLOCK_BYTES", 300)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{LONG} {i}", "n": i}) + "\n" * (1 + (i % 3 == 0)) for i in range(50)))
    out = run(ingest, files(path, id_field="n"), {}, tmp_path / "run")
    documents = {d.id: d for d in read_documents(out.path)}
    assert documents.keys() == {f"mine/{i}" for i in range(50)}
    assert documents["mine/7"].text == f"{LONG} 7"
    assert documents["mine/7"].license == "CC0-1.0"


def test_text_parquet_and_datasets_give_the_same_documents(tmp_path):
    texts = [f"{LONG} {i}" for i in range(5)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i}.txt").write_text(text)
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"body": texts}), tmp_path / "data" / "a.parquet", row_group_size=2)
    dataset = {
        "kind": "dataset",
        "name": "mine",
        "path": str(tmp_path / "data"),
        "text_field": "body",
        "license": "MIT",
    }
    configs = {
        "text": files(tmp_path / "*.txt", "text"),
        "parquet": files(tmp_path / "data", "parquet", text_field="body"),
        "dataset": {"source": dataset | {"license": "MIT"}},
    }
    for name, config in configs.items():
        out = run(ingest, config, {}, tmp_path / name)
        assert sorted(d.text for d in read_documents(out.path)) == texts, name
        assert {d.language for d in read_documents(out.path)} == {"zh"}


def test_the_sample_of_a_file_is_spread_over_it(tmp_path, monkeypatch):
    monkeypatch.setattr("stages.corpus.sources.files.BLOCK_BYTES", 2000)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"{LONG} {i}", "n": i}) + "\n" for i in range(2000)))
    out = run(ingest, files(path, id_field="n") | {"max_documents": 100}, {}, tmp_path / "run")
    places = np.array([int(d.id.partition("/")[2]) for d in read_documents(out.path)])
    assert len(places) == 100
    assert out.summary["units_read"] < out.summary["units"]
    assert 700 < places.mean() < 1300  # uniform: 1000, with 16 blocks a standard error of 144
    assert places.max() - places.min() > 1200


def bad_parquet(path):
    pq.write_table(pa.table({"text": [LONG * 50] * 200}), path)
    data = bytearray(path.read_bytes())
    data[10:60] = b"\xff" * 50
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl"),
        ("empty.jsonl", b"", "empty"),
        ("short.jsonl", b'{"text": "x"}\n', "min_characters"),
        ("list.jsonl", b"[1]\n", "JSON object"),
        ("broken.jsonl", b'{"text": \n', "not a JSON value"),
        ("column.jsonl", b'{"body": "x"}\n', "text_field"),
        ("number.jsonl", b'{"text": 3}\n', "not text"),
        ("gb.jsonl", '{"text": "中文"}\n'.encode("gb18030"), "iconv"),
        ("gb.txt", "中文".encode("gb18030"), "not UTF-8"),
        ("none.parquet", b"not parquet", "not a readable Parquet"),
        ("corrupt.parquet", bad_parquet, "corrupt"),
        ("column.parquet", lambda path: pq.write_table(pa.table({"body": ["x"]}), path), "text_field"),
    ],
)
def test_bad_files_give_one_clear_error_that_names_them(tmp_path, name, content, message):
    path = tmp_path / name
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    format = {".jsonl": "jsonl", ".txt": "text", ".parquet": "parquet"}[path.suffix]
    with pytest.raises(InputError, match=message) as caught:
        run(ingest, files(path, format), {}, tmp_path / "run")
    assert name in str(caught.value)


def test_a_missing_package_is_named_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setattr(api_reference, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"fathom-line\[corpus\]"):
        run(ingest, SOURCES["zh"], {}, tmp_path)


def test_an_absent_package_is_named(tmp_path):
    source = {"kind": "builtin", "name": "installed_docstrings", "packages": ["no-such-package"]}
    with pytest.raises(InputError, match="no-such-package"):
        run(ingest, {"source": source}, {}, tmp_path)


def test_an_unknown_dataset_is_an_input_error(tmp_path):
    source = {"kind": "dataset", "name": "x", "path": str(tmp_path / "nothing"), "license": "MIT"}
    with pytest.raises(InputError, match="nothing"):
        run(ingest, {"source": source}, {}, tmp_path)


def test_a_corrupt_shard_of_documents_is_named(tmp_path):
    (tmp_path / "documents-00000.parquet").write_bytes(b"junk")
    with pytest.raises(InputError, match="documents-00000"):
        run(filter, FilterConfig(), {"documents": Artifact.local(tmp_path, "documents")}, tmp_path / "run")


def test_an_empty_corpus_is_refused_by_the_stages_that_need_text(tmp_path):
    write_documents(tmp_path, [])
    empty = Artifact.local(tmp_path, "documents")
    with pytest.raises(InputError, match="no document"):
        run(train_tokenizer, TrainTokenizerConfig(), {"documents": empty}, tmp_path / "a")
    with pytest.raises(InputError, match=r"dropped every document|no document"):
        run(filter, FilterConfig(), {"documents": empty}, tmp_path / "b")
    assert run(deduplicate, DeduplicateConfig(), {"documents": (empty,)}, tmp_path / "c").summary["documents"] == 0
    with pytest.raises(InputError, match="no document"):
        run(mix, MixConfig(), {"documents": empty}, tmp_path / "d")


def test_a_validation_split_without_documents_is_refused(line, tmp_path):
    inputs = {"documents": line["mix"], "tokenizer": line["train_tokenizer"]}
    with pytest.raises(InputError, match="validation_fraction"):
        run(tokenize, TokenizeConfig(validation_fraction=1e-9), inputs, tmp_path)


def test_a_language_for_a_builtin_source_is_refused():
    with pytest.raises(ConfigError, match="leave language at auto"):
        IngestConfig.parse(SOURCES["zh"] | {"language": "en"})


def test_a_file_changed_under_the_same_path_makes_another_artifact(tmp_path):
    text = tmp_path / "one.txt"
    text.write_text("The first version of a text that is long enough.", encoding="utf-8")
    source = {"kind": "files", "name": "mine", "path": str(text), "format": "text", "license": "CC0-1.0"}
    config = ingest.config_type.parse({"source": source})
    before = ingest.id(config, {})
    assert ingest.id(config, {}) == before
    text.write_text("The second version of a text that is long enough.", encoding="utf-8")
    assert ingest.id(config, {}) != before


def test_an_installed_source_is_known_by_its_version():
    config = ingest.config_type.parse({"source": {"kind": "builtin", "name": "python_docs"}})
    assert ingest.external(config) == {"python": platform.python_version()}
