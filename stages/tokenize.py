"""Tokenize: documents to packed token shards, split into training and validation by document.

A document is `BOS ids EOS`: the EOS ends what the model learns to end, and the BOS makes every text begin as every
prompt does. The split is a hash of the id without its copy number: no document that `mix` repeats is on both sides.
Shards are made side by side, one of each split from one documents shard.
"""

from __future__ import annotations

import shutil
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow as pa
from pydantic import Field

from infra.config import Config
from infra.errors import InputError
from infra.stage import Context, Inputs, stage
from stages.corpus.document import fraction, read_shard, shard_paths
from stages.corpus.parallel import bytes_of, over_shards
from stages.tokens.bpe import load_tokenizer
from stages.tokens.shards import SPLITS, TOKENIZER_FILES, ShardWriter, write_index

BATCH = 256  # documents encoded at a time


class TokenizeConfig(Config):
    validation_fraction: float = Field(0.01, gt=0, lt=1, description="share of documents kept for validation")
    seed: int = 0

    def split_of(self, id: str) -> str:
        original = id.partition("#")[0]
        return "validation" if fraction(original, f"split {self.seed}") < self.validation_fraction else "train"


@stage(version=1, takes={"documents": "documents", "tokenizer": "tokenizer"}, makes="tokens")
def tokenize(config: TokenizeConfig, inputs: Inputs, ctx: Context) -> dict:
    """Encode documents into packed shards with an index that names the document behind any token."""
    paths = shard_paths(inputs["documents"].path)
    tokenizer_path = inputs["tokenizer"].path
    vocab_size = load_tokenizer(tokenizer_path).vocab_size
    encode = partial(_encode_shard, config, tokenizer_path, ctx.out)
    parts = list(over_shards(encode, list(enumerate(paths)), ctx, bytes_of(paths)))
    write_index(ctx.out, parts, vocab_size)
    for name in TOKENIZER_FILES:
        shutil.copyfile(tokenizer_path / name, ctx.out / name)

    tokens: Counter[tuple[str, str]] = Counter()
    sizes: Counter[str] = Counter()
    index = pa.concat_tables(parts).select(["split", "language", "length", "bytes"])
    for split, language, length, size in zip(*(column.to_pylist() for column in index.columns), strict=True):
        tokens[split, language] += length
        sizes[language] += size
    for split in SPLITS:
        if not any(name == split for name, _ in tokens):
            raise InputError(
                f"no document fell into the {split} split: raise validation_fraction or tokenize more text"
            )
    languages = sorted(sizes)
    return {
        "vocab_size": vocab_size,
        "documents": index.num_rows,
        **{f"{split}_tokens": sum(n for (name, _), n in tokens.items() if name == split) for split in SPLITS},
        **{f"{split}_tokens_{language}": tokens[split, language] for split in SPLITS for language in languages},
        **{
            f"bytes_per_token_{language}": round(sizes[language] / sum(tokens[split, language] for split in SPLITS), 3)
            for language in languages
        },
    }


def _encode_shard(config: TokenizeConfig, tokenizer_path: Path, out: Path, task: tuple[int, Path]) -> pa.Table:
    """Write one shard's tokens; return its index rows."""
    number, path = task
    tokenizer = load_tokenizer(tokenizer_path)
    documents = read_shard(path)
    writer = ShardWriter(out, number, tokenizer.vocab_size)
    for start in range(0, len(documents), BATCH):
        batch = documents[start : start + BATCH]
        for document, ids in zip(batch, tokenizer.encode_batch([d.text for d in batch]), strict=True):
            writer.add(
                [tokenizer.bos, *ids, tokenizer.eos],
                config.split_of(document.id),
                id=document.id,
                language=document.language,
                domain=document.domain,
                source=document.source,
                bytes=document.bytes,
            )
    return writer.close()
