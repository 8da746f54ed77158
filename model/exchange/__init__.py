"""Checkpoints in the published formats: what transformers, vLLM and SGLang load, and what the authors release.

`export_hf` and `write_published` write safetensors, config.json and the tokenizer's files; `PublishedCheckpoint` and
`import_hf` read such a directory, in any floating dtype and with DeepSeek-V3's FP8 blocks. Values are moved, never
rounded, so a round trip is exact, unless one asks for those blocks. Both ways go tensor by tensor, from files to files
without a model in between: `shards.py` says what that holds in memory.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from infra.errors import ConfigError, InputError
from kernels.fp8 import BLOCK, FLOAT8, quantize_blocks
from model.config import ModelConfig
from model.exchange import deepseek, llama, qwen
from model.exchange.layout import Part, Place
from model.exchange.reader import SCALES, PublishedWeights, read_config
from model.exchange.shards import MAX_SHARD_BYTES, Read, Spec, Specs, specs_of, write_shards
from model.transformer import Transformer

__all__ = [
    "TOKENIZER_FILES",
    "PublishedCheckpoint",
    "copy_tokenizer",
    "export_hf",
    "import_hf",
    "published_tensors",
    "write_published",
]

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK]}
_LAYOUTS: dict[str, ModuleType] = {
    "deepseek_v3": deepseek,
    "deepseek_v2": deepseek,
    "llama": llama,
    "qwen2": qwen,
    "qwen3": qwen,
}


def export_hf(
    model: Transformer,
    directory: str | Path,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """Write `model` as a published checkpoint that AutoModelForCausalLM loads offline; creates the directory."""
    state = model.state_dict()
    write_published(model.config, specs_of(state), state.__getitem__, directory, tokenizer_dir, max_shard_bytes, fp8)


def write_published(
    config: ModelConfig,
    specs: Specs,
    read: Read,
    directory: str | Path,
    tokenizer_dir: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    fp8: bool = False,
) -> None:
    """`export_hf` of tensors that need not be in memory: `read` gives those of `specs`, under our names.

    `fp8` writes the weights of linear layers and experts as DeepSeek-V3's are released: e4m3 codes, and beside each
    tensor one `…_scale_inv` for each 128 × 128 of it. Embedding, head, router and norms stay as they are.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    places = {place.part.name: place for place in _places(config, specs, read)}
    for copy, source in deepseek.shared_copies(config):
        places[copy] = Place(source, 0, Part(copy, specs[source].shape[0]))
    published = _LAYOUTS[config.family].to_published(config)
    published["dtype"] = str(specs["embedding.weight"].dtype).removeprefix("torch.")
    published |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    if tokenizer_dir is not None:
        published |= _special_ids(Path(tokenizer_dir))
        copy_tokenizer(tokenizer_dir, directory)
    if fp8:
        published["quantization_config"] = FP8_CONFIG
    (directory / "config.json").write_text(json.dumps(published, indent=2) + "\n")
    cuts = {
        name: Spec(specs[place.ours].dtype, place.part.shape(specs[place.ours].shape)) for name, place in places.items()
    }

    def cut(name: str) -> Tensor:
        return places[name].cut(read(places[name].ours))

    if not fp8:
        write_shards(directory, cuts, lambda name: [cut(name)], max_shard_bytes)
        return

    def coded(name: str) -> Tensor:
        whole = name.removesuffix(SCALES)
        codes, scales = quantize_blocks(cut(whole))
        return codes if name == whole else scales

    quantized = [name for name in cuts if _is_linear(name)]
    for name in quantized:
        shape = cuts[name].shape
        cuts[name] = Spec(FLOAT8, shape)
        cuts[name + SCALES] = Spec(torch.float32, tuple(-(-size // BLOCK) for size in shape))
    fp8_names = {*quantized, *(name + SCALES for name in quantized)}
    write_shards(directory, cuts, lambda name: [coded(name) if name in fp8_names else cut(name)], max_shard_bytes)


def _is_linear(name: str) -> bool:
    """Whether a published tensor is the weight of a linear layer or of an expert: every published name says so."""
    return "_proj" in name and name.endswith(".weight")


def copy_tokenizer(source: str | Path, destination: str | Path) -> None:
    """Copy the tokenizer's files from one folder into another. Raises InputError if there is none."""
    if not (Path(source) / "tokenizer.json").is_file():
        raise InputError(f"{source} holds no tokenizer.json; a checkpoint carries the tokenizer it was trained with.")
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(destination) / name)


def published_tensors(model: Transformer) -> Iterator[tuple[str, Tensor]]:
    """(published name, tensor) of every weight, without MTP's copies of embedding and head: views where possible."""
    state = model.state_dict()
    for place in _places(model.config, specs_of(state), state.__getitem__):
        yield place.part.name, place.cut(state[place.ours])


class PublishedCheckpoint:
    """A published directory read as a checkpoint of ours: its config, and its tensors under our names.

    Raises InputError if files or tensors are missing or of another shape than config.json says, ConfigError naming
    what is not implemented.
    """

    def __init__(self, directory: str | Path) -> None:
        directory = Path(directory)
        published = read_config(directory)
        layout = _LAYOUTS.get(published.get("model_type"))
        if layout is None:
            raise ConfigError(
                f"{directory}: model_type {published.get('model_type')!r}; implemented are {', '.join(_LAYOUTS)}"
            )
        self._weights = PublishedWeights(directory)
        config: ModelConfig = layout.from_published(published)
        if config.n_mtp and f"model.layers.{config.n_layers}.eh_proj.weight" not in self._weights.specs:
            config = config.replace(n_mtp=0)  # transformers drops the MTP modules when it saves
        self.config = config
        self._entries = {entry.ours: entry for entry in layout.entries(config)}
        _check_architecture(directory, published, layout.to_published(config)["architectures"])
        with torch.device("meta"):
            model = Transformer(config)
        self.specs = {name: self._spec(name, tuple(tensor.shape)) for name, tensor in model.state_dict().items()}
        self._check_all_is_read(directory)

    def pieces(self, name: str) -> Iterator[Tensor]:
        """The rows of one of our tensors, a published tensor at a time."""
        if name not in self._entries:
            return iter([torch.zeros(self.specs[name].shape)])  # V2's routing bias
        return self._entries[name].pieces(self._weights.read)

    def _spec(self, name: str, shape: tuple[int, ...]) -> Spec:
        if name not in self._entries:
            assert name.endswith("router.bias"), name  # V2 publishes none
            return Spec(torch.float32, shape)
        dtypes = []  # they differ where a part is FP8 and another is not
        for part in self._entries[name].parts:
            found = self._weights.spec(part.name)
            if found.shape != part.shape(shape):
                raise InputError(f"{part.name} is {list(found.shape)}; config.json makes it {list(part.shape(shape))}")
            dtypes.append(found.dtype)
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = torch.promote_types(dtype, other)
        return Spec(dtype, shape)

    def _check_all_is_read(self, directory: Path) -> None:
        """A tensor without a place is a part of an architecture that only looks like one of ours."""
        known = {part.name for entry in self._entries.values() for part in entry.parts}
        known |= {copy for copy, _ in deepseek.shared_copies(self.config)}
        known |= {name + SCALES for name in known}
        if self.config.tie_embeddings:
            known.add("lm_head.weight")
        unread = [n for n in self._weights.specs if n not in known and not n.endswith("rotary_emb.inv_freq")]
        if unread:
            more = f" and {len(unread) - 3} more" if len(unread) > 3 else ""
            raise ConfigError(f"{directory}: a {self.config.family} has no place for {', '.join(unread[:3])}{more}")


def import_hf(directory: str | Path) -> Transformer:
    """The model of a published checkpoint, each weight in its published dtype. Raises as `PublishedCheckpoint`."""
    published = PublishedCheckpoint(directory)
    with torch.device("meta"):
        model = Transformer(published.config)
    state = {
        name: torch.cat([piece.to(spec.dtype) for piece in published.pieces(name)]).view(spec.shape)
        for name, spec in published.specs.items()
    }
    model.load_state_dict(state, assign=True)
    return model


def _places(config: ModelConfig, specs: Specs, read: Read) -> Iterator[Place]:
    """Where each published tensor lies in ours. ConfigError if ours hold what the layout cannot say."""
    entries = _LAYOUTS[config.family].entries(config)
    lost = specs.keys() - {entry.ours for entry in entries}
    lost = {name for name in lost if not name.endswith("router.bias") or bool(read(name).any())}
    if lost:
        raise ConfigError(f"the published layout has no place for {', '.join(sorted(lost))}")
    for entry in entries:
        yield from entry.places()


def _check_architecture(directory: Path, published: dict[str, Any], implemented: list[str]) -> None:
    if published.get("architectures", implemented) != implemented:
        raise ConfigError(
            f"{directory}: architectures {published['architectures']}; a {published['model_type']} is read as "
            f"{implemented[0]} alone"
        )


def _special_ids(tokenizer_dir: Path) -> dict[str, int]:
    """bos, eos and pad ids: config.json must say them, or its readers assume llama's."""
    settings = json.loads((tokenizer_dir / "tokenizer_config.json").read_text())
    added = json.loads((tokenizer_dir / "tokenizer.json").read_text())["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    names = {f"{role}_token_id": settings.get(f"{role}_token") for role in ("bos", "eos", "pad")}
    contents = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    return {name: ids[content] for name, content in contents.items() if content in ids}
