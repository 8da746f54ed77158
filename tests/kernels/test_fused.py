"""The Triton kernels under Triton's interpreter, against what they stand in for: same shapes, ragged sizes, poisoned
outputs. A process of its own, since the interpreter is chosen when Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.parametrize("script", ["interpret_fused.py", "interpret_attention.py"])
def test_every_fused_kernel_equals_its_twin_in_torch_under_the_interpreter(script):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, Path(__file__).with_name(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-4000:]
