"""lm-evaluation-harness on a micro model, offline, on tasks of a local folder; its scores against the model's own."""

import json
from collections import Counter

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs the extra eval")

from lm_eval.api.instance import Instance

from infra.artifact import Artifact
from infra.errors import ConfigError, InputError
from infra.stage import Context
from stages.benchmark import BENCHMARKS, BenchmarkConfig, benchmark, keep, read_measures
from stages.evaluation.harness import HarnessJob, HarnessModel, TaskManager, run_harness
from stages.evaluation.intervals import wilson
from stages.evaluation.measures import Measure, read_report
from stages.tokens.bpe import load_tokenizer
from stages.tokens.chat_template import render
from stages.training.checkpoint import load_model
from stages.training.distributed import process_group

CHOICE = """
task: digits
dataset_path: json
dataset_kwargs: {data_files: {test: digits.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{target}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
FREE = """
task: pull
dataset_path: json
dataset_kwargs: {data_files: {test: digits.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "3"
generation_kwargs: {until: ["</answer>"], do_sample: false, max_gen_toks: 14}
filter_list: [{name: answer, filter: [{function: regex, regex_pattern: "<answer>(.*)"}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    rows = [{"question": f"Pull {digit}.", "choices": ["so", "3"], "target": digit % 2} for digit in range(6)]
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "digits.yaml").write_text(CHOICE)
    (folder / "pull.yaml").write_text(FREE)
    return folder


def nothing(*_, **__):
    pass


@pytest.fixture
def model(bandit_base):
    with process_group() as ranks:
        yield HarnessModel(str(bandit_base), ranks, 16, 0, nothing)


def asked(kind, *args):
    return [Instance(kind, {}, arguments, number) for number, arguments in enumerate(args)]


@torch.no_grad()
def test_log_likelihoods_are_the_models_own_whatever_the_batch(model, bandit_base):
    pairs = [
        ("Pull 3.", " so"),
        ("", "Pull 17."),
        ("Pull", "3"),
        ("so so so so Pull 1.", "<think>so</think>"),
        ("", "3"),
    ]
    plain, tokenizer = load_model(bandit_base), load_tokenizer(bandit_base)
    for (context, said), (total, greedy) in zip(
        pairs, model.loglikelihood(asked("loglikelihood", *pairs)), strict=True
    ):
        tokens_T = torch.tensor([tokenizer.bos, *tokenizer.encode(context + said)])
        first = 1 + len(tokenizer.encode(context))
        logits_TV = plain(tokens_T[None]).logits_BTV[0, :-1]
        own_N = logits_TV.log_softmax(-1).gather(1, tokens_T[1:, None])[first - 1 :, 0]
        assert total == pytest.approx(float(own_N.sum()), abs=1e-4)
        assert greedy == bool((logits_TV.argmax(-1) == tokens_T[1:])[first - 1 :].all())


@torch.no_grad()
def test_a_text_longer_than_the_context_is_scored_window_by_window_each_token_once(model, bandit_base):
    text = "so Pull 0123456789." * 6
    tokenizer, plain = load_tokenizer(bandit_base), load_model(bandit_base)
    tokens = [tokenizer.bos, *tokenizer.encode(text)]
    assert len(tokens) > 64 + 1
    wanted = 0.0
    for start in range(1, len(tokens), 64):  # the last window looks back as far as the context reaches
        end = min(start + 64, len(tokens))
        window_T = torch.tensor(tokens[max(0, end - 65) : end])
        own_T = plain(window_T[None, :-1]).log_probs(window_T[None, 1:])[0]
        wanted += float(own_T[-(end - start) :].sum())
    assert model.loglikelihood_rolling(asked("loglikelihood_rolling", (text,)))[0] == pytest.approx(wanted, abs=1e-4)


def test_a_chat_prompt_has_the_ids_that_training_saw(model, bandit_base):
    tokenizer = load_tokenizer(bandit_base)
    messages = [
        {"role": "user", "content": "Pull 3."},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "so"},
    ]
    assert model.tok_encode(model.apply_chat_template(messages)) == render(messages, tokenizer, True)[0]
    begun = [messages[0], {"role": "assistant", "content": "<think>"}]
    ids = model.tok_encode(model.apply_chat_template(begun, add_generation_prompt=False))
    assert ids == [*render(messages[:1], tokenizer, True)[0], tokenizer.think]


def test_replies_end_before_the_first_stop_string_and_prompts_keep_their_ends(model):
    prompt = model.apply_chat_template([{"role": "user", "content": "Pull 3."}])
    how = {"until": ["</think>"], "max_gen_toks": 14}
    long = "so " * 80
    replies = model.generate_until(asked("generate_until", (prompt, how), (long, {"until": [], "max_gen_toks": 3})))
    assert replies[0] == "<think>so"
    assert model.n_cut == 1


def job(checkpoint, tasks_dir, *tasks, **changed):
    plain = {"few_shot": None, "limit": None, "chat": True, "max_new_tokens": 14, "run_unsafe_code": False, "seed": 0}
    return HarnessJob(checkpoint=str(checkpoint), tasks=tasks, tasks_dir=str(tasks_dir), **plain | changed)


def test_local_tasks_are_scored_offline(bandit_base, tasks_dir, tmp_path):
    config, checkpoint = (
        BenchmarkConfig(name="micro", tasks=("digits", "pull")),
        Artifact.local(bandit_base, "checkpoint"),
    )
    found = run_harness(job(bandit_base, tasks_dir, *config.tasks), nothing)
    summary = keep(found, config, checkpoint, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert Counter(row["task"] for row in rows) == {"digits": 6, "pull": 6}
    right = sum(row["filtered_resps"][0] == "3" for row in rows if row["task"] == "pull")
    assert summary["pull.exact_match.answer"] == round(right / 6, 4)
    measure = read_report(Artifact.local(tmp_path, "report"), checkpoint)["measures"]["digits.acc"]
    assert 0 <= measure.low <= summary["digits.acc"] <= measure.high <= 1
    assert "| pull.exact_match.answer |" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "benchmarks.png").stat().st_size > 1000


@pytest.mark.slow
def test_two_ray_workers_score_what_one_process_scores(bandit_base, tasks_dir, ray_session, tmp_path):
    config = BenchmarkConfig(
        name="micro", tasks=("digits", "pull"), tasks_dir=str(tasks_dir), limit=5, max_new_tokens=14
    )
    summary = benchmark(config, {"checkpoint": Artifact.local(bandit_base, "checkpoint")}, Context.local(tmp_path, 2))
    alone = read_measures(run_harness(job(bandit_base, tasks_dir, *config.tasks, limit=5), nothing))
    assert {name: summary[name] for name in alone} == {name: round(measure.value, 4) for name, measure in alone.items()}
    assert summary["documents"] == 10


def test_a_groups_interval_is_over_the_documents_of_its_parts():
    rows = [{"filter": "none", "acc": float(number < 6)} for number in range(10)]
    found = {
        "results": {"a": {"acc,none": 0.6}, "b": {"acc,none": 0.6}, "all": {"acc,none": 0.6, "alias": "all"}},
        "samples": {"a": rows, "b": rows},
        "group_subtasks": {"all": ["a", "b"]},
    }
    measures = read_measures(found)
    assert measures["all.acc"] == Measure.of(wilson(12, 20))
    assert measures["a.acc"] == Measure.of(wilson(6, 10))


@pytest.mark.slow
def test_every_benchmark_that_we_name_is_one_of_the_harness():
    index = TaskManager().task_index
    assert [name for names in BENCHMARKS.values() for name in names if name not in index] == []


def test_programs_of_the_model_do_not_run_unless_told_so(bandit_base, tasks_dir, tmp_path):
    (tmp_path / "digits.jsonl").write_text((tasks_dir / "digits.jsonl").read_text())
    (tmp_path / "programs.yaml").write_text(FREE.replace("task: pull", "task: programs\nunsafe_code: true"))
    with pytest.raises(ConfigError, match="outside our sandbox"):
        run_harness(job(bandit_base, tmp_path, "programs"), nothing)


def test_what_is_not_there_is_named(bandit_base, tasks_dir, tmp_path):
    with pytest.raises(InputError, match="no folder"):
        benchmark.external(BenchmarkConfig(name="x", tasks=("digits",), tasks_dir=str(tmp_path / "absent")))
    (tmp_path / "bare.yaml").write_text(CHOICE.replace("task: digits", "task: bare"))
    with pytest.raises(InputError, match="data of bare cannot be read"):
        run_harness(job(bandit_base, tmp_path, "bare"), nothing)


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_the_nearest(bandit_base, tasks_dir):
    with pytest.raises(ConfigError, match="no 'digit'; did you mean 'digits'"):
        run_harness(job(bandit_base, tasks_dir, "digit"), nothing)


def test_a_changed_task_file_is_another_benchmark(tasks_dir, tmp_path):
    config = BenchmarkConfig(name="x", tasks=("digits",), tasks_dir=str(tmp_path))
    (tmp_path / "digits.yaml").write_text(CHOICE)
    before = benchmark.id(config, {})
    (tmp_path / "digits.yaml").write_text(CHOICE.replace("{{question}}", "{{question}} "))
    assert benchmark.id(config, {}) != before
