"""The kernels of `kernels.fused.attention` against `kernels.reference`, as a program: on CUDA as it is, on a CPU under
TRITON_INTERPRET=1.

Heads lie apart in memory and tokens follow the last: there, and in what the kernels write into, it is full of NaN.
"""

import torch

import kernels
from kernels import fused, reference
from kernels.reference import PREFIX

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
# The interpreter truncates fp32 to bf16 where hardware rounds: one more unit in the last place.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 4e-3 if CUDA else 8e-3}
NAN = float("nan")


def poisoned(allocate):
    """`allocate`, what holds NaN full of it."""

    def allocated(*arguments, **options):
        x = allocate(*arguments, **options)
        return x.fill_(NAN) if x.is_floating_point() else x

    return allocated


def heads(batch, length, number, width, dtype):
    """[B, H, T, width], in memory [B, T, H, width] with gaps."""
    memory = torch.full((batch, length + 3, number, width + 8), NAN, device=DEVICE, dtype=dtype)
    x = memory[:, :length, :, :width].transpose(1, 2)
    return x.copy_(torch.randn(x.shape, device=DEVICE))


def documents(*rows):
    """Numbers of documents from (number, length) pairs, a row each."""
    return torch.tensor([[number for number, length in row for _ in range(length)] for row in rows], device=DEVICE)


def check(name, document, dtype, query_heads=2, key_heads=2, width=16, value=16):
    (batch, length), scale = document.shape, width**-0.5
    q = heads(batch, length, query_heads, width, dtype)
    k, v = (heads(batch, length, key_heads, each, dtype) for each in (width, value))
    grad = heads(batch, length, query_heads, value, dtype)
    spans = fused.visibility(document)
    y, lse = fused.document_attention(q, k, v, spans, scale)
    assert y.transpose(1, 2).is_contiguous()
    ours = y, *fused.document_attention_backward(grad, q, k, v, y, lse, spans, scale)
    exact = [x.float().requires_grad_() for x in (q, k, v)]
    expected = reference.document_attention(*exact, document, scale)
    theirs = expected, *torch.autograd.grad(expected, exact, grad.float())
    for what, a, b in zip(("y", "dq", "dk", "dv"), ours, theirs, strict=True):
        assert a.shape == b.shape and a.dtype == dtype, (name, what, a.shape, a.dtype)
        error = ((a.double() - b.double()).norm() / b.double().norm().clamp(min=1.0)).item()
        print(f"{name:44s} {what} {dtype!s:16s} relative error {error:.1e}")
        assert error <= TOLERANCE[dtype], (name, what, error)


def every_shape_of_documents():
    """In fp32, whose tiles are 32 × 32."""
    for name, rows in {
        "one token": [[(0, 1)]],
        "one document": [[(4, 130)]],
        "ends on borders of tiles and off them": [[(0, 32), (1, 3), (2, 61), (3, 64), (4, 30)], [(7, 100), (8, 90)]],
        "documents of one token, and one more": [[*((number, 1) for number in range(70)), (70, 50)]],
        "prefix": [[(PREFIX, 41), (0, 7), (1, 80), (2, 50)], [(PREFIX, 5), (0, 100), (1, 73)]],
        "prefix of whole tiles": [[(PREFIX, 64), (0, 40), (1, 60)], [(PREFIX, 32), (0, 32), (1, 100)]],
        "prefix in one row, nothing but it in one": [[(PREFIX, 90)], [(0, 33), (1, 57)]],
    }.items():
        check(name, documents(*rows), torch.float32)


def every_width():
    document = documents([(PREFIX, 20), (0, 30), (1, 95), (2, 155)])
    for query_heads, key_heads, width, value in [(2, 2, 24, 16), (4, 2, 48, 48), (3, 1, 20, 12), (1, 1, 128, 256)]:
        name = f"{query_heads} heads on {key_heads}, {width}/{value}"
        check(name, document[:, :100], torch.float32, query_heads, key_heads, width, value)
        check(name, document, torch.bfloat16, query_heads, key_heads, width, value)
    check("1 head, 192/128", document, torch.bfloat16, 1, 1, 192, 128)
    check("4 heads on 1, 128/128", document, torch.bfloat16, 4, 1, 128, 128)


def what_nobody_needs_is_not_read():
    """NaN inside a document does not reach others, forward or backward, but for those that share a tile with it."""
    document, scale = documents([(0, 40), (1, 120), (2, 40)]), 0.25
    q, k, v, grad = (heads(1, 200, 1, 16, torch.float32) for _ in range(4))
    for x in (q, k, v, grad):
        x[:, :, 64:128] = NAN  # two tiles
    spans = fused.visibility(document)
    y, lse = fused.document_attention(q, k, v, spans, scale)
    outputs = y, *fused.document_attention_backward(grad, q, k, v, y, lse, spans, scale)
    for x in outputs:
        assert x[:, :, :32].isfinite().all() and x[:, :, 160:].isfinite().all()


def the_operation_is_differentiable():
    """`kernels.attention`: on CUDA these kernels, on a CPU torch's."""
    document = documents([(PREFIX, 20), (0, 30), (1, 50)])
    leaves = [heads(1, 100, number, 24, torch.float32).requires_grad_() for number in (4, 2, 2)]
    ours = kernels.attention(*leaves, kernels.visibility(document), 0.2)
    theirs = reference.document_attention(*leaves, document, 0.2)
    grad = torch.randn_like(theirs)
    for a, b in zip(*(torch.autograd.grad(y, leaves, grad) for y in (ours, theirs)), strict=True):
        assert (a - b).norm() <= 2e-6 * b.norm()


def main():
    torch.empty, torch.Tensor.new_empty = poisoned(torch.empty), poisoned(torch.Tensor.new_empty)
    cases = every_shape_of_documents, every_width, what_nobody_needs_is_not_read, the_operation_is_differentiable
    for case in cases:
        torch.manual_seed(0)
        case()


if __name__ == "__main__":
    main()
