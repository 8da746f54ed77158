"""Mix: choose how much of each language and domain a model reads, and shuffle it into one corpus.

A group (a language, a domain or both) has a weight: its share of the bytes. `budget_bytes` is spread by weight; a
group that is short of text is read up to `max_epochs` times, and what it still lacks goes to the others by weight.
Whole copies first, then a seeded sample. `mixture.json` records what was wanted, what there was and what was taken.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace

from pydantic import Field, model_validator

from infra.config import Config
from infra.errors import ConfigError, InputError
from infra.stage import Context, Inputs, stage
from stages.corpus.document import Document, fraction, read_documents, shard_bytes, write_documents
from stages.corpus.plots import bars

EVERY = "*"


class Share(Config):
    """The weight of one group; `*` stands for every language or domain. A document belongs to the first that fits."""

    language: str = EVERY
    domain: str = EVERY
    weight: float = Field(gt=0)


class MixConfig(Config):
    shares: tuple[Share, ...] = Field((), description="weights of the groups; empty keeps the corpus as it is")
    budget_bytes: int | None = Field(
        None, ge=1, description="bytes to read in all; unset: as much as the weights allow without a shortage"
    )
    max_epochs: float = Field(1.0, gt=0, description="how often one document may be read at most, on average")
    seed: int = 0

    @model_validator(mode="after")
    def _one_weight_a_group(self) -> MixConfig:
        names = [(share.language, share.domain) for share in self.shares]
        if repeated := [name for name, count in Counter(names).items() if count > 1]:
            raise ValueError(f"shares: {'/'.join(repeated[0])} has two weights; keep one")
        return self

    def share_of(self, document: Document) -> str | None:
        """The first entry that fits a document, as "language/domain"; None if none does."""
        if not self.shares:
            return f"{document.language}/{document.domain}"
        for share in self.shares:
            if share.language in (EVERY, document.language) and share.domain in (EVERY, document.domain):
                return f"{share.language}/{share.domain}"
        return None


@stage(version=1, takes={"documents": "documents"}, makes="documents")
def mix(config: MixConfig, inputs: Inputs, ctx: Context) -> dict:
    """Weigh languages and domains, and shuffle."""
    groups: dict[str, list[Document]] = {}
    unused = 0
    for document in read_documents(inputs["documents"].path):
        name = config.share_of(document)
        if name is None:
            unused += 1
        else:
            groups.setdefault(name, []).append(document)
    if not groups and not unused:
        raise InputError("mix was given no document: ingest more text, or loosen the filter")
    available = {name: sum(document.bytes for document in groups[name]) for name in sorted(groups)}
    weights = _weights(config, available)
    targets = allocate(weights, available, config.budget_bytes, config.max_epochs)
    chosen = [document for name in sorted(groups) for document in take(groups[name], targets[name], config.seed)]
    chosen.sort(key=lambda document: (fraction(document.id, f"shuffle {config.seed}"), document.id))
    total = sum(document.bytes for document in chosen)
    write_documents(ctx.out, chosen, shard_bytes(total))

    taken: Counter[str] = Counter()
    languages: Counter[str] = Counter()
    for document in chosen:
        name = config.share_of(document)
        taken[name] += document.bytes
        languages[document.language] += document.bytes
    rows = {
        name: {
            "weight": round(weights[name], 4),
            "available_bytes": available[name],
            "bytes": taken[name],
            "share": round(taken[name] / max(total, 1), 4),
            "epochs": round(taken[name] / max(available[name], 1), 3),
        }
        for name in available
    }
    (ctx.out / "mixture.json").write_text(json.dumps(rows, indent=2) + "\n")
    wanted = {name: 100 * row["weight"] for name, row in rows.items()}
    got = {name: 100 * row["share"] for name, row in rows.items()}
    bars(ctx.out / "shares.png", "Mixture by group", {"wanted": wanted, "taken": got}, "% of bytes")
    return {
        "documents": len(chosen),
        "bytes": total,
        "documents_without_a_share": unused,
        **{f"share_{name.replace('/', '_')}": row["share"] for name, row in rows.items()},
        **{f"epochs_{name.replace('/', '_')}": row["epochs"] for name, row in rows.items()},
        **{f"bytes_{language}": count for language, count in sorted(languages.items())},
    }


def _weights(config: MixConfig, available: Mapping[str, int]) -> dict[str, float]:
    """Weights that sum to one. ConfigError for a weight without a document."""
    if not config.shares:
        return {name: size / sum(available.values()) for name, size in available.items()}
    given = {f"{share.language}/{share.domain}": share.weight for share in config.shares}
    if empty := [name for name in given if name not in available]:
        have = ", ".join(available) or "no group"
        raise ConfigError(
            f"shares: no document is {' or '.join(empty)} (there is {have}); remove the share or ingest some"
        )
    return {name: given[name] / sum(given.values()) for name in available}


def allocate(
    weights: Mapping[str, float], available: Mapping[str, int], budget: int | None, max_epochs: float
) -> dict[str, int]:
    """Bytes to take of each group: the budget by weight, no group above `max_epochs` times what it has."""
    limits = {name: size * max_epochs for name, size in available.items()}
    if budget is None:
        budget = int(min(limits[name] / weights[name] for name in weights))
    targets: dict[str, float] = {}
    left, open_weights = float(budget), dict(weights)
    while open_weights:
        total = sum(open_weights.values())
        short = [name for name, weight in open_weights.items() if left * weight / total > limits[name]]
        if not short:
            targets |= {name: left * weight / total for name, weight in open_weights.items()}
            break
        for name in short:
            targets[name] = limits[name]
            del open_weights[name]
        left = budget - sum(targets.values())
    return {name: round(target) for name, target in targets.items()}


def take(documents: list[Document], target: int, seed: int) -> Iterator[Document]:
    """Documents of about `target` bytes: whole copies (ids "…#2" from the second on), then a seeded sample."""
    order = sorted(documents, key=lambda document: (fraction(document.id, f"mix {seed}"), document.id))
    size = sum(document.bytes for document in order)
    copy, left = 1, target
    while left > 0 and size > 0:
        whole = left >= size
        for document in order:
            if not whole and document.bytes > left:
                continue
            left -= document.bytes
            yield document if copy == 1 else replace(document, id=f"{document.id}#{copy}")
        if not whole:
            return
        copy += 1
