"""Ten steps of each family give the recorded losses, to the last bit; golden_losses.py says what a change asks for."""

import json
import platform

import golden_losses as golden
import pytest
import torch

RECORD = json.loads(golden.RECORD.read_text())


@pytest.fixture(scope="module")
def losses() -> dict[str, list[str]]:
    installed = torch.__version__.partition("+")[0]
    if installed != RECORD["torch"]:
        pytest.skip(f"recorded with torch {RECORD['torch']}, this is {installed}")
    if platform.machine() != "x86_64" or torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        pytest.skip("recorded with the kernels for AVX2")
    return golden.compute()


@pytest.mark.parametrize("family", golden.FAMILIES)
def test_ten_steps_give_the_golden_losses(family, losses):
    assert losses[family] == RECORD["losses"][family]


def test_every_family_is_recorded_and_learns():
    assert RECORD["losses"].keys() == golden.FAMILIES.keys()
    for family, values in RECORD["losses"].items():
        first, last = (float.fromhex(values[index]) for index in (0, -1))
        assert last < first - 0.5, (family, first, last)
