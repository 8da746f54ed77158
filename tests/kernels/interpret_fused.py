"""`kernels.fused` against `kernels.eager`, as a program: on CUDA as it is, on a CPU under TRITON_INTERPRET=1."""

import torch

from kernels import RoutingRule, eager, fused

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter truncates fp32 to bf16 where hardware rounds: one more unit in the last place.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if DEVICE == "cuda" else 8e-3}


def poisoned(*size, **options):
    """`torch.empty` for the kernels' outputs, full of what nobody writes."""
    out = EMPTY(*size, **options)
    return out.fill_(float("nan") if out.is_floating_point() else -7)


EMPTY = torch.empty


def check(name, ours, theirs, dtype, times=1):
    for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if a is None and b is None:
            continue
        assert a.shape == b.shape and a.dtype == b.dtype, (name, number, a.shape, b.shape, a.dtype, b.dtype)
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item()
        print(f"{name:32s} output {number} {dtype!s:16s} relative error {error:.1e}")
        assert error <= times * TOLERANCE[dtype], (name, number, error)


def random(*shape, dtype):
    return (torch.randn(*shape, device=DEVICE) * torch.randn(1, device=DEVICE).exp()).to(dtype)


def rms_norm(dtype):
    for n, d in [(70, 96), (3, 2048), (33, 512), (1, 7)]:
        x, weight, grad = random(n, d, dtype=dtype), random(d, dtype=torch.float32), random(n, d, dtype=dtype)
        expected = eager.rms_norm(x, weight, 1e-6)
        check(f"rms_norm {n}x{d}", fused.rms_norm(x, weight, 1e-6), expected, dtype)
        ours = fused.rms_norm_backward(grad, x, weight, expected[1])
        check(f"rms_norm_backward {n}x{d}", ours, eager.rms_norm_backward(grad, x, weight, expected[1]), dtype)
        check(f"reciprocal_rms {n}x{d}", [fused.reciprocal_rms(x, 1e-6)], [eager.reciprocal_rms(x, 1e-6)], dtype)
        added, beside = random(n, d, dtype=dtype), random(n, d, dtype=dtype)
        expected = eager.add_rms_norm(x, added, weight, 1e-6)
        total, *normed = fused.add_rms_norm(x, added, weight, 1e-6)
        check(f"add_rms_norm {n}x{d}", [total, *normed], expected, dtype)
        for one, other in zip(normed, fused.rms_norm(total, weight, 1e-6), strict=True):
            assert torch.equal(one, other), "not the bits of a sum and then a norm"
        both, _ = fused.rms_norm_backward(grad, total, weight, expected[2], beside)
        alone, _ = fused.rms_norm_backward(grad, total, weight, expected[2])
        check(f"add_rms_norm backward {n}x{d}", [both], [alone + beside], dtype)


def swiglu(dtype):
    for n, f in [(13, 40), (5, 1408), (1, 3)]:
        for scale in (None, random(n, dtype=torch.float32)):
            x, grad = random(n, 2 * f, dtype=dtype), random(n, f, dtype=dtype)
            exact = eager.swiglu(x.float(), scale).to(dtype)
            check(f"swiglu {n}x{f}", [fused.swiglu(x, scale)], [exact], dtype)
            ours = fused.swiglu_backward(grad, x, scale)
            exact_grad, exact_scale = eager.swiglu_backward(grad.float(), x.float(), scale)
            check(f"swiglu_backward {n}x{f}", ours, (exact_grad.to(dtype), exact_scale), dtype)


def rotate(dtype):
    angles = torch.rand(2, 30, 4, device=DEVICE)
    wide = random(2, 30, 3 * 20 + 12, dtype=dtype)
    heads = wide[..., :60].unflatten(-1, (3, 20))  # a slice of a wider product, not contiguous
    for name, x, a in [
        ("per sequence", heads, angles[:, :, None]),
        ("shared", heads, angles[0, :, None]),
        ("latent", wide[..., -12:], angles[0]),
        ("whole width", wide[..., :8].contiguous(), angles),
    ]:
        for inverse in (False, True):
            exact = eager.rotate(x.float(), a.cos(), a.sin(), inverse).to(dtype)
            check(f"rotate {name}", [fused.rotate(x, a.cos(), a.sin(), inverse)], [exact], dtype)


def keys(dtype):
    both = random(2, 9, 3 * 20 + 8, dtype=dtype)
    up, rope = both[..., :60].unflatten(-1, (3, 20)), both[..., 60:]
    check("assemble_keys", [fused.assemble_keys(up, rope, 12)], [eager.assemble_keys(up, rope, 12)], dtype)
    grad_key, grad_value = random(2, 9, 3, 20, dtype=dtype), random(2, 9, 3, 8, dtype=dtype)
    exact = eager.assemble_keys_backward(grad_key.float(), grad_value.float(), 8)
    ours = fused.assemble_keys_backward(grad_key, grad_value, 8)
    check("assemble_keys_backward", ours, [x.to(dtype) for x in exact], dtype)


def latent(dtype):
    for b, t, h, s, c, r in [(5, 1, 10, 130, 24, 8), (2, 2, 40, 70, 64, 32), (1, 1, 3, 200, 512, 64)]:
        q = random(h, b * t, c, dtype=dtype).transpose(0, 1), random(b * t, h, c + r, dtype=dtype)[..., c:]
        cache = random(b, s + 9, c + r, dtype=dtype)[:, :s]
        position = torch.randint(s, (b, t), device=DEVICE)
        position[0, 0], position[-1, -1] = 0, s - 1
        later = torch.arange(s, device=DEVICE) > position[..., None]
        mask = torch.zeros(b, t, s, device=DEVICE).masked_fill_(later, float("-inf"))
        exact = eager.latent_attention(*(x.float() for x in (*q, cache)), position, mask, c**-0.5).to(dtype)
        if b > t == 1:
            cache[0, 1:] = float("nan")  # which its one token does not see
            cache = torch.cat([cache, torch.full_like(cache[:1], float("nan"))])[:b]
            position[-1, -1] = s + 200  # a row that is done runs on, past what those before its end need
        ours = fused.latent_attention(*q, cache, position, mask, c**-0.5)
        check(f"latent {b}x{t}x{h} of {s}", [ours], [exact], dtype, times=2)


def gather_sum(dtype):
    y, rows = random(50, 96, dtype=dtype), torch.randperm(50, device=DEVICE)[:36]
    exact = eager.gather_sum(y.float(), rows, 12).to(dtype)
    check("gather_sum", [fused.gather_sum(y, rows, 12)], [exact], dtype)


def cross_entropy(dtype):
    for n, v in [(9, 500), (4, 20000)]:
        logits, targets = 3 * random(n, v, dtype=dtype), torch.randint(v, (n,), device=DEVICE)
        logits[0, targets[0]] = 30
        logits[1, : v // 2] = float("-inf")
        targets[1] = v - 1
        exact_loss, exact_grad = eager.cross_entropy_gradient(logits.float().clone(), targets)
        ours = fused.cross_entropy_gradient(logits.clone(), targets)
        check(f"cross_entropy {n}x{v}", ours, (exact_loss, exact_grad.to(dtype)), dtype)


def adamw(dtype):
    for split in (False, True):
        for moments in (torch.float32, torch.bfloat16):
            master = random(5000, dtype=torch.float32)
            options = {"rate": 1e-2, "decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "scale": 0.7}
            states = []
            for module in (fused, eager):
                weight, low = eager.split_master(master.clone()) if split else (master.clone(), None)
                m, v = (torch.zeros(5000, dtype=moments, device=DEVICE) for _ in range(2))
                for step in (1, 2, 3):
                    torch.manual_seed(step)
                    module.adamw_step(weight, low, random(5000, dtype=dtype), m, v, step=step, **options)
                whole = eager.join_master(weight, low) if split else weight
                states.append((whole - master, m.float(), v.float()))
            check(f"adamw split={split} {moments}", *states, moments, times=20)  # a step is a small part of its weight


ROUTING = {  # experts, and how they are chosen
    "v3": (256, RoutingRule(True, True, 8, n_groups=8, n_limited_groups=4, group_top=2, scale=2.5)),
    "v2": (160, RoutingRule(False, False, 6, n_groups=8, n_limited_groups=3, group_top=1, scale=16.0)),
    "v2_lite": (64, RoutingRule(False, False, 6)),
    "gshard": (16, RoutingRule(False, True, 2)),
    "switch": (8, RoutingRule(False, False, 1)),
    "nine groups of eleven": (99, RoutingRule(True, True, 5, n_groups=9, n_limited_groups=2, group_top=2)),
    "all of five": (5, RoutingRule(True, True, 5)),
    "wide": (512, RoutingRule(True, True, 16)),
}


def first_best(x, count):
    """The `count` greatest along the last dimension in descending order, of equal ones the first."""
    return x.sort(dim=-1, descending=True, stable=True).indices[..., :count]


def choose(scores, bias, rule):
    """`reference.choose`, and what it leaves open."""
    choice = (scores + bias).unflatten(-1, (rule.n_groups, -1))
    group = choice.sort(dim=-1, descending=True).values[..., : rule.group_top].sum(-1)
    kept = torch.zeros_like(group).scatter(1, first_best(group, rule.n_limited_groups), 1.0)
    return first_best(choice.masked_fill(kept[..., None] == 0, float("-inf")).flatten(1), rule.n_activated)


def gated(logits, indices, rule):
    """`reference.route` with the choice given."""
    scores = logits.sigmoid() if rule.sigmoid else logits.softmax(-1)
    gates = scores.gather(1, indices)
    return (gates / (gates.sum(-1, keepdim=True) + 1e-20) if rule.renormalised else gates) * rule.scale, scores


def route():
    for name, (e, rule) in ROUTING.items():
        for kind in ("random", "ties", "one token", "sharp"):
            n = 1 if kind == "one token" else 21
            logits, bias = torch.randn(n, e, device=DEVICE), torch.randn(e, device=DEVICE) / 10
            if kind == "ties":
                logits, bias = logits.round(), torch.zeros_like(bias)
                logits[0] = 0.0
            if kind == "sharp":
                logits *= 6.0
            gates, indices, scores = fused.route(logits, bias, rule)
            assert torch.equal(indices, choose(scores, bias, rule)), (name, kind)
            leaf = logits.double().requires_grad_()
            exact = gated(leaf, indices, rule)
            case = f"route {name}, {kind}"
            check(case, (gates, scores), [x.float() for x in exact], torch.float32)
            pulls = torch.randn_like(gates), torch.randn_like(scores)
            for used in (1, 2):  # the gates alone, and the affinities too
                loss = sum((x * pull).sum() for x, pull in zip(exact[:used], pulls, strict=False))
                (grad,) = torch.autograd.grad(loss, leaf, retain_graph=True)
                inputs = pulls[0], pulls[1] if used == 2 else None, scores, indices, rule
                ours, theirs = (module.route_backward(*inputs) for module in (fused, eager))
                check(f"{case}, gradient", (ours, theirs), [grad.float()] * 2, torch.float32, times=10)
    for name in ("v3", "v2"):  # a NaN must reach the loss, and name no expert that is not there
        e, rule = ROUTING[name]
        gates, indices, _ = fused.route(
            torch.full((2, e), float("nan"), device=DEVICE), torch.zeros(e, device=DEVICE), rule
        )
        assert gates.isnan().all() and (indices >= 0).all() and (indices < e).all(), name


def layout():
    options = {"device": DEVICE}
    for name, e, indices in [
        ("random", 64, torch.rand(150, 64, **options).topk(6).indices),
        ("many", 256, torch.rand(700, 256, **options).topk(8).indices),
        ("all to one", 8, torch.full((300, 2), 5, **options)),
        ("all to the first", 512, torch.zeros(40, 1, dtype=torch.int64, **options)),
        ("all to the last", 7, torch.full((257, 1), 6, **options)),
        ("idle experts", 40, torch.randint(3, (512, 3), **options) * 7),
        ("whole tiles", 4, torch.arange(1024, **options).view(-1, 2) % 4),
        ("one token", 160, torch.tensor([[3, 159, 0]], **options)),
        ("no token", 8, torch.zeros(0, 2, dtype=torch.int64, **options)),
    ]:
        for tile in (1, 128):
            ours, theirs = (module.layout(indices, e, tile) for module in (fused, eager))
            for number, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                assert a.dtype == b.dtype and torch.equal(a, b), (name, tile, number)
        print(f"layout {name}: the same")


def main():
    torch.empty = poisoned
    for dtype in (torch.float32, torch.bfloat16):
        for case in (rms_norm, swiglu, rotate, keys, latent, gather_sum, cross_entropy, adamw):
            torch.manual_seed(0)
            case(dtype)
    for case in (route, layout):
        torch.manual_seed(0)
        case()


if __name__ == "__main__":
    main()
