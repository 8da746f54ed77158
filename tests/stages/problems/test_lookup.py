"""Planted facts: asked for after they were told, never those of the held-out side."""

import re

import numpy as np
import pytest

from stages.problems.lookup import DIGITS, SPACING, Lookup, draw, least_window, plant, spell
from stages.problems.problem import split_of
from stages.tokens.bpe import train


@pytest.fixture(scope="module")
def tokenizer():
    return train(["Box 12 holds what? What does box 3456 hold? 号箱里是什么 abcdef"] * 3, 400)


def rng(seed):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_keys_and_values_lie_on_their_side_of_the_split(split):
    for seed in range(50):
        lookup = draw(rng(seed), "en", split)
        assert split_of(f"lookup key {lookup.key}") == split_of(f"lookup value {lookup.value}") == split
        assert (len(lookup.key), len(lookup.value)) == (4, 5)


def test_every_digit_is_a_token_of_its_own_even_where_numbers_are_cut_in_threes(tokenizer):
    assert tokenizer.decode(spell("31415", tokenizer)) == "31415"
    assert len(set(spell(DIGITS, tokenizer))) == 10


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_question_ends_where_the_answer_begins(tokenizer, language):
    lookup = Lookup(language, "0417", "59302")
    told = tokenizer.decode(lookup.statement(tokenizer)).strip()
    asked = tokenizer.decode(lookup.question(tokenizer) + lookup.answer(tokenizer)).strip()
    assert asked.endswith(told.rstrip(".。").removeprefix("B"))
    assert told.count("59302") == asked.count("59302") == 1


@pytest.mark.parametrize("length", [0, 300, 2000])
@pytest.mark.parametrize("seed", range(5))
def test_a_planted_window_keeps_its_length_and_its_text_and_asks_after_it_tells(tokenizer, length, seed):
    text = np.array(tokenizer.encode("abc" * 2000)[: length or least_window(tokenizer)])
    planted = plant(text, tokenizer, rng(seed))
    assert len(planted) == len(text)
    assert planted.dtype == text.dtype
    words = tokenizer.decode(planted.tolist())
    told = dict(re.findall(r"Box (\d{4}) holds (\d{5})\.\n", words) + re.findall(r"(\d{4})号箱里是(\d{5})。", words))
    assert len(told) == max(1, len(text) // SPACING)
    for key, value in told.items():
        asked = re.search(rf"(hold\? Box {key} holds |什么？{key}号箱里是){value}", words)
        assert asked, key
        assert re.search(rf"(Box {key} holds {value}\.|{key}号箱里是{value}。)", words).start() < asked.start()
        assert split_of(f"lookup key {key}") == split_of(f"lookup value {value}") == "train"
    left = re.sub(r"\nBox \d{4} holds \d{5}\.\n|\n\d{4}号箱里是\d{5}。\n", "", words)
    left = re.sub(
        r"\nWhat does box \d{4} hold\? Box \d{4} holds \d{5}|\n\d{4}号箱里是什么？\d{4}号箱里是\d{5}", "", left
    )
    assert "".join(left.split()) == "abc" * (len(left) // 3) + "abc"[: len(left) % 3]


def test_distances_reach_from_near_to_the_whole_window(tokenizer):
    text = np.array(tokenizer.encode("abc" * 4000)[:250])
    distances = []
    for seed in range(200):
        words = tokenizer.decode(plant(text, tokenizer, rng(seed)).tolist())
        statement = re.search(r"Box \d{4} holds \d{5}\.|\d{4}号箱里是\d{5}。", words)
        question = re.search(r"What does|\d{4}号箱里是什么", words)
        distances.append((question.start() - statement.end()) / len(words))
    assert min(distances) < 0.2
    assert max(distances) > 0.6
    assert np.mean(np.array(distances) < 0.3) > 0.4  # logarithmic: near ones are more


def test_the_same_numbers_plant_the_same_facts(tokenizer):
    text = np.array(tokenizer.encode("abc" * 2000)[:600])
    assert np.array_equal(plant(text, tokenizer, rng(3)), plant(text, tokenizer, rng(3)))
    assert not np.array_equal(plant(text, tokenizer, rng(3)), plant(text, tokenizer, rng(4)))
