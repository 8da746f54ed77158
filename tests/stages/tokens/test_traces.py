"""Traces of published data sets become replies that the rewards can read."""

import pytest

from stages.rl.rewards import parse
from stages.tokens.traces import think_answer

OPEN_R1 = "<think>\nFirst 3 times 4.\n\nWait, check: 12.\n</think>\n\nSo the product is\n\\[ \\boxed{12} \\]"
STRATOS = (
    "<|begin_of_thought|>\n\nFirst 3 times 4.\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nThe product is \\boxed{12}.\n\n<|end_of_solution|>"
)


@pytest.mark.parametrize("trace", [OPEN_R1, STRATOS], ids=["open-r1", "stratos"])
def test_a_trace_is_a_chain_with_its_solution_and_the_boxed_answer(trace):
    reply = parse(think_answer(trace))
    assert reply.answer == "12"
    assert reply.chain.startswith("First 3 times 4.")
    assert "product is" in reply.chain


def test_a_solution_without_a_box_is_the_answer_and_answer_tags_are_not_doubled():
    assert think_answer("<think>so</think> forty-two") == "<think>so</think><answer>forty-two</answer>"
    assert think_answer("<think>so</think>\n<answer>\n7\n</answer>") == "<think>so</think><answer>7</answer>"


@pytest.mark.parametrize(
    "reply",
    ["12", "<think>cut off", "<think></think>12", "<think>a</think>", "<think>a</think>b<think>c</think>d"],
)
def test_what_has_no_chain_and_one_solution_is_no_trace(reply):
    assert think_answer(reply) is None
