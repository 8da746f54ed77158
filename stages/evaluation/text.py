"""Bits per byte of a checkpoint and of the byte trigram on the *same* validation documents, language by language."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from infra.metrics import Report
from stages.evaluation.ngram import fit
from stages.tokens.shards import TokenShards
from stages.training.checkpoint import load_model
from stages.training.distributed import process_group
from stages.training.validation import (
    PADDING,
    Validation,
    ValidationSet,
    bits_per_byte,
    text_group,
    validation_sets,
)


@dataclasses.dataclass(frozen=True)
class TextJob:
    checkpoint: str
    tokens: str
    sequence_length: int
    windows: int  # of each language
    trigram_bytes: int  # training text of each language that the trigram sees
    micro_batch: int = 16


def measure_text(job: TextJob, report: Report) -> list[dict[str, Any]]:
    """One row a language: bits per byte of the model and of a trigram fitted on that language's training text."""
    with process_group() as ranks:
        sets = validation_sets(Validation(job.tokens, job.sequence_length, job.windows, every=1))
        model = load_model(job.checkpoint, str(ranks.device))
        model_bits = bits_per_byte(model, sets, ranks, job.micro_batch)
        spelling = token_bytes(Path(job.tokens))
        rows = []
        # Ranks share the languages; each fits on its own. The caller joins the rows.
        for number in range(ranks.rank, len(sets), ranks.world):
            chosen = sets[number]
            training = training_text(Path(job.tokens), chosen.language, job.trigram_bytes, spelling)
            documents = validation_text(chosen, spelling)
            trigram = fit(training).bits(documents) / sum(map(len, documents)) if training else None
            rows.append(
                {
                    "language": chosen.language,
                    "bits_per_byte": model_bits[chosen.language],
                    "trigram_bits_per_byte": trigram,
                    "bytes": chosen.n_bytes,
                    "trigram_training_bytes": sum(map(len, training)),
                }
            )
            report(number + 1, len(sets), "languages")
    return rows


def token_bytes(directory: Path) -> list[bytes]:
    """The bytes that each id stands for; none for special tokens. Read from tokenizer.json, because a token may be
    a part of a character, which no decoder can show as text."""
    description = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    alphabet = {letter: byte for byte, letter in byte_letters().items()}
    vocabulary: dict[str, int] = description["model"]["vocab"]
    added = {token["id"]: token for token in description["added_tokens"]}
    spelling = [b""] * (max([*vocabulary.values(), *added]) + 1)
    for token, number in vocabulary.items():
        if number not in added:
            spelling[number] = bytes(alphabet[letter] for letter in token)
    for number, token in added.items():
        spelling[number] = b"" if token["special"] else token["content"].encode()
    return spelling


def byte_letters() -> dict[int, str]:
    """Byte-level BPE's printable letter for each byte (GPT-2): itself where printable, else the next free above 255."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in printable}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + position) for position, byte in enumerate(others)}


def spell(tokens: np.ndarray | Sequence[int], spelling: list[bytes]) -> bytes:
    return b"".join([spelling[token] for token in np.asarray(tokens).tolist()])


def training_text(directory: Path, language: str, limit: int, spelling: list[bytes]) -> list[bytes]:
    """Training documents of a language, in order, until `limit` bytes."""
    documents: list[bytes] = []
    total = 0
    for reference, tokens in TokenShards(directory, "train").documents():
        if total >= limit:
            break
        if text_group(reference) == language:
            documents.append(spell(tokens, spelling))
            total += len(documents[-1])
    return documents


def validation_text(chosen: ValidationSet, spelling: list[bytes]) -> list[bytes]:
    """The documents of a validation set as bytes: its windows end to end (each repeats the last token of the one
    before), cut where another document begins."""
    stream, numbers = (
        np.concatenate([part_NT[0, :1].numpy(), part_NT[:, 1:].flatten().numpy()])
        for part_NT in (chosen.tokens_NT, chosen.document_NT)
    )
    text, numbers = stream[numbers != PADDING], numbers[numbers != PADDING]
    return [spell(part, spelling) for part in np.split(text, np.flatnonzero(np.diff(numbers)) + 1)]
