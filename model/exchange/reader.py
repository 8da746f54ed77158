"""Tensors of a published checkpoint by name, read one at a time from one file or many."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import safe_open
from torch import Tensor

from infra.errors import InputError

FP8_BLOCK = 128  # DeepSeek-V3's weights: one fp32 scale per 128 x 128 block (section 3.3)


class PublishedWeights:
    """The safetensors files of a directory, open for the length of a `with` block."""

    def __init__(self, directory: Path) -> None:
        self._stack = ExitStack()
        self._directory = directory
        index = directory / "model.safetensors.index.json"
        if index.exists():
            self._files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif (directory / "model.safetensors").exists():
            with safe_open(directory / "model.safetensors", "pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise InputError(f"{directory} holds neither model.safetensors nor model.safetensors.index.json")

    def __enter__(self) -> Self:
        self._open: dict[str, Any] = {}
        for name in sorted(set(self._files.values())):
            if not (self._directory / name).exists():
                raise InputError(f"{self._directory}: the index names {name}, which is not there")
            self._open[name] = self._stack.enter_context(safe_open(self._directory / name, "pt"))
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, name: str) -> Tensor:
        """The tensor of that name; FP8 weights come back in bf16, scaled block by block."""
        if name not in self._files:
            raise InputError(f"{self._directory}: the checkpoint lacks the tensor {name}")
        tensor = self._open[self._files[name]].get_tensor(name)
        return self._dequantize(name, tensor) if tensor.dtype == torch.float8_e4m3fn else tensor

    def _dequantize(self, name: str, tensor: Tensor) -> Tensor:
        scale = self.read(f"{name}_scale_inv")
        for dim in (0, 1):
            scale = scale.repeat_interleave(FP8_BLOCK, dim).narrow(dim, 0, tensor.shape[dim])
        return (tensor.float() * scale).to(torch.bfloat16)
