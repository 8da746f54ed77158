"""Recomputation changes no bit of a gradient, keeps less, and chooses no other experts."""

from collections.abc import Iterable

import pytest
import torch

import kernels
from model import checkpointing
from model.balance import BalanceWeights
from model.checkpointing import Recompute
from model.config import ModelConfig
from model.router import Router
from model.transformer import Transformer

BATCH, LENGTH = 2, 24
V3 = ModelConfig(
    vocab_size=96,
    d_model=64,
    n_layers=2,
    n_heads=4,
    d_ff=96,
    init_std=0.1,
    q_lora_rank=24,
    kv_lora_rank=16,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
    n_dense_layers=1,
    n_routed_experts=8,
    n_activated_experts=2,
    n_shared_experts=1,
    moe_d_ff=32,
    n_mtp=1,
)
MODELS = {
    "v3": V3,
    "v2_lite": V3.replace(q_lora_rank=None, score_function="softmax", n_mtp=0),
    "llama": ModelConfig(family="llama", vocab_size=96, d_model=64, n_layers=2, n_kv_heads=2, init_std=0.1),
}
NAMES = [("rms_norm",), ("mla_up",), ("swiglu",), ("rms_norm", "mla_up", "swiglu"), ("block",)]


def forward(model: Transformer, recompute: Recompute) -> torch.Tensor:
    """A loss that depends on all that a forward pass gives."""
    recompute.attach(model)
    tokens_BT = torch.randint(model.config.vocab_size, (BATCH, LENGTH), generator=torch.Generator().manual_seed(1))
    document_BT = (torch.arange(LENGTH - 1) > LENGTH // 2).long().expand(BATCH, -1)
    tokens_BT, document_BT = (x.to(model.embedding.weight.device) for x in (tokens_BT, document_BT))
    with recompute.tape():
        out = model(tokens_BT[:, :-1], document_BT=document_BT)
    loss = -out.log_probs(tokens_BT[:, 1:]).sum() + out.balance_loss(BalanceWeights(1.0))
    return loss - sum(out.log_probs(tokens_BT[:, k + 1 :], depth=k).sum() for k in range(1, model.config.n_mtp + 1))


def gradients(config: ModelConfig, names: Iterable[str], dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = Transformer(config).to(dtype)
    forward(model, Recompute(names)).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_the_same_to_the_last_bit(name, dtype):
    expected = gradients(MODELS[name], (), dtype)
    for names in NAMES:
        found = gradients(MODELS[name], names, dtype)
        assert [key for key in expected if not torch.equal(found[key], expected[key])] == [], names


def kept_bytes(config: ModelConfig, names: Iterable[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the storages, parameters apart, that a forward pass keeps for its backward pass."""
    torch.manual_seed(0)
    model = Transformer(config)
    kept: dict[int, torch.Tensor] = {}

    def keep(packed: object) -> None:
        if isinstance(packed, torch.Tensor):
            kept[packed.untyped_storage().data_ptr()] = packed
        elif isinstance(packed, checkpointing._View):
            for each in packed.recipe.inputs:
                keep(each)

    class Counting(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pack, unpack):
            super().__init__(lambda tensor: [packed := pack(tensor), keep(packed)][0], unpack)

    monkeypatch.setattr(checkpointing, "saved_tensors_hooks", Counting)
    # A name that no module uses has every tensor pass through the same hooks, and kept.
    forward(model, Recompute(names or ("nothing",)))
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


def test_each_name_keeps_less_by_what_it_makes_again(monkeypatch):
    plain = kept_bytes(V3, (), monkeypatch)
    saved = {names: plain - kept_bytes(V3, names, monkeypatch) for names in NAMES if names != ("block",)}
    tokens, blocks, word = BATCH * (LENGTH - 1), V3.n_layers, 4
    main = tokens * blocks * word
    mtp = BATCH * (LENGTH - 2) * word
    # queries and keys of every head; values too where attention takes them unpadded, which is not here
    assert saved[("mla_up",)] >= (main + mtp) * 2 * V3.n_heads * V3.head_dim
    # inputs of the down-projections: a dense layer's, then of the chosen and the shared experts
    experts = (V3.n_activated_experts + V3.n_shared_experts) * V3.moe_d_ff
    assert saved[("swiglu",)] == tokens * word * V3.d_ff + (tokens * word + mtp) * experts
    # at least what goes into the projections of attention and FFN
    assert saved[("rms_norm",)] >= (main + mtp) * 2 * V3.d_model
    assert saved[("rms_norm", "mla_up", "swiglu")] == sum(saved[(name,)] for name in ("rms_norm", "mla_up", "swiglu"))


@pytest.mark.parametrize("names", NAMES)
def test_the_choice_of_experts_is_kept_and_not_made_again(names):
    expected = gradients(V3, ())
    torch.manual_seed(0)
    model = Transformer(V3)
    loss = forward(model, Recompute(names))
    for module in model.modules():
        if isinstance(module, Router):
            module.bias.copy_(torch.randn(V3.n_routed_experts))  # other experts would be chosen now
    loss.backward()
    assert all(torch.equal(parameter.grad, expected[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_block_made_again_chooses_the_same_experts(device, monkeypatch):
    route, chosen = kernels.route, []

    def observed(*inputs):
        outputs = route(*inputs)
        chosen.append(outputs[1])
        return outputs

    monkeypatch.setattr(kernels, "route", observed)
    torch.manual_seed(0)
    model = Transformer(V3).to(device)
    forward(model, Recompute(("block",))).backward()
    first, again = chosen[: len(chosen) // 2], chosen[len(chosen) // 2 :]
    assert len(first) == 2 and all(torch.equal(a, b) for a, b in zip(first, reversed(again), strict=True))


def test_an_input_that_was_changed_in_place_is_noticed():
    recompute = Recompute(("swiglu",))
    x = torch.randn(3, requires_grad=True)
    with recompute.tape():
        y = x * 1
        z = recompute("swiglu", torch.exp, y)
        loss = (z * z).sum()
    y.data.add_(0)  # behind autograd's back
    y.detach().mul_(2)
    with pytest.raises(AssertionError, match="changed in place"):
        loss.backward()


@pytest.mark.gpu
def test_on_cuda_less_memory_is_held_between_the_passes():
    config = V3.replace(d_model=1024, d_ff=4096, moe_d_ff=1024, n_heads=16)

    def held(names: Iterable[str]) -> int:
        torch.manual_seed(0)
        model = Transformer(config).cuda()
        recompute = Recompute(names)
        recompute.attach(model)
        tokens_BT = torch.randint(96, (4, 1024), device="cuda")
        before = torch.cuda.memory_allocated()
        with recompute.tape():
            out = model(tokens_BT)
        held = torch.cuda.memory_allocated() - before
        out.hidden_BTD.sum().backward()
        return held

    plain = held(())
    part, block = held(("rms_norm", "mla_up", "swiglu")), held(("block",))
    print({"plain": plain, "part": part, "block": block})
    assert block < part < 0.75 * plain
