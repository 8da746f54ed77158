"""Our losses and advantages against TRL's own on the same tensors in float64. Skipped where TRL is not installed.

TRL's losses are methods of trainers. Each is called on a stand-in that has only the attributes it reads, and whose
"model" answers with the shared log-probabilities; advantages come from a real trainer with a model of a few weights.

Legend: B replies or pairs, T positions, P questions, G replies to each.
"""

import collections
import dataclasses
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch

from stages.rl.advantages import group_centred, group_normalised, leave_one_out
from stages.rl.algorithms import ALGORITHMS
from stages.rl.mismatch import truncated_importance
from stages.rl.policy_loss import PolicyBatch, PolicyObjective, policy_loss
from stages.rl.preference_loss import bradley_terry_loss, dpo_loss, preference_margin
from stages.rl.preference_tasks import pair_figures

pytest.importorskip("trl")
from trl import DPOTrainer, GRPOConfig, GRPOTrainer, RewardTrainer, RLOOConfig, RLOOTrainer

B, T, LONGEST = 12, 9, 11
CLOSE = {"rtol": 1e-12, "atol": 1e-14}


def shared(seed=0):
    """Log-probabilities of four policies, of replies of 1 to T tokens; the ratios are clipped on both sides."""
    generator = torch.Generator().manual_seed(seed)
    new_BT, old_BT, reference_BT, engine_BT = (
        -torch.rand(B, T, generator=generator, dtype=torch.float64) * 1.5 - 0.05 for _ in range(4)
    )
    lengths_B = torch.randint(1, T + 1, (B,), generator=generator)
    mask_BT = torch.arange(T)[None] < lengths_B[:, None]
    advantages_B = torch.randn(B, generator=generator, dtype=torch.float64)
    return new_BT.requires_grad_(), old_BT, reference_BT, engine_BT, advantages_B, mask_BT


def trl_policy_loss(tensors, objective, loss_type, corrected):
    new_BT, old_BT, reference_BT, engine_BT, advantages_B, mask_BT = tensors
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (new_BT, torch.zeros_like(new_BT), None),
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=objective.kl == "k3_corrected", steps_per_generation=1),
        _metrics={"train": collections.defaultdict(list)},
        loss_type=loss_type,
        importance_sampling_level=objective.ratio,
        epsilon_low=objective.clip_low,
        # TRL's CISPO has the cap itself here, and no bound from below.
        epsilon_high=objective.clip_high + (loss_type == "cispo"),
        beta=objective.kl_coefficient,
        max_completion_length=LONGEST,
        current_gradient_accumulation_steps=1,
        use_vllm=corrected,
        vllm_importance_sampling_correction=corrected,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
    )
    ids = torch.zeros(B, T, dtype=torch.int64)
    inputs = {
        **{"prompt_ids": ids[:, :2], "prompt_mask": ids[:, :2] + 1, "completion_ids": ids, "completion_mask": mask_BT},
        **{"advantages": advantages_B, "old_per_token_logps": old_BT, "ref_per_token_logps": reference_BT},
        "num_items_in_batch": mask_BT.sum(),
        "importance_sampling_ratio": truncated_importance(old_BT, engine_BT, 2.0),
    }
    loss = GRPOTrainer._compute_loss(stand_in, None, inputs)
    return loss, {name: values[0] for name, values in stand_in._metrics["train"].items()}


POLICY = {
    "grpo": ("grpo", ALGORITHMS["grpo"].objective),
    "dr_grpo": ("dr_grpo", ALGORITHMS["dr_grpo"].objective),
    "dapo": ("dapo", ALGORITHMS["dapo"].objective),
    "gspo": ("grpo", ALGORITHMS["gspo"].objective),
    "gspo, wide": ("grpo", PolicyObjective(clip_low=0.1, clip_high=0.15, ratio="sequence")),
    "cispo": ("cispo", ALGORITHMS["cispo"].objective),
    "cispo, tight": ("cispo", PolicyObjective(clip_low=1.0, clip_high=0.3, surrogate="detached", mean="token")),
}


@pytest.mark.parametrize("corrected", [False, True], ids=["", "truncated importance"])
@pytest.mark.parametrize("kl", [(0.0, "k3"), (0.04, "k3"), (0.04, "k3_corrected")], ids=["no kl", "k3", "corrected"])
@pytest.mark.parametrize("name", POLICY)
def test_policy_losses_and_their_gradients_are_trls(name, kl, corrected):
    loss_type, objective = POLICY[name]
    objective = dataclasses.replace(objective, kl_coefficient=kl[0], kl=kl[1])
    tensors = shared()
    theirs, seen = trl_policy_loss(tensors, objective, loss_type, corrected)
    new_BT, old_BT, reference_BT, engine_BT, advantages_B, mask_BT = tensors
    correction_BT = truncated_importance(old_BT, engine_BT, 2.0) if corrected else None
    batch = PolicyBatch(new_BT, old_BT, reference_BT, advantages_B[:, None], mask_BT, correction_BT)
    ours, metrics = policy_loss(batch, objective, objective.normaliser(B, int(mask_BT.sum()), LONGEST))
    torch.testing.assert_close(ours, theirs, **CLOSE)
    (our_BT,), (their_BT,) = (torch.autograd.grad(loss, new_BT) for loss in (ours, theirs))
    torch.testing.assert_close(our_BT, their_BT, **CLOSE)
    assert (their_BT != 0).any()
    if kl[0]:
        assert metrics.kl / metrics.tokens == pytest.approx(seen["kl"], rel=1e-6)  # TRL counts tokens in fp32
    if objective.surrogate == "clipped" and objective.ratio == "token":
        assert metrics.clipped / metrics.tokens == pytest.approx(seen["clip_ratio/region_mean"], rel=1e-6)


def trl_dpo_loss(policy_BT, reference_BT, mask_BT, beta, loss_type, label_smoothing=0.0):
    """The first half of the rows is chosen. Position 0 is the prompt."""

    def answering(logprobs_BT):
        nothing = torch.zeros_like(logprobs_BT)
        measures = {"entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
        outputs = SimpleNamespace(log_probs=logprobs_BT * mask_BT, **measures)
        return MagicMock(side_effect=lambda **_: outputs, training=True)

    stand_in = MagicMock()
    stand_in.configure_mock(
        **{"model": answering(policy_BT), "ref_model": answering(reference_BT), "beta": beta},
        **{"loss_types": [loss_type], "loss_weights": [1.0], "label_smoothing": label_smoothing},
        **{"ld_alpha": None, "precompute_ref_logps": False, "f_divergence_type": "reverse_kl", "use_weighting": False},
        **{"aux_loss_enabled": False, "_tp_size": 1, "_total_train_tokens": 0},
        _metrics={"train": collections.defaultdict(list)},
    )
    stand_in.accelerator = SimpleNamespace(device="cpu", gather=lambda x: x, gather_for_metrics=lambda x: x)
    prompt_B1 = torch.ones(len(mask_BT), 1, dtype=torch.int64)
    inputs = {
        "input_ids": torch.cat([prompt_B1, mask_BT.long()], 1),
        "attention_mask": torch.cat([prompt_B1, mask_BT.long()], 1),
        "completion_mask": torch.cat([prompt_B1 * 0, mask_BT.long()], 1),
    }
    return DPOTrainer._compute_loss(stand_in, stand_in.model, inputs, return_outputs=False)


@pytest.mark.parametrize(
    ("loss_type", "pairs", "smoothing"),
    [("sigmoid", B // 2, 0.0), ("aot", 1, 0.1)],
    ids=["dpo", "conservative dpo: AOT of one pair"],
)
def test_dpo_and_its_gradient_are_trls(loss_type, pairs, smoothing):
    new_BT, _, reference_BT, _, _, mask_BT = (tensor[: 2 * pairs] for tensor in shared(1))
    theirs = trl_dpo_loss(new_BT, reference_BT, mask_BT, 0.1, loss_type, smoothing)
    policy_B, reference_B = ((logprobs_BT * mask_BT).sum(1) for logprobs_BT in (new_BT, reference_BT))
    margin_B = preference_margin(*policy_B.chunk(2), *reference_B.chunk(2))
    ours = dpo_loss(margin_B, 0.1, pairs, smoothing)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    (our_BT,), (their_BT,) = (torch.autograd.grad(loss, new_BT) for loss in (ours, theirs))
    torch.testing.assert_close(our_BT, their_BT, **CLOSE)


REWARDS_PG = torch.tensor([[1.0, 0, 0, 0.2], [1, 1.2, 0, 0.2], [0.7] * 4], dtype=torch.float64)


@pytest.fixture
def trl_advantages(publish_tokenizer, tmp_path, monkeypatch):
    """trl_advantages(trainer, config, **options): what a real trainer makes of REWARDS_PG, [P, G]."""
    from datasets import Dataset
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    def made(trainer, config, **options):
        tokenizer = AutoTokenizer.from_pretrained(publish_tokenizer(tmp_path))
        widths = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **widths, num_key_value_heads=1))
        n, group = REWARDS_PG.numel(), REWARDS_PG.shape[1]
        args = config(
            **{"output_dir": str(tmp_path), "per_device_train_batch_size": n, "num_generations": group, "beta": 0.0},
            **{"max_completion_length": 2, "report_to": "none", "use_cpu": True, "bf16": False, "seed": 0, **options},
        )
        rows = [{"prompt": f"{p}"} for p in range(len(REWARDS_PG)) for _ in range(group)]
        instance = trainer(model, lambda **_: [0.0] * n, args, Dataset.from_list(rows), processing_class=tokenizer)
        monkeypatch.setattr(instance, "_calculate_rewards", lambda *_: REWARDS_PG.view(-1, 1).clone())
        return instance._generate_and_score_completions(rows)["advantages"].view(REWARDS_PG.shape)

    return made


def test_group_advantages_are_trls_but_for_the_kind_of_std(trl_advantages):
    """TRL divides by the *sample* std + 1e-4; DeepSeekMath says "std" and our choice is the population's, exactly."""
    theirs_PG = trl_advantages(GRPOTrainer, GRPOConfig, scale_rewards="group")
    sample_P1, population_P1 = (REWARDS_PG.std(1, correction=c, keepdim=True) for c in (1, 0))
    ours_PG = group_normalised(REWARDS_PG) * population_P1 / (sample_P1 + 1e-4)
    torch.testing.assert_close(ours_PG, theirs_PG, rtol=1e-6, atol=1e-11)


def test_dr_grpo_and_leave_one_out_advantages_are_trls(trl_advantages):
    centred_PG = trl_advantages(GRPOTrainer, GRPOConfig, scale_rewards="none")
    torch.testing.assert_close(group_centred(REWARDS_PG), centred_PG, rtol=1e-12, atol=1e-15)
    out_PG = trl_advantages(RLOOTrainer, RLOOConfig)
    torch.testing.assert_close(leave_one_out(REWARDS_PG), out_PG, rtol=1e-12, atol=1e-15)


def test_the_bradley_terry_loss_and_its_gradient_are_trls():
    rewards_B = torch.randn(B, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    stand_in = SimpleNamespace(
        **{"model": SimpleNamespace(training=True), "args": SimpleNamespace(center_rewards_coefficient=None)},
        **{"_metrics": {"train": collections.defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1},
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
    )
    inputs = {"attention_mask": torch.ones(B, 2)}
    theirs = RewardTrainer.compute_loss(stand_in, lambda **_: SimpleNamespace(logits=rewards_B[:, None]), inputs)
    ours = bradley_terry_loss(*rewards_B.chunk(2), B // 2)
    torch.testing.assert_close(ours, theirs, **CLOSE)
    (our_B,), (their_B,) = (torch.autograd.grad(loss, rewards_B) for loss in (ours, theirs))
    torch.testing.assert_close(our_B, their_B, **CLOSE)
    right, margin = pair_figures(rewards_B.view(2, -1))[:2] / (B // 2)
    assert float(right) == pytest.approx(stand_in._metrics["train"]["accuracy"][0], rel=1e-6)
    assert float(margin) == pytest.approx(stand_in._metrics["train"]["margin"][0], rel=1e-6)
