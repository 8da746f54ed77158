"""Windows of whole documents: nothing that fits is cut, nothing is left out, no row has padding."""

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.tokens.loader import PackedLoader
from stages.tokens.packing import LongDocuments, pack, whole_documents
from stages.tokens.shards import ShardWriter, write_index

LENGTHS = st.lists(st.integers(2, 60), min_size=1, max_size=40)


@settings(max_examples=100, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=40), shuffled=st.booleans())
def test_best_fit_places_every_item_once_and_leaves_one_row_half_empty_at_most(lengths, shuffled):
    order = np.random.default_rng(0).permutation(len(lengths)).tolist() if shuffled else None
    rows = pack(lengths, 20, order)
    assert sorted(item for row in rows for item in row) == list(range(len(lengths)))
    filled = [sum(lengths[item] for item in row) for row in rows]
    assert all(total <= 20 for total in filled)
    assert sum(total <= 10 for total in filled) <= 1


def test_an_item_goes_where_it_leaves_least_room():
    assert pack([7, 5, 3, 2], 10) == [[0, 2], [1, 3]]
    assert pack([5, 7, 3], 10, order=[0, 1, 2]) == [[0], [1, 2]]


@settings(max_examples=150, deadline=None)
@given(lengths=LENGTHS, sequence_length=st.integers(4, 24), extra=st.integers(1, 2), seed=st.integers(0, 9))
def test_rows_are_full_and_hold_every_fitting_document_whole_and_every_token_as_a_target(
    lengths, sequence_length, extra, seed
):
    width = sequence_length + extra
    if sum(lengths) < width:
        return
    order = np.random.default_rng(seed).permutation(len(lengths))
    spans = whole_documents(np.array(lengths), sequence_length, extra, 0.5, order)
    rows = [spans.row(number) for number in range(len(spans))]
    assert all(sum(length for _, length in row) == width for row in rows)
    read = [set(range(start, start + length)) for row in rows for start, length in row]
    starts = np.cumsum([0, *lengths])
    assert set().union(*read) == set(range(starts[-1]))
    for start, length in zip(starts, lengths, strict=False):
        whole = set(range(start, start + length))
        if length <= width:
            assert any(whole <= span for span in read)  # one span: it is never cut
        elif length > width:
            inside = [min(span) for span in read if span <= whole and len(span) == width]
            assert inside[:1] == [start]


@given(lengths=LENGTHS, seed=st.integers(0, 9))
def test_the_long_rows_come_first_and_begin_with_a_long_text(lengths, seed):
    if sum(lengths) < 17:
        return
    spans = whole_documents(np.array(lengths), 16, 1, 0.5, np.random.default_rng(seed).permutation(len(lengths)))
    heads = [spans.row(number)[0][1] for number in range(len(spans))]
    assert all(head >= 8.5 for head in heads[: spans.n_long])
    assert all(head < 8.5 for head in heads[spans.n_long :])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two shards of documents of 2 to 100 tokens; token values count up, so a token is its own position."""
    folder, rng, value, parts = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0), 0, []
    for shard in range(2):
        writer = ShardWriter(folder, shard, 60_000)
        for number, length in enumerate([*rng.integers(2, 9, 60), *rng.integers(30, 100, 8)]):
            names = {"language": "zh", "domain": "d", "source": "s", "bytes": 1}
            writer.add(range(value, value + length), "train", id=f"{shard}/{number}", **names)
            value += int(length)
        parts.append(writer.close())
    write_index(folder, parts, 60_000)
    return folder


def loader(corpus, documents, **changes):
    values = {"split": "train", "sequence_length": 32, "batch_size": 4, "seed": 7, "documents": documents}
    return PackedLoader(corpus, **(values | changes))


def test_a_row_numbers_its_documents_in_the_order_in_which_they_come(corpus):
    batches = loader(corpus, LongDocuments())
    for batch in islice(batches, 20):
        for tokens, documents in zip(batch["tokens_BT"], batch["document_BT"], strict=True):
            assert documents.diff().min() >= 0
            assert documents.diff().max() <= 1
            for number in range(int(documents.max()) + 1):
                inside = tokens[documents == number]
                assert torch.equal(inside, torch.arange(inside[0], inside[0] + len(inside)))  # one stretch of text
                owners = {batches.shards.document_at(int(token)).id for token in inside}
                assert len(owners) == 1


@pytest.mark.parametrize("share", [0.25, 0.5, 1.0, None])
def test_of_all_windows_read_the_share_asked_for_is_long(corpus, share):
    batches = loader(corpus, LongDocuments(windows=share), batch_size=1)
    heads = {int(batches.read(np.array([window]))["position_B"][0]) for window in range(batches.n_long)}
    read = [int(batch["position_B"][0]) in heads for batch in islice(batches, 400)]
    wanted = batches.n_long / batches.n_windows if share is None else share
    for n in (1, 10, 77, 400):
        assert sum(read[:n]) == int(n * wanted)


def test_each_kind_of_window_is_read_once_before_any_is_read_again(corpus):
    batches = loader(corpus, LongDocuments(windows=None), batch_size=1)
    epochs = [[tuple(b["tokens_BT"][0].tolist()) for b in islice(batches, batches.n_windows)] for _ in range(2)]
    assert len(set(epochs[0])) == len(set(epochs[1])) == batches.n_windows
    assert set(epochs[0]) == set(epochs[1])
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("world", [2, 4])
def test_whole_documents_are_the_same_on_any_number_of_ranks_and_after_a_resume(corpus, world):
    whole = loader(corpus, LongDocuments())
    ranks = [loader(corpus, LongDocuments(), rank=rank, world=world) for rank in range(world)]
    for _ in islice(whole, 3):
        pass
    for rank in ranks:
        rank.load_state_dict(whole.state_dict())
    for batch, *parts in islice(zip(whole, *ranks, strict=True), 10):
        for name, tensor in batch.items():
            assert torch.equal(tensor, torch.cat([part[name] for part in parts]))


def test_another_seed_packs_other_neighbours(corpus):
    rows = []
    for seed in (1, 2):
        batches = loader(corpus, LongDocuments(), seed=seed, batch_size=1)
        rows.append({tuple(batch["tokens_BT"][0].tolist()) for batch in islice(batches, batches.n_windows)})
    assert rows[0] != rows[1]


def test_every_token_knows_how_long_its_document_is(corpus):
    batches = loader(corpus, LongDocuments())
    for window in range(batches.n_windows):
        tokens = batches.read(np.array([window]))["tokens_BT"][0].tolist()
        expected = [batches.shards.document_at(token).length for token in tokens]
        assert batches.document_lengths(window).tolist() == expected
