"""Distillation by each method: what it brings a student to, what it costs, and what it refuses."""

import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import kernels
from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from model.config import ModelConfig
from model.transformer import Transformer
from stages.distill import DistillConfig, distill
from stages.import_checkpoint import ImportCheckpointConfig, import_checkpoint
from stages.rl.distiller import _prompts, load_teacher, teach
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import render
from stages.training import launch
from stages.training.checkpoint import load_model, save_model
from stages.training.data import Batch, pack_rows
from stages.training.distributed import Ranks
from stages.training.supervised import CONVERSATIONS

CPU = Ranks(0, 1, torch.device("cpu"))
STEPS = {"steps": 15, "batch_size": 2, "sequence_length": 64, "micro_batch_size": 2}
OPTIONS = {**STEPS, "learning_rate": {"peak": 5e-3, "schedule": "constant"}, "max_new_tokens": 12}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    """One rank, as torchrun would start it: what Ray adds is tested with the other training stages."""
    monkeypatch.setattr(launch, "spmd", lambda program, job, ctx, workers: [program(job, ctx.report)])


def quiet(*_, **__):
    """A report that nobody reads."""


def talk(question, answer):
    reply = f"<think>so</think><answer>{answer}</answer>"
    return [{"role": "user", "content": f"Pull {question}."}, {"role": "assistant", "content": reply}]


def conversations_of(folder, questions):
    folder.mkdir()
    # The teacher says 3 or 4 as often; of the conversations each has one of them.
    rows = [
        {"id": str(n), "messages": json.dumps(talk(n, 3 + n % 2)), "problem": None, "language": "en", "family": "x"}
        for n in questions
    ]
    pq.write_table(pa.Table.from_pylist(rows, CONVERSATIONS), folder / "conversations-00000.parquet")
    return Artifact.local(folder, "conversations", {"sample_flops": 1e6})


@pytest.fixture(scope="module")
def teacher(taught, tmp_path_factory):
    """A mixture of experts with MTP that answers 3 or 4, whatever is asked."""
    pairs = [(f"Pull {n}.", answer) for n in range(10) for answer in "34"]
    return Artifact.local(taught(tmp_path_factory.mktemp("teacher"), pairs, steps=60), "checkpoint")


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    """A Llama of the teacher's tokenizer that has read the form of replies and prefers the answer 7."""
    folder = tmp_path_factory.mktemp("student")
    tokenizer = load_tokenizer(teacher.path)
    torch.manual_seed(1)
    shape = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 1, "d_ff": 64, "init_std": 0.05}
    # Padded, as published vocabularies are; the teacher's is not.
    model = Transformer(ModelConfig(family="llama", vocab_size=tokenizer.vocab_size + 8, max_position=64, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens_BT = torch.tensor([render(talk(n, 7), tokenizer)[0] for n in range(10)])
    for _ in range(25):
        optimizer.zero_grad()
        (-model(tokens_BT[:, :-1]).log_probs(tokens_BT[:, 1:]).mean()).backward()
        optimizer.step()
    save_model(folder, model, teacher.path)
    return Artifact.local(folder, "checkpoint")


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return conversations_of(tmp_path_factory.mktemp("talks") / "train", range(6))


@torch.no_grad()
def distance(path, teacher):
    """(forward, reverse) KL in nats a token to the teacher, on the right replies to questions that none learnt from."""
    tokenizer = load_tokenizer(teacher.path)
    tokens_BT = torch.tensor([render(talk(n, answer), tokenizer)[0] for n in range(6, 10) for answer in (3, 4)])
    reply = render(talk(6, 3), tokenizer)[1].index(1)
    size = tokenizer.vocab_size
    student_NV, teacher_NV = (
        load_model(folder)(tokens_BT[:, :-1]).logits_BTV[:, reply - 1 :, :size].flatten(0, 1)
        for folder in (path, teacher.path)
    )
    return tuple(kernels.divergence(student_NV, teacher_NV, beta)[0].mean().item() for beta in (0.0, 1.0))


@pytest.mark.parametrize("method", ["sft", "logits", "on_policy"])
def test_every_method_brings_the_student_nearer_to_the_teacher(method, student, teacher, conversations, tmp_path):
    steps = {"sft": 15, "logits": 15, "on_policy": 40}[method]
    config = DistillConfig(method=method, **{**OPTIONS, "steps": steps})
    inputs = {"student": student, "conversations": conversations}
    if method != "sft":
        inputs["teacher"] = teacher
    summary = distill(config, inputs, Context.local(tmp_path))
    before, after = distance(student.path, teacher), distance(tmp_path / "out", teacher)
    measure = 1 if method == "on_policy" else 0
    assert after[measure] < 0.5 * before[measure], (before, after)
    assert summary["loss"] < summary["loss_start"]
    spent = {"sft": 1e6, "logits": 1e6, "on_policy": 0}[method]
    assert summary["sample_flops"] == spent if method == "sft" else summary["sample_flops"] > spent
    assert summary["train_flops"] > 0
    assert load_model(tmp_path / "out").config.family == "llama"


def test_the_teachers_distribution_teaches_more_than_its_samples(student, teacher, conversations, tmp_path):
    """Each question's sample is one of two answers that the teacher gives alike."""
    found = {}
    for method in ("sft", "logits"):
        inputs = {"student": student, "conversations": conversations}
        inputs |= {"teacher": teacher} if method == "logits" else {}
        distill(DistillConfig(method=method, **{**OPTIONS, "steps": 40}), inputs, Context.local(tmp_path / method))
        found[method] = distance(tmp_path / method / "out", teacher)[0]
    assert found["logits"] < 0.5 * found["sft"]


def test_a_student_in_mixed_precision_writes_and_learns_its_own_replies(student, teacher, conversations, tmp_path):
    config = DistillConfig(method="on_policy", precision="bf16", **{**OPTIONS, "steps": 12})
    inputs = {"student": student, "conversations": conversations, "teacher": teacher}
    summary = distill(config, inputs, Context.local(tmp_path))
    assert summary["loss"] < summary["loss_start"]
    assert {weight.dtype for weight in load_model(tmp_path / "out").parameters()} == {torch.float32}


def test_a_killed_run_on_own_replies_goes_on_to_the_same_last_bit(
    student, teacher, conversations, tmp_path, monkeypatch
):
    jobs = []
    monkeypatch.setattr(launch, "spmd", lambda _, job, *__, **___: [jobs.append(job), teach(job, quiet)][1:])
    config = DistillConfig(method="on_policy", **{**OPTIONS, "steps": 4})
    inputs = {"student": student, "conversations": conversations, "teacher": teacher}
    distill(config, inputs, Context.local(tmp_path / "whole"))

    def dies(done, *_, **__):
        if done == 3:
            raise KeyboardInterrupt

    job = replace(jobs[0], save_every=1, out=str(tmp_path / "killed"), scratch=str(tmp_path / "resume"))
    with pytest.raises(KeyboardInterrupt):
        teach(job, dies)
    assert len(teach(job, quiet).progress.rows) == 4
    whole, killed = (load_model(folder).state_dict() for folder in (tmp_path / "whole" / "out", job.out))
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_the_prompt_of_a_packed_conversation_ends_before_its_last_reply():
    examples = [([1, 2, 3, 4, 5, 6], [0, 0, 1, 0, 0, 1]), ([7, 8, 9], [0, 1, 1])]
    rows = {name: torch.from_numpy(array).long() for name, array in pack_rows(examples, 12, pad=0).items()}
    batch = Batch(rows["tokens"], rows["loss_mask"], rows["document"], rows["position"])
    assert list(_prompts(batch)) == [[1, 2, 3, 4, 5], [7]]


def test_a_teacher_of_mixed_precision_keeps_its_gates_exact_and_predicts_one_token(teacher):
    model = load_teacher(str(teacher.path), torch.device("cpu"), rounded=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16, torch.float32}
    assert not any(p.requires_grad for p in model.parameters())
    assert model(torch.ones(1, 4, dtype=torch.int64)).mtp_hidden == []


def test_a_student_of_another_tokenizer_is_refused_but_for_samples(publish_tokenizer, teacher, conversations, tmp_path):
    """A published Qwen3 in bf16, imported: its own tokenizer and chat template serve for samples."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    widths = {"vocab_size": 336, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 12}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 160}
    folder = publish_tokenizer(tmp_path / "published")
    Qwen3ForCausalLM(Qwen3Config(**widths, **heads)).bfloat16().save_pretrained(folder)
    import_checkpoint(ImportCheckpointConfig(path=str(folder)), {}, Context.local(tmp_path / "import"))
    qwen = Artifact.local(tmp_path / "import" / "out", "checkpoint")
    inputs = {"student": qwen, "conversations": conversations}
    options = {**OPTIONS, "steps": 2, "sequence_length": 128}
    with pytest.raises(InputError, match="the teacher's tokenizer is not the student's"):
        distill(DistillConfig(method="logits", **options), inputs | {"teacher": teacher}, Context.local(tmp_path / "x"))
    summary = distill(DistillConfig(**options), inputs, Context.local(tmp_path / "sft"))
    assert (summary["family"], summary["conversations"]) == ("qwen3", 6)
    # What was learnt of itself is nothing, to the rounding of its weights.
    summary = distill(
        DistillConfig(method="logits", **{**options, "steps": 1}),
        inputs | {"teacher": qwen},
        Context.local(tmp_path / "self"),
    )
    assert abs(summary["loss"]) < 1e-5


def test_a_budget_trains_for_what_the_rival_cost_with_or_without_the_teachers_samples(student, conversations, tmp_path):
    length = {**OPTIONS, "steps": None, "learning_rate": {"peak": 1e-3, "schedule": "constant"}}
    step = load_model(student.path).config.flops_per_token(64, mtp=True) * 64 * 2
    rival = Artifact.local(student.path, "checkpoint", {"train_flops": 3.5 * step})
    sampled = Artifact.local(conversations.path, "conversations", {"sample_flops": 1.6 * step})
    inputs = {"student": student, "conversations": sampled, "rival": rival}
    for budget, steps in (("student", 3), ("with_teacher", 1)):
        config = DistillConfig(**{**length, "budget": budget})
        summary = distill(config, inputs, Context.local(tmp_path / budget))
        assert summary["steps"] == steps
        assert summary["train_flops"] == pytest.approx(steps * step)
        assert summary["sample_flops"] == 1.6 * step
    dear = Artifact.local(conversations.path, "conversations", {"sample_flops": 3.0 * step})
    config = DistillConfig(**{**length, "budget": "with_teacher"})
    with pytest.raises(InputError, match="sample less from the teacher"):
        distill(config, inputs | {"conversations": dear}, Context.local(tmp_path / "dear"))
    with pytest.raises(InputError, match="together with budget, or neither"):
        distill(DistillConfig(**OPTIONS), inputs, Context.local(tmp_path / "none"))
    with pytest.raises(ConfigError, match="give one of epochs, steps and budget"):
        DistillConfig.parse({**OPTIONS, "budget": "student"})


def test_a_method_and_its_inputs_must_agree(student, teacher, conversations, tmp_path):
    inputs = {"student": student, "conversations": conversations}
    with pytest.raises(InputError, match="give its checkpoint as the input teacher"):
        distill(DistillConfig(method="on_policy", **OPTIONS), inputs, Context.local(tmp_path))
    with pytest.raises(InputError, match="method=sft reads no teacher"):
        distill(DistillConfig(**OPTIONS), inputs | {"teacher": teacher}, Context.local(tmp_path))
    with pytest.raises(ConfigError, match="leave beta and temperature out"):
        DistillConfig.parse({**OPTIONS, "beta": 0.5})
