"""One file a stage: a frozen config and a plain function, artifacts in, one artifact out.

Adding a stage is adding its file, its name to `NAMES`, and its test.
"""

from __future__ import annotations

import importlib

from infra.config import nearest
from infra.errors import ConfigError
from infra.stage import Stage

NAMES = (
    "ingest",
    "deduplicate",
    "filter",
    "mix",
    "train_tokenizer",
    "tokenize",
    "pretrain",
    "extend_context",
    "scaling_laws",
    "generate_problems",
    "import_problems",
    "ingest_conversations",
    "ingest_preferences",
    "ask_reference",
    "sft",
    "grpo",
    "sample",
    "rejection_sample",
    "make_preferences",
    "contrast_replies",
    "dpo",
    "train_reward_model",
    "label_steps",
    "train_process_reward_model",
    "distill",
    "evaluate",
    "probe",
    "benchmark",
    "model_card",
    "promote",
    "export",
    "import_checkpoint",
    "report",
)


def load(name: str) -> Stage:
    """The stage of that name, imported on demand (some import torch); ConfigError names the nearest right one."""
    if name not in NAMES:
        raise ConfigError(f"no stage {name!r}; {nearest(name, NAMES)}")
    found = getattr(importlib.import_module(f"stages.{name}"), name)
    assert isinstance(found, Stage), name
    return found
