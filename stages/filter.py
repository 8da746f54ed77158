"""Filter: drop documents that break a rule or that the quality classifier takes for spoiled text, and say which.

The classifier is taught inside the stage on a sample of the documents that pass the rules (`stages.corpus.quality`), so
nothing is downloaded and the corpus sets its own standard. `dropped.parquet` keeps every dropped document's id, reason
and beginning; `quality.bin` is the classifier.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from infra.config import Config
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus import quality
from stages.corpus.document import Document, fraction, read_shard, shard_paths, write_shard
from stages.corpus.parallel import bytes_of, over_shards
from stages.corpus.plots import bars
from stages.corpus.rules import CHINESE, CODE, ENGLISH, Limits, why_drop

MIN_TAUGHT = 100  # documents of a language below which a classifier would be noise
HELD_OUT = 0.2
EXCERPT = 200
DROPPED = pa.schema([(name, pa.string()) for name in ("id", "reason", "language", "domain", "source", "beginning")])


class FilterConfig(Config):
    en: Limits = Field(ENGLISH, title="English rules")
    zh: Limits = Field(CHINESE, title="Chinese rules")
    code: Limits = Field(CODE, title="Code rules")
    exempt_domains: tuple[str, ...] = Field(("math",), description="right by construction, and short: no rule applies")
    min_quality_en: float | None = Field(0.3, ge=0, le=1, description="least P(real); None: no classifier for English")
    min_quality_zh: float | None = Field(0.3, ge=0, le=1)
    quality_documents: int = Field(1500, ge=MIN_TAUGHT, description="documents a language that teach the classifier")
    seed: int = 1

    def limits(self, language: str) -> Limits | None:
        return {"en": self.en, "zh": self.zh, "code": self.code}.get(language)

    def min_quality(self, language: str) -> float | None:
        return {"en": self.min_quality_en, "zh": self.min_quality_zh}.get(language)


@stage(version=1, takes={"documents": "documents"}, makes="documents")
def filter(config: FilterConfig, inputs: Inputs, ctx: Context) -> dict:
    """Drop documents by rules and by a quality classifier, counting every reason."""
    paths = shard_paths(inputs["documents"].path)
    size = bytes_of(paths)
    model, measured = _teach(config, paths, ctx)
    judge = partial(_judge_shard, config, model, ctx.out)
    kept: Counter[str] = Counter()
    kept_bytes = 0
    dropped = []
    for languages, written, table in over_shards(judge, list(enumerate(paths)), ctx, size):
        kept += languages
        kept_bytes += written
        dropped.append(table)
    if not kept:
        raise InputError("filter dropped every document: loosen the limits of the language, see the drop reasons")
    table = pa.concat_tables(dropped)
    pq.write_table(table, ctx.out / "dropped.parquet", compression="zstd")
    reasons: dict[str, Counter[str]] = {}
    for language, reason in zip(table["language"].to_pylist(), table["reason"].to_pylist(), strict=True):
        reasons.setdefault(language, Counter())[reason] += 1
    total = sum(reasons.values(), Counter())
    ranked = {language: {r: reasons[language][r] for r, _ in total.most_common()} for language in sorted(reasons)}
    bars(ctx.out / "drop_reasons.png", "Documents dropped, by the first rule they break", ranked, "documents")
    return {
        "documents_in": sum(kept.values()) + table.num_rows,
        "documents": sum(kept.values()),
        "bytes": kept_bytes,
        **{f"kept_{language}": count for language, count in sorted(kept.items())},
        **{f"dropped_{language}": sum(counts.values()) for language, counts in sorted(reasons.items())},
        **{f"reason_{reason}": count for reason, count in total.most_common()},
        **{f"quality_accuracy_{language}": round(value, 4) for language, value in measured.items()},
    }


def why(config: FilterConfig, document: Document) -> str | None:
    """The rule that `document` breaks, by the limits of its language; None if none, or its domain is exempt."""
    if document.domain in config.exempt_domains:
        return None
    limits = config.limits(document.language)
    return "unknown_language" if limits is None else why_drop(document, limits)


def _teach(config: FilterConfig, paths: list[Path], ctx: Context) -> tuple[Path | None, dict[str, float]]:
    """Teach the classifier; its file, and its accuracy by language on held-out documents."""
    wanted = [language for language in ("en", "zh") if config.min_quality(language) is not None]
    sample: list[Document] = []
    for language in wanted:
        found = _sample(config, paths, language)
        sample += found if len(found) >= MIN_TAUGHT else []
    if not sample:
        return None, {}
    learned: dict[bool, list[tuple[str, str, str]]] = {False: [], True: []}
    for document in sample:
        held_out = fraction(document.id, "quality") < HELD_OUT
        learned[held_out].append((document.id, document.text, document.language))
    model = quality.train(quality.examples(learned[False], config.seed), ctx.scratch / "quality.txt", config.seed)
    path = ctx.out / "quality.bin"
    model.save_model(str(path))
    return path, quality.accuracy(model, quality.examples(learned[True], config.seed))


def _sample(config: FilterConfig, paths: list[Path], language: str) -> list[Document]:
    """Up to `quality_documents` documents that pass the rules, the same ones however the shards are cut."""
    candidates = [
        (fraction(document.id, f"teach {config.seed}"), document.id, document)
        for path in paths
        for document in read_shard(path)
        if document.language == language and document.domain not in config.exempt_domains
    ]
    chosen: list[Document] = []
    for _, _, document in sorted(candidates, key=lambda candidate: candidate[:2]):
        if len(chosen) == config.quality_documents:
            break
        if why(config, document) is None:
            chosen.append(document)
    return chosen


def _judge_shard(
    config: FilterConfig, model: Path | None, out: Path, task: tuple[int, Path]
) -> tuple[Counter[str], int, pa.Table]:
    """Write what one shard keeps; (kept by language, bytes kept, the dropped)."""
    number, path = task
    documents = read_shard(path)
    reasons = [why(config, document) for document in documents]
    if model is not None:
        asked = [
            row
            for row, document in enumerate(documents)
            if reasons[row] is None
            and config.min_quality(document.language) is not None
            and document.domain not in config.exempt_domains
        ]
        scored = quality.scores(quality.load(model), [documents[row].text for row in asked])
        for row, score in zip(asked, scored, strict=True):
            if score < config.min_quality(documents[row].language):
                reasons[row] = "low_quality"
    kept = [document for document, reason in zip(documents, reasons, strict=True) if reason is None]
    write_shard(out, number, kept)
    rows = [
        (d.id, reason, d.language, d.domain, d.source, d.text[:EXCERPT])
        for d, reason in zip(documents, reasons, strict=True)
        if reason is not None
    ]
    columns = list(zip(*rows, strict=True)) or [[]] * len(DROPPED)
    table = pa.table([pa.array(column, pa.string()) for column in columns], schema=DROPPED)
    return Counter(d.language for d in kept), sum(d.bytes for d in kept), table
