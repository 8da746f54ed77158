"""What a model reads before it replies: R1-Zero's description in the question's language, or a system turn."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from infra.errors import InputError
from stages.evaluate import EvaluateConfig
from stages.grpo import GrpoConfig
from stages.problems.problem import Problem
from stages.rl.prompts import prompt_ids
from stages.rl.rewards import RewardWeights, score
from stages.sample import SampleConfig
from stages.tokens.bpe import load_tokenizer

SUM = Problem("p", "chain_sum", "en", 1, "Compute 2+3.", "2+3=5", "5", "integer", {"value": 5}, "2+3")
ENGLISH = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The assistant "
    "first thinks about the reasoning process in the mind and then provides the user with the answer. The reasoning "
    "process and answer are enclosed within <think> </think> and <answer> </answer> tags, respectively, i.e., <think> "
    "reasoning process here </think> <answer> answer here </answer>."
)
FORM = " <think> 2+3=5 </think> <answer> 5 </answer>"


@pytest.fixture
def tokenizer(publish_tokenizer, tmp_path):
    return load_tokenizer(publish_tokenizer(tmp_path))


def shown(tokenizer, *arguments, **options):
    return tokenizer.decode(prompt_ids(*arguments[:2], tokenizer, *arguments[2:], **options), skip_special=False)


def test_the_described_prompt_is_the_papers_and_the_reply_that_it_describes_is_paid_in_full(tokenizer):
    prompt = shown(tokenizer, SUM.question, "r1_zero_described")
    assert prompt == f"{ENGLISH}\nUser: Compute 2+3.\nAssistant:"
    verdict = score(SUM, FORM, True, RewardWeights())
    assert (verdict.accuracy, verdict.format) == (1, 1)


@pytest.mark.parametrize("question", ["计算2+3。", "用函数 add 计算 {2} 与 3 的和。"])
def test_a_chinese_question_is_asked_in_chinese(tokenizer, question):
    prompt = shown(tokenizer, question, "r1_zero_described")
    assert prompt.endswith(f"\n用户：{question}\n助手：")
    assert all(f"{tag} 此处为" in prompt and f" </{tag[1:]}" in prompt for tag in ("<think>", "<answer>"))
    assert "Assistant" not in prompt


def test_a_problem_is_asked_in_its_own_language_however_much_of_it_is_latex(tokenizer):
    question = r"已知 $\triangle ABC$ 中 $\angle A=60^\circ$，求 $\sin B$"
    assert shown(tokenizer, question, "r1_zero_described", language="zh").endswith("\n助手：")
    assert shown(tokenizer, "Was heißt 你好?", "r1_zero_described", language="en").endswith("\nAssistant:")


def test_worked_examples_stand_before_it_as_texts_that_end(tokenizer):
    examples = [SUM, replace(SUM, question="计算2+3。", language="zh")]
    *texts, asked = shown(tokenizer, "Compute 4+4.", "r1_zero_described", examples).split("<|im_end|>")
    assert texts[0] == f"{ENGLISH}\nUser: Compute 2+3.\nAssistant: <think>2+3=5</think><answer>5</answer>"
    assert texts[1].endswith("\n用户：计算2+3。\n助手： <think>2+3=5</think><answer>5</answer>")
    assert asked == f"{ENGLISH}\nUser: Compute 4+4.\nAssistant:"
    bare = shown(tokenizer, "Compute 4+4.", "r1_zero", examples[:1])
    assert bare == f"{SUM.worked}<|im_end|>Compute 4+4.\n"


def test_a_system_prompt_is_the_first_turn_of_the_chat(tokenizer):
    prompt = shown(tokenizer, "Compute 4+4.", "chat", [SUM], system_prompt="Use <think> </think>.")
    assert prompt.startswith("<|im_start|>system\nUse <think> </think>.<|im_end|>\n<|im_start|>user\nCompute 2+3.")
    assert prompt.endswith("<|im_start|>user\nCompute 4+4.<|im_end|>\n<|im_start|>assistant\n")
    assert "You are helpful" in shown(tokenizer, "Compute 4+4.", "chat")  # the template's own, where none is given


def test_a_system_prompt_is_there_also_where_the_tokenizer_composes_it(publish_tokenizer, tmp_path):
    file = publish_tokenizer(tmp_path) / "tokenizer.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"normalizer": {"type": "NFC"}}))  # as Qwen's
    prompt = shown(load_tokenizer(tmp_path), "Compute 4+4.", "chat", system_prompt="Re\u0301ponds.")
    assert "R\u00e9ponds." in prompt


def test_a_chat_template_that_drops_the_system_turn_is_refused(publish_tokenizer, tmp_path):
    deaf = "{% for message in messages if message.role != 'system' %}{{ message.content }}{% endfor %}"
    tokenizer = load_tokenizer(publish_tokenizer(tmp_path, deaf))
    assert prompt_ids("a", "chat", tokenizer)
    with pytest.raises(InputError, match="drops the system turn: leave system_prompt out"):
        prompt_ids("a", "chat", tokenizer, system_prompt="Use tags.")


@pytest.mark.parametrize("kind", [GrpoConfig, EvaluateConfig, SampleConfig])
@pytest.mark.parametrize("template", ["r1_zero", "r1_zero_described"])
def test_a_template_without_turns_takes_no_system_prompt(kind, template):
    name = {"name": "x"} if kind is EvaluateConfig else {}
    assert kind(**name, template=template).system_prompt is None
    with pytest.raises(ValueError, match=f"template={template} has no system turn: set template to chat"):
        kind(**name, template=template, system_prompt="Use tags.")
