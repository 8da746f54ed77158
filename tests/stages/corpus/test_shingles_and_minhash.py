"""The vectorised shingles and signatures against naive Python, datasketch and brute-force exact Jaccard."""

import re
from itertools import combinations
from random import Random

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.corpus import minhash
from stages.corpus.clusters import UnionFind, link
from stages.corpus.shingles import SHINGLE_WORDS, jaccard, ngrams, shingles, words

NAIVE_WORD = re.compile(r"[\u3400-\u9fff\uf900-\ufaff〇]|[^\W_\u3400-\u9fff\uf900-\ufaff〇]+")
ALPHABET = "ab Z9_,。\n查询实例〇é"


def naive_words(text):
    return NAIVE_WORD.findall(text.lower())


def naive_shingles(text):
    found = naive_words(text)
    n = min(SHINGLE_WORDS, len(found))
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)} if found else set()


def naive_jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 0.0


@settings(max_examples=300, deadline=None)
@given(st.text(ALPHABET, max_size=80))
def test_words_are_cut_as_the_regular_expression_cuts_them(text):
    found = words(text)
    lowered = text.lower()
    assert [lowered[a:b] for a, b in zip(found.starts, found.ends, strict=True)] == naive_words(text)
    assert len(set(found.hashes.tolist())) == len(set(naive_words(text)))


@settings(max_examples=300, deadline=None)
@given(st.text(ALPHABET, max_size=80), st.text(ALPHABET, max_size=80))
def test_shingle_sets_have_the_naive_sets_size_and_similarity(a, b):
    assert len(shingles(a)) == len(naive_shingles(a))
    assert jaccard(shingles(a), shingles(b)) == pytest.approx(naive_jaccard(naive_shingles(a), naive_shingles(b)))


@pytest.mark.parametrize(
    ("a", "b"), [("Hello, WORLD", "hello world"), ("ＡＢＣ１２ 查询。", "abc12 查询"), ("a\n\nb", "a b")]
)
def test_case_width_and_punctuation_do_not_count(a, b):
    assert np.array_equal(shingles(a), shingles(b))


def test_a_chinese_sentence_is_many_words():
    assert len(words("该接口用于查询实例列表")) == 11
    assert jaccard(shingles("该接口用于查询实例列表"), shingles("该接口用于查询镜像列表")) > 0


def test_order_of_words_counts():
    assert not np.isin(ngrams(words("a b c d e").hashes), ngrams(words("e d c b a").hashes)).any()


def test_long_texts_hash_the_same_words_at_any_place():
    text = "the quick brown fox jumps over the lazy dog " * 20_000
    assert len(shingles(text)) == 9  # nine rotations
    assert np.isin(shingles("quick brown fox jumps over"), shingles(text)).all()


def test_signatures_equal_datasketch_to_the_bit():
    multipliers, offsets = minhash.permutations(128, seed=7)
    hashes = shingles("some words of a text that is long enough to have shingles 查询实例列表的接口")
    theirs = MinHash(num_perm=128, seed=7, scheme="affine32", hashfunc=lambda value: value)
    theirs.update_batch([int(h) & 0xFFFFFFFF for h in hashes])
    assert np.array_equal(minhash.signature(hashes, multipliers, offsets), theirs.hashvalues)


def test_signatures_estimate_jaccard_within_their_standard_error():
    """256 permutations: standard error sqrt(s(1-s)/256) <= 0.031; the mean of 60 pairs is within 4 of it / sqrt(60)."""
    rng, parameters = np.random.default_rng(0), minhash.permutations(256, seed=1)
    errors = []
    for _ in range(60):
        pool = rng.integers(0, 2**63, 400).astype(np.uint64)
        cut = int(rng.integers(1, 200))
        a, b = np.unique(pool[: 400 - cut]), np.unique(pool[cut:])
        agree = (minhash.signature(a, *parameters) == minhash.signature(b, *parameters)).mean()
        errors.append(agree - jaccard(a, b))
    assert abs(np.mean(errors)) < 4 * 0.031 / 60**0.5
    assert np.abs(errors).max() < 4.5 * 0.031


def planted(rng, n=250):
    """Chinese and English base texts and edited copies of each: the indexed texts."""
    english = [f"word{i}" for i in range(600)]
    chinese = [chr(0x4E00 + i) for i in range(900)]
    texts = []
    for number in range(n):
        vocabulary, joint = (english, " ") if number % 2 else (chinese, "")
        base = [rng.choice(vocabulary) for _ in range(rng.randint(40, 160))]
        texts.append(joint.join(base))
        for _ in range(rng.randint(0, 2)):
            rate = rng.choice([0.0, 0.01, 0.02, 0.04, 0.1])
            texts.append(joint.join(rng.choice(vocabulary) if rng.random() < rate else word for word in base))
    return texts


def test_planted_copies_are_found_with_full_precision_and_nearly_full_recall():
    """Against the exact Jaccard of all pairs at 0.8: precision 1 by construction, recall >= 0.97 (0.997 expected)."""
    texts = planted(Random(5))
    sets = [naive_shingles(text) for text in texts]
    true = {(i, j) for i, j in combinations(range(len(texts)), 2) if naive_jaccard(sets[i], sets[j]) >= 0.8}
    parameters = minhash.permutations(128, seed=1)
    hashes = [shingles(text) for text in texts]
    signatures = np.stack([minhash.signature(h, *parameters) for h in hashes])
    found = {
        pair for pair in minhash.candidate_pairs(signatures, 16, 8) if jaccard(hashes[pair[0]], hashes[pair[1]]) >= 0.8
    }
    assert len(true) > 80
    right = len(found & true)
    print(f"{len(true)} pairs, precision {right / len(found):.3f}, recall {right / len(true):.3f}")
    assert found <= true
    assert right >= 0.97 * len(true)


def test_a_huge_bucket_costs_a_star_and_not_a_clique():
    signatures = np.ones((1000, 8), np.uint32)
    pairs = list(minhash.candidate_pairs(signatures, 1, 8))
    assert len(pairs) == 999
    groups = UnionFind(1000)
    link(groups, pairs, lambda a, b: True)
    assert groups.sets() == [list(range(1000))]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 19), st.integers(0, 19)), max_size=30))
def test_union_find_gives_the_connected_components(edges):
    groups = UnionFind(20)
    link(groups, edges, lambda a, b: True)
    labels = list(range(20))
    for _ in range(20):
        for a, b in edges:
            labels[a] = labels[b] = min(labels[a], labels[b])
    expected = {}
    for item, label in enumerate(labels):
        expected.setdefault(label, []).append(item)
    assert groups.sets() == [members for members in expected.values() if len(members) > 1]


def test_pairs_already_joined_are_not_verified_again():
    asked, joined = link(UnionFind(3), [(0, 1), (1, 2), (0, 2), (0, 1)], lambda a, b: True)
    assert (asked, joined) == (2, 2)
