"""Named tensors in safetensors files, written and read a piece at a time.

    model.safetensors                      all of them, where they fit into one shard; otherwise
    model-00001-of-00003.safetensors, …    and model.safetensors.index.json, which says what lies where

Shapes and dtypes are known before any value is. So a file's header comes first and values follow as they are made:
writing holds one piece of one tensor, whatever the shard's size. Reading maps a file anew for each tensor, whose pages
leave the process with it: a map that stayed would collect the pages of all that was read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from infra.errors import InputError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # as the Hugging Face libraries cut published checkpoints

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Spec:
    """What is known of a tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Self:
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


Specs = Mapping[str, Spec]
Read = Callable[[str], Tensor]
Pieces = Callable[[str], Iterable[Tensor]]  # a tensor's rows from first to last, in as many pieces as one likes


def specs_of(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """The specs of a state dict."""
    return {name: Spec.of(tensor) for name, tensor in tensors.items()}


def shard_files(directory: str | Path) -> list[str]:
    """Names of the files that hold a directory's tensors, sorted. InputError if there are none."""
    if (index := Path(directory) / INDEX).is_file():
        return sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    if (Path(directory) / WEIGHTS).is_file():
        return [WEIGHTS]
    raise InputError(f"{directory} holds neither {WEIGHTS} nor {INDEX}: it has no weights to read")


class Shards:
    """The tensors of a directory, of one safetensors file or many, by name.

    Raises InputError if there are none, or if a file is missing or damaged.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.specs: dict[str, Spec] = {}
        self._files: dict[str, str] = {}
        for file in shard_files(directory):
            found = self._header(file)
            self.specs |= found
            self._files |= dict.fromkeys(found, file)

    def spec(self, name: str) -> Spec:
        """Dtype and shape of what `read` gives; InputError if there is no such tensor."""
        if name not in self.specs:
            raise InputError(f"{self.directory}: the checkpoint lacks the tensor {name}")
        return self.specs[name]

    def read(self, name: str) -> Tensor:
        """The tensor of that name, mapped from its file until it is dropped: never write to it."""
        self.spec(name)
        return self._map(self._files[name]).get_tensor(name)

    def _map(self, file: str) -> Any:
        path = self.directory / file
        if not path.is_file():
            raise InputError(f"{self.directory}: the index names {file}, which is not there")
        try:
            return safe_open(path, "pt")
        except SafetensorError as error:
            raise InputError(f"{path} is damaged or no safetensors file: {error}") from None

    def _header(self, file: str) -> dict[str, Spec]:
        mapped, specs = self._map(file), {}
        for name in mapped.keys():  # noqa: SIM118 (it is no mapping)
            value = mapped.get_slice(name)
            if value.get_dtype() not in DTYPES:
                raise InputError(f"{self.directory / file}: {name} is {value.get_dtype()}; known are {list(DTYPES)}")
            specs[name] = Spec(DTYPES[value.get_dtype()], tuple(value.get_shape()))
        return specs


def write_shards(
    directory: str | Path, specs: Specs, pieces: Pieces, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Write tensors into files of at most `max_shard_bytes` of values (one that is larger alone gets a file alone).

    Replaces what a former call left in `directory`, which must exist; returns the files in order.
    """
    directory = Path(directory)
    for old in [directory / WEIGHTS, directory / INDEX, *directory.glob("model-*-of-*.safetensors")]:
        old.unlink(missing_ok=True)
    shards: list[dict[str, Spec]] = [{}]
    filled = 0
    for name, spec in specs.items():
        if filled and filled + spec.bytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.bytes
    if len(shards) == 1:
        _write(directory / WEIGHTS, specs, pieces)
        return [directory / WEIGHTS]
    paths = [directory / f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    for path, shard in zip(paths, shards, strict=True):
        _write(path, shard, pieces)
    index = {
        "metadata": {"total_size": sum(spec.bytes for spec in specs.values())},
        "weight_map": {name: path.name for path, shard in zip(paths, shards, strict=True) for name in shard},
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return paths


def _write(path: Path, specs: Specs, pieces: Pieces) -> None:
    """One file: the header's length in eight bytes, the header, the values without a gap."""
    names = sorted(specs, key=lambda name: -specs[name].dtype.itemsize)  # so every tensor lies aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        start, end = end, end + specs[name].bytes
        dtype, shape = _NAMES[specs[name].dtype], list(specs[name].shape)
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            written = 0
            for piece in pieces(name):
                values = piece.to("cpu", specs[name].dtype).contiguous().flatten()
                written += file.write(values.view(torch.uint8).numpy())
            assert written == specs[name].bytes, (name, written, specs[name])
