"""Engines that write replies: our own batched generator (embedded default) and vLLM, behind one small protocol."""

from __future__ import annotations

from typing import Literal

from model.transformer import Transformer
from stages.rl.engines.base import Engine

EngineName = Literal["native", "vllm"]


def open_engine(name: EngineName, model: Transformer, tokenizer_dir: str) -> Engine:
    """An engine that generates with `model`'s weights. vLLM takes a copy, and is imported only if it is asked for."""
    if name == "native":
        from stages.rl.engines.native import NativeEngine

        return NativeEngine(model)
    from stages.rl.engines.vllm import VllmEngine

    return VllmEngine(model, tokenizer_dir)
