"""`fathom import` and `fathom export` as a user types them, on a checkpoint in the published format."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from infra.store import ArtifactStore
from model.config import ModelConfig
from model.exchange import export_hf
from model.transformer import Transformer
from stages.tokens.bpe import train


def test_what_is_imported_can_be_exported_again(fathom: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
    (tmp_path / "tokenizer").mkdir()
    tokenizer.save(tmp_path / "tokenizer")
    torch.manual_seed(0)
    config = ModelConfig(family="qwen3", vocab_size=280, d_model=32, n_layers=2, n_heads=2, d_ff=48, max_position=64)
    export_hf(Transformer(config), tmp_path / "published", tmp_path / "tokenizer")

    for arguments in (("import", "published", "--tag", "qwen@base"), ("export", "qwen@base", "copy")):
        process = fathom(*arguments)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
    store = ArtifactStore(tmp_path / "store")
    checkpoint, made = store.check("qwen@base"), store.check("export@latest")
    assert checkpoint.kind == "checkpoint"
    assert made.manifest.inputs == {"checkpoint": checkpoint.id}
    copied = {path.name for path in (tmp_path / "copy").iterdir()}
    assert copied == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("published", "copy"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
