"""MinHash signatures and the candidate pairs that share a band of them (Broder 1997; Leskovec et al., section 3.4).

A signature is datasketch's `affine32` scheme to the bit, for all shingles of a document at once: the minimum over the
shingles h of a·fmix32(h) + b modulo 2^32, one (a, b) for each of `n_permutations`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from stages.corpus.shingles import mix

CLIQUE = 32  # a bucket up to this size gives all its pairs; a larger one (templated text) a star around its first


def permutations(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """datasketch's multipliers and offsets, uint32 [n] each."""
    from datasketch import MinHash

    multipliers, offsets = MinHash(num_perm=n, seed=seed, scheme="affine32").permutations
    return multipliers, offsets


def signature(shingles: np.ndarray, multipliers: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """uint32 [n] of a set of shingle hashes; all ones for an empty set."""
    if not len(shingles):
        return np.full(len(multipliers), 0xFFFFFFFF, np.uint32)
    hashes = _fmix32(shingles.astype(np.uint32))
    return (multipliers[:, None] * hashes[None, :] + offsets[:, None]).min(axis=1)


def candidate_pairs(signatures: np.ndarray, bands: int, rows: int) -> Iterator[tuple[int, int]]:
    """Pairs i < j of documents that agree in all `rows` of some band of `signatures` [N, >= bands·rows].

    A pair may come several times. Chance of a pair of Jaccard similarity s: 1 - (1 - s^rows)^bands.
    """
    assert signatures.shape[1] >= bands * rows, (signatures.shape, bands, rows)
    for band in range(bands):
        key = np.zeros(len(signatures), np.uint64)
        for row in range(band * rows, (band + 1) * rows):
            key = mix(key * np.uint64(31) + signatures[:, row].astype(np.uint64))
        order = np.argsort(key, kind="stable")  # stable: a bucket lists its documents in order
        sorted_key = key[order]
        edges = np.flatnonzero(np.r_[True, sorted_key[1:] != sorted_key[:-1], True])
        for first, last in pairwise(edges):
            if last - first > 1:
                yield from _bucket_pairs(order[first:last].tolist())


def _bucket_pairs(bucket: list[int]) -> Iterator[tuple[int, int]]:
    hubs = bucket if len(bucket) <= CLIQUE else bucket[:1]
    for place, hub in enumerate(hubs):
        for other in bucket[place + 1 :]:
            yield hub, other


def _fmix32(hashes: np.ndarray) -> np.ndarray:
    hashes = (hashes ^ (hashes >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    hashes = (hashes ^ (hashes >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return hashes ^ (hashes >> np.uint32(16))
