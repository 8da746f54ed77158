"""Every operation against its plain definition in `kernels.reference`: values and gradients."""

import pytest
import torch

import kernels
from kernels import RoutingRule, grouped, log_probs, reference


def check(fast, slow, *inputs, dtype=torch.float32):
    """Largest relative error of outputs and of the gradients of every floating input."""
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    results = []
    for function in (fast, slow):
        leaves = [x.detach().clone().requires_grad_() if x.is_floating_point() else x for x in inputs]
        y = function(*leaves)
        torch.manual_seed(1)
        y.backward(torch.randn(y.shape).to(y.dtype))
        results.append([y.detach(), *(leaf.grad for leaf in leaves if leaf.is_floating_point())])
    errors = []
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        errors.append(((a.float() - b.float()).norm() / b.float().norm()).item())
    print("relative errors", *(f"{error:.1e}" for error in errors))
    assert max(errors) < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_its_definition(dtype):
    x = torch.randn(3, 50, 96).to(dtype)

    def with_eps(function):
        return lambda x, weight: function(x, weight, 1e-6)

    check(with_eps(kernels.rms_norm), with_eps(reference.rms_norm), x, torch.randn(96), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sum_and_its_norm_have_the_bits_of_both_one_after_the_other(dtype):
    results = []
    for fused in (False, True):
        torch.manual_seed(0)
        x, added = (torch.randn(3, 50, 96).to(dtype).requires_grad_() for _ in range(2))
        weight = torch.randn(96, requires_grad=True)
        if fused:
            total, y = kernels.add_rms_norm(x, added, weight, 1e-6)
        else:
            total = x + added
            y = kernels.rms_norm(total, weight, 1e-6)
        grads = torch.autograd.grad((total.float().sin() + y.float().cos()).sum(), (x, added, weight))
        results.append([total, y, *grads])
    for ours, expected in zip(*results, strict=True):
        assert torch.equal(ours, expected)
    with torch.inference_mode():
        for ours, expected in zip(kernels.add_rms_norm(x, added, weight, 1e-6), (total, y), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaled", [False, True])
def test_swiglu_equals_its_definition_with_and_without_row_scales(dtype, scaled):
    x = torch.randn(200, 64).to(dtype)
    check(kernels.swiglu, reference.swiglu, x, *([torch.rand(200)] if scaled else []), dtype=dtype)


def test_rope_turns_the_last_dims_and_leaves_the_rest():
    angles = torch.rand(30, 4)
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    x = torch.randn(2, 30, 3, 20)
    check(lambda x: kernels.apply_rope(x, cos, sin), lambda x: reference.apply_rope(x, cos, sin), x)
    y = kernels.apply_rope(x, cos, sin)
    assert torch.equal(y[..., :12], x[..., :12])
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keys_and_values_equal_their_definition(dtype):
    up, rope = torch.randn(2, 9, 3, 20).to(dtype), torch.randn(2, 9, 8).to(dtype)

    def both(function):
        return lambda up, rope: torch.cat(function(up, rope, 12), dim=-1)  # keys [.., 20] and values [.., 8]

    check(both(kernels.keys_and_values), both(reference.keys_and_values), up, rope, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [True, False])
def test_attention_equals_its_definition_causal_and_inside_documents(packed, dtype):
    prefix = kernels.PREFIX
    document = torch.tensor([[prefix] * 9 + [0] * 20 + [1] * 31, [3] * 59 + [4]]) if packed else torch.zeros(2, 60)
    q, k, v = (torch.randn(2, 60, heads, width).to(dtype) for heads, width in ((4, 24), (2, 24), (2, 16)))

    def laid_out(function):
        return lambda *operands: function(*(x.transpose(1, 2) for x in operands)).transpose(1, 2)

    visible = kernels.visibility(document) if packed else None
    fast = laid_out(lambda q, k, v: kernels.attention(q, k, v, visible, 0.2))
    check(fast, laid_out(lambda q, k, v: reference.document_attention(q, k, v, document, 0.2)), q, k, v, dtype=dtype)


@pytest.mark.parametrize("tile", [1, 16, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_routed_experts_equal_a_loop_over_tokens_in_every_layout(tile, dtype):
    torch.manual_seed(0)
    n_tokens, n_experts, width, hidden = 90, 6, 32, 24
    indices = torch.rand(n_tokens, n_experts).topk(3).indices
    indices[indices == 4] = 5  # an expert without tokens; a repeated choice is harmless here
    x, gates = torch.randn(n_tokens, width).to(dtype), torch.rand(n_tokens, 3)
    gate_up = (torch.randn(n_experts, 2 * hidden, width) * 0.2).to(dtype)
    down = (torch.randn(n_experts, width, hidden) * 0.2).to(dtype)

    def fast(x, gates, gate_up, down):
        order = grouped.layout(indices, n_experts, tile)
        assert order.load_E.tolist() == indices.flatten().bincount(minlength=n_experts).tolist()
        h = kernels.swiglu(
            kernels.grouped_gemm(kernels.permute(x, order), gate_up, order), kernels.permute_gates(gates, order)
        )
        return kernels.unpermute(kernels.grouped_gemm(h, down, order), order, n_tokens)

    def slow(x, gates, gate_up, down):
        return reference.routed_experts(x, gates.to(dtype), indices, gate_up, down)

    check(fast, slow, x, gates, gate_up, down, dtype=dtype)


def test_a_tiled_layout_has_one_shape_whatever_the_loads():
    even = torch.arange(64).view(-1, 1) % 4
    all_to_one = torch.zeros(64, 1, dtype=torch.int64)
    layouts = [grouped.layout(indices, 4, 16) for indices in (even, all_to_one)]
    assert layouts[0].pair_P.shape == layouts[1].pair_P.shape
    for order in layouts:
        assert order.real_P.sum() == 64
        assert torch.equal(order.pair_P[order.row_R], torch.arange(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_equal_a_whole_softmax_over_several_chunks(dtype, temperature, monkeypatch):
    monkeypatch.setitem(log_probs.CHUNK_BYTES, "cpu", 4 * 500 * 32)
    x, weight = torch.randn(100, 24).to(dtype), torch.randn(500, 24) * 0.3
    targets = torch.randint(500, (100,))
    check(
        lambda x, w: kernels.linear_log_probs(x, w, targets, temperature),
        lambda x, w: reference.linear_log_probs(x, w, targets, temperature),
        x,
        weight,
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [32, 100])
def test_cross_entropy_equals_the_sum_of_a_whole_softmax(dtype, chunk, monkeypatch):
    monkeypatch.setitem(log_probs.CHUNK_BYTES, "cpu", 4 * 500 * chunk)
    x, weight = torch.randn(100, 24).to(dtype), torch.randn(500, 24) * 0.3
    targets = torch.randint(500, (100,))
    check(
        lambda x, w: kernels.linear_cross_entropy(x, w, targets) / 100,
        lambda x, w: -reference.linear_log_probs(x, w, targets).mean(),
        x,
        weight,
        dtype=dtype,
    )


def test_gradients_that_cross_entropy_has_given_away_are_not_given_twice():
    x, weight = torch.randn(10, 4, requires_grad=True), torch.randn(8, 4, requires_grad=True)
    loss = kernels.linear_cross_entropy(x, weight, torch.arange(10) % 8)
    loss.backward(torch.tensor(0.5), retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward(torch.tensor(0.5))


RULES = [
    RoutingRule(sigmoid=True, renormalised=True, n_activated=3, n_groups=4, n_limited_groups=2, group_top=2, scale=2.5),
    RoutingRule(sigmoid=False, renormalised=False, n_activated=3, n_groups=4, n_limited_groups=2, scale=16.0),
    RoutingRule(sigmoid=False, renormalised=True, n_activated=2),
]


@pytest.mark.parametrize("rule", RULES)
def test_routing_equals_the_papers_rule_token_by_token(rule):
    torch.manual_seed(0)
    bias = torch.rand(16) - 0.5
    _, chosen, scores = kernels.route(torch.randn(50, 16), bias, rule)
    for token in range(50):
        biased = (scores[token] + bias).tolist()
        groups = torch.arange(16).chunk(rule.n_groups)
        groups = sorted(groups, key=lambda g: -sum(sorted((biased[e] for e in g), reverse=True)[: rule.group_top]))
        allowed = torch.cat(groups[: rule.n_limited_groups]).tolist()
        expected = sorted(allowed, key=lambda e: -biased[e])[: rule.n_activated]
        assert chosen[token].tolist() == expected


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("used", ["gates", "affinities", "both"])
def test_the_gradient_of_routing_is_its_definitions(rule, used):
    bias, pull = torch.rand(16) - 0.5, torch.randn(50, 16)

    def weighed(function):
        def of(logits):
            gates, _, scores = function(logits, bias, rule)
            parts = {"gates": gates, "affinities": scores, "both": torch.cat([gates, scores], dim=1)}
            return parts[used]

        return of

    check(weighed(kernels.route), weighed(reference.route), pull)
