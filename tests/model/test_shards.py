"""Safetensors files as the library itself reads and writes them, and what happens when one is not whole."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from infra.errors import InputError
from model.exchange.shards import INDEX, WEIGHTS, Shards, Spec, write_shards

TENSORS = {
    "bf16": torch.randn(3, 5).bfloat16(),  # 30 bytes: what follows it unsorted would lie unaligned
    "fp32": torch.randn(4),
    "fp8": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "fp64": torch.randn(2, 1, 3, dtype=torch.float64),
    "scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 4),
}
SPECS = {name: Spec.of(tensor) for name, tensor in TENSORS.items()}


def write(folder, max_shard_bytes=1000):
    return write_shards(folder, SPECS, lambda name: [TENSORS[name]], max_shard_bytes)


def same(tensors):
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name].double(), tensor.double()), name


def test_one_file_is_what_the_library_reads(tmp_path):
    assert write(tmp_path) == [tmp_path / WEIGHTS]
    same(load_file(tmp_path / WEIGHTS))
    shards = Shards(tmp_path)
    assert shards.specs == SPECS
    same({name: shards.read(name) for name in shards.specs})


def test_what_the_library_writes_is_read(tmp_path):
    save_file(TENSORS, tmp_path / WEIGHTS)
    shards = Shards(tmp_path)
    assert shards.specs == SPECS
    same({name: shards.read(name) for name in TENSORS})


def test_files_stay_below_the_limit_unless_one_tensor_is_larger(tmp_path):
    paths = write(tmp_path, 40)
    assert [path.name for path in paths] == [f"model-0000{n}-of-00004.safetensors" for n in (1, 2, 3, 4)]
    held = [load_file(path) for path in paths]
    sizes = [sum(t.nbytes for t in tensors.values()) for tensors in held]
    assert all(size <= 40 or len(tensors) == 1 for size, tensors in zip(sizes, held, strict=True))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    same({name: held[[p.name for p in paths].index(file)][name] for name, file in index["weight_map"].items()})
    shards = Shards(tmp_path)
    same({name: shards.read(name) for name in TENSORS})


def test_pieces_are_laid_end_to_end(tmp_path):
    write_shards(tmp_path, SPECS, lambda name: TENSORS[name].flatten().split(2))
    same(load_file(tmp_path / WEIGHTS))


def test_writing_again_leaves_nothing_of_what_was_there(tmp_path):
    write(tmp_path, 40)
    write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(InputError, match="holds neither"):
        Shards(tmp_path)
    first, *_ = write(tmp_path, 40)
    first.write_bytes(first.read_bytes()[:-1])
    with pytest.raises(InputError, match=f"{first.name} is damaged"):
        Shards(tmp_path)
    first.unlink()
    with pytest.raises(InputError, match=f"the index names {first.name}"):
        Shards(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    write(tmp_path)
    with pytest.raises(InputError, match="lacks the tensor absent"):
        Shards(tmp_path).read("absent")
