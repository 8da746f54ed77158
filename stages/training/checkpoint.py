"""The `checkpoint` artifact on disk: weights under our own names, the model's config, the tokenizer.

    model.safetensors     every parameter and persistent buffer (routing biases included), as trained
    model.json            ModelConfig; enough to build the model with no other file
    tokenizer.json, …     copied from the tokens artifact, so that a checkpoint travels alone

Published (Hugging Face) names are model/exchange's business. The resumable state of a *running* training job is
in resume.py: it also holds the optimiser and never leaves the stage's scratch folder.
"""

import errno
import shutil
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_model as load_tensors
from safetensors.torch import save_model as save_tensors

from infra.errors import InputError
from model.config import ModelConfig
from model.transformer import Transformer

WEIGHTS = "model.safetensors"
CONFIG = "model.json"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def save_model(directory: Path | str, model: Transformer, tokenizer_dir: Path | str | None) -> None:
    """Write `model` and the tokenizer's files into `directory` (created if missing).

    `tokenizer_dir` is any artifact folder that holds a tokenizer (tokenizer, tokens or checkpoint); None leaves the
    tokenizer out, which only a unit test has reason to do.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        save_tensors(model, str(directory / WEIGHTS))  # writes tied tensors once
    except SafetensorError as error:  # which names an operating system's error in its text alone
        for number in (errno.ENOSPC, errno.EDQUOT):
            if f"os error {number})" in str(error):
                raise OSError(number, str(error), str(directory / WEIGHTS)) from error
        raise
    (directory / WEIGHTS).chmod(0o644)  # safetensors makes it its owner's alone
    (directory / CONFIG).write_text(model.config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    if tokenizer_dir is not None:
        copy_tokenizer(tokenizer_dir, directory)


def load_model(directory: Path | str, device: str = "cpu") -> Transformer:
    """Build the model a checkpoint describes and load its weights, in eval mode.

    Raises InputError where the folder is no checkpoint or its weights do not fit its config.
    """
    directory = Path(directory)
    return load_weights(Transformer(load_config(directory)).to(device), directory).eval()


def load_config(directory: Path | str) -> ModelConfig:
    """The ModelConfig of a checkpoint, without building anything."""
    path = Path(directory) / CONFIG
    if not path.is_file():
        raise InputError(f"{directory} is not a checkpoint: it has no {CONFIG}.")
    return ModelConfig.model_validate_json(path.read_text(encoding="utf-8"))


def load_weights(model: Transformer, directory: Path | str) -> Transformer:
    """Copy a checkpoint's weights into `model`, whose config may differ in what owns no weights (YaRN, lengths)."""
    path = Path(directory) / WEIGHTS
    if not path.is_file():
        raise InputError(f"{directory} is not a checkpoint: it has no {WEIGHTS}.")
    try:
        load_tensors(model, str(path))
    except RuntimeError as error:
        raise InputError(f"the weights in {path} do not fit the model they should fill: {error}") from error
    return model


def copy_tokenizer(source: Path | str, destination: Path | str) -> None:
    """Copy the tokenizer's files from one artifact folder into another. Raises InputError if there is none."""
    if not (Path(source) / "tokenizer.json").is_file():
        raise InputError(f"{source} holds no tokenizer.json; a checkpoint carries the tokenizer it was trained with.")
    for name in TOKENIZER_FILES:
        if (Path(source) / name).is_file():
            shutil.copyfile(Path(source) / name, Path(destination) / name)
