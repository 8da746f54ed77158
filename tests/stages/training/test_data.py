"""Training windows with planted lookups: as many as asked for, and the same on any number of ranks."""

import numpy as np
import pytest
import torch

from infra.errors import ConfigError
from stages.tokens.packing import LongDocuments
from stages.training.data import TokenWindows

LENGTH = 128


def windows(tokens_dir, lookups, **changes):
    return TokenWindows(str(tokens_dir), LENGTH, lookups=lookups, **changes)


def test_the_share_of_windows_asked_for_has_lookups_and_the_others_are_untouched(tokens_dir, tokenizer):
    planted, plain = (windows(tokens_dir, share).open(4, seed=0, rank=0, world=1) for share in (0.4, 0.0))
    changed = []
    for index in range(60):
        ours, theirs = planted.batch(index).tokens_BT, plain.batch(index).tokens_BT
        assert ours.shape == theirs.shape
        for row, text in zip(ours, theirs, strict=True):
            changed.append(not torch.equal(row, text))
            asks = "What does box" in tokenizer.decode(row.tolist()) or "号箱里是什么" in tokenizer.decode(row.tolist())
            assert asks == changed[-1]
    assert np.mean(changed) == pytest.approx(0.4, abs=4 * (0.4 * 0.6 / 240) ** 0.5)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("documents", [None, LongDocuments()])
def test_planted_windows_are_the_same_on_any_number_of_ranks(tokens_dir, world, documents):
    data = windows(tokens_dir, 0.5, documents=documents, mask_documents=True)
    whole = data.open(4, seed=3, rank=0, world=1)
    ranks = [data.open(4, seed=3, rank=rank, world=world) for rank in range(world)]
    for index in range(5):
        batch, parts = whole.batch(index), [rank.batch(index) for rank in ranks]
        assert torch.equal(batch.tokens_BT, torch.cat([part.tokens_BT for part in parts]))
        assert torch.equal(batch.document_BT, torch.cat([part.document_BT for part in parts]))


def test_a_window_with_lookups_is_one_document_so_that_the_question_sees_the_fact(tokens_dir):
    batch = windows(tokens_dir, 1.0, mask_documents=True).open(8, seed=0, rank=0, world=1).batch(0)
    assert not batch.document_BT.any()


def test_a_window_without_room_is_refused_before_anything_is_read(tokens_dir):
    with pytest.raises(ConfigError, match="a window of 32 tokens has no room for a lookup: set lookups=0"):
        TokenWindows(str(tokens_dir), 32, lookups=0.1).open(4, seed=0, rank=0, world=1)
