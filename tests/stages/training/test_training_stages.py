"""The training stages end to end, on two ranks through Ray where it matters."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.metrics import read_metrics
from infra.ray import shutdown
from infra.stage import Context
from stages.distill import DistillConfig, distill
from stages.export import ExportConfig, export
from stages.extend_context import ExtendContextConfig, extend_context
from stages.pretrain import PretrainConfig, pretrain
from stages.problems.problem import write_problems
from stages.problems.registry import generate
from stages.sft import SftConfig, sft
from stages.training.checkpoint import load_config, load_model, save_model

RATE = {"peak": 1e-2, "schedule": "constant"}


@pytest.fixture(scope="module", autouse=True)
def end_ray():
    yield
    shutdown()


@pytest.fixture(scope="module")
def tokens(tokens_dir) -> Artifact:
    return Artifact.local(tokens_dir, "tokens")


@pytest.fixture(scope="module")
def base(tokens, micro_v3, tmp_path_factory) -> tuple[Artifact, dict, Path]:
    """(checkpoint, summary, folder) of a short pre-training on two ranks."""
    folder = tmp_path_factory.mktemp("pretrain")
    config = PretrainConfig(
        model=micro_v3.replace(vocab_size=2),
        steps=30,
        batch_size=8,
        sequence_length=32,
        learning_rate=RATE,
        validation_every=10,
        validation_windows=3,
    )
    summary = pretrain(config, {"tokens": tokens}, Context.local(folder, workers=2))
    return Artifact.local(folder / "out", "checkpoint"), summary, folder


@pytest.fixture(scope="module")
def conversations(tmp_path_factory) -> Artifact:
    folder = tmp_path_factory.mktemp("conversations")
    messages = [
        [{"role": "user", "content": f"stage {n}"}, {"role": "assistant", "content": f"artifact {n * 7 % 5}"}]
        for n in range(40)
    ]
    table = pa.table({"id": [str(n) for n in range(40)], "messages": [json.dumps(each) for each in messages]})
    pq.write_table(table, folder / "conversations-00000.parquet")
    return Artifact.local(folder, "conversations")


def test_pretraining_lowers_bits_per_byte_in_every_language(base, tokenizer):
    checkpoint, summary, folder = base
    for language in ("en", "zh", "code"):
        assert summary[f"bits_per_byte_{language}"] < 0.8 * summary[f"bits_per_byte_{language}_start"]
    model = load_model(checkpoint.path)
    assert model.config.vocab_size == tokenizer.vocab_size  # the tokenizer's, whatever the config said
    assert summary["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert summary["tokens"] == 30 * 8 * 32
    assert summary["train_workers"] == 2
    assert {"global_max_violation", "bias_drift", "tokens_per_second", "train_flops"} <= summary.keys()
    for name in ("loss.png", "routing_health.png"):
        assert (folder / "out" / name).read_bytes().startswith(b"\x89PNG")
    health = json.loads((folder / "out" / "routing_health.json").read_text())
    assert health["layers"] == ["layer 1", "MTP 1"]
    assert sum(sum(row["load"][0]) for row in health["rows"]) == summary["tokens"] * model.config.n_activated_experts
    assert summary["drop_rate"] == summary["dead_experts"] == 0
    rows = read_metrics(folder / "scratch" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 31))


@pytest.fixture(scope="module")
def extended(base, tokens, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, summary) of an extension that was called again after it had done all its steps."""
    folder = tmp_path_factory.mktemp("extended")
    config = ExtendContextConfig(
        phases=[
            {"sequence_length": 64, "rope_factor": 4, "steps": 6, "batch_size": 4},
            {"sequence_length": 128, "rope_factor": 4, "steps": 30, "batch_size": 4},
        ],
        learning_rate={"peak": 2e-3, "schedule": "constant"},
        lookups=0.3,
        validation_windows=2,
        needle={"lengths": [120], "depths": 2, "cases": 2},
    )
    inputs = {"checkpoint": base[0], "tokens": tokens}
    with pytest.raises(ConfigError, match="a window of 64 tokens has no room for a lookup"):
        extend_context(config, inputs, Context.local(folder))
    config = config.replace(lookups=0.0)
    first = extend_context(config, inputs, Context.local(folder))
    second = extend_context(config, inputs, Context.local(folder))
    assert first == second
    return folder, first


def test_context_extension_goes_through_its_phases_once(extended):
    folder, summary = extended
    model = load_config(folder / "out")
    assert (model.max_position, model.original_max_position, model.rope_factor) == (128, 32, 4)
    assert summary["steps"] == 36
    assert summary["tokens"] == 6 * 4 * 64 + 30 * 4 * 128
    rows = read_metrics(folder / "scratch" / "metrics.jsonl")
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 37))


def test_context_extension_reports_needles_and_loss_by_length_before_and_after(extended):
    folder, summary = extended
    names = list(summary)
    assert names[:2] == ["needle_retrieved_120_after", "needle_retrieved_120_before"]
    assert summary["needle_cases"] == 2 * 2 * 2
    for start, end in ((0, 32), (32, 64), (64, 128)):
        for name in ("loss", "bits_per_byte"):
            assert {f"{name}_before_{start}-{end}", f"{name}_after_{start}-{end}"} <= summary.keys()
    assert summary["loss_after_64-128"] < summary["loss_before_64-128"]
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["needle"]["ranked_chance"] == 0.1
    assert [row["bin"] for row in report["loss_by_position"]] == ["0-32", "32-64", "64-128"]
    assert [row["sequence_length"] for row in report["windows"]] == [64, 128]
    for name in ("loss", "loss_by_length", "needle"):
        assert (folder / "out" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_phases_that_do_not_grow_or_outrun_their_scale_are_refused(base):
    model = load_config(base[0].path)
    phase = {"steps": 1, "batch_size": 1}
    short = ExtendContextConfig(phases=[{"sequence_length": 32, "rope_factor": 2, **phase}])
    with pytest.raises(ConfigError, match=r"lengths must grow beyond 32"):
        short.models(model)
    outrun = ExtendContextConfig(phases=[{"sequence_length": 128, "rope_factor": 2, **phase}])
    with pytest.raises(ConfigError, match=r"max_position \(128\) exceeds rope_factor"):
        outrun.models(model)


def test_sft_learns_conversations_and_worked_problems(base, conversations, tmp_path):
    problems = tmp_path / "problems"
    problems.mkdir()
    write_problems(problems / "train.jsonl", generate(("compare",), ("en",), 20, 0, "train"))
    inputs = {
        "checkpoint": base[0],
        "conversations": conversations,
        "problems": Artifact.local(problems, "problems"),
    }
    config = SftConfig(steps=20, batch_size=4, sequence_length=128, learning_rate=RATE, problems={"limit": 12})
    summary = sft(config, inputs, Context.local(tmp_path))
    assert summary["conversations"] + summary["conversations_left_out"] == 52
    assert summary["loss"] < 0.7 * summary["loss_start"]
    assert 0.5 < summary["row_fill"] <= 1
    assert (tmp_path / "out" / "tokenizer.json").is_file()


def test_general_conversations_are_the_share_of_all_that_was_asked_for(base, conversations, tmp_path):
    inputs = {"checkpoint": base[0], "conversations": conversations, "general": conversations}
    config = SftConfig(steps=1, batch_size=4, sequence_length=64, general_share=0.2)
    summary = sft(config, inputs, Context.local(tmp_path))
    assert (summary["general_conversations"], summary["general_passes"]) == (10, 0.25)  # beside 40 others
    assert summary["conversations"] == 50


def test_sft_without_anything_to_learn_from_says_what_to_give(base, tmp_path):
    with pytest.raises(InputError, match="give the input conversations, problems or both"):
        sft(SftConfig(steps=1), {"checkpoint": base[0]}, Context.local(tmp_path))


def test_conversations_that_fit_no_row_are_an_error(base, conversations, tmp_path):
    config = SftConfig(steps=1, sequence_length=8)
    with pytest.raises(InputError, match="none of 40 conversations has a reply and fits 8 tokens"):
        sft(config, {"checkpoint": base[0], "conversations": conversations}, Context.local(tmp_path))


def test_distillation_trains_a_llama_and_refuses_a_mixture(base, conversations, micro_llama, tokens_dir, tmp_path):
    from model.transformer import Transformer

    config = DistillConfig(epochs=2, batch_size=4, sequence_length=64, learning_rate=RATE)
    with pytest.raises(InputError, match="is of family 'deepseek_v3', a student is one of llama, qwen2"):
        distill(config, {"student": base[0], "conversations": conversations}, Context.local(tmp_path))
    torch.manual_seed(0)
    save_model(tmp_path / "student", Transformer(micro_llama), tokens_dir)
    student = Artifact.local(tmp_path / "student", "checkpoint")
    summary = distill(config, {"student": student, "conversations": conversations}, Context.local(tmp_path))
    assert summary["family"] == "llama"
    assert summary["train_flops"] > 0
    assert summary["loss"] < summary["loss_start"]
    assert summary["epochs"] == pytest.approx(2, abs=0.5)


def test_an_export_computes_in_transformers_what_we_compute(base, tmp_path):
    summary = export(ExportConfig(), {"checkpoint": base[0]}, Context.local(tmp_path))
    assert summary["max_logits_difference"] < 1e-4
    assert summary["greedy_agreement"] == 1
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


@pytest.mark.parametrize(
    ("config", "key", "hint"),
    [
        (PretrainConfig, "learning_rte", "did you mean 'learning_rate'"),
        (ExtendContextConfig, "phase", "did you mean 'phases'"),
        (SftConfig, "epoch", "did you mean 'epochs'"),
        (DistillConfig, "sequence_len", "did you mean 'sequence_length'"),
        (ExportConfig, "tolerence", "did you mean 'tolerance'"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(config, key, hint):
    with pytest.raises(ConfigError, match=hint):
        config.parse({key: 1})


def test_fine_tuning_needs_epochs_or_steps_and_not_both():
    for given in ({}, {"epochs": 1.0, "steps": 3}):
        with pytest.raises(ConfigError, match="give either epochs or steps"):
            SftConfig.parse(given)
