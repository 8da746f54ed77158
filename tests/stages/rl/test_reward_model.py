"""Reward models in use: what they look at, where they are read, and that batches change no score."""

import pytest
import torch

from infra.errors import InputError
from stages.rl.judges import Judges, WeightedModel
from stages.rl.reward_model import RewardModel, judged, load_reward_model, place_reply, place_steps, save_reward_model
from stages.rl.rewards import Score
from stages.rl.rollout import Rollout
from stages.rl.steps import split_steps
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_value_model


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", []),
        ("so", ["so"]),
        ("first 3+4=7, then 7-2=5", ["first 3+4=7,", " then 7-2=5"]),
        ("先算3+4=7，再算7-2=5", ["先算3+4=7，", "再算7-2=5"]),
        ("3*4=12, 12+1=13 no; 4+1=5, 5*3=15 yes", ["3*4=12, 12+1=13 no;", " 4+1=5, 5*3=15 yes"]),
        (
            "It is 3.14, I think. Wait, no! (Check.) Good.",
            ["It is 3.14, I think.", " Wait, no!", " (Check.)", " Good."],
        ),
        ("等等。再算一次！好", ["等等。", "再算一次！", "好"]),
        ("a. b.\n\nc. d.\n", ["a. b.\n\n", "c. d.\n"]),
        ("<think>\na, b</think><answer>3</answer>", ["<think>\na,", " b", "</think><answer>3</answer>"]),
        ("<think></think><answer>3</answer>", ["<think>", "</think><answer>3</answer>"]),
    ],
)
def test_a_chain_is_cut_at_its_coarsest_separators_and_the_steps_are_the_chain(text, steps):
    assert split_steps(text) == steps
    assert "".join(steps) == text


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("<think>so</think><answer>3</answer>", "<answer>3</answer>"),
        ("<think>so</think>no</think>3", "3"),
        ("<think>for ever", ""),
        ("just 3", "just 3"),
    ],
)
def test_an_answer_is_judged_without_its_chain_and_a_response_with_it(reply, answer):
    assert judged(reply, "answer") == answer
    assert judged(reply, "response") == reply


def turns(question, reply):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": reply}]


@pytest.fixture
def scored(bandit_base, tmp_path):
    """scored(target): a reward model with a random head, saved and loaded."""

    def make(target):
        torch.manual_seed(1)
        model = load_value_model(bandit_base)
        torch.nn.init.normal_(model.head.weight)
        save_reward_model(tmp_path / target, model, target, bandit_base)
        return load_reward_model(tmp_path / target)

    return make


REPLIES = [f"<think>{'so ' * n}</think><answer>{n}</answer>" for n in (5, 0, 9, 2)]


def test_scores_are_values_at_the_eos_in_the_order_asked_whatever_the_batches(scored):
    model = scored("response")
    assert model.score([]) == []
    talks = [turns(f"Pull {n}.", reply) for n, reply in enumerate(REPLIES)]
    scores = model.score(talks)
    assert len(set(scores)) == 4
    for talk, score in zip(talks, scores, strict=True):
        ids, (place,) = place_reply(talk, "response", model.tokenizer)
        assert ids[place] == model.tokenizer.eos
        assert score == pytest.approx(model.model(torch.tensor([ids]))[0, -1].item(), abs=1e-5)
    small = RewardModel(model.model, model.tokenizer, "response", max_tokens=40)
    assert small.score(talks) == pytest.approx(scores, abs=1e-5)


def test_a_model_of_answers_is_blind_to_the_chain(scored):
    model = scored("answer")
    first, second, third = model.score(
        [turns("Pull 1.", f"<think>{c}</think><answer>{a}</answer>") for c, a in (("so", 3), ("Pull", 3), ("so", 4))]
    )
    assert first == second != third


def test_steps_are_scored_at_their_ends_by_what_was_read_up_to_there(scored):
    model = scored("steps")
    steps = split_steps("<think>so. Pull 1. so</think><answer>3</answer>")
    assert len(steps) == 4
    (scores,) = model.score_chains([("Pull 1.", steps)])
    assert all(0 < score < 1 for score in scores)
    assert model.score_chains([("Pull 1.", steps[:2])])[0] == pytest.approx(scores[:2], abs=1e-6)
    chains = [("Pull 1.", steps), ("Pull 22.", steps[:1]), ("Pull 1.", [])]
    found = model.score_chains(chains)
    assert [len(one) for one in found] == [4, 1, 0]
    assert found[0] == pytest.approx(scores, abs=1e-6)


def test_steps_encoded_one_by_one_are_the_reply_encoded_whole(bandit_base):
    tokenizer = load_tokenizer(bandit_base)
    reply = "<think>so Pull 1, then 2. Pull 34! so。再拉</think><answer>3</answer>"
    ids, places = place_steps("Pull 1.", split_steps(reply), tokenizer)
    assert ids[-len(tokenizer.encode(reply)) :] == tokenizer.encode(reply)
    assert places[-1] == len(ids) - 1


def test_a_reply_that_the_model_never_learnt_to_judge_is_worth_the_least(scored, bandit_problems):
    texts = [*REPLIES, "<think>so", REPLIES[0].replace("<answer>5", "<answer>5<｜User｜>"), "<think>so</think>"]
    rollouts = [
        Rollout(bandit_problems[0], [1], [2], [0.0], text != "<think>so", text, Score(0.5, {})) for text in texts
    ]
    judges = Judges({"preference": WeightedModel(scored("answer"), 2.0)})
    paid = judges.judge(rollouts, scored("answer").tokenizer)
    points = [rollout.score.rules["preference"] for rollout in paid]
    assert len(set(points[:4])) == 4
    assert points[4:] == [min(points[:4])] * 3, "cut off, a mark of the template, no answer"
    assert [rollout.score.reward for rollout in paid] == pytest.approx([0.5 + 2 * point for point in points])
    (alone,) = judges.judge(rollouts[4:5], scored("answer").tokenizer)
    assert alone.score.reward == 0.5


def test_what_cannot_be_scored_is_refused(scored, bandit_base):
    with pytest.raises(InputError, match="call score_chains"):
        scored("steps").score([turns("a", "b")])
    with pytest.raises(InputError, match="judges the response: call score"):
        scored("response").score_chains([("a", ["b"])])
    with pytest.raises(InputError, match="the assistant's: add the reply"):
        scored("response").score([turns("a", "b")[:1]])
    with pytest.raises(InputError, match=r"no reward_model\.json"):
        load_reward_model(bandit_base)
