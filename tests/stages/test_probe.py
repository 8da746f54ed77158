"""The stage probe: real generations of a micro model, whose report is what its replies say."""

import json
import shutil

import pytest

from infra.artifact import Artifact
from infra.stage import Context
from stages.evaluation.ask import AskJob, ask, conversation_ids
from stages.evaluation.measures import read_report
from stages.evaluation.probes import PROBES
from stages.probe import ProbeConfig, probe
from stages.problems.problem import write_problems
from stages.problems.registry import generate
from stages.tokens.bpe import load_tokenizer


@pytest.fixture(scope="module")
def inputs(bandit_base, tmp_path_factory):
    checkpoint = tmp_path_factory.mktemp("wide") / "checkpoint"
    shutil.copytree(bandit_base, checkpoint)
    shape = json.loads((checkpoint / "model.json").read_text())
    (checkpoint / "model.json").write_text(json.dumps(shape | {"max_position": 2048}))  # prompts with tools are long
    folder = tmp_path_factory.mktemp("problems")
    for split in ("heldout", "train"):
        write_problems(folder / f"{split}.jsonl", generate(("chain_sum", "sort"), ("en", "zh"), 24, 0, split, (1,)))
    return {"checkpoint": Artifact.local(checkpoint, "checkpoint"), "problems": Artifact.local(folder, "problems")}


def test_a_probes_report_is_what_its_replies_say(inputs, ray_session, tmp_path):
    ctx = Context.local(tmp_path)
    config = ProbeConfig(name="micro", cases=2, shots=1, max_new_tokens=12)
    summary = probe(config, inputs, ctx)
    rows = [json.loads(line) for line in (ctx.out / "replies.jsonl").read_text().splitlines()]
    assert {row["probe"] for row in rows} == set(PROBES)
    assert summary["cases"] == len(rows) == 2 * (3 * 2 + 2 * 4)
    assert all(0 < row["tokens"] <= 12 for row in rows)
    parsed = [row["verdict"]["json_parses"] for row in rows if row["probe"] == "json"]
    assert summary["json_parses"] == sum(parsed) / len(parsed)
    measures = read_report(Artifact.local(ctx.out, "report"), inputs["checkpoint"])["measures"]
    assert measures["json_parses"].low <= summary["json_parses"] <= measures["json_parses"].high
    assert "| few_shot_gain |" in (ctx.out / "report.md").read_text()
    assert (ctx.out / "probes.png").stat().st_size > 1000


def test_what_does_not_fit_the_context_is_not_asked_and_counted(inputs, bandit_base):
    short, long = ([{"role": "user", "content": text}] for text in ("Pull 3.", "Pull 3. " * 40))
    job = AskJob(
        str(bandit_base), ((short, (), "en"), (long, (), "en"), (short, (), "en")), "chat", 12, 0.0, 1.0, 0, "bf16"
    )
    said = ask(job, lambda *_, **__: None)
    assert [(one.number, one.tokens > 0) for one in said] == [(0, True), (1, False), (2, True)]
    assert said[0].text == said[2].text


def test_a_published_template_is_told_of_tools_in_words(tmp_path, publish_tokenizer):
    tokenizer = load_tokenizer(publish_tokenizer(tmp_path))
    tool = {"type": "function", "function": {"name": "pull"}}
    ids = conversation_ids([{"role": "user", "content": "Pull 3."}], [tool], "en", "chat", tokenizer)
    text = tokenizer.decode(ids, skip_special=False)
    assert text.startswith("<|im_start|>system\n")
    assert '{"name": "pull"}' in text
    assert text.endswith("<|im_start|>user\nPull 3.<|im_end|>\n<|im_start|>assistant\n")


def test_a_base_model_reads_a_conversation_as_its_lines(inputs):
    tokenizer = load_tokenizer(inputs["checkpoint"].path)
    messages = [{"role": "user", "content": "Pull 3."}, {"role": "assistant", "content": "3"}]
    tool = {"type": "function", "function": {"name": "pull"}}
    ids = conversation_ids(messages, [tool], "en", "r1_zero", tokenizer)
    assert ids[0] == tokenizer.bos
    text = tokenizer.decode(ids[1:])
    assert '"pull"' in text
    assert text.endswith("\nPull 3.\n3\n")
