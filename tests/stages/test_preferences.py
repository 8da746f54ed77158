"""Preferences: read from files of every published form, and made from rollouts."""

import dataclasses
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from infra.artifact import Artifact
from infra.errors import InputError
from infra.stage import Context
from stages.ingest_preferences import IngestPreferencesConfig, ingest_preferences
from stages.make_preferences import MakePreferencesConfig, make_preferences
from stages.problems.problem import Problem
from stages.rl.preferences import Preference, hold_out, read_preferences, write_preferences
from stages.rl.rollout import SCHEMA, write_rollouts

USER = {"role": "user", "content": "2 + 2?"}
CALLS = {"tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}]}


def said(text):
    return {"role": "assistant", "content": text}


def read(folder, source, **options):
    ctx = Context.local(folder)
    about = {"kind": "files", "name": "mine", "license": "MIT", **source}
    summary = ingest_preferences(IngestPreferencesConfig(source=about, **options), {}, ctx)
    return summary, read_preferences(ctx.out)


def lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return {"path": str(path), "format": "jsonl"}


FORMS = {
    "prompt as text": {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"},
    "prompt as messages": {"prompt": [USER], "chosen": [said("4")], "rejected": [said("5")]},
    "whole conversations": {"chosen": [USER, said("4")], "rejected": [USER, said("5")]},
    "both": {"prompt": "2 + 2?", "chosen": [USER, said("4")], "rejected": [USER, said("5")]},
    "sharegpt": {
        "prompt": [{"from": "human", "value": "2 + 2?"}],
        "chosen": [{"from": "gpt", "value": "4"}],
        "rejected": [{"from": "gpt", "value": "5"}],
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_pair_gives_the_same_preference(tmp_path, form):
    summary, (pair,) = read(tmp_path, lines(tmp_path / "a.jsonl", [FORMS[form]]))
    assert (pair.messages, pair.chosen, pair.rejected, pair.margin) == ([USER], "4", "5", None)
    assert pair.reply("x") == [USER, said("x")]
    assert (summary["pairs"], summary["prompts"], summary["language_other"]) == (1, 1, 1)


def test_jsonl_parquet_and_a_dataset_give_the_same_pairs_and_a_limit_samples_them(tmp_path):
    rows = [{"q": f"{n}?", "good": f"yes {n}", "bad": "no", "by": n / 2, "k": f"k{n}"} for n in range(30)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=7)
    Dataset.from_list(rows).to_parquet(tmp_path / "data" / "train.parquet")
    fields = {"prompt_field": "q", "chosen_field": "good", "rejected_field": "bad", "margin_field": "by"}
    sources = (
        lines(tmp_path / "a.jsonl", rows) | {"id_field": "k"},
        {"path": str(tmp_path / "a.parquet"), "format": "parquet", "id_field": "k"},
        {"kind": "dataset", "path": str(tmp_path / "data")},
    )
    found = []
    for number, source in enumerate(sources):
        summary, pairs = read(tmp_path / f"run-{number}", source | fields)
        assert summary["language_en"] == 30
        found.append(sorted((pair.prompt, pair.chosen, pair.rejected, pair.margin) for pair in pairs))
    assert found[0] == found[1] == found[2]
    assert sorted(row[3] for row in found[0]) == [n / 2 for n in range(30)]
    summary, few = read(tmp_path / "few", sources[0] | fields, max_pairs=5)
    _, again = read(tmp_path / "again", sources[1] | fields, max_pairs=5)
    assert few == again
    assert (len(few), summary["left_out"]) == (5, 25)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": "2 + 2?", "chosen": "4"}, "no field 'rejected'"),
        ({"prompt": "2 + 2?", "chosen": "4", "rejected": "4"}, "both replies are the same"),
        ({"prompt": "2 + 2?", "chosen": " ", "rejected": "4"}, "'chosen', message 2, of the assistant, says nothing"),
        ({"prompt": 4, "chosen": "4", "rejected": "5"}, "'prompt' must be text or a list"),
        ({"chosen": "4", "rejected": "5"}, "the field 'chosen'"),
        ({"chosen": [said("4")], "rejected": [said("5")]}, "name the prompt's column"),
        ({"chosen": [USER, said("4"), USER], "rejected": [USER, said("5")]}, "must end with one reply"),
        ({"prompt": "2 + 2?", "chosen": [said("") | CALLS], "rejected": "5"}, "ends with calls of tools"),
        ({"chosen": [USER, said("4")], "rejected": [{**USER, "content": "?"}, said("5")]}, "differ before their last"),
    ],
)
def test_what_is_no_pair_is_refused_with_its_place(tmp_path, row, error):
    source = lines(tmp_path / "a.jsonl", [FORMS["both"], row])
    with pytest.raises(InputError, match=rf"a\.jsonl at byte \d+: .*{error}"):
        read(tmp_path / "run", source)


def test_a_margin_must_be_a_number_and_a_missing_column_is_named_with_its_option(tmp_path):
    source = lines(tmp_path / "a.jsonl", [FORMS["both"] | {"by": "much"}]) | {"margin_field": "by"}
    with pytest.raises(InputError, match="'by' is 'much'; it must be a finite number"):
        read(tmp_path / "run", source)
    with pytest.raises(InputError, match=r"no field 'best' \(it has .*\); set source.chosen_field"):
        read(tmp_path / "run", source | {"chosen_field": "best"})


def rollout(problem, text, accuracy, step=1, language="en", finished=True, reward=None):
    asked = Problem(problem, "sums", language, 1, f"Q {problem}", "", "", "integer", {}, f"sums {problem[:1]}")
    row = dict.fromkeys(SCHEMA.names) | {"step": step, "problem": asked.to_json()}
    row |= {"problem_id": problem, "prompt": f"Q {problem}", "completion": text, "language": language}
    return row | {"finished": finished, "accuracy": accuracy, "reward": accuracy if reward is None else reward}


def make(folder, rows, **options):
    source = folder / "rollouts"
    source.mkdir(parents=True)
    write_rollouts(source / "rollouts-00001-000.parquet", rows[::2])
    write_rollouts(source / "rollouts-00001-001.parquet", rows[1::2])
    ctx = Context.local(folder)
    summary = make_preferences(
        MakePreferencesConfig(**options), {"rollouts": Artifact.local(source, "checkpoint")}, ctx
    )
    return summary, read_preferences(ctx.out)


def texts(pairs):
    return {(pair.chosen, pair.rejected) for pair in pairs}


def test_right_replies_go_against_wrong_ones_of_the_same_problem_and_step(tmp_path):
    rows = [
        *(rollout("a", text, 1.0) for text in ("right", "right", "also right")),
        *(rollout("a", text, 0.0) for text in ("wrong", "also wrong", "all wrong")),
        rollout("a", "cut off", 0.0, finished=False),
        rollout("b", "only right", 1.0),
        rollout("c", "right at 1", 1.0),
        rollout("c", "wrong at 2", 0.0, step=2),
    ]
    summary, pairs = make(tmp_path, rows)
    assert len(pairs) == summary["pairs"] == 2
    assert {pair.chosen for pair in pairs} == {"right", "also right"}
    assert all("wrong" in pair.rejected for pair in pairs)
    assert len({pair.rejected for pair in pairs}) == 2
    assert all((pair.messages, pair.margin) == ([{"role": "user", "content": "Q a"}], 1.0) for pair in pairs)
    _, again = make(tmp_path / "again", rows)
    assert [pair.id for pair in again] == [pair.id for pair in pairs]
    assert texts(again) == texts(pairs)


def test_rewards_pair_the_best_with_the_worst_while_the_margin_is_wide_enough(tmp_path):
    rows = [rollout("a", f"r{reward}", 0.0, reward=reward) for reward in (0.1, 0.2, 0.5, 0.7, 1.0)]
    assert texts(make(tmp_path / "one", rows, judge="reward", min_margin=0.5)[1]) == {
        ("r1.0", "r0.1"),
        ("r0.7", "r0.2"),
    }
    assert texts(make(tmp_path / "two", rows, judge="reward", min_margin=0.6)[1]) == {("r1.0", "r0.1")}
    assert len(make(tmp_path / "cap", rows, judge="reward", min_margin=0.1, pairs_per_problem=1)[1]) == 1
    with pytest.raises(InputError, match=r"no two to one problem differ by 2\.0 in reward: lower min_margin"):
        make(tmp_path / "none", rows, judge="reward", min_margin=2.0)


def test_languages_are_balanced_to_the_rarest_and_the_draw_is_bounded(tmp_path):
    rows = []
    for number in range(12):
        language = "zh" if number < 3 else "en"
        rows += [rollout(f"p{number}", text, right, language=language) for text, right in (("yes", 1.0), ("no", 0.0))]
    summary, pairs = make(tmp_path / "even", rows)
    assert Counter(pair.language for pair in pairs) == {"en": 3, "zh": 3}
    assert (summary["language_en"], summary["language_zh"]) == (3, 3)
    assert len(make(tmp_path / "all", rows, balance_languages=False)[1]) == 12
    assert len(make(tmp_path / "few", rows, max_pairs=2)[1]) == 2


def test_a_folder_without_rollouts_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no rollouts-\*\.parquet"):
        make_preferences(
            MakePreferencesConfig(), {"rollouts": Artifact.local(tmp_path, "rollouts")}, Context.local(tmp_path)
        )


def test_a_prompt_is_held_out_whole_and_measured_by_one_pair(tmp_path):
    pairs = [Preference(f"{p}/{n}", f'["{p}"]', f"good {n}", "bad", "en", "s") for p in range(200) for n in range(3)]
    learnt, held = hold_out(pairs, 0.2, seed=0)
    assert 20 < len(held) < 60
    assert not {pair.prompt for pair in learnt} & {pair.prompt for pair in held}
    assert len({pair.prompt for pair in held}) == len(held)
    assert len(learnt) == 600 - 3 * len(held)
    assert hold_out(pairs, 0.0, seed=0) == (pairs, [])
    assert hold_out(pairs, 0.2, seed=1)[1] != held
    write_preferences(tmp_path, pairs)
    assert read_preferences(tmp_path) == pairs


def test_a_problems_twin_in_the_other_language_is_held_out_with_it(tmp_path):
    rows = [
        rollout(f"{chr(number)}-{language}", text, right, language=language)
        for number in range(ord("a"), ord("a") + 26)
        for language in ("en", "zh")
        for text, right in (("yes", 1.0), ("no", 0.0))
    ]
    _, pairs = make(tmp_path, rows)
    learnt, held = hold_out(pairs, 0.3, seed=0)
    assert len(pairs) == 52
    assert len({pair.prompt for pair in pairs}) == 52  # by their texts alone the twins would be apart
    assert 3 < len(held) < 15
    assert len(learnt) == 52 - 2 * len(held)
    assert not {pair.content for pair in learnt} & {pair.content for pair in held}


def test_pairs_of_earlier_versions_are_held_out_by_their_prompts(tmp_path):
    pair = Preference("a", "[]", "good", "bad", "en", "s", 1.0, "sums 1")
    write_preferences(tmp_path, [pair])
    path = tmp_path / "preferences-00000.parquet"
    pq.write_table(pq.read_table(path).drop_columns("content"), path)
    (read_back,) = read_preferences(tmp_path)
    assert read_back == dataclasses.replace(pair, content=None)
    assert (pair.asked, read_back.asked) == ("sums 1", "[]")
