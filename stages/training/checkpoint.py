"""The `checkpoint` artifact on disk: weights under our own names, the model's config, the tokenizer.

    model.safetensors     every parameter and persistent buffer (routing biases included), as trained; what exceeds
                          5 GB lies in model-00001-of-… and so on, with an index (model/exchange/shards.py)
    model.json            ModelConfig; enough to build the model with no other file
    tokenizer.json, …     copied from the tokens artifact, so that a checkpoint travels alone

A `reward_model` artifact has the same files; its weights are a `ValueModel`'s, the trunk's under `trunk.`.

Weights keep the dtype they were saved in (an imported bf16 checkpoint stays bf16); a model built from them is fp32,
unless asked for in bf16. Published (Hugging Face) names are model/exchange's business. The resumable state of a
*running* training job is in resume.py: it also holds the optimiser and never leaves the stage's scratch folder.
"""

from pathlib import Path
from typing import Literal, TypeVar

import torch

from infra.errors import InputError
from model.config import ModelConfig
from model.exchange import copy_tokenizer
from model.exchange.shards import MAX_SHARD_BYTES, Pieces, Shards, Specs, specs_of, write_shards
from model.transformer import Transformer
from model.value import ValueModel

CONFIG = "model.json"
Model = TypeVar("Model", Transformer, ValueModel)
Precision = Literal["fp32", "bf16"]


def save_model(directory: Path | str, model: Transformer | ValueModel, tokenizer_dir: Path | str | None) -> None:
    """Write `model` and the tokenizer's files into `directory` (created if missing).

    `tokenizer_dir` is any artifact folder that holds a tokenizer (tokenizer, tokens or checkpoint); None leaves the
    tokenizer out, which only a unit test has reason to do.
    """
    state = model.state_dict()
    save_tensors(directory, model.config, specs_of(state), lambda name: [state[name]], tokenizer_dir)


def save_tensors(
    directory: Path | str,
    config: ModelConfig,
    specs: Specs,
    pieces: Pieces,
    tokenizer_dir: Path | str | None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """`save_model` of tensors that need not be in memory; the files of weights."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = write_shards(directory, specs, pieces, max_shard_bytes)
    (directory / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, directory)
    return paths


def load_model(directory: Path | str, device: str = "cpu", precision: Precision = "fp32") -> Transformer:
    """Build the model a checkpoint describes and load its weights, in eval mode; bf16 rounds what training in it does.

    Raises InputError where the folder is no checkpoint or its weights do not fit its config.
    """
    directory = Path(directory)
    model = load_weights(Transformer(load_config(directory)).to(device), directory).eval()
    return model.round_weights() if precision == "bf16" else model


def load_value_model(directory: Path | str, device: str = "cpu") -> ValueModel:
    """The value model in a folder, or its language model with a new head that values everything at 0; in eval mode.

    Raises InputError where the folder is neither.
    """
    directory = Path(directory)
    config = load_config(directory)
    if not any(name.startswith("trunk.") for name in Shards(directory).specs):
        return ValueModel(load_model(directory, device)).eval()
    return load_weights(ValueModel(Transformer(config)).to(device), directory).eval()


def load_config(directory: Path | str) -> ModelConfig:
    """The ModelConfig of a checkpoint, without building anything."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} is not a checkpoint: it has no {CONFIG}.")
    return ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))


@torch.no_grad()
def load_weights(model: Model, directory: Path | str) -> Model:
    """Copy a checkpoint's weights into `model`, whose config may differ in what owns no weights (YaRN, lengths)."""
    weights = Shards(directory)
    state = model.state_dict()
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    saved = {name: spec.shape for name, spec in weights.specs.items()}
    if shapes != saved:
        differing = sorted(name for name in shapes.keys() | saved.keys() if shapes.get(name) != saved.get(name))
        first = differing[0]
        raise InputError(
            f"the weights in {directory} do not fit the model they should fill: {len(differing)} tensors differ, first "
            f"{first}, {saved.get(first, 'absent')} there and {shapes.get(first, 'absent')} in the model"
        )
    for name in weights.specs:
        state[name].copy_(weights.read(name))
    return model
