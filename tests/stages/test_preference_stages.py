"""DPO and reward models on a bandit whose arm 3 is preferred: what they learn, how they resume, what they refuse."""

import json
import pickle

import pytest
import torch

from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from stages.dpo import DpoConfig, dpo
from stages.rl.pairs import encode_pairs, pair_batch, reply_logprobs
from stages.rl.preference_tasks import BradleyTerry, Dpo
from stages.rl.preferences import Preference, write_preferences
from stages.rl.reward_model import load_reward_model
from stages.tokens.bpe import load_tokenizer
from stages.train_reward_model import TrainRewardModelConfig, train_reward_model
from stages.training.checkpoint import load_config, load_model, load_value_model
from stages.training.examples import ExamplesConfig, ExamplesJob, fit, micro_batches

ARMS = "0123456789"
RATE = {"schedule": "constant", "peak": 3e-3}


def reply(arm, chain="so"):
    return f"<think>{chain}</think><answer>{arm}</answer>"


def bandit_pairs(name="bandit", best="3", chains=("so", "so")):
    return [
        Preference(
            f"{name}/{question}/{arm}",
            json.dumps([{"role": "user", "content": f"Pull {question}."}]),
            *(reply(best, chains[0]), reply(arm, chains[1]), "en", name),
        )
        for question in range(30)
        for arm in ARMS[question % 2 :: 2]
        if arm != best
    ]


@pytest.fixture(scope="module")
def inputs(bandit_base, tmp_path_factory, ray_session):
    folder = tmp_path_factory.mktemp("pairs")
    write_preferences(folder, bandit_pairs())
    return {
        "checkpoint": Artifact.local(bandit_base, "checkpoint"),
        "preferences": Artifact.local(folder, "preferences"),
    }


@pytest.fixture(scope="module")
def job(bandit_base):
    """job(folder, task, **config): a short run on the bandit's pairs."""
    tokenizer = load_tokenizer(bandit_base)
    pairs = encode_pairs(bandit_pairs(), tokenizer, 100)
    tasks = {
        "dpo": Dpo(str(bandit_base), tokenizer.pad, beta=0.5, likelihood_weight=0.1),
        "reward": BradleyTerry(str(bandit_base), tokenizer.pad, "response"),
    }

    def make(folder, task, **options):
        given = {"batch_size": 8, "learning_rate": RATE, "micro_batch_tokens": 200, "epochs": 6 * 8 / 110, **options}
        out, scratch = folder / "out", folder / "scratch"
        for path in (out, scratch):
            path.mkdir(parents=True, exist_ok=True)
        config = ExamplesConfig(**given)
        where = {"out": str(out), "scratch": str(scratch)}
        return ExamplesJob(
            tasks[task], config, load_config(bandit_base), pairs[:110], {"heldout": pairs[110:]}, **where
        )

    return make


def silent(done, total, unit, **metrics):
    pass


def weights(folder):
    load = load_value_model if (folder / "reward_model.json").exists() else load_model
    return load(folder).state_dict()


def test_dpo_makes_the_chosen_arm_likelier_and_reports_it_on_prompts_it_never_saw(inputs, tmp_path):
    ctx = Context.local(tmp_path)
    summary = dpo(DpoConfig(batch_size=16, learning_rate=RATE, heldout_share=0.3, epochs=4, beta=0.5), inputs, ctx)
    assert summary["heldout_accuracy"] > 0.9 > summary["accuracy_first"]
    assert summary["heldout_accuracy_low"] < summary["heldout_accuracy"] <= summary["heldout_accuracy_high"] <= 1
    assert summary["loss_last"] < summary["loss_first"] <= 0.7
    assert summary["reward_chosen_last"] > summary["reward_rejected_last"]
    assert summary["train_flops"] > 0
    assert (ctx.out / "curves.png").stat().st_size > 1000
    before, after = load_model(inputs["checkpoint"].path), load_model(ctx.out)
    tokenizer = load_tokenizer(ctx.out)
    batch = pair_batch(encode_pairs(bandit_pairs()[:4], tokenizer, 100), tokenizer.pad)
    gain_2P = reply_logprobs(after, batch) - reply_logprobs(before, batch)
    assert (gain_2P[0] > gain_2P[1] + 0.5).all()
    assert all(torch.equal(p, dict(before.named_parameters())[n]) for n, p in after.mtp.named_parameters("mtp"))


def test_a_reward_model_learns_what_is_chosen_and_learns_on_with_a_share_of_replay(inputs, tmp_path):
    ctx = Context.local(tmp_path / "first")
    options = {"batch_size": 16, "learning_rate": RATE, "heldout_share": 0.3, "target": "answer"}
    summary = train_reward_model(TrainRewardModelConfig(epochs=3, **options), inputs, ctx)
    assert summary["heldout_accuracy"] > 0.9
    assert summary["heldout_accuracy_start"] == 0.5  # a new head ties everything
    judge = load_reward_model(ctx.out)
    question = {"role": "user", "content": "Pull 5."}
    three, four, thought = judge.score(
        [[question, {"role": "assistant", "content": text}] for text in (reply(3), reply(4), reply(3, "Pull so"))]
    )
    assert three > four
    assert three == thought

    later = tmp_path / "later"
    later.mkdir()
    write_preferences(later, bandit_pairs("later", best="7"))
    again = Context.local(tmp_path / "second")
    given = {
        "checkpoint": Artifact.local(ctx.out, "reward_model"),
        "preferences": Artifact.local(later, "preferences"),
        "replay": (inputs["preferences"],),
    }
    second = train_reward_model(TrainRewardModelConfig(epochs=0.2, replay_share=0.25, **options), given, again)
    assert second["replayed"] == round((second["examples"] - second["replayed"]) / 3)
    assert second["replay_heldout_accuracy_start"] == summary["heldout_accuracy"]
    with pytest.raises(ConfigError, match="judges the answer; set target=answer"):
        train_reward_model(TrainRewardModelConfig(), given, Context.local(tmp_path / "third"))


def test_a_killed_run_resumes_to_the_same_last_bit(job, start, tmp_path):
    rows = fit(job(tmp_path / "whole", "dpo", save_every=2, evaluate_every=3), silent)
    killed = job(tmp_path / "killed", "dpo", save_every=2, evaluate_every=3)
    program = """
        import pickle, signal
        from stages.training.examples import fit
        def report(done, *rest, **metrics):
            if done == 5:
                os.kill(os.getpid(), signal.SIGKILL)
        fit(pickle.loads(job), report)
    """
    process = start(program, job=pickle.dumps(killed))
    process.join(timeout=120)
    assert process.exitcode == -9
    resumed = []
    again = fit(killed, lambda done, *rest, **metrics: resumed.append(done))
    assert resumed in ([5, 6], [3, 4, 5, 6])  # from the state of step 4, or of 2 if 4 was still being written
    assert again == rows
    ours, theirs = weights(tmp_path / "whole/out"), weights(tmp_path / "killed/out")
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_two_ranks_learn_what_one_does(job, run_ranks, tmp_path):
    rows = fit(job(tmp_path / "one", "dpo", evaluate_every=2), silent)
    two = tmp_path / "two"
    program = """
        import pickle
        from stages.training.examples import fit
        rows = fit(pickle.loads(job), lambda *_, **__: None)
        with open(f"{folder}/rows-{environment['RANK']}", "wb") as file:
            pickle.dump(rows, file)
    """
    run_ranks(program, 2, job=pickle.dumps(job(two, "dpo", evaluate_every=2)), folder=str(two))
    first, second = (pickle.loads((two / f"rows-{rank}").read_bytes()) for rank in range(2))
    assert first == second
    for mine, theirs in zip(rows, first, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    ours, theirs = weights(tmp_path / "one/out"), weights(two / "out")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)


def test_a_step_takes_every_example_once_an_epoch_in_micro_batches_of_like_lengths():
    examples = ["x" * length for length in (5, 50, 7, 6, 100, 8)]
    cut = micro_batches(examples, [0, 1, 2, 3, 4, 5], 24)
    assert sorted(number for micro in cut for number in micro) == [0, 1, 2, 3, 4, 5]
    assert cut == [[4], [1], [5, 2, 3], [0]]


def test_pairs_that_leave_nothing_to_learn_say_why(inputs, tmp_path):
    with pytest.raises(InputError, match=r"none of 135 pairs is left.*raise max_tokens"):
        dpo(DpoConfig(max_tokens=8), inputs, Context.local(tmp_path))
    with pytest.raises(InputError, match=r"none of 135 pairs is left.*raise max_tokens"):
        train_reward_model(TrainRewardModelConfig(max_tokens=8), inputs, Context.local(tmp_path))
