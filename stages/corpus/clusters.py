"""Verified pairs to clusters of duplicates: union-find, and which member a cluster keeps."""

from __future__ import annotations

from collections.abc import Callable, Iterable


class UnionFind:
    """Disjoint sets of range(n); the root of a set is its smallest member."""

    def __init__(self, n: int) -> None:
        self._parent = list(range(n))

    def find(self, item: int) -> int:
        parent = self._parent
        while parent[item] != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    def union(self, a: int, b: int) -> None:
        low, high = sorted((self.find(a), self.find(b)))
        self._parent[high] = low

    def sets(self) -> list[list[int]]:
        """Sets of two or more, each sorted, in the order of their roots."""
        members: dict[int, list[int]] = {}
        for item in range(len(self._parent)):
            members.setdefault(self.find(item), []).append(item)
        return [group for group in members.values() if len(group) > 1]


def link(sets: UnionFind, pairs: Iterable[tuple[int, int]], similar: Callable[[int, int], bool]) -> tuple[int, int]:
    """Join the pairs that are `similar`, without asking for pairs already joined: (pairs asked, pairs joined)."""
    asked: set[tuple[int, int]] = set()
    joined = 0
    for pair in pairs:
        if pair in asked or sets.find(pair[0]) == sets.find(pair[1]):
            continue
        asked.add(pair)
        if similar(*pair):
            sets.union(*pair)
            joined += 1
    return len(asked), joined
