"""A reply's text while it is still coming: no broken character is given, nothing held back without cause."""

import random

import pytest

from stages.tokens.bpe import Tokenizer, train
from stages.tokens.text_stream import Said, TextStream, ThinkingStream, hold_back

TEXTS = (
    "<think>三加四等于七 🙂 naïve</think><answer>7</answer>",
    "数字 12 和 👩‍👩‍👧 é\n\ttab",
    "plain ascii < think > not a marker </thin",
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train(["three plus four 12"], 275, digits="single", min_frequency=1)  # no merges: a token is a byte


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_whole_characters_and_make_up_the_text(tokenizer, text):
    stream, seen = TextStream(tokenizer), ""
    ids = tokenizer.encode(text)
    for number, token in enumerate(ids, start=1):
        piece = stream.push([token])
        assert "\ufffd" not in piece
        seen += piece
        # All that is a character by now has been given.
        assert seen == tokenizer.decode(ids[:number], skip_special=False).rstrip("\ufffd")
    assert seen + stream.close() == text
    assert len(ids) >= len(text.encode()) - 40


def test_bytes_that_are_no_text_come_out_as_the_tokenizer_decodes_them(tokenizer):
    generator = random.Random(0)
    byte_ids = [tokenizer.encode(letter)[0] for letter in "aZ9"]
    byte_ids += tokenizer.encode("🙂é中")
    for _ in range(50):
        ids = generator.choices(byte_ids, k=30)
        stream = TextStream(tokenizer)
        pieces = [stream.push([token]) for token in ids]
        assert "".join(pieces) + stream.close() == tokenizer.decode(ids, skip_special=False)


def split(text: str, size: int) -> list[Said]:
    stream, said = ThinkingStream(), []
    for start in range(0, len(text), size):
        said += stream.push(text[start : start + size])
    said += stream.close()
    joined: list[Said] = []
    for stretch in said:
        if joined and joined[-1].thinking == stretch.thinking:
            stretch = Said(joined.pop().text + stretch.text, stretch.thinking)
        joined.append(stretch)
    return joined


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thinking_is_told_from_the_answer_however_the_text_is_cut(size):
    assert split("<think>a < b</think><answer>7</answer>", size) == [
        Said("a < b", True),
        Said("<answer>7</answer>", False),
    ]
    assert split("no chain </thi", size) == [Said("no chain </thi", False)]
    assert split("<think>never ends </thin", size) == [Said("never ends </thin", True)]
    assert split("x<think></think>y", size) == [Said("xy", False)]


def test_only_what_may_become_a_marker_is_held_back():
    assert hold_back("so <thi", ["<think>"]) == ("so ", "<thi")
    assert hold_back("so <thin k", ["<think>"]) == ("so <thin k", "")
    assert hold_back("a##", ["###", "#!"]) == ("a", "##")
