"""Only what a recipe as it is has made, from trees that commits have, is kept under the command that makes it."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from benchmarks.rl.reports import made_by
from flows.pipelines import LINE
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


@pytest.mark.parametrize(
    ("own", "part", "message"),
    [
        (evaluation(labels={}), evaluation(), "not made by a pipeline"),
        (evaluation("grpo"), evaluation(), "give a report or an evaluation"),
        (evaluation(), evaluation(dirty=True), "no commit has"),
        (evaluation(), evaluation(dirty=None), "no commit has"),
        (evaluation(), evaluation(commit=None), "no commit has"),
        (evaluation(), evaluation(config={**CONFIG, "seed": 7}), "not those of recipe tiny"),
    ],
)
def test_what_the_command_would_not_make_is_refused(own, part, message):
    with pytest.raises(InputError, match=message):
        made_by(Artifact(own, Path()), [part])
