"""The graph of artifacts."""

from __future__ import annotations

from pathlib import Path

import pytest
from sample_stages import commit

from infra.lineage import Edge, lineage
from infra.store import ArtifactStore


@pytest.fixture
def diamond(store: ArtifactStore, tmp_path: Path) -> dict[str, str]:
    """top → left, right → bottom, and an artifact apart."""
    top = commit(store, tmp_path / "1", "top").id
    left = commit(store, tmp_path / "2", "left", inputs={"of": top}).id
    right = commit(store, tmp_path / "3", "right", inputs={"of": top}).id
    bottom = commit(store, tmp_path / "4", "bottom", inputs={"a": left, "b": right}).id
    apart = commit(store, tmp_path / "5", "apart").id
    return {"top": top, "left": left, "right": right, "bottom": bottom, "apart": apart}


@pytest.mark.parametrize(
    ("root", "direction", "members"),
    [
        ("bottom", "up", ["top", "left", "right", "bottom"]),
        ("left", "up", ["top", "left"]),
        ("left", "down", ["left", "bottom"]),
        ("left", "both", ["top", "left", "bottom"]),
        ("top", "down", ["top", "left", "right", "bottom"]),
        ("apart", "both", ["apart"]),
    ],
)
def test_lineage_goes_up_down_or_both_parents_first(
    root: str, direction: str, members: list[str], store: ArtifactStore, diamond: dict[str, str]
) -> None:
    graph = lineage(store, diamond[root], direction)
    assert [i.partition("/")[0] for i in graph.nodes] == members


def test_edges_carry_the_role(store: ArtifactStore, diamond: dict[str, str]) -> None:
    edges = lineage(store, diamond["bottom"]).edges
    assert Edge(diamond["right"], diamond["bottom"], "b") in edges
    assert len(edges) == 4


def test_a_collected_ancestor_stays_in_the_graph_as_missing(store: ArtifactStore, diamond: dict[str, str]) -> None:
    store.fs.rm(f"{store.root}/artifacts/{diamond['top']}", recursive=True)
    store.tag("kept", diamond["bottom"])
    drawn = lineage(store, "kept").to_json(store.tags())
    assert [(n["stage"], n["missing"]) for n in drawn["nodes"]] == [
        ("top", True), ("left", False), ("right", False), ("bottom", False)
    ]  # fmt: skip
    assert drawn["nodes"][-1]["tags"] == ["kept"]
    assert {"from": diamond["top"], "to": diamond["left"], "role": "of"} in drawn["edges"]
