"""The stages of reinforcement learning, called by themselves on artifacts in folders, through Ray where they use it."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch

from infra import ray as session
from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from stages.evaluate import EvaluateConfig, evaluate
from stages.evaluation.claims import Claim, Rise
from stages.generate_problems import GenerateProblemsConfig, generate_problems
from stages.grpo import GrpoConfig, grpo
from stages.problems.problem import Problem, read_problems, write_problems
from stages.rejection_sample import REASONS, RejectionSampleConfig, choose, conversation, rejection_sample
from stages.report import ReportConfig, report
from stages.rl.learner import GrpoJob, learn
from stages.rl.prompts import reply_text
from stages.rl.reward_model import save_reward_model
from stages.rl.rollout import read_rollouts
from stages.sample import SampleConfig, sample
from stages.tokens.bpe import load_tokenizer
from stages.training.checkpoint import load_model, load_value_model


@pytest.fixture(scope="module")
def inputs(bandit_base, bandit_problems, tmp_path_factory):
    folder = tmp_path_factory.mktemp("problems")
    for split in ("train", "heldout"):
        write_problems(folder / f"{split}.jsonl", bandit_problems)
    yield {"checkpoint": Artifact.local(bandit_base, "checkpoint"), "problems": Artifact.local(folder, "problems")}
    session.shutdown()


def test_formulas_are_judged_inside_ray_workers(inputs, bandit_problems, tmp_path):
    pytest.importorskip("math_verify")
    (tmp_path / "problems").mkdir()
    surds = (
        replace(p, verifier="boxed", answer=r"\sqrt{9}", arguments={"value": r"\sqrt{9}"}) for p in bandit_problems
    )
    write_problems(tmp_path / "problems" / "heldout.jsonl", surds)
    config = EvaluateConfig(name="surds", samples=4, temperature=1.0, max_new_tokens=14)
    plain = evaluate(config, inputs, Context.local(tmp_path / "plain", workers=2))
    given = inputs | {"problems": Artifact.local(tmp_path / "problems", "problems")}
    rooted = evaluate(config, given, Context.local(tmp_path / "surds", workers=2))
    assert rooted["pass_1"] == plain["pass_1"] > 0  # the root of 9 is arm 3


def test_generated_problems_are_distinct_split_and_counted(tmp_path):
    ctx = Context.local(tmp_path)
    config = GenerateProblemsConfig(families=("chain_sum", "reverse"), levels=(1, 2), n_train=300, n_heldout=40, seed=3)
    summary = generate_problems(config, {}, ctx)
    train, heldout = (list(read_problems(ctx.out / f"{split}.jsonl")) for split in ("train", "heldout"))
    assert (len(train), len(heldout)) == (summary["n_train"], summary["n_heldout"]) == (300, 40)
    assert not {p.question for p in train} & {p.question for p in heldout}
    assert all(p.split == "train" for p in train)
    assert all(p.split == "heldout" for p in heldout)
    assert summary["heldout_reverse_zh"] + summary["heldout_reverse_en"] == sum(p.family == "reverse" for p in heldout)


OPTIONS = {
    **{"steps": 3, "groups_per_step": 4, "rollout_groups": 2, "group_size": 8, "max_new_tokens": 14},
    **{"learning_rate": 3e-3, "keep_rollouts_every": 2},
}


def test_two_ray_workers_learn_what_one_process_learns(inputs, bandit_problems, bandit_base, tmp_path):
    ctx = Context.local(tmp_path / "two", workers=2)
    summary = grpo(GrpoConfig(name="micro", **OPTIONS), inputs, ctx)
    assert summary["name"] == "micro"
    assert summary["steps"] == 3
    assert summary["train_flops"] > 0
    assert (ctx.out / "curves.png").stat().st_size > 1000
    rollouts = list(read_rollouts(ctx.out))
    assert [(row["step"], row["group"], row["sample"]) for row in rollouts] == [
        (step, group, sample) for step in (1, 3) for group in range(4) for sample in range(8)
    ]
    alone = Context.local(tmp_path / "one")
    job = GrpoJob(GrpoConfig(**OPTIONS), str(bandit_base), bandit_problems, str(alone.out), str(alone.scratch))
    rows = learn(job, lambda *_, **__: None)
    ours, theirs = (load_model(folder.out).state_dict() for folder in (ctx, alone))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    assert rows[-1]["accuracy"] == pytest.approx(summary["accuracy_last"], abs=1e-4)


def test_a_filter_that_leaves_nothing_says_so(inputs, tmp_path):
    for stage, config in (
        (grpo, GrpoConfig(problems={"levels": [9]})),
        (evaluate, EvaluateConfig(name="x", problems={"levels": [9]})),
        (sample, SampleConfig(problems={"levels": [9]})),
    ):
        with pytest.raises(InputError, match="widen the filter"):
            stage(config, inputs, Context.local(tmp_path))


def test_reward_models_and_what_asks_for_them_go_together(inputs, bandit_base, tmp_path):
    save_reward_model(tmp_path, load_value_model(bandit_base), "steps", bandit_base)
    judge = Artifact.local(tmp_path, "reward_model")
    points = {"rewards": {"preference": 1}}
    for config, given, says in (
        ({}, {"reward_model": judge}, "rewards.preference > 0 go together"),
        (points, {}, "rewards.preference > 0 go together"),
        (points, {"reward_model": judge}, "judges the steps: give one of target response or answer"),
        ({"rewards": {"harmlessness": 1}}, {}, "harmlessness_model and rewards.harmlessness > 0 go together"),
        ({"rewards": {"harmlessness": 1}}, {"harmlessness_model": judge}, "the steps: give one of target response$"),
        ({"supervision": "process"}, {}, "process_reward_model and supervision=process"),
    ):
        with pytest.raises(ConfigError, match=says):
            grpo(GrpoConfig.parse(config), inputs | given, Context.local(tmp_path / "run"))


def test_step_credit_is_refused_where_no_steps_are_rewarded():
    with pytest.raises(ConfigError, match="step_credit=progress is for steps: set supervision to process"):
        GrpoConfig.parse({"step_credit": "progress"})
    with pytest.raises(ConfigError, match="progress_weight is set, but nothing is credited by progress"):
        GrpoConfig.parse({"supervision": "process", "progress_weight": 1.0})


def test_chunks_must_fill_a_step():
    with pytest.raises(ConfigError, match="rollout_groups"):
        GrpoConfig.parse({"groups_per_step": 6, "rollout_groups": 4})


def test_evaluations_and_their_report_agree_with_the_rows_they_keep(inputs, tmp_path):
    artifacts = []
    for name, temperature in (("warm", 1.0), ("cold", 0.0)):
        ctx = Context.local(tmp_path / name, workers=2)
        config = EvaluateConfig(name=name, samples=4, temperature=temperature, max_new_tokens=14)
        summary = evaluate(config, inputs, ctx)
        records = pq.read_table(ctx.out / "problems.parquet").to_pylist()
        assert len(records) == 10
        assert summary["pass_1"] == pytest.approx(sum(r["pass_1"] for r in records) / 10, abs=1e-4)
        assert summary["pass_1_low"] <= summary["pass_1"] <= summary["pass_1_high"]
        made = json.loads((ctx.out / "report.json").read_text())
        assert [row["k"] for row in made["curve"]] == [1, 2, 4]
        assert sum(made["wrong"].values()) == 40 - round(4 * sum(r["pass_1"] for r in records))
        assert all(f"{reason} {count}" in summary["wrong"] for reason, count in made["wrong"].items())
        assert f"of 40 answers are wrong: {summary['wrong']}." in (ctx.out / "report.md").read_text()
        assert made["curve"][0]["maj"] == pytest.approx(made["measures"]["pass_1"]["value"])
        assert made["measures"]["maj_at_4"]["value"] == pytest.approx(sum(r["consensus"] for r in records) / 10)
        artifacts.append(Artifact.local(ctx.out, "report", summary))
    greedy = pq.read_table(tmp_path / "cold" / "out" / "problems.parquet").to_pylist()
    assert all(row["pass_1"] in (0, 1) for row in greedy)  # four times the same reply
    claims = (
        Claim(left="warm", right="cold", margin=-1.0, strict=False),
        Claim(left="warm", right="warm", measure="consensus", right_measure="pass_1", margin=0.9),
        Claim(left="warm", right="absent"),
    )
    ctx = Context.local(tmp_path / "report")
    rises = (Rise(after="warm", before="cold", k=4),)
    summary = report(ReportConfig(title="Two", claims=claims, rises=rises), {"evaluations": tuple(artifacts)}, ctx)
    content = json.loads((ctx.out / "report.json").read_text())
    assert [claim["holds"] for claim in content["claims"]] == [True, False, False, False]
    assert content["claims"][2]["note"] == "no evaluation named 'absent'"
    assert summary["claims_held"] == 1
    assert all((ctx.out / name).stat().st_size > 1000 for name in ("pass_at_1.png", "pass_and_maj_at_k.png"))
    assert "| warm |" in (ctx.out / "report.md").read_text()
    twice = {"evaluations": (artifacts[0], artifacts[0])}
    with pytest.raises(InputError, match="named 'warm'"):
        report(ReportConfig(claims=()), twice, Context.local(tmp_path / "twice"))


@pytest.fixture(scope="module")
def sampled(inputs, tmp_path_factory):
    """(context, summary) of 16 replies to each of the ten questions, on two workers."""
    ctx = Context.local(tmp_path_factory.mktemp("sampled"), workers=2)
    return ctx, sample(SampleConfig(samples=16, max_new_tokens=14, chunk=3), inputs, ctx)


def test_samples_are_kept_whole_once_each_and_their_figures_agree(sampled, bandit_problems, bandit_base):
    ctx, summary = sampled
    rows = list(read_rollouts(ctx.out))
    assert [(row["group"], row["sample"]) for row in rows] == [(g, s) for g in range(10) for s in range(16)]
    assert [Problem.from_json(rows[16 * g]["problem"]) for g in range(10)] == list(bandit_problems)
    assert summary["samples"] == 160
    assert summary["accuracy"] == pytest.approx(sum(row["accuracy"] for row in rows) / 160, abs=1e-4)
    assert all((row["reason"] is None) == (row["accuracy"] == 1) for row in rows)
    assert summary["wrong"].startswith("wrong answer ")
    assert summary["sample_flops"] == sum(row["flops"] for row in rows) > 0
    tokenizer, model = load_tokenizer(bandit_base), load_model(bandit_base)
    for row in rows[:3]:  # all that a learner needs to learn from them is there
        assert reply_text(row["reply_ids"], tokenizer) == row["completion"]
        ids = torch.tensor([row["prompt_ids"] + row["reply_ids"]])
        logprobs = model(ids[:, :-1]).log_probs(ids[:, 1:])[0, len(row["prompt_ids"]) - 1 :]
        torch.testing.assert_close(logprobs, torch.tensor(row["logprobs"]), rtol=1e-4, atol=1e-5)


def test_in_bf16_the_rounded_weights_reply(inputs, bandit_base, tmp_path):
    exact = load_model(bandit_base)
    for stage, config in (
        (sample, SampleConfig(samples=2, max_new_tokens=14, precision="bf16")),
        (evaluate, EvaluateConfig(name="x", samples=2, max_new_tokens=14, temperature=1, top_p=1, precision="bf16")),
    ):
        ctx = Context.local(tmp_path / stage.name)
        stage(config, inputs, ctx)
        for row in list(read_rollouts(ctx.out))[:5]:
            ids = torch.tensor([row["prompt_ids"] + row["reply_ids"]])
            logprobs = exact(ids[:, :-1]).log_probs(ids[:, 1:])[0, len(row["prompt_ids"]) - 1 :]
            assert 1e-4 < (logprobs - torch.tensor(row["logprobs"])).abs().max() < 0.2


def test_shots_stand_before_the_question_and_are_not_asked_themselves(inputs, bandit_problems, tmp_path):
    for template in ("r1_zero", "chat"):
        ctx = Context.local(tmp_path / template)
        config = SampleConfig(template=template, shots=1, samples=2, max_new_tokens=14)
        assert sample(config, inputs, ctx)["problems"] == 9
        rows = list(read_rollouts(ctx.out))
        assert bandit_problems[0].id not in {row["problem_id"] for row in rows}
        tokenizer = load_tokenizer(inputs["checkpoint"].path)
        shown = tokenizer.decode(rows[0]["prompt_ids"])
        assert shown.startswith("Pull 0.")
        assert "<think>so</think><answer>3</answer>" in shown
        assert shown.rstrip().endswith("Pull 1.")
        assert rows[0]["prompt"] == "Pull 1."
    with pytest.raises(InputError, match="bandit in en has 10 problems here, 10 of them worked"):
        sample(SampleConfig(shots=10), inputs, Context.local(tmp_path / "many"))


def test_every_stage_that_asks_says_the_system_prompt(inputs, tmp_path):
    said = {"system_prompt": "so Pull", "max_new_tokens": 14}
    for stage, config in (
        (grpo, GrpoConfig(**{**OPTIONS, **said, "steps": 1})),
        (evaluate, EvaluateConfig(name="x", samples=2, **said)),
        (sample, SampleConfig(samples=2, **said)),
    ):
        ctx = Context.local(tmp_path / stage.name)
        stage(config, inputs, ctx)
        tokenizer = load_tokenizer(inputs["checkpoint"].path)
        for row in read_rollouts(ctx.out):
            ids = [tokenizer.bos, *tokenizer.encode("so Pull"), tokenizer.user, *tokenizer.encode(row["prompt"])]
            assert row["prompt_ids"] == [*ids, tokenizer.assistant]


def test_rejection_sampling_keeps_only_right_clean_and_different_replies(sampled, tmp_path):
    drawn, told = sampled
    ctx = Context.local(tmp_path)
    rollouts = Artifact.local(drawn.out, "rollouts")
    summary = rejection_sample(RejectionSampleConfig(keep_per_problem=2), {"rollouts": rollouts}, ctx)
    rows = pq.read_table(ctx.out / "conversations-00000.parquet").to_pylist()
    assert len(rows) == summary["conversations"] > 0
    dropped = sum(value for name, value in summary.items() if name.startswith("dropped_"))
    assert dropped + summary["conversations"] == summary["samples"] == 160
    assert summary["problems_solved"] <= told["problems_solved"]
    assert summary["sample_flops"] == told["sample_flops"]
    assert summary["dropped_wrong"] > 50
    for row in rows:
        messages = json.loads(row["messages"])
        assert messages[1] == {"role": "assistant", "content": "<think>so</think><answer>3</answer>"}
        assert json.loads(row["problem"])["question"] == messages[0]["content"]
    assert len({row["id"] for row in rows}) == len(rows)


def test_rejection_sampling_reads_what_reinforcement_learning_kept(inputs, tmp_path):
    learnt, ctx = Context.local(tmp_path / "grpo"), Context.local(tmp_path / "kept")
    grpo(GrpoConfig(**{**OPTIONS, "steps": 5}), inputs, learnt)
    checkpoint = Artifact.local(learnt.out, "checkpoint")
    summary = rejection_sample(RejectionSampleConfig(keep_per_problem=1), {"rollouts": checkpoint}, ctx)
    assert summary["samples"] == 3 * 4 * 8
    assert summary["problems"] < 3 * 4  # three steps ask some of the ten again, and keep one reply for them together
    assert summary["conversations"] == summary["problems_solved"]
    with pytest.raises(InputError, match="keep_rollouts_every"):
        rejection_sample(RejectionSampleConfig(), {"rollouts": inputs["checkpoint"]}, ctx)


def test_every_reason_to_drop_is_counted_once():
    good = {"completion": "<think>so</think><answer>3</answer>", "accuracy": 1.0, "format": 1.0, "tokens": 9}
    good |= {"language_consistency": 1.0, "repetition": 0.1}
    program = "<think>so</think><answer>```python\npass\n```</answer>"  # an answer may be code, a chain may not
    rows = [
        good,
        good,
        {**good, "format": 0.0, "accuracy": 0.0},
        {**good, "accuracy": 0.0},
        {**good, "language_consistency": 0.5},
        {**good, "completion": "<think>```py```</think><answer>3</answer>"},
        {**good, "completion": "longer", "tokens": 99},
        {**good, "completion": "a paragraph\n" + "x" * 2001 + "\n"},
        {**good, "completion": "again and again", "repetition": 0.6},
        {**good, "completion": program},
        {**good, "completion": "third"},
    ]
    kept, dropped = choose(rows, RejectionSampleConfig(keep_per_problem=2, max_tokens=50))
    assert [row["completion"] for row in kept] == [good["completion"], program]
    assert dict(dropped) == dict.fromkeys(REASONS, 1)


def test_the_shortest_of_the_right_replies_stay_and_the_system_prompt_stands_before_the_question(bandit_problems):
    row = {"accuracy": 1.0, "format": 1.0, "language_consistency": 1.0, "repetition": 0.0}
    rows = [{**row, "completion": text, "tokens": len(text)} for text in ("long reply", "short", "shorter", "s")]
    rows[3]["accuracy"] = 0.0
    kept, _ = choose(rows, RejectionSampleConfig(keep_per_problem=2, prefer="shortest"))
    assert [row["completion"] for row in kept] == ["short", "shorter"]
    made = json.loads(conversation(bandit_problems[0], kept[0], 0, "Reflect.")["messages"])
    assert [message["role"] for message in made] == ["system", "user", "assistant"]
    assert made[0]["content"] == "Reflect."
