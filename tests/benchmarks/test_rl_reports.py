"""Only what a recipe as it is has made, from trees that commits have, is kept under the command that makes it."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.rl.reports import made_by
from flows.pipelines import LINE, pipeline
from flows.recipes import load_recipe
from infra.artifact import Artifact, Manifest, Provenance
from infra.errors import InputError

CONFIG = load_recipe("tiny").resolve(LINE)["evaluate_r1"].model_dump(mode="json")
MADE = {"commit": "c0ffee", "dirty": False, "labels": {"pipeline": "line", "recipe": "tiny"}}


def evaluation(stage="evaluate", config=CONFIG, **provenance):
    made = Provenance(**{**MADE, **provenance})
    about = {"kind": "report", "stage": stage, "stage_version": 1, "inputs": {}, "summary": {}, "files": ()}
    return Manifest(id=f"{stage}/1", config=config, provenance=made, created=datetime.now(UTC), **about)


def test_the_command_is_the_pipelines():
    own = evaluation()
    assert made_by(Artifact(own, Path()), [own, own]) == "fathom run line --recipe tiny"


def test_where_the_users_own_files_lie_is_no_change_of_the_recipe():
    labels = {"pipeline": "imported_zero", "recipe": "logic_rl"}
    path = "import_base.path=/models/Qwen"
    configs = load_recipe("logic_rl").resolve(pipeline("imported_zero"), [path])
    own, base = (
        evaluation(stage, configs[node].model_dump(mode="json"), labels={**labels, "node": node})
        for stage, node in (("evaluate", "evaluate_start"), ("import_checkpoint", "import_base"))
    )
    command = "fathom run imported_zero --recipe logic_rl --set import_base.path=PATH"
    assert made_by(Artifact(own, Path()), [own, base]) == command


@pytest.mark.parametrize(
    ("own", "part", "message"),
    [
        (evaluation(labels={}), evaluation(), "made outside a pipeline"),
        (evaluation("grpo"), evaluation(), "give a report or an evaluation"),
        (evaluation(), evaluation(dirty=True), "no commit is known"),
        (evaluation(), evaluation(dirty=None), "no commit is known"),
        (evaluation(), evaluation(commit=None), "no commit is known"),
        (evaluation(), evaluation(config={**CONFIG, "seed": 7}), "not those of recipe tiny"),
    ],
)
def test_what_the_command_would_not_make_is_refused(own, part, message):
    with pytest.raises(InputError, match=message):
        made_by(Artifact(own, Path()), [part])
