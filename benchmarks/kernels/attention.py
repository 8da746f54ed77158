"""Attention against cuDNN and torch's own kernels: plainly causal, and inside packed documents.

TFLOP/s count the visible pairs alone, for every candidate: two products of a query with a key or value forward, five
backward. The library has no word for documents, so there it takes a dense mask; it is made beforehand, as are values
padded to the keys' width and keys repeated for their group, where a kernel wants them.
Letters: B rows, H query heads, K key heads, T tokens, d and v the widths of a key and of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.timing import Candidate, Case, captured
from kernels import fused, reference

BF16 = torch.bfloat16
FORWARD_ERROR, BACKWARD_ERROR = 4e-3, 6e-3
MLA = 192, 128
# B, H, K, T, (d, v), mean length of a document (None: one a row)
SHAPES = (
    *((1, 16, 16, 4096, MLA, None), (1, 128, 128, 4096, MLA, None), (1, 16, 16, 16384, MLA, None)),
    *((4, 16, 16, 4096, MLA, 512), (4, 16, 16, 4096, MLA, 2048)),
    *((4, 32, 8, 4096, (128, 128), 512), (4, 32, 8, 4096, (128, 128), 2048)),
)
aten = torch.ops.aten


@dataclass(frozen=True)
class Job:
    """One attention: operands as the model lays them out, a token's heads side by side."""

    name: str
    q: Tensor
    k: Tensor
    v: Tensor
    grad: Tensor
    document_BT: Tensor
    packed: bool
    pairs: float  # visible ones, of all rows and heads

    @property
    def scale(self) -> float:
        return self.q.shape[3] ** -0.5

    @property
    def group(self) -> int:
        return self.q.shape[1] // self.k.shape[1]

    def mask(self) -> Tensor | None:
        """What is added to the scores of packed documents."""
        if not self.packed:
            return None
        visible_B1TT = reference.document_mask(self.document_BT)[:, None]
        bias_B1TT = torch.zeros(visible_B1TT.shape, device="cuda", dtype=BF16).masked_fill_(
            ~visible_B1TT, float("-inf")
        )
        return bias_B1TT.expand(-1, self.q.shape[1], -1, -1)

    def repeated(self) -> tuple[Tensor, Tensor]:
        """Keys and values for every query head."""
        if self.group == 1:
            return self.k, self.v
        k, v = (x.transpose(1, 2).repeat_interleave(self.group, 2).transpose(1, 2) for x in (self.k, self.v))
        return k, v

    def padded(self) -> tuple[Tensor, Tensor, Tensor]:
        """Keys, values and gradients for every query head, all of one width."""
        k, v = self.repeated()
        wider = self.q.shape[3] - v.shape[3]
        return k, F.pad(v, (0, wider)), F.pad(self.grad, (0, wider))


def job(b: int, h: int, k: int, t: int, widths: tuple[int, int], mean: int | None) -> Job:
    def normal(heads: int, width: int) -> Tensor:
        return torch.randn(b, t, heads, width, device="cuda", dtype=BF16).transpose(1, 2)

    lengths = [lengths_of(t, mean, seed) if mean else [t] for seed in range(b)]
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    pairs = h * sum(n * (n + 1) / 2 for row in lengths for n in row)
    name = f"B{b} H{h}{f' K{k}' if k < h else ''} T{t} {widths[0]}/{widths[1]}{f' documents of {mean}' if mean else ''}"
    operands = normal(h, widths[0]), normal(k, widths[0]), normal(k, widths[1]), normal(h, widths[1])
    return Job(name, *operands, torch.stack(numbers).cuda(), mean is not None, pairs)


def lengths_of(tokens: int, mean: int, seed: int) -> list[int]:
    """Lengths of documents that fill a row, exponential with this mean; the last is cut."""
    generator, lengths = torch.Generator().manual_seed(seed), []
    while (left := tokens - sum(lengths)) > 0:
        drawn = torch.empty(()).exponential_(1 / mean, generator=generator).item()
        lengths.append(min(left, max(1, round(drawn))))
    return lengths


def exact(job: Job) -> tuple[Tensor, ...]:
    """Output and gradients of the last row's last group of heads, in fp32: all of them would not fit."""
    last = slice(-job.group, None)
    inputs = job.q[-1:, last], job.k[-1:, -1:], job.v[-1:, -1:]
    leaves = [x.float().requires_grad_() for x in inputs]
    y = reference.document_attention(*leaves, job.document_BT[-1:], job.scale)
    return y.detach(), *torch.autograd.grad(y, leaves, job.grad[-1:, last].float())


def comparable(job: Job, grads: tuple[Tensor, ...]) -> list[Tensor]:
    """What `exact` has of gradients of q, k and v; those of repeated heads are summed."""
    parts = []
    for grad, x in zip(grads, (job.q, job.k, job.v), strict=True):
        last = grad[-1:, -job.group * grad.shape[1] // job.q.shape[1] :, :, : x.shape[3]].float()
        parts.append(last.sum(1, keepdim=True) if grad.shape[1] > x.shape[1] else last)
    return parts


def of_one_norm(grads: Iterable[Tensor], norms: Iterable[Tensor]) -> Tensor:
    """Gradients side by side, each over its own norm: an error in any of them counts alike."""
    return torch.cat([(grad / norm).flatten() for grad, norm in zip(grads, norms, strict=True)])


class Cudnn:
    """cuDNN's kernel through torch, its passes called by name: autograd's own calls cannot all be captured."""

    def __init__(self, job: Job) -> None:
        mask, causal = job.mask(), not job.packed
        operands, options = (job.q, *job.repeated()), {"scale": job.scale}
        forward, backward = aten._scaled_dot_product_cudnn_attention, aten._scaled_dot_product_cudnn_attention_backward
        self.forward = lambda: forward(*operands, mask, True, 0.0, causal, False, **options)[0]
        y, lse, *lengths, seed, offset, _ = forward(*operands, mask, True, 0.0, causal, False, **options)
        given = job.grad, *operands, y, lse, seed, offset, mask, *lengths, 0.0, causal
        self.backward = lambda: backward(*given, **options)


class Torch:
    """The faster of torch's own kernels that can do it: FlashAttention 2 without a mask, the efficient one with one."""

    def __init__(self, job: Job) -> None:
        k, v, grad = job.padded()
        operands, options = (job.q, k, v), {"scale": job.scale}
        if job.packed:
            mask = job.mask()
            forward = aten._scaled_dot_product_efficient_attention
            backward = aten._scaled_dot_product_efficient_attention_backward
            settings = mask, True, 0.0, False
            y, lse, seed, offset = forward(*operands, *settings, **options)
            given = grad, *operands, mask, y, lse, seed, offset, 0.0, [True, True, True, False], False
        else:
            forward = aten._scaled_dot_product_flash_attention
            backward = aten._scaled_dot_product_flash_attention_backward
            settings = 0.0, True, False
            y, lse, *lengths, seed, offset, _ = forward(*operands, *settings, **options)
            given = grad, *operands, y, lse, *lengths, 0.0, True, seed, offset
        self.forward = lambda: forward(*operands, *settings, **options)[0]
        self.backward = lambda: backward(*given, **options)[:3]


ANCHORS = {"cudnn": Cudnn, "torch": Torch}


def reason(error: Exception) -> str:
    """The first sentence of what torch says."""
    return str(error).strip().partition("\n")[0].partition(". ")[0]


def add_anchors(case: Case, job: Job, pick: Callable[[Any], Callable[[], Any]]) -> None:
    """The library's kernels that do this job rightly on this machine; of the others, why they are left out."""
    for name, anchor in ANCHORS.items():
        try:
            call = pick(anchor(job))
            case.error(Candidate(name, call))
            captured(call)
        except (RuntimeError, AssertionError) as error:
            print(f"{case.name}: {name} is left out: {reason(error)}", flush=True)
        else:
            case.add(name, call)


def attention_fwd() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        made = job(*shape)
        (d, v), spans = shape[4], fused.visibility(made.document_BT)
        case = Case(f"attention_fwd {made.name}", "TFLOP/s", 2.0 * (d + v) * made.pairs, exact(made)[0], FORWARD_ERROR)
        case.taken = lambda y, made=made, v=v: y[-1:, -made.group :, :, :v]
        operands = made.q, made.k, made.v, spans, made.scale
        case.add("ours", lambda operands=operands: fused.document_attention(*operands)[0])
        add_anchors(case, made, lambda anchor: anchor.forward)
        yield case.run()


def attention_bwd() -> Iterator[dict[str, Any]]:
    for shape in SHAPES:
        made = job(*shape)
        (d, v), spans = shape[4], fused.visibility(made.document_BT)
        expected = exact(made)[1:]
        norms = [x.norm() for x in expected]

        def joined(grads: tuple[Tensor, ...], job: Job = made, norms: list[Tensor] = norms) -> Tensor:
            return of_one_norm(comparable(job, grads), norms)

        case = Case(f"attention_bwd {made.name}", "TFLOP/s", 2.0 * (3 * d + 2 * v) * made.pairs)
        case.expected, case.tolerance, case.taken = of_one_norm(expected, norms), BACKWARD_ERROR, joined
        y, lse = fused.document_attention(made.q, made.k, made.v, spans, made.scale)
        operands = made.grad, made.q, made.k, made.v, y, lse, spans, made.scale
        case.add("ours", lambda operands=operands: fused.document_attention_backward(*operands))
        add_anchors(case, made, lambda anchor: anchor.backward)
        yield case.run()


AREAS = {"attention_fwd": attention_fwd, "attention_bwd": attention_bwd}
