"""Checkpoints in from the published formats and out to them: what later stages get, and what it costs in memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

from infra import ray as session
from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.settings import Settings
from infra.stage import Context, run
from infra.store import ArtifactStore
from model.config import ModelConfig
from model.exchange import export_hf
from model.exchange.shards import INDEX, specs_of, write_shards
from model.transformer import Transformer
from stages.evaluate import EvaluateConfig, evaluate
from stages.export import ExportConfig, export
from stages.grpo import GrpoConfig, grpo
from stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from stages.problems.problem import write_problems
from stages.rl.engines.base import Sampling
from stages.rl.engines.native import NativeEngine
from stages.sft import SftConfig, sft
from stages.tokens.bpe import load_tokenizer, train
from stages.tokens.chat_template import JINJA, render
from stages.training.checkpoint import load_config, load_model, save_model

SHARD_BYTES = 20_000


@pytest.fixture(scope="module", autouse=True)
def end_ray():
    yield
    session.shutdown()


@pytest.fixture
def qwen(publish_tokenizer, tmp_path):
    """What Qwen3's authors would publish, in bf16 and several files."""
    torch.manual_seed(0)
    config = Qwen3Config(
        **{"vocab_size": 336, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12},
        **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "initializer_range": 0.1},
    )
    folder = publish_tokenizer(tmp_path / "published")
    Qwen3ForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="20KB")
    return folder


def imported(folder, path, **options):
    ctx = Context.local(folder)
    summary = import_checkpoint(ImportCheckpointConfig(path=str(path), **options), {}, ctx)
    return Artifact.local(ctx.out, "checkpoint", summary)


def tensors(folder) -> dict[str, torch.Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


@torch.no_grad()
def test_an_import_computes_what_transformers_computes_and_exports_to_the_same_tensors(qwen, tmp_path):
    checkpoint = imported(tmp_path / "import", qwen, max_shard_bytes=SHARD_BYTES)
    assert (checkpoint.path / INDEX).is_file()
    assert checkpoint.summary["dtype"] == "bfloat16"
    assert checkpoint.summary["parameters"] == sum(tensor.numel() for tensor in tensors(qwen).values())
    assert checkpoint.summary["chat_template"] == "its own"
    tokens_BT = torch.randint(300, (2, 30))
    oracle = AutoModelForCausalLM.from_pretrained(qwen, dtype=torch.float32)
    error = (oracle(tokens_BT).logits - load_model(checkpoint.path)(tokens_BT).logits_BTV).abs().max()
    assert error <= 1e-4

    out = Context.local(tmp_path / "export")
    summary = export(ExportConfig(max_shard_bytes=SHARD_BYTES), {"checkpoint": checkpoint}, out)
    assert summary["max_logits_difference"] < 1e-4
    ours, theirs = tensors(out.out), tensors(qwen)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].dtype == theirs[name].dtype for name in theirs)
    published = json.loads((out.out / "config.json").read_text())
    assert published["dtype"] == "bfloat16"
    assert (published["bos_token_id"], published["eos_token_id"]) == (None, load_tokenizer(qwen).eos)


def test_later_stages_start_from_an_import(qwen, bandit_problems, tmp_path):
    checkpoint = imported(tmp_path / "import", qwen)
    for split in ("train", "heldout"):
        write_problems(tmp_path / f"{split}.jsonl", bandit_problems)
    problems = Artifact.local(tmp_path, "problems")
    inputs = {"checkpoint": checkpoint, "problems": problems}
    tuned = Context.local(tmp_path / "sft")
    config = SftConfig(steps=8, batch_size=2, sequence_length=95, learning_rate={"peak": 1e-2, "schedule": "constant"})
    summary = sft(config, inputs, tuned)
    assert summary["loss"] < summary["loss_start"]
    inputs["checkpoint"] = Artifact.local(tuned.out, "checkpoint")
    learnt = Context.local(tmp_path / "grpo")
    options = {"steps": 1, "groups_per_step": 2, "rollout_groups": 2, "group_size": 4, "max_new_tokens": 8}
    grpo(GrpoConfig(name="micro", **options), inputs, learnt)
    inputs["checkpoint"] = Artifact.local(learnt.out, "checkpoint")
    report = evaluate(EvaluateConfig(name="x", samples=2, max_new_tokens=8), inputs, Context.local(tmp_path / "report"))
    assert report["problems"] == len(bandit_problems)
    out = Context.local(tmp_path / "export")
    export(ExportConfig(), {"checkpoint": inputs["checkpoint"]}, out)
    messages = [{"role": "user", "content": "Pull 3."}]
    ours, theirs = load_tokenizer(learnt.out), AutoTokenizer.from_pretrained(out.out)
    prompt, _ = render(messages, ours, generation_prompt=True)
    assert prompt == theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_checkpoint_of_ours_comes_back_as_it_was_mtp_and_template_included(bandit_base, tmp_path):
    out = Context.local(tmp_path / "export")
    export(ExportConfig(max_shard_bytes=SHARD_BYTES), {"checkpoint": Artifact.local(bandit_base, "checkpoint")}, out)
    AutoTokenizer.from_pretrained(out.out).save_pretrained(out.out)  # as others may have left it
    checkpoint = imported(tmp_path / "import", out.out)
    assert load_config(checkpoint.path) == load_config(bandit_base)
    before, after = load_model(bandit_base).state_dict(), load_model(checkpoint.path).state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert load_tokenizer(checkpoint.path).template == JINJA


def test_an_export_in_fp8_is_checked_by_what_its_codes_stand_for(bandit_base, tmp_path):
    out = Context.local(tmp_path / "export")
    summary = export(ExportConfig(fp8=True), {"checkpoint": Artifact.local(bandit_base, "checkpoint")}, out)
    assert 0 < summary["logits_moved_by_fp8"] < 0.5
    assert summary["max_logits_difference"] < 1e-4
    checkpoint = imported(tmp_path / "import", out.out)
    assert load_config(checkpoint.path) == load_config(bandit_base)


def test_our_template_is_for_a_tokenizer_with_deepseeks_marks_and_none_of_its_own(bandit_base, qwen, tmp_path):
    out = Context.local(tmp_path / "export")
    export(ExportConfig(), {"checkpoint": Artifact.local(bandit_base, "checkpoint")}, out)
    settings = json.loads((out.out / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (out.out / "tokenizer_config.json").write_text(json.dumps(settings))
    checkpoint = imported(tmp_path / "import", out.out)
    assert checkpoint.summary["chat_template"] == "ours"
    assert load_tokenizer(checkpoint.path).template == JINJA
    (qwen / "chat_template.jinja").unlink()
    bare = imported(tmp_path / "bare", qwen)
    assert bare.summary["chat_template"] == "none"
    assert load_tokenizer(bare.path).template is None


def test_a_changed_file_is_another_artifact_and_a_refusal_commits_nothing(qwen, tmp_path):
    store, settings = ArtifactStore(tmp_path / "store"), Settings(store=str(tmp_path / "store"), workers=1)
    config = ImportCheckpointConfig(path=str(qwen))
    first = run(import_checkpoint, config, {}, store, settings)
    assert run(import_checkpoint, config, {}, store, settings).reused
    path = next(qwen.glob("model-00001-*"))
    changed = {name: tensor + 1 for name, tensor in load_file(path).items()}
    save_file(changed, path)
    second = run(import_checkpoint, config, {}, store, settings)
    assert second.artifact.id != first.artifact.id
    committed = store.ids()
    published = json.loads((qwen / "config.json").read_text())
    for changes, error, message in (
        ({"model_type": "mamba"}, ConfigError, "model_type 'mamba'"),
        ({"use_sliding_window": True}, ConfigError, "use_sliding_window"),
        ({"vocab_size": 300}, InputError, r"embed_tokens\.weight is \[336, 32\]"),
    ):
        (qwen / "config.json").write_text(json.dumps(published | changes))
        with pytest.raises(error, match=message):
            run(import_checkpoint, config, {}, store, settings)
    (qwen / "config.json").write_text(json.dumps(published))
    (qwen / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"holds no tokenizer\.json"):
        run(import_checkpoint, config, {}, store, settings)
    assert store.ids() == committed
    assert not list((tmp_path / "store" / "drafts").iterdir())
    with pytest.raises(InputError, match="is not a directory"):
        run(import_checkpoint, ImportCheckpointConfig(path=str(tmp_path / "absent")), {}, store, settings)


MEASURED = """
import sys
from pathlib import Path
import torch
from infra.stage import Context
from model.config import ModelConfig
from model.exchange import write_published
from model.exchange.shards import Shards
from model.transformer import Transformer
from stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from stages.training.checkpoint import load_config, load_weights

def resident(line):
    return next(int(row.split()[1]) * 1024 for row in open("/proc/self/status") if row.startswith(line))

def measure(what, work):
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS:")
    work()
    print(what, resident("VmHWM:") - before)

with torch.device("meta"):
    Transformer(ModelConfig())  # loads what torch needs for it: code, not weights
published, limit, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
ours = Context.local(folder)
config = ImportCheckpointConfig(path=published, max_shard_bytes=limit)
measure("import", lambda: import_checkpoint(config, {}, ours))
model = load_config(ours.out)
weights = Shards(ours.out)
measure("export", lambda: write_published(model, weights.specs, weights.read, folder / "export", ours.out, limit))
del weights
built = Transformer(model)
measure("load", lambda: load_weights(built, ours.out))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_stays_below_twice_the_largest_shard(tmp_path):
    """All resident memory counts, mapped pages of the files too: the peak of a process of its own over what it held
    before, its libraries loaded. 218 MB of bf16 weights, of which the experts come in FP8 as V3 publishes them."""
    limit = 20_000_000
    config = ModelConfig(
        **{"vocab_size": 4096, "d_model": 512, "n_layers": 4, "n_heads": 4, "d_ff": 1024, "max_position": 64},
        **{"kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32},
        **{"n_routed_experts": 32, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 512},
    )
    tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
    save_to = tmp_path / "published"
    save_to.mkdir()
    tokenizer.save(save_to)
    export_hf(Transformer(config).bfloat16(), tmp_path / "bf16", save_to, limit)
    made = {}
    for name, tensor in tensors(tmp_path / "bf16").items():
        if ".experts." in name:
            tensor = tensor.to(torch.float8_e4m3fn)
            made[f"{name}_scale_inv"] = torch.full([-(-size // 128) for size in tensor.shape], 2.0)
        made[name] = tensor
    (save_to / "config.json").write_text((tmp_path / "bf16/config.json").read_text())
    write_shards(save_to, specs_of(made), lambda name: [made[name]], limit)
    out = tmp_path / "measured"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(save_to), str(limit), str(out)],
        **{"capture_output": True, "text": True, "timeout": 300, "cwd": Path(__file__).parents[2]},
    )
    assert done.returncode == 0, done.stderr
    peaks = {what: int(peak) for what, peak in (line.split() for line in done.stdout.splitlines())}
    largest = {
        what: max(path.stat().st_size for path in folder.glob("*.safetensors"))
        for what, folder in {"import": save_to, "export": out / "out", "load": out / "out"}.items()
    }
    total = sum(path.stat().st_size for path in (out / "out").glob("*.safetensors"))
    for what, peak in peaks.items():
        print(f"{what}: peak {peak / 1e6:.0f} MB, largest file {largest[what] / 1e6:.0f} MB, weights {total / 1e6:.0f}")
        assert peak < 2 * largest[what] < total / 2


GROUPED = {"d_model": 64, "n_layers": 3, "n_heads": 2, "n_kv_heads": 1, "d_ff": 128}
LATENT = {"kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16, "v_head_dim": 32}
FAMILIES = {
    **{name: {"family": name, **GROUPED} for name in ("llama", "qwen2")},
    "qwen3": {"family": "qwen3", **GROUPED, "head_dim": 64},
    "deepseek_v3": {
        **{"d_model": 64, "n_layers": 3, "n_heads": 2, "d_ff": 128, "n_groups": 4, "n_limited_groups": 2, **LATENT},
        **{"n_dense_layers": 1, "n_routed_experts": 8, "n_activated_experts": 2, "n_shared_experts": 1, "moe_d_ff": 32},
    },
}
PROMPTS = [[0, *range(20, 20 + n)] for n in (3, 7, 12, 5)]
GREEDY = """
import json, sys
from stages.rl.engines.base import Sampling
from stages.rl.engines.vllm import VllmEngine
from stages.training.checkpoint import load_model

engine = VllmEngine(load_model(sys.argv[1]), sys.argv[1])
replies = engine.generate(json.loads(sys.argv[2]), Sampling(24, temperature=0.0), seed=0)
print("REPLIES", json.dumps([reply.tokens for reply in replies]))
"""


@pytest.mark.vllm
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_equals_vllms(family, tmp_path):
    """vLLM on the exported files, in a process of its own: it cannot be started twice in one."""
    pytest.importorskip("vllm")
    torch.manual_seed(0)
    tokenizer = train(["so Pull 0123456789." * 3], 280, digits="single", min_frequency=1)
    tokenizer.save(tmp_path)
    model = Transformer(
        ModelConfig(vocab_size=tokenizer.vocab_size, max_position=128, init_std=0.1, **FAMILIES[family])
    )
    save_model(tmp_path, model.eval(), None)
    done = subprocess.run(
        [sys.executable, "-c", GREEDY, str(tmp_path), json.dumps(PROMPTS)],
        **{"capture_output": True, "text": True, "timeout": 500, "cwd": Path(__file__).parents[2]},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    theirs = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("REPLIES"))[8:])
    ours = [reply.tokens for reply in NativeEngine(model).generate(PROMPTS, Sampling(24, temperature=0.0), seed=0)]
    assert [tokenizer.decode(tokens) for tokens in ours] == [tokenizer.decode(tokens) for tokens in theirs]
    assert ours == theirs
