"""Deduplicate: keep one document of each group of copies, over all sources at once.

Exact copies agree after folding case, width and white space. Near copies have a Jaccard similarity of `threshold` or
more between their sets of 5-word shingles. MinHash bands only propose pairs, more than needed (16 bands of 8 find 0.997
of the pairs at 0.8); each is then verified on the shingles themselves, so no pair is joined on an estimate.

Groups are transitive: a chain of near copies keeps one document, the longest. `duplicates.parquet` names what was
removed and for which document. Memory: 8 bytes a shingle and 4·bands·rows bytes a document, about twice the text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.config import Config
from infra.stage import Context, Inputs, many, stage
from stages.corpus import minhash
from stages.corpus.clusters import UnionFind, link
from stages.corpus.document import read_shard, shard_paths, write_shard
from stages.corpus.normalize import exact_key
from stages.corpus.parallel import bytes_of, over_shards
from stages.corpus.plots import bars
from stages.corpus.shingles import jaccard, shingles

DUPLICATES = pa.schema([("id", pa.string()), ("kept", pa.string()), ("kind", pa.string()), ("jaccard", pa.float32())])


class DeduplicateConfig(Config):
    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity from which two documents are near copies")
    bands: int = Field(16, ge=1, description="more bands find more of the pairs just above the threshold")
    rows: int = Field(8, ge=1, description="signature values a band: fewer propose more pairs")
    exact_only_domains: tuple[str, ...] = Field(
        ("math",), description="templated on purpose: only exact copies are removed there"
    )
    seed: int = 1


@dataclass(frozen=True)
class Sketch:
    """What deduplication must know of one shard's documents."""

    ids: list[str]
    sizes: list[int]  # characters
    keys: list[bytes]  # digest of the exact key
    shingles: list[np.ndarray]  # sorted distinct hashes; empty where only exact copies count
    signatures: np.ndarray  # uint32 [documents, bands * rows]


@stage(version=1, takes={"documents": many("documents")}, makes="documents")
def deduplicate(config: DeduplicateConfig, inputs: Inputs, ctx: Context) -> dict:
    """Remove exact and near-duplicate documents across all sources."""
    paths = [path for artifact in inputs["documents"] for path in shard_paths(artifact.path)]
    size = bytes_of(paths)
    parameters = minhash.permutations(config.bands * config.rows, config.seed)
    sketches = list(over_shards(partial(sketch, config.exact_only_domains, parameters), paths, ctx, size))
    ids = [id for part in sketches for id in part.ids]
    sizes = [size for part in sketches for size in part.sizes]
    hashes = [array for part in sketches for array in part.shingles]
    signatures = np.concatenate([part.signatures for part in sketches])

    def prefer(documents: list[int]) -> int:
        return min(documents, key=lambda document: (-sizes[document], ids[document]))

    removed: dict[int, tuple[int, str]] = {}
    copies: dict[bytes, list[int]] = {}
    for document, key in enumerate(key for part in sketches for key in part.keys):
        copies.setdefault(key, []).append(document)
    exact = [group for group in copies.values() if len(group) > 1]
    for group in exact:
        kept = prefer(group)
        removed |= {document: (kept, "exact") for document in group if document != kept}

    left = [document for document in range(len(ids)) if document not in removed and len(hashes[document])]
    groups = UnionFind(len(left))
    pairs = minhash.candidate_pairs(signatures[left], config.bands, config.rows)
    asked, joined = link(groups, pairs, lambda a, b: jaccard(hashes[left[a]], hashes[left[b]]) >= config.threshold)
    near = [[left[member] for member in group] for group in groups.sets()]
    for group in near:
        kept = prefer(group)
        removed |= {document: (kept, "near") for document in group if document != kept}

    tasks, first = [], 0
    for number, (path, part) in enumerate(zip(paths, sketches, strict=True)):
        last = first + len(part.ids)
        tasks.append((number, path, [row - first for row in range(first, last) if row not in removed]))
        first = last
    kept_bytes = sum(over_shards(partial(_keep, ctx.out), tasks, ctx, size))
    for document, (kept, kind) in removed.items():
        removed[document] = (removed[kept][0] if kept in removed else kept, kind)  # name what is still there
    similarity = {d: jaccard(hashes[d], hashes[k]) if len(hashes[d]) else 1.0 for d, (k, _) in removed.items()}
    table = pa.table(
        [
            [ids[document] for document in sorted(removed)],
            [ids[removed[document][0]] for document in sorted(removed)],
            [removed[document][1] for document in sorted(removed)],
            [similarity[document] for document in sorted(removed)],
        ],
        schema=DUPLICATES,
    )
    pq.write_table(table, ctx.out / "duplicates.parquet", compression="zstd")
    _plot(ctx.out / "cluster_sizes.png", exact, near)
    kinds = Counter(kind for _, kind in removed.values())
    return {
        "documents_in": len(ids),
        "documents": len(ids) - len(removed),
        "bytes": kept_bytes,
        "removed_exact": kinds["exact"],
        "removed_near": kinds["near"],
        "removed_share": round(len(removed) / max(len(ids), 1), 4),
        "pairs_verified": asked,
        "pairs_joined": joined,
        "largest_group": max(map(len, exact + near), default=1),
    }


def sketch(exact_only: tuple[str, ...], parameters: tuple[np.ndarray, np.ndarray], path: Path) -> Sketch:
    """Keys, shingles and signatures of one shard; a pure function of the shard and its arguments."""
    documents = read_shard(path)
    none = np.zeros(0, np.uint64)
    hashes = [none if d.domain in exact_only else shingles(d.text) for d in documents]
    signatures = np.empty((len(documents), len(parameters[0])), np.uint32)
    for row, array in enumerate(hashes):
        signatures[row] = minhash.signature(array, *parameters)
    return Sketch(
        ids=[d.id for d in documents],
        sizes=[len(d.text) for d in documents],
        keys=[hashlib.blake2b(exact_key(d.text).encode(), digest_size=16).digest() for d in documents],
        shingles=hashes,
        signatures=signatures,
    )


def _keep(out: Path, task: tuple[int, Path, list[int]]) -> int:
    """Write what one shard keeps; return its bytes."""
    number, path, rows = task
    documents = read_shard(path)
    kept = [documents[row] for row in rows]
    write_shard(out, number, kept)
    return sum(document.bytes for document in kept)


def _plot(path: Path, exact: list[list[int]], near: list[list[int]]) -> None:
    bounds = (2, 3, 5, 9, 17, 65, 257)
    names = [f"{low}-{high - 1}" if high - low > 1 else str(low) for low, high in pairwise(bounds)]
    names.append(f"{bounds[-1]}+")

    def histogram(groups: list[list[int]]) -> dict[str, float]:
        places = np.searchsorted(bounds, [len(group) for group in groups], "right") - 1
        return {name: int((places == place).sum()) for place, name in enumerate(names)}

    bars(path, "Groups of duplicates by size", {"exact": histogram(exact), "near": histogram(near)}, "groups")
