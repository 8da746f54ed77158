"""Train tokenizer: a byte-level BPE on the mixed corpus, with DeepSeek's cuts and special tokens (`stages.tokens.bpe`).

The merges are learnt from a hash sample of the documents; compression is measured on others, held out by the same hash.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from infra.config import Config
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus.document import Document, fraction, read_documents
from stages.tokens import bpe

HELD_OUT = 0.02
MAX_HELD_OUT_BYTES = 1 << 20  # a language


class TrainTokenizerConfig(Config):
    vocab_size: int = Field(4096, ge=300, le=2**20, description="marks, bytes and merges; 128,000 in V3")
    digits: Literal["single", "triples"] = Field("single", description="cut numbers to digits (V2) or threes (V3)")
    min_frequency: int = Field(2, ge=1, description="pairs rarer than this are not merged")
    tool_marks: bool = Field(False, description="ids for the marks of tool calls, as V3 has; else they are spelt out")
    max_bytes: int | None = Field(None, ge=1, description="bytes of text to learn from, sampled; all when unset")
    seed: int = 0


@stage(version=2, takes={"documents": "documents"}, makes="tokenizer")
def train_tokenizer(config: TrainTokenizerConfig, inputs: Inputs, ctx: Context) -> dict:
    """Learn a byte-level BPE vocabulary on both languages."""
    learn, held_out = [], []
    for document in read_documents(inputs["documents"].path):
        (held_out if fraction(document.id, "tokenizer") < HELD_OUT else learn).append(document)
    if not learn:
        raise InputError("train_tokenizer was given no document: ingest more text, or loosen the filter")
    learn = _sample(learn, config)
    options = config.vocab_size, config.digits, config.min_frequency, config.tool_marks
    tokenizer = bpe.train((document.text for document in learn), *options)
    tokenizer.save(ctx.out)
    return {
        "vocab_size": tokenizer.vocab_size,
        "documents": len(learn),
        "bytes": sum(document.bytes for document in learn),
        **_compression(tokenizer, held_out),
    }


def _sample(documents: list[Document], config: TrainTokenizerConfig) -> list[Document]:
    if config.max_bytes is None:
        return documents
    chosen, left = [], config.max_bytes
    for document in sorted(documents, key=lambda d: (fraction(d.id, f"vocabulary {config.seed}"), d.id)):
        if document.bytes <= left:
            chosen.append(document)
            left -= document.bytes
    return chosen


def _compression(tokenizer: bpe.Tokenizer, held_out: list[Document]) -> dict[str, float]:
    """Characters and bytes a token on held-out documents, by language."""
    texts: dict[str, list[str]] = {}
    sizes: dict[str, int] = {}
    for document in held_out:
        if sizes.get(document.language, 0) < MAX_HELD_OUT_BYTES:
            texts.setdefault(document.language, []).append(document.text)
            sizes[document.language] = sizes.get(document.language, 0) + document.bytes
    measured = {}
    for language in sorted(texts):
        tokens = sum(map(len, tokenizer.encode_batch(texts[language])))
        characters = sum(map(len, texts[language]))
        measured[f"characters_per_token_{language}"] = round(characters / max(tokens, 1), 3)
        measured[f"bytes_per_token_{language}"] = round(sizes[language] / max(tokens, 1), 3)
    return measured
