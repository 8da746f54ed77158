import math

import pytest
import torch
import torch.nn.functional as F

from model.transformer import Transformer
from stages.tokens.chat_template import render
from stages.training.data import PackedRows, write_packed
from stages.training.losses import cross_entropy_sum, target_mask, total_loss


def test_cross_entropy_agrees_with_torch_in_value_and_gradient():
    torch.manual_seed(0)
    hidden = torch.randn(3, 7, 16, requires_grad=True)
    head = torch.randn(50, 16, requires_grad=True)
    targets, mask = torch.randint(50, (3, 7)), torch.rand(3, 7) > 0.4
    ours = cross_entropy_sum(hidden, head, targets, mask)
    ours_grads = torch.autograd.grad(ours, (hidden, head))
    reference = F.cross_entropy((hidden @ head.T)[mask], targets[mask], reduction="sum")
    torch.testing.assert_close(ours, reference)
    for mine, theirs in zip(ours_grads, torch.autograd.grad(reference, (hidden, head)), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_uniform_logits_cost_the_logarithm_of_the_vocabulary_per_token():
    loss = cross_entropy_sum(torch.zeros(2, 5, 8), torch.randn(100, 8), torch.zeros(2, 5, dtype=torch.long))
    assert float(loss) == pytest.approx(10 * math.log(100), rel=1e-6)


def test_an_empty_mask_costs_nothing_and_has_a_gradient():
    hidden = torch.randn(1, 4, 8, requires_grad=True)
    nobody = torch.zeros(1, 4, dtype=torch.bool)
    loss = cross_entropy_sum(hidden, torch.randn(10, 8), torch.zeros(1, 4, dtype=torch.long), nobody)
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()


def test_mtp_targets_lie_one_token_further_ahead_for_each_depth():
    learnt = torch.tensor([[0, 0, 1, 0, 1, 1]])  # tokens 2, 4 and 5 of six; positions 0..4 are inputs
    assert target_mask(learnt, None, depth=0).tolist() == [[False, True, False, True, True]]
    assert target_mask(learnt, None, depth=1).tolist() == [[True, False, True, True]]
    assert target_mask(learnt, None, depth=2).tolist() == [[False, True, True]]


def test_no_target_lies_in_another_document():
    document = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert target_mask(None, document, depth=0).tolist() == [[True, True, False, True, True]]
    assert target_mask(None, document, depth=1).tolist() == [[True, False, False, True]]


def test_without_masks_every_position_learns():
    assert target_mask(None, None, depth=1) is None


def test_total_loss_weighs_mtp_by_its_mean_over_depths():
    main, mtp, balance = torch.tensor(2.0), [torch.tensor(3.0), torch.tensor(5.0)], torch.tensor(7.0)
    assert float(total_loss(main, mtp, balance, 0.3)) == pytest.approx(2 + 0.3 * (3 + 5) / 2 + 7)
    assert float(total_loss(main, [], balance, 0.3)) == 2 + 7


def test_the_users_turn_is_never_a_target(tokenizer):
    messages = [
        {"role": "user", "content": "stage 3 reads"},
        {"role": "assistant", "content": "artifact 7"},
        {"role": "user", "content": "and writes"},
        {"role": "assistant", "content": "one name"},
    ]
    ids, mask = render(messages, tokenizer)
    tokens, learnt = torch.tensor([ids]), torch.tensor([mask])
    targets = tokens[:, 1:][target_mask(learnt, None)].tolist()
    said = [*tokenizer.encode("artifact 7"), tokenizer.eos, *tokenizer.encode("one name"), tokenizer.eos]
    assert targets == said


def test_a_packed_row_has_the_loss_of_its_conversations_alone(tokenizer, micro_v3, micro_llama, tmp_path):
    dialogues = [
        [{"role": "user", "content": f"artifact {n}?"}, {"role": "assistant", "content": "stage " * n + "writes"}]
        for n in (1, 5, 2)
    ]
    examples = [render(messages, tokenizer) for messages in dialogues]
    rows = write_packed(tmp_path / "packed.npz", examples, 63, tokenizer.pad)
    assert rows == 1
    batch = PackedRows(str(tmp_path / "packed.npz"), 63).open(1, seed=0, rank=0, world=1).batch(0)
    for config in (micro_v3, micro_llama):
        torch.manual_seed(1)
        model = Transformer(config)
        packed = _losses(model, batch.tokens_BT, batch.loss_mask_BT, batch.document_BT, batch.positions_BT)
        alone = torch.stack([_losses(model, torch.tensor([ids]), torch.tensor([mask])) for ids, mask in examples]).sum(
            0
        )
        torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
        crossed = _losses(model, batch.tokens_BT, batch.loss_mask_BT)
        assert not torch.allclose(crossed, alone, rtol=1e-4)  # the mask is what makes them equal


def _losses(model, tokens, learnt, document=None, positions=None) -> torch.Tensor:
    """Loss sums of every depth."""
    cut = [None if t is None else t[:, :-1] for t in (tokens, positions, document)]
    out = model(cut[0], positions_BT=cut[1], document_BT=cut[2])
    return torch.stack(
        [
            cross_entropy_sum(hidden, model.head_weight, tokens[:, depth + 1 :], target_mask(learnt, document, depth))
            for depth, hidden in enumerate([out.hidden_BTD, *out.mtp_hidden])
        ]
    ).detach()
