"""The graph of artifacts: edges run from an input to what was made of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from infra.artifact import Manifest

if TYPE_CHECKING:
    from infra.store import ArtifactStore


@dataclass(frozen=True)
class Edge:
    """`child` was made from `parent`, which it took in `role`."""

    parent: str
    child: str
    role: str


@dataclass(frozen=True)
class Lineage:
    """A part of the graph. Parents come before children; an id without a manifest was collected since."""

    nodes: dict[str, Manifest | None]
    edges: tuple[Edge, ...]

    def to_json(self, tags: Mapping[str, str]) -> dict[str, Any]:
        """`{nodes, edges}` with JSON values only."""
        names: dict[str, list[str]] = {}
        for name, artifact_id in sorted(tags.items()):
            names.setdefault(artifact_id, []).append(name)
        nodes = []
        for artifact_id, manifest in self.nodes.items():
            node: dict[str, Any] = {"id": artifact_id, "stage": artifact_id.partition("/")[0], "missing": not manifest}
            if manifest:
                created = manifest.created.isoformat()
                node |= {"kind": manifest.kind, "created": created, "summary": manifest.summary}
            nodes.append(node | {"tags": names.get(artifact_id, [])})
        return {"nodes": nodes, "edges": [{"from": e.parent, "to": e.child, "role": e.role} for e in self.edges]}


def ancestors(manifests: Mapping[str, Manifest], ids: Iterable[str]) -> set[str]:
    """The ids and everything they were made from."""
    seen: set[str] = set()
    waiting = list(ids)
    while waiting:
        artifact_id = waiting.pop()
        if artifact_id not in seen:
            seen.add(artifact_id)
            if artifact_id in manifests:
                waiting += manifests[artifact_id].inputs.values()
    return seen


def descendants(manifests: Mapping[str, Manifest], ids: Iterable[str]) -> set[str]:
    """The ids and everything made from them."""
    children: dict[str, list[str]] = {}
    for manifest in manifests.values():
        for parent in manifest.inputs.values():
            children.setdefault(parent, []).append(manifest.id)
    seen: set[str] = set()
    waiting = list(ids)
    while waiting:
        artifact_id = waiting.pop()
        if artifact_id not in seen:
            seen.add(artifact_id)
            waiting += children.get(artifact_id, [])
    return seen


def lineage(store: ArtifactStore, ref: str, direction: Literal["up", "down", "both"] = "up") -> Lineage:
    """The graph above, below or around one artifact."""
    root = store.resolve(ref)
    manifests = {m.id: m for m in store.find()}
    members: set[str] = set()
    if direction in ("up", "both"):
        members |= ancestors(manifests, [root])
    if direction in ("down", "both"):
        members |= descendants(manifests, [root])
    edges = [
        Edge(parent, child, role)
        for child in members
        if child in manifests
        for role, parent in manifests[child].inputs.items()
        if parent in members
    ]
    return Lineage(
        {i: manifests.get(i) for i in _topological(members, edges)},
        tuple(sorted(edges, key=lambda e: (e.child, e.role))),
    )


def _topological(members: set[str], edges: list[Edge]) -> list[str]:
    parents: dict[str, set[str]] = {member: set() for member in members}
    for edge in edges:
        parents[edge.child].add(edge.parent)
    order: list[str] = []
    while parents:
        ready = sorted(member for member, waiting in parents.items() if not waiting)
        assert ready, f"lineage has a cycle among {sorted(parents)}"
        order += ready
        for member in ready:
            del parents[member]
        for waiting in parents.values():
            waiting.difference_update(ready)
    return order
