"""Two CPU cores, minutes for the whole line. Every number stands here, node by node."""

from __future__ import annotations

from flows.recipes import Recipe

CONFIGS: dict = {}


def recipe(name: str) -> Recipe:
    return Recipe(name, "two CPU cores, minutes", CONFIGS)
