"""Pairs behind one prompt against each reply alone: the same numbers and gradients; and the losses by hand."""

import json
import math
import random

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from model.value import ValueModel
from stages.rl.pairs import Pair, encode_pairs, pair_batch, reply_logprobs, reply_values
from stages.rl.preference_loss import bradley_terry_loss, dpo_loss, likelihood_loss, step_loss
from stages.rl.preferences import Preference
from stages.tokens.bpe import load_tokenizer

VOCABULARY = 96
WIDTHS = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "init_std": 0.2}
FAMILIES = {
    "llama": {"family": "llama", "n_kv_heads": 2},
    "deepseek_v3": {
        **{"family": "deepseek_v3", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "moe_d_ff": 16, "n_mtp": 0},
    },
}


@pytest.fixture(params=FAMILIES)
def model(request):
    torch.manual_seed(0)
    return Transformer(ModelConfig(**WIDTHS, **FAMILIES[request.param]))


@pytest.fixture
def pairs():
    rng = random.Random(0)

    def ids(length):
        return [rng.randrange(1, VOCABULARY) for _ in range(length)]

    return [Pair(ids(p), ids(c), ids(r)) for p, c, r in ((7, 3, 9), (2, 1, 1), (12, 20, 1), (5, 4, 30))]


def replies(pairs):
    """(prompt, reply) in the order of [2, P] flattened."""
    return [(pair.prompt, pair.chosen) for pair in pairs] + [(pair.prompt, pair.rejected) for pair in pairs]


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert (ours[name] - theirs[name]).norm() <= 1e-5 * theirs[name].norm() + 1e-6, name


WEIGHTS_R = torch.arange(1.0, 9) - 4.5


def test_log_probabilities_behind_a_shared_prompt_are_those_of_each_reply_alone(model, pairs):
    batch = pair_batch(pairs, pad=0)
    ours_2P = reply_logprobs(model, batch)
    (ours_2P.flatten() * WEIGHTS_R).sum().backward()
    mine = gradients(model)
    alone = []
    for prompt, reply in replies(pairs):
        logits = model(torch.tensor([prompt + reply[:-1]])).logits_BTV[0, len(prompt) - 1 :]
        alone.append(logits.log_softmax(-1).gather(1, torch.tensor(reply)[:, None]).sum())
    torch.testing.assert_close(ours_2P.flatten(), torch.stack(alone), rtol=1e-5, atol=1e-4)
    (torch.stack(alone) * WEIGHTS_R).sum().backward()
    assert_same(mine, gradients(model))
    assert batch.lengths_2P.flatten().tolist() == [len(reply) for _, reply in replies(pairs)]


def test_values_behind_a_shared_prompt_are_those_of_each_reply_alone(model, pairs):
    judge = ValueModel(model)
    torch.nn.init.normal_(judge.head.weight)
    ours_2P = reply_values(judge, pair_batch(pairs, pad=0))
    (ours_2P.flatten() * WEIGHTS_R).sum().backward()
    mine = gradients(judge)
    alone = torch.stack([judge(torch.tensor([prompt + reply]))[0, -1] for prompt, reply in replies(pairs)])
    torch.testing.assert_close(ours_2P.flatten(), alone, rtol=1e-4, atol=1e-4)
    (alone * WEIGHTS_R).sum().backward()
    assert_same(mine, gradients(judge))


def preference(chosen, rejected):
    prompt = [
        {"role": "user", "content": "Pull 1."},
        {"role": "assistant", "content": "so"},
        {"role": "user", "content": "?"},
    ]
    return Preference("x", json.dumps(prompt), chosen, rejected, "en", "s")


def test_a_pair_is_encoded_as_its_conversations_are_and_split_at_the_last_turn(bandit_base):
    tokenizer = load_tokenizer(bandit_base)
    (pair,) = encode_pairs([preference("3", "44")], tokenizer, 100)
    assert (pair.chosen, pair.rejected) == (
        [*tokenizer.encode("3"), tokenizer.eos],
        [*tokenizer.encode("44"), tokenizer.eos],
    )
    whole = tokenizer.decode(pair.prompt, skip_special=False)
    assert whole.endswith("<｜User｜>?<｜Assistant｜>")
    assert "<｜Assistant｜>so" in whole
    longest = len(pair.prompt) + 3
    assert len(encode_pairs([preference("3", "44")], tokenizer, longest)) == 1
    assert encode_pairs([preference("3", "44")], tokenizer, longest - 1) == []


def test_pairs_of_a_published_template_are_split_there_too(publish_tokenizer, tmp_path):
    tokenizer = load_tokenizer(publish_tokenizer(tmp_path))
    (pair,) = encode_pairs([preference("the answer", "is 3")], tokenizer, 1000)
    assert tokenizer.decode(pair.chosen, skip_special=False) == "the answer<|im_end|>"
    assert tokenizer.decode(pair.prompt, skip_special=False).endswith("<|im_start|>assistant\n")


def test_judged_by_the_answer_a_pair_of_equal_answers_is_none(bandit_base):
    tokenizer = load_tokenizer(bandit_base)
    same, differ = (preference(f"<think>so</think>{a}", f"<think>Pull</think>{b}") for a, b in ((3, 3), (3, 4)))
    assert len(encode_pairs([same, differ], tokenizer, 100, "response")) == 2
    (pair,) = encode_pairs([same, differ], tokenizer, 100, "answer")
    assert pair.chosen == [*tokenizer.encode("3"), tokenizer.eos]


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


def test_the_losses_are_what_one_computes_by_hand():
    chosen_B, rejected_B = torch.tensor([[1.5, -0.2, 0.7], [0.5, 0.4, 0.7]], dtype=torch.float64)
    by_hand = -sum(map(log_sigmoid, (1.0, -0.6, 0.0)))
    assert float(bradley_terry_loss(chosen_B, rejected_B, 3)) == pytest.approx(by_hand / 3, rel=1e-14)
    parts = [bradley_terry_loss(chosen_B[i : i + 1], rejected_B[i : i + 1], 3) for i in range(3)]
    assert float(sum(parts)) == pytest.approx(by_hand / 3, rel=1e-14)
    margin_B = torch.tensor([2.0, -1.0], dtype=torch.float64)
    smoothed = -sum(0.9 * log_sigmoid(0.3 * m) + 0.1 * log_sigmoid(-0.3 * m) for m in (2.0, -1.0)) / 2
    assert float(dpo_loss(margin_B, 0.3, 2, 0.1)) == pytest.approx(smoothed, rel=1e-14)
    logprobs_B, lengths_B = torch.tensor([-6.0, -1.0], dtype=torch.float64), torch.tensor([3, 4])
    assert float(likelihood_loss(logprobs_B, lengths_B, 2)) == pytest.approx((2.0 + 0.25) / 2, rel=1e-14)
    values_N, labels_N = torch.tensor([[0.3, -2.0], [1.0, 0.25]], dtype=torch.float64)
    entropy = -(log_sigmoid(0.3) + 0.25 * log_sigmoid(-2.0) + 0.75 * log_sigmoid(2.0))
    assert float(step_loss(values_N, labels_N, 2)) == pytest.approx(entropy / 2, rel=1e-14)
