"""The value model: it is its trunk with one number a position, and survives a round trip."""

import pytest
import torch

from infra.errors import InputError
from model.config import ModelConfig
from model.transformer import Transformer
from model.value import ValueModel
from stages.training.checkpoint import load_model, load_value_model, save_model

TOKENS_BT = torch.arange(24).view(2, 12) % 50
FAMILIES = {
    "llama": {"family": "llama", "n_kv_heads": 2},
    "deepseek_v3": {
        **{"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "n_mtp": 1},
        **{"n_routed_experts": 4, "n_activated_experts": 2, "moe_d_ff": 16},
    },
}


@pytest.fixture(params=FAMILIES)
def language_model(request):
    torch.manual_seed(0)
    shape = {"vocab_size": 50, "d_model": 32, "n_layers": 2, "n_heads": 4, "d_ff": 48, "init_std": 0.1}
    return Transformer(ModelConfig(**shape, **FAMILIES[request.param]))


def test_values_are_the_heads_product_with_the_trunks_states_in_fp32(language_model):
    hidden_BTD = language_model(TOKENS_BT).hidden_BTD
    model = ValueModel(language_model)
    assert (model(TOKENS_BT) == 0).all()
    torch.nn.init.normal_(model.head.weight)
    model.head.bias.data.fill_(0.5)
    torch.testing.assert_close(model(TOKENS_BT), hidden_BTD @ model.head.weight[0] + 0.5)
    model.trunk.bfloat16()
    assert model(TOKENS_BT).dtype == torch.float32


def test_it_has_its_trunks_parameters_and_a_head_and_no_vocabulary_head(language_model):
    model = ValueModel(language_model)
    names = {name for name, _ in model.named_parameters()}
    assert {"head.weight", "head.bias"} <= names
    assert not any("mtp" in name or name == "trunk.head.weight" for name in names)
    assert sum(p.numel() for p in model.parameters()) == model.config.n_parameters() + model.config.d_model + 1


def test_a_language_model_becomes_a_value_model_and_comes_back_from_disk_bit_for_bit(language_model, tmp_path):
    save_model(tmp_path / "lm", language_model, None)
    hidden_BTD = language_model.eval()(TOKENS_BT).hidden_BTD
    model = load_value_model(tmp_path / "lm")
    assert (model.head.weight == 0).all()
    assert torch.equal(model.trunk(TOKENS_BT).hidden_BTD, hidden_BTD)
    torch.nn.init.normal_(model.head.weight)
    save_model(tmp_path / "value", model, None)
    again = load_value_model(tmp_path / "value")
    assert torch.equal(again(TOKENS_BT), model(TOKENS_BT))
    with pytest.raises(InputError, match="do not fit"):
        load_model(tmp_path / "value")


def test_packed_documents_have_the_values_that_they_have_alone(language_model):
    model = ValueModel(language_model).eval()
    torch.nn.init.normal_(model.head.weight)
    document_BT = (torch.arange(12) >= 5).long().expand(2, -1)
    positions_BT = torch.where(document_BT == 1, torch.arange(12) - 5, torch.arange(12))
    packed_BT = model(TOKENS_BT, positions_BT, document_BT)
    for part in (slice(0, 5), slice(5, 12)):
        torch.testing.assert_close(packed_BT[:, part], model(TOKENS_BT[:, part]), rtol=1e-4, atol=1e-5)
