"""Checkpoints in the published formats: what transformers, vLLM and SGLang load, and what the authors release.

`export_hf` writes safetensors, config.json and the tokenizer's files; `import_hf` reads such a directory, sharded or
not, in any floating dtype and with DeepSeek-V3's FP8 blocks. Values are moved, never rounded, so a round trip is exact.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import torch
from safetensors.torch import save_file
from torch import Tensor

from infra.errors import ConfigError, InputError
from model.config import ModelConfig
from model.exchange import deepseek, llama, qwen
from model.exchange.reader import PublishedWeights
from model.transformer import Transformer

__all__ = ["export_hf", "import_hf", "published_tensors"]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def export_hf(model: Transformer, directory: str | Path, tokenizer_dir: str | Path | None = None) -> None:
    """Write `model` as a published checkpoint that AutoModelForCausalLM loads offline; creates the directory."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    published = _family(model.config).to_published(model.config)
    published["dtype"] = str(model.embedding.weight.dtype).removeprefix("torch.")
    published |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer_dir is not None:
        tokenizer_dir = Path(tokenizer_dir)
        published |= _special_ids(tokenizer_dir)
        for name in TOKENIZER_FILES:
            if (tokenizer_dir / name).exists():
                shutil.copyfile(tokenizer_dir / name, directory / name)
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    tensors = {name: tensor.cpu().contiguous() for name, tensor in published_tensors(model)}
    copies = deepseek.shared_copies(model.config) if model.config.n_mtp else []
    ours = model.state_dict()
    tensors |= {name: ours[source].cpu().clone() for name, source in copies}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def published_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of every weight, without MTP's copies of embedding and head: views where possible."""
    ours = model.state_dict()
    for entry in _family(model.config).entries(model.config):
        yield from entry.split(ours.pop(entry.ours))
    lost = [name for name, tensor in ours.items() if not name.endswith("router.bias") or bool(tensor.any())]
    if lost:
        raise ConfigError(f"the published layout has no place for {', '.join(lost)}")


def import_hf(directory: str | Path) -> Transformer:
    """Read a published checkpoint. InputError if files or tensors are missing; ConfigError if unsupported."""
    directory = Path(directory)
    config_file = directory / "config.json"
    if not config_file.exists():
        raise InputError(f"{directory} holds no config.json: it is not a published checkpoint")
    published = json.loads(config_file.read_text())
    families = {"deepseek_v3": deepseek, "deepseek_v2": deepseek, "llama": llama, "qwen2": qwen}
    kind = published.get("model_type")
    if kind not in families:
        raise ConfigError(f"{config_file}: model_type {kind!r}; implemented are {', '.join(families)}")
    config = families[kind].from_published(published)
    with PublishedWeights(directory) as weights:
        if config.n_mtp and f"model.layers.{config.n_layers}.eh_proj.weight" not in weights:
            config = config.replace(n_mtp=0)  # transformers drops the MTP modules when it saves
        with torch.device("meta"):
            model = Transformer(config)
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        state = {entry.ours: entry.join(weights.read, shapes[entry.ours]) for entry in families[kind].entries(config)}
    for name in shapes.keys() - state.keys():
        assert name.endswith("router.bias"), name  # V2 publishes none
        state[name] = torch.zeros(shapes[name])
    model.load_state_dict(state, assign=True)
    return model


def _family(config: ModelConfig) -> ModuleType:
    return {"deepseek_v3": deepseek, "llama": llama, "qwen2": qwen}[config.family]


def _special_ids(tokenizer_dir: Path) -> dict[str, int]:
    """bos, eos and pad ids: config.json must say them, or its readers assume llama's."""
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    added = json.loads((tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    names = {f"{role}_token_id": settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    return {name: ids[content] for name, content in contents.items() if content in ids}
