"""Process reward models: steps labelled by completing them, and a model that learns the labels."""

import pytest
import torch

from infra import ray as session
from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from stages.label_steps import LabelStepsConfig, label_steps
from stages.rl.preference_tasks import Chain
from stages.rl.prompts import prompt_ids
from stages.rl.reward_model import load_reward_model, save_reward_model
from stages.rl.rollout import SCHEMA, read_rollouts, write_rollouts
from stages.rl.step_order import in_order, order
from stages.rl.steps import split_steps
from stages.tokens.bpe import load_tokenizer
from stages.train_process_reward_model import TrainProcessRewardModelConfig, train_process_reward_model
from stages.training.checkpoint import load_value_model

RATE = {"schedule": "constant", "peak": 3e-3}


def reply(chain, arm):
    return f"<think>{chain}</think><answer>{arm}</answer>"


@pytest.fixture(scope="module")
def policy(bandit_base):
    yield Artifact.local(bandit_base, "checkpoint")
    session.shutdown()


@pytest.fixture(scope="module")
def row(bandit_base, bandit_problems):
    """row(n, text, labels): a reply to problem n as a row of rollouts."""
    tokenizer = load_tokenizer(bandit_base)

    def make(number, text, labels=(), finished=True):
        problem = bandit_problems[number]
        said = {"completion": text, "reply_ids": [*tokenizer.encode(text), tokenizer.eos], "finished": finished}
        prompt = {
            "prompt_ids": [tokenizer.bos, tokenizer.user, *tokenizer.encode(problem.question), tokenizer.assistant]
        }
        about = {"step": 0, "problem_id": problem.id, "problem": problem.to_json(), "language": "en"}
        scores = {"format": 1.0, "accuracy": float("<answer>3<" in text), "reward": 0.0}
        steps = {
            "step_ends": [0] * len(labels),
            "step_rewards": list(labels),
            "logprobs": [0.0] * len(said["reply_ids"]),
        }
        return dict.fromkeys(SCHEMA.names) | about | said | prompt | scores | steps

    return make


def rollouts(folder, rows):
    folder.mkdir(parents=True)
    write_rollouts(folder / "rollouts-00000-0000.parquet", rows)
    return Artifact.local(folder, "rollouts")


def test_replies_of_another_tokenizer_are_not_labelled(policy, row, tmp_path):
    other = row(0, reply("so", 3)) | {"completion": reply("so", 4)}  # as other ids would read
    given = {"checkpoint": policy, "rollouts": rollouts(tmp_path / "rollouts", [other])}
    with pytest.raises(InputError, match="reads otherwise by the checkpoint's tokenizer"):
        label_steps(LabelStepsConfig(max_new_tokens=14), given, Context.local(tmp_path / "labelled"))


def test_a_step_is_labelled_by_the_share_of_right_completions_and_an_answer_by_its_verdict(policy, row, tmp_path):
    texts = [reply("so", 3), reply("so", 4), reply("so 4 Pull, so", 4)]
    rows = [row(n, text) for n in range(3) for text in texts] + [row(0, "<think>so", finished=False), row(0, texts[0])]
    given = {"checkpoint": policy, "rollouts": rollouts(tmp_path / "rollouts", rows)}
    ctx = Context.local(tmp_path / "labelled", workers=2)
    config = LabelStepsConfig(completions=32, max_new_tokens=14, chunk=3)
    summary = label_steps(config, given, ctx)
    assert (summary["replies"], summary["problems"], summary["steps"]) == (9, 3, 3 * (2 + 2 + 3))
    tokenizer, shared = load_tokenizer(policy.path), {}
    for labelled in read_rollouts(ctx.out):
        steps, labels, ends = split_steps(labelled["completion"]), labelled["step_rewards"], labelled["step_ends"]
        assert len(steps) == len(labels) == len(ends)
        assert labels[-1] == labelled["accuracy"] == ("3" in labelled["completion"])
        assert ends[-1] == len(labelled["reply_ids"]) - 1
        for number, end in enumerate(ends[:-1]):
            assert tokenizer.decode(labelled["reply_ids"][: end + 1]) == "".join(steps[: number + 1])
        assert shared.setdefault((labelled["problem_id"], steps[0]), labels[0]) == labels[0]
    guessed = [label for (_, step), label in shared.items() if step == "<think>so"]
    assert 0 < sum(guessed) / len(guessed) < 0.4  # the policy pulls any of ten arms
    assert summary["mean_label"] == pytest.approx(
        sum(sum(r["step_rewards"]) for r in read_rollouts(ctx.out)) / summary["steps"], abs=1e-4
    )

    alone = Context.local(tmp_path / "alone")
    label_steps(config, given, alone)
    assert list(read_rollouts(alone.out)) == list(read_rollouts(ctx.out))
    first, *others = sorted(alone.scratch.glob("labels/*.parquet"))
    first.unlink()  # as if a run had been killed before it wrote this chunk
    written = [path.stat().st_mtime_ns for path in others]
    label_steps(config, given, alone)
    assert list(read_rollouts(alone.out)) == list(read_rollouts(ctx.out))
    assert [path.stat().st_mtime_ns for path in others] == written
    few = label_steps(config.replace(replies_per_problem=1, max_replies=2), given, Context.local(tmp_path / "few"))
    assert (few["replies"], few["problems"]) == (2, 2)


def test_a_process_reward_model_learns_which_steps_are_right(policy, row, tmp_path):
    """Whoever says "Pull" in a chain is lost from there on."""
    rows = []
    for number in range(10):
        for chain, labels in (("so, so", (1, 0.75, 1)), ("so, Pull", (1, 0, 0)), ("Pull, so", (0.25, 0, 0))):
            rows.append(row(number, reply(chain, 3 if labels[-1] else 4), labels))
    given = {"checkpoint": policy, "rollouts": rollouts(tmp_path / "rollouts", rows)}
    ctx = Context.local(tmp_path / "soft")
    config = TrainProcessRewardModelConfig(
        batch_size=8, epochs=12, learning_rate=RATE, heldout_share=0.3, evaluate_every=10
    )
    summary = train_process_reward_model(config, given, ctx)
    assert summary["heldout_accuracy"] > 0.9 > summary["heldout_accuracy_start"]
    assert summary["heldout_brier"] < 0.05
    assert summary["heldout_order"] == 1
    assert summary["examples"] + summary["heldout_examples"] == summary["replies"] == 30
    judge = load_reward_model(ctx.out)
    good, bad = judge.score_chains([("Pull 1.", split_steps(reply(chain, 3))) for chain in ("so, so", "so, Pull")])
    assert min(good) > 0.5 > bad[1]
    assert bad[0] == pytest.approx(good[0], abs=1e-5)  # of what was read so far, both are the same

    hard = config.replace(labels="hard", epochs=0.1)
    again = train_process_reward_model(
        hard, given | {"checkpoint": Artifact.local(ctx.out, "reward_model")}, Context.local(tmp_path / "hard")
    )
    assert again["heldout_accuracy_start"] == round(8 / 9, 4)  # a quarter right is right now


def test_replies_to_one_problem_are_in_order_where_the_better_labels_have_the_better_scores(policy, tmp_path):
    tokenizer, model = load_tokenizer(policy.path), load_value_model(policy.path)
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    save_reward_model(tmp_path, model, "steps", policy.path)
    question = prompt_ids("Pull 1.", "chat", tokenizer)

    def chain(said, label):
        return Chain([*question, *tokenizer.encode(said)], [len(question)], [label])

    def found(*chains):
        return order(str(tmp_path), {("1", "Pull 1."): chains, ("2", "Pull 2."): chains[:1]}, Context.local(tmp_path))

    judge = load_reward_model(tmp_path)
    worse, better = sorted("78", key=lambda said: judge.step_probabilities([(chain(said, 0.0).ids, [len(question)])]))
    assert found(chain(worse, 0.0), chain(better, 0.5)).mean == 1
    assert found(chain(worse, 1.0), chain(better, 0.5)).mean == 0
    assert found(chain(worse, 0.5), chain(better, 0.5)) is None
    assert in_order([0.0, 0.5, 1.0, 1.0], [0.1, 0.1, 0.4, 0.0]) == [0.5, 1, 0, 1, 0]


def test_what_has_no_steps_or_no_labels_is_refused(policy, row, tmp_path):
    unlabelled = {"checkpoint": policy, "rollouts": rollouts(tmp_path / "a", [row(0, reply("so", 3))])}
    with pytest.raises(InputError, match="make them with label_steps"):
        train_process_reward_model(TrainProcessRewardModelConfig(), unlabelled, Context.local(tmp_path))
    cut_off = unlabelled | {"rollouts": rollouts(tmp_path / "b", [row(0, "<think>so", finished=False)])}
    with pytest.raises(InputError, match="no well-formed reply"):
        label_steps(LabelStepsConfig(), cut_off, Context.local(tmp_path))
    save_reward_model(tmp_path / "whole", load_value_model(policy.path), "response", policy.path)
    judge = {"checkpoint": Artifact.local(tmp_path / "whole", "reward_model")}
    with pytest.raises(ConfigError, match="judges whole replies"):
        train_process_reward_model(TrainProcessRewardModelConfig(), unlabelled | judge, Context.local(tmp_path))
