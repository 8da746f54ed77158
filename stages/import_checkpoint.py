"""Import: a published checkpoint (DeepSeek V2, V3, R1; Llama; Qwen2, Qwen3) as one of ours, for any later stage.

Tensors go from file to file, one published tensor at a time and in their own dtype (FP8 blocks as the BF16 they stand
for): no model is built, and memory stays below the largest shard. What is not implemented is refused by name.

The tokenizer comes along as it is. Its files must name an `eos_token`; a chat template of its own is the one that
later stages render conversations with. A vocabulary that has DeepSeek's role marks and no template gets ours.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from infra.config import Config, Field
from infra.errors import InputError
from infra.files import entry
from infra.stage import Context, Inputs, stage
from model.exchange import TOKENIZER_FILES, PublishedCheckpoint
from model.exchange.shards import INDEX, MAX_SHARD_BYTES, shard_files
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import JINJA
from stages.training.checkpoint import save_tensors


class ImportCheckpointConfig(Config):
    path: str = Field(
        title="Directory", description="A published checkpoint: config.json, safetensors files, tokenizer.json."
    )
    max_shard_bytes: int = Field(MAX_SHARD_BYTES, title="Largest file", description="Bytes of weights a file.", ge=1)


def _outside(config: ImportCheckpointConfig) -> dict[str, str]:
    """SHA-256 of every file that is read."""
    directory = Path(config.path)
    if not directory.is_dir():
        raise InputError(f"path: {config.path!r} is not a directory; give one with a published checkpoint in it")
    names = [name for name in ("config.json", INDEX, *TOKENIZER_FILES) if (directory / name).is_file()]
    names += [name for name in shard_files(directory) if (directory / name).is_file()]
    return {name: entry(directory / name, directory).sha256 for name in names}


@stage(version=1, makes="checkpoint", reads=_outside)
def import_checkpoint(config: ImportCheckpointConfig, inputs: Inputs, ctx: Context) -> dict:
    """Read a published checkpoint, so that any later stage can start from it."""
    published = PublishedCheckpoint(config.path)
    tokenizer = load_tokenizer(config.path)
    model = published.config
    if tokenizer.vocab_size > model.vocab_size:
        raise InputError(
            f"{config.path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding {model.vocab_size} rows"
        )
    total, done = len(published.specs), 0

    def pieces(name: str) -> Iterable[Tensor]:
        nonlocal done
        yield from published.pieces(name)
        done += 1
        ctx.report(done, total, "tensors")

    files = save_tensors(ctx.out, model, published.specs, pieces, config.path, config.max_shard_bytes)
    template = "none" if tokenizer.template is None else "its own"
    if tokenizer.template is None and None not in (tokenizer.bos, tokenizer.user, tokenizer.assistant):
        _add_template(ctx.out / "tokenizer_config.json")
        template = "ours"
    return {
        "parameters": model.n_parameters(),
        "family": model.family,
        "dtype": str(published.specs["embedding.weight"].dtype).removeprefix("torch."),
        "vocab_size": model.vocab_size,
        "max_position": model.max_position,
        "bytes": sum(spec.bytes for spec in published.specs.values()),
        "weight_files": len(files),
        "chat_template": template,
    }


def _add_template(file: Path) -> None:
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    file.write_text(json.dumps(settings | {"chat_template": JINJA}, ensure_ascii=False, indent=2) + "\n")
