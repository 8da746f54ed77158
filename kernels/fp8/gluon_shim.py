"""Gluon's names in Triton 3.6 and in those after it."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import tma

_RENAMED = gl.constexpr(hasattr(tma, "async_load"))
load = tma.async_load if _RENAMED else tma.async_copy_global_to_shared
copy = async_copy.async_load if _RENAMED else async_copy.async_copy_global_to_shared
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
store = tma.async_store if _RENAMED else tma.async_copy_shared_to_global


@gluon.jit
def reinterpret(buffer, SHAPE: gl.constexpr):
    """A buffer of fp32 numbers under another shape, flat in memory."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(vec=1, per_phase=1, max_phase=1, order=[0])
    if _RENAMED:  # noqa: SIM108 - the compiler leaves out the branch that it does not take
        view = buffer.reinterpret(gl.float32, SHAPE, flat)
    else:
        view = buffer._reinterpret(gl.float32, SHAPE, flat)
    return view
