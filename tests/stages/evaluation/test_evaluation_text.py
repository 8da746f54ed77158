"""Bits per byte: the bytes behind tokens are the text itself; model and trigram are measured on the same documents."""

import math
from pathlib import Path

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from stages.evaluation.ngram import fit
from stages.evaluation.text import TextJob, measure_text, spell, token_bytes, training_text, validation_text
from stages.tokens.bpe import load_tokenizer, train
from stages.tokens.shards import ShardWriter, write_index
from stages.training.checkpoint import save_model
from stages.training.validation import Validation, validation_sets

TEXTS = {
    "en": [f"The stage number {n} reads artifacts and writes one, naïvely — {n * n}. " * 2 for n in range(40)],
    "zh": [f"第{n}个阶段读取产物，然后写出自己的产物：{n * n}。" * 3 for n in range(40)],
}


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    tokenizer = train([text for texts in TEXTS.values() for text in texts[:10]], 400)
    tokenizer.save(folder)
    writer = ShardWriter(folder, 0, tokenizer.vocab_size)
    for language, texts in TEXTS.items():
        for n, text in enumerate(texts):
            ids = [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]
            names = {"id": f"{language}/{n}", "language": language, "domain": "prose", "source": "test"}
            writer.add(ids, "validation" if n % 8 == 0 else "train", bytes=len(text.encode()), **names)
    write_index(folder, [writer.close()], tokenizer.vocab_size)
    torch.manual_seed(0)
    model = Transformer(ModelConfig(family="llama", vocab_size=tokenizer.vocab_size, d_model=16, n_layers=1, n_heads=1))
    save_model(folder, model, None)
    return folder


def test_tokens_spell_the_bytes_of_their_text_even_where_a_token_is_part_of_a_character(tokens):
    text = "naïve — 第九个🂡 <think>x</think>\n\t"
    tokenizer = load_tokenizer(tokens)
    ids = tokenizer.encode(text)
    assert spell([tokenizer.bos, *ids, tokenizer.eos], token_bytes(tokens)) == text.encode()


def test_validation_documents_come_back_whole(tokens):
    spelling = token_bytes(tokens)
    for chosen in validation_sets(Validation(str(tokens), sequence_length=16, windows=1000, every=0)):
        documents = validation_text(chosen, spelling)
        held = [text.encode() for n, text in enumerate(TEXTS[chosen.language]) if n % 8 == 0]
        assert sorted(documents) == sorted(held)
        assert sum(map(len, documents)) == chosen.n_bytes


def test_training_text_is_the_languages_own_up_to_the_limit(tokens):
    spelling = token_bytes(tokens)
    whole = training_text(tokens, "zh", 10**9, spelling)
    assert whole == [text.encode() for n, text in enumerate(TEXTS["zh"]) if n % 8]
    assert training_text(tokens, "zh", 1, spelling) == whole[:1]


def test_an_untrained_model_costs_its_tokens_and_the_trigram_far_less(tokens):
    sets = validation_sets(Validation(str(tokens), 16, 1000, 0))
    rows = measure_text(TextJob(str(tokens), str(tokens), 16, 1000, 10**6), lambda *_, **__: None)
    assert [row["language"] for row in rows] == ["en", "zh"]
    for row in rows:
        held = [text.encode() for n, text in enumerate(TEXTS[row["language"]]) if n % 8 == 0]
        training = [text.encode() for n, text in enumerate(TEXTS[row["language"]]) if n % 8]
        assert row["trigram_bits_per_byte"] == pytest.approx(fit(training).bits(held) / sum(map(len, held)))
        chosen = next(s for s in sets if s.language == row["language"])
        uniform = int(chosen.mask_NT.sum()) * math.log2(400) / chosen.n_bytes
        assert row["bits_per_byte"] == pytest.approx(uniform, rel=0.02)  # N(0, 0.006²) weights: almost even odds
        assert row["trigram_bits_per_byte"] < 0.5 * row["bits_per_byte"]
