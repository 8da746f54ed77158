"""Packed shards and the loader: every token's document, exact resume, the same batch on any number of ranks."""

import json
from itertools import islice

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.errors import ConfigError, InputError
from stages.tokens.loader import PackedLoader, permute
from stages.tokens.shards import ShardWriter, TokenShards, write_index


def write(directory, shards, vocab_size=1000):
    """`shards`: lists of document lengths. Token values count up over the split, so a position is its own token."""
    directory.mkdir(exist_ok=True)
    parts, value = [], 0
    for number, lengths in enumerate(shards):
        writer = ShardWriter(directory, number, vocab_size)
        for index, length in enumerate(lengths):
            names = {"id": f"{number}/{index}", "language": "zh", "domain": "math", "source": "s", "bytes": 3 * length}
            writer.add([(value + i) % vocab_size for i in range(length)], "train", **names)
            value += length
        parts.append(writer.close())
    write_index(directory, parts, vocab_size)
    return directory


@settings(max_examples=60, deadline=None)
@given(shards=st.lists(st.lists(st.integers(2, 9), max_size=5), min_size=1, max_size=4).filter(any))
def test_every_position_names_its_document(shards, tmp_path_factory):
    tokens = TokenShards(write(tmp_path_factory.mktemp("tokens"), shards), "train")
    owners = [f"{s}/{d}" for s, lengths in enumerate(shards) for d, n in enumerate(lengths) for _ in range(n)]
    assert tokens.n_tokens == len(owners)
    assert [tokens.document_at(p).id for p in range(tokens.n_tokens)] == owners
    assert tokens.read(0, tokens.n_tokens).tolist() == list(range(len(owners)))
    for reference, ids in tokens.documents():
        assert tokens.document_at(reference.start) == reference
        assert tokens.document_at(reference.start + reference.length - 1) == reference
        assert ids[0] == reference.start
        assert reference.bytes == 3 * reference.length


@pytest.mark.parametrize("vocab_size", [65_535, 65_536, 129_280])
def test_ids_fit_the_files_at_every_vocabulary_size(tmp_path, vocab_size):
    writer = ShardWriter(tmp_path, 0, vocab_size)
    names = {"id": "a", "language": "en", "domain": "d", "source": "s", "bytes": 1}
    writer.add([0, vocab_size - 1], "train", **names)
    write_index(tmp_path, [writer.close()], vocab_size)
    tokens = TokenShards(tmp_path, "train")
    assert tokens.read(0, 2).tolist() == [0, vocab_size - 1]
    assert tokens.read(0, 2).dtype.itemsize == (2 if vocab_size < 2**16 else 4)


def test_a_shard_without_documents_of_the_split_is_passed_over(tmp_path):
    parts = []
    for number, split in enumerate(["train", "validation", "train"]):
        writer = ShardWriter(tmp_path, number, 1000)
        writer.add([number] * 3, split, id=str(number), language="en", domain="d", source="s", bytes=1)
        parts.append(writer.close())
    write_index(tmp_path, parts, 1000)
    assert TokenShards(tmp_path, "train").read(0, 6).tolist() == [0, 0, 0, 2, 2, 2]
    assert TokenShards(tmp_path, "validation").document_at(2).id == "1"


def test_reading_past_the_end_is_an_error(tmp_path):
    tokens = TokenShards(write(tmp_path, [[4]]), "train")
    with pytest.raises(IndexError):
        tokens.read(2, 3)
    with pytest.raises(IndexError):
        tokens.document_at(4)


def test_a_missing_split_is_named(tmp_path):
    with pytest.raises(InputError, match="validation"):
        TokenShards(write(tmp_path, [[4]]), "validation")


@settings(max_examples=100, deadline=None)
@given(n=st.integers(1, 5000), key=st.integers(0, 2**70))
def test_the_shuffle_is_a_permutation(n, key):
    order = permute(np.arange(n), n, key)
    assert sorted(order.tolist()) == list(range(n))


def test_the_shuffle_leaves_no_visible_order():
    """Rank correlation of place and value, and of neighbours, within 4 standard errors of none."""
    n = 4000
    order = permute(np.arange(n), n, key=3)
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 4 / n**0.5
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 4 / n**0.5


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    rng = np.random.default_rng(0)
    return write(tmp_path_factory.mktemp("corpus"), [rng.integers(2, 40, 30).tolist() for _ in range(3)], 60_000)


def loader(corpus, **changes):
    return PackedLoader(corpus, **({"split": "train", "sequence_length": 16, "batch_size": 4, "seed": 7} | changes))


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_rows_are_consecutive_tokens_and_number_their_documents(corpus):
    batches = loader(corpus, extra=2)
    for batch in islice(batches, 12):
        for tokens, documents, position in zip(
            *(batch[k] for k in ("tokens_BT", "document_BT", "position_B")), strict=True
        ):
            assert tokens.tolist() == list(range(position, position + 18))
            names = [batches.shards.document_at(p).id for p in range(position, position + 18)]
            assert documents.tolist() == [sorted(set(names), key=names.index).index(name) for name in names]


def test_one_epoch_reads_every_window_once_and_the_next_in_another_order(corpus):
    batches = loader(corpus, batch_size=1)
    epochs = [[int(b["position_B"][0]) for b in islice(batches, batches.n_windows)] for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [16 * i for i in range(batches.n_windows)]
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("steps", [0, 1, 17, 200])
def test_a_resumed_loader_continues_exactly(corpus, steps):
    first, second = loader(corpus), loader(corpus)
    for _ in islice(first, steps):
        pass
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for ours, theirs in zip(islice(first, 10), islice(second, 10), strict=True):
        assert same(ours, theirs)


@pytest.mark.parametrize("world", [2, 4])
def test_the_global_batch_is_the_same_on_any_number_of_ranks(corpus, world):
    ranks = [loader(corpus, rank=rank, world=world) for rank in range(world)]
    for batch, *parts in islice(zip(loader(corpus), *ranks, strict=True), 15):
        assert same(batch, {name: torch.cat([part[name] for part in parts]) for name in batch})


def test_a_run_resumes_on_another_number_of_ranks(corpus):
    whole = loader(corpus)
    for _ in islice(whole, 5):
        pass
    parts = [loader(corpus, rank=rank, world=2) for rank in range(2)]
    for part in parts:
        part.load_state_dict(whole.state_dict())
    rows = [next(part)["tokens_BT"] for part in parts]
    assert torch.equal(next(whole)["tokens_BT"], torch.cat(rows))


def test_a_state_of_other_data_is_refused(corpus):
    state = loader(corpus, seed=8).state_dict()
    with pytest.raises(ConfigError, match="seed=8"):
        loader(corpus).load_state_dict(state)


def test_a_batch_that_does_not_divide_is_refused(corpus):
    with pytest.raises(ConfigError, match="batch_size=4"):
        loader(corpus, world=3)


def test_a_split_shorter_than_a_window_is_refused(corpus):
    with pytest.raises(ConfigError, match="sequence_length=100000"):
        loader(corpus, sequence_length=100_000)


def test_the_index_is_readable_by_anyone(corpus):
    table = pa.parquet.read_table(corpus / "index.parquet")
    assert table.column_names == ["id", "language", "domain", "source", "split", "shard", "offset", "length", "bytes"]
