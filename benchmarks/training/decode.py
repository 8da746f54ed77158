"""Decoding on this machine: our batched generator against `transformers.generate`, and our options against ourselves.

    .venv/bin/python benchmarks/training/decode.py --checkpoint base@latest

Both generate greedily from the same exported weights in fp32, the same random prompts to the same length, with one
thread, in turns; a figure is the median of the rounds. transformers runs each of its experts' implementations once at
the first batch size and then its fastest. Speculation needs a model whose MTP module has learnt something: `--checkpoint`
names a checkpoint of the store, prompted with its own line's held-out questions' tokens.
Writes results/decode_cpu.json beside this file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from transformers import AutoModelForCausalLM

from infra import provenance
from infra.settings import Settings
from infra.store import ArtifactStore
from model.config import ModelConfig
from model.exchange import export_hf
from model.generate import Generator, acceptance_rate
from model.transformer import Transformer
from flows.recipes.tiny import MODEL as TINY
from stages.training.checkpoint import load_model

PROMPT, NEW = 32, 96
BATCHES = (1, 16, 64)
MODELS = {
    "deepseek_v3 3M (the tiny recipe's)": ModelConfig(**{**TINY, "vocab_size": 2048, "n_mtp": 0}),
    "deepseek_v3 6M": ModelConfig(
        **{"vocab_size": 4096, "d_model": 192, "n_layers": 4, "n_heads": 4, "d_ff": 768, "init_std": 0.05},
        **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32, "n_dense_layers": 1},
        **{"n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 192},
        **{"n_groups": 4, "n_limited_groups": 2},
    ),
    "llama 6M": ModelConfig(
        **{"family": "llama", "vocab_size": 4096, "d_model": 256, "n_layers": 6, "n_heads": 8, "n_kv_heads": 4},
        **{"d_ff": 704, "init_std": 0.05},
    ),
}
EXPERTS = ("eager", "grouped_mm", "batched_mm")
