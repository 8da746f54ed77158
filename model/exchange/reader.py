"""Tensors of a published checkpoint, FP8 scaled back on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError, InputError
from kernels.fp8 import BLOCK, FLOAT8
from model.exchange.shards import Shards, Spec

SCALES = "_scale_inv"  # ends the name of an FP8 weight's scales, one for each 128 × 128


class PublishedWeights(Shards):
    """Published tensors by name. FP8 weights have the specs and the values of the BF16 that they stand for."""

    def spec(self, name: str) -> Spec:
        spec = super().spec(name)
        return Spec(torch.bfloat16, spec.shape) if spec.dtype == FLOAT8 else spec

    def read(self, name: str) -> Tensor:
        tensor = super().read(name)
        return self._scaled(name, tensor) if tensor.dtype == FLOAT8 else tensor

    def _scaled(self, name: str, tensor: Tensor) -> Tensor:
        """fp32 products rounded to BF16, one band of blocks at a time."""
        scales = super().read(name + SCALES).float()
        if tuple(scales.shape) != (blocks := tuple(-(-size // BLOCK) for size in tensor.shape)):
            raise InputError(f"{name}{SCALES} is {list(scales.shape)}; blocks of {BLOCK} need {list(blocks)}")
        scaled = torch.empty(tensor.shape, dtype=torch.bfloat16)
        for number, band in enumerate(tensor.split(BLOCK)):
            columns = scales[number].repeat_interleave(BLOCK)[: tensor.shape[1]]
            scaled[number * BLOCK :][: len(band)] = band.float() * columns
        return scaled


def read_config(directory: Path) -> dict[str, Any]:
    """config.json. InputError if there is none, ConfigError for a quantization that `PublishedWeights` cannot undo."""
    file = directory / "config.json"
    if not file.is_file():
        raise InputError(f"{directory} holds no config.json: it is not a published checkpoint")
    try:
        published = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{file} is no JSON: {error}") from None
    quantization: Mapping[str, Any] = published.get("quantization_config") or {"quant_method": "fp8"}
    blocks = quantization.get("weight_block_size", [BLOCK, BLOCK])
    if quantization.get("quant_method") != "fp8" or blocks != [BLOCK, BLOCK]:
        raise ConfigError(
            f"{file}: quantization_config {dict(quantization)}; only fp8 in blocks of {BLOCK} x {BLOCK} is "
            "implemented: publish the weights in bf16"
        )
    return published
