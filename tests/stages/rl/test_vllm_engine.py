"""vLLM against transformers on a micro model: greedy tokens, log-probabilities, weights sent to a running engine."""

import pytest
import torch

from model.config import ModelConfig
from model.exchange import export_hf
from model.transformer import Transformer
from stages.rl.engines.base import Sampling
from stages.rl.engines.native import NativeEngine
from stages.tokens.bpe import train

pytestmark = pytest.mark.vllm


def build(folder):
    tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
    tokenizer.save(folder)
    torch.manual_seed(0)
    config = ModelConfig(
        **{"vocab_size": tokenizer.vocab_size, "d_model": 64, "n_layers": 3, "n_heads": 2, "d_ff": 128},
        **{"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "init_std": 0.1},
        **{"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 32},
        **{"max_position": 128, "n_groups": 4, "n_limited_groups": 2},
    )
    return Transformer(config).eval()


def transformers_greedy(model, folder, prompts, n):
    from transformers import AutoModelForCausalLM

    export_hf(model, folder)
    oracle = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = oracle.generate(ids, max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=2)
        answers.append(out[0, len(prompt) :].tolist())
    return answers


@torch.no_grad()
def test_vllm_agrees_with_transformers_before_and_after_a_weight_update(tmp_path):
    """Prompts of more than a block of its cache, asked again after the update, and some behind another's beginning."""
    pytest.importorskip("vllm")
    from stages.rl.engines.vllm import VllmEngine

    model = build(tmp_path)
    prompts = [[0, *range(20, 20 + n)] for n in (3, 7, 40, 40, 70)]
    greedy = Sampling(24, temperature=0.0)
    engine = VllmEngine(model, str(tmp_path))
    replies = engine.generate(prompts, greedy, seed=0)
    assert [r.tokens for r in replies] == transformers_greedy(model, tmp_path / "first", prompts, 24)

    torch.manual_seed(1)
    changed = {name: tensor + 0.03 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    engine.update_weights(changed.items())
    updated = engine.generate(prompts, greedy, seed=0)
    assert [r.tokens for r in updated] == transformers_greedy(model, tmp_path / "second", prompts, 24)
    assert [r.tokens for r in updated] != [r.tokens for r in replies]

    sampled = engine.generate(prompts, Sampling(24, temperature=0.8), seed=5)
    assert [r.tokens for r in sampled] == [r.tokens for r in engine.generate(prompts, Sampling(24, 0.8), seed=5)]
    for prompt, reply in zip(prompts, sampled, strict=True):
        tokens = torch.tensor([prompt + reply.tokens])
        expected = model(tokens[:, :-1]).log_probs(tokens[:, 1:], temperature=0.8)[0, len(prompt) - 1 :]
        assert torch.tensor(reply.logprobs) == pytest.approx(expected, abs=1e-4)
    native = NativeEngine(model).generate(prompts, greedy, seed=0)
    assert [r.tokens for r in native] == [r.tokens for r in updated]


def test_replies_to_a_prompt_share_its_blocks_and_none_outlives_its_call(tmp_path, monkeypatch):
    pytest.importorskip("vllm")
    from stages.rl.engines.vllm import CPU_BLOCK, VllmEngine

    engine = VllmEngine(build(tmp_path), str(tmp_path))
    inner, cached = engine._llm.generate, []

    def generate(*arguments, **options):
        outputs = inner(*arguments, **options)
        cached.append([output.num_cached_tokens for output in outputs])
        return outputs

    monkeypatch.setattr(engine._llm, "generate", generate)
    short, long = [0, *range(20, 30)], [0, *range(20, 100)]
    for _ in range(2):
        engine.generate([short, short, long, long, long], Sampling(8), seed=0)
    whole = len(long) // CPU_BLOCK * CPU_BLOCK
    assert cached == [[0, 0, 0, whole, whole]] * 2
