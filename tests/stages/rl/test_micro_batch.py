"""Replies that share a prompt's row against each reply alone: the same log-probabilities and the same gradient."""

import random

import pytest
import torch

from model.config import ModelConfig
from model.transformer import Transformer
from stages.rl.micro_batch import micro_batches, token_logprobs
from stages.rl.rollout import Rollout

PAD, VOCABULARY = 0, 96
WIDTHS = {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "init_std": 0.2}
FAMILIES = {
    "llama": {"family": "llama", "n_kv_heads": 2},
    "deepseek_v3": {
        **{"family": "deepseek_v3", "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8},
        **{"n_dense_layers": 1, "n_routed_experts": 4, "n_activated_experts": 2, "moe_d_ff": 16, "n_mtp": 0},
    },
}


def rollout(rng, prompt, length):
    tokens = [rng.randrange(1, VOCABULARY) for _ in range(length)]
    return Rollout(None, prompt, tokens, [-rng.random() for _ in tokens], True, "", None)


def explored(lengths, prompt_length, seed=0):
    """A group of replies of these lengths to each of three prompts, and their advantages."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(1, VOCABULARY) for _ in range(prompt_length + extra)] for extra in range(3)]
    return [
        (rollout(rng, prompt, length), [rng.uniform(-1, 1) for _ in range(length)])
        for prompt in prompts
        for length in lengths
    ]


def alone(model, reply, temperature):
    read = torch.tensor([reply.prompt + reply.tokens[:-1]])
    logits = model(read).logits_BTV[0, len(reply.prompt) - 1 :] / temperature
    return logits.log_softmax(-1).gather(1, torch.tensor(reply.tokens)[:, None]).squeeze(1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_prompt_changes_neither_log_probabilities_nor_gradients(family):
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**WIDTHS, **FAMILIES[family]))
    batch = explored(lengths=(1, 5, 9, 2, 30), prompt_length=7)
    cut = micro_batches(batch, PAD, max_tokens=130)
    assert len(cut) > 1
    assert any(micro.document_XW is not None for micro in cut)

    ours, credits, engine = [], [], []
    for micro in cut:
        logprobs_BR = token_logprobs(model, micro, 0.7)
        (logprobs_BR * micro.credit_BR).sum().backward()
        assert (logprobs_BR[~micro.mask_BR] == 0).all()
        ours += [row[mask].detach() for row, mask in zip(logprobs_BR, micro.mask_BR, strict=True)]
        engine += [row[mask].tolist() for row, mask in zip(micro.engine_logprobs_BR, micro.mask_BR, strict=True)]
        assert (micro.credit_BR[~micro.mask_BR] == 0).all()
        credits += [row[mask] for row, mask in zip(micro.credit_BR, micro.mask_BR, strict=True)]
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    # Each reply is told by its first token's advantage, which no other has.
    places = {credit[0].item(): number for number, credit in enumerate(credits)}
    assert len(places) == len(batch)
    for reply, credit in batch:
        place = places[torch.tensor(credit[0]).item()]
        torch.testing.assert_close(credits[place], torch.tensor(credit), rtol=0, atol=0)
        expected = alone(model, reply, 0.7)
        torch.testing.assert_close(ours[place], expected.detach(), rtol=1e-5, atol=1e-5)
        assert engine[place] == pytest.approx(reply.logprobs)
        (expected * torch.tensor(credit)).sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_stay_within_the_micro_batch_and_long_replies_to_a_short_question_stand_alone():
    shared = micro_batches(explored(lengths=(9,) * 12, prompt_length=10), PAD, max_tokens=64)
    assert all(micro.tokens_XW.numel() <= 64 for micro in shared)
    assert sum(len(micro.credit_BR) for micro in shared) == 36
    assert max(micro.tokens_XW.shape[1] for micro in shared) > 40

    apart = micro_batches(explored(lengths=(30,) * 4, prompt_length=3), PAD, max_tokens=200)
    assert all(micro.document_XW is None for micro in apart)
    assert all(len(micro.tokens_XW) == len(micro.credit_BR) for micro in apart)

    huge = micro_batches(explored(lengths=(90, 4), prompt_length=12), PAD, max_tokens=64)
    assert sum(len(micro.credit_BR) for micro in huge) == 6
    assert max(micro.tokens_XW.shape[1] for micro in huge) == 14 + 89
