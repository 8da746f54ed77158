"""What a run would do, and why, from ids alone."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from toy import RECIPE, TOY, load

from flows.pipelines import Node, Pipeline
from flows.planning import Plan, Selection, plan
from flows.recipes import Recipe
from infra.errors import ArtifactNotFound, ConfigError, TamperedArtifact
from infra.settings import Settings
from infra.stage import run
from infra.store import ArtifactStore


def planned(root: Path, *settings: str, recipe: Recipe = RECIPE, **selection: object) -> Plan:
    return plan(TOY, recipe, ArtifactStore(root), settings, Selection(**selection), load)  # type: ignore[arg-type]


def states(made: Plan) -> dict[str, str]:
    return {step.node.name: step.state for step in made.steps}


def test_an_empty_store_runs_everything_and_says_never_made(tmp_path: Path) -> None:
    made = planned(tmp_path)
    assert set(states(made).values()) == {"run"}
    assert made["small"].why == ("never made",)


def test_what_exists_is_reused(made_store: Path) -> None:
    made = planned(made_store)
    assert set(states(made).values()) == {"reuse"}
    assert all(step.why == () for step in made.steps)


def test_a_changed_field_is_named_and_reaches_only_what_follows(made_store: Path) -> None:
    made = planned(made_store, "cubes.power=4")
    assert states(made) == {"small": "reuse", "large": "reuse", "squares": "reuse", "cubes": "run", "sums": "run"}
    assert made["cubes"].why == ("power: 3 → 4",)
    assert made["sums"].why == ("input parts.cubes will change (cubes runs)",)


def test_the_nearest_artifact_is_the_one_with_fewest_differences(made_store: Path) -> None:
    made = planned(made_store, "large.seed=3")
    assert made["large"].why == ("seed: 0 → 3",)  # and not the difference to `small`, which has another shape and order


def test_a_nested_default_keeps_its_other_fields(made_store: Path) -> None:
    made = planned(made_store, "large.shape.height=9")
    assert made["large"].why == ("shape.height: 3 → 9",)
    assert made["large"].config.shape.width == 4  # type: ignore[attr-defined]


def test_until_leaves_out_what_the_node_does_not_need(made_store: Path) -> None:
    assert set(states(planned(made_store, until="cubes"))) == {"large", "cubes"}


def test_from_executes_a_node_and_all_that_follows_again(made_store: Path) -> None:
    made = planned(made_store, from_="cubes")
    assert {s.node.name for s in made.steps if s.force} == {"cubes", "sums"}
    assert not made["large"].chosen
    assert made["large"].state == "reuse"


def test_only_executes_one_node_again(made_store: Path) -> None:
    made = planned(made_store, only="cubes")
    assert [(s.node.name, s.state, s.force) for s in made.steps if s.chosen] == [("cubes", "run", True)]


def test_force_executes_one_node_again_inside_a_normal_run(made_store: Path) -> None:
    made = planned(made_store, force=("small",))
    assert {s.node.name for s in made.steps if s.force} == {"small"}
    assert states(made)["sums"] == "reuse"


def test_a_missing_upstream_is_named_with_the_command_that_makes_it(made_store: Path) -> None:
    made = planned(made_store, "large.seed=3", from_="cubes")
    assert states(made)["cubes"] == states(made)["sums"] == "blocked"
    assert isinstance(made.problem, ArtifactNotFound)
    assert made["large"].id in str(made.problem)
    assert "fathom run toy --recipe toy --set large.seed=3 --until large" in str(made.problem)
    quoted = planned(made_store, "large.seed=3", "large.shape={width: 5}", from_="cubes")
    assert "--set 'large.shape={width: 5}' --until large" in str(quoted.problem)


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        ({"until": "cube"}, "did you mean 'cubes'"),
        ({"from_": "squares", "until": "cubes"}, "cubes does not need squares"),
        ({"only": "cubes", "until": "sums"}, "leave out"),
        ({"until": "cubes", "force": ("small",)}, "small"),
    ],
)
def test_a_selection_that_makes_no_sense_is_refused(made_store: Path, selection: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(made_store, **selection)


def test_a_tampered_artifact_blocks_what_needs_it(store_copy: Path) -> None:
    step = planned(store_copy)["squares"]
    (store_copy / "artifacts" / step.id / "numbers.txt").write_text("1\n2\n3")
    made = planned(store_copy)
    assert states(made) == {
        "small": "reuse",
        "large": "reuse",
        "squares": "blocked",
        "cubes": "reuse",
        "sums": "blocked",
    }
    assert isinstance(made.problem, TamperedArtifact)
    assert "--force squares" in str(made.problem)
    assert planned(store_copy, force=("squares",)).problem is None


def test_an_input_rebuilt_with_another_content_makes_what_follows_out_of_date(store_copy: Path) -> None:
    store = ArtifactStore(store_copy)
    step = planned(store_copy)["small"]
    with store.draft(step.id) as (draft, _):
        (draft / "numbers.txt").write_text("5\n6")
        store.commit(draft, store.manifest(step.id), replace=True)
    made = planned(store_copy)
    assert made["squares"].state == "run"
    assert made["squares"].force
    assert "input numbers was rebuilt since" in made["squares"].why[0]


def test_drifted_code_is_reused_and_said(store_copy: Path) -> None:
    store = ArtifactStore(store_copy)
    step = planned(store_copy)["small"]
    manifest = store.manifest(step.id)
    changed = manifest.provenance.model_copy(update={"source_digest": "other"})
    with store.draft(step.id) as (draft, _):
        shutil.copytree(store.get(step.id).path, draft, dirs_exist_ok=True)
        (draft / "manifest.json").unlink()
        store.commit(draft, manifest.model_copy(update={"provenance": changed}), replace=True)
    made = planned(store_copy)
    assert (made["small"].state, made["small"].why) == ("reuse", ("code drifted since (reused)",))


def test_a_pin_takes_an_upstream_from_the_store_by_tag(made_store: Path) -> None:
    pinned = Recipe("pinned", "", RECIPE.configs, {"cubes": "squares@latest"})
    made = planned(made_store, recipe=pinned)
    assert made["cubes"].id == made["squares"].id
    assert made["cubes"].why == ("pinned to squares@latest",)
    assert made["sums"].state == "run"
    absent = planned(made_store, recipe=Recipe("pinned", "", RECIPE.configs, {"cubes": "nothing@latest"}))
    assert isinstance(absent.problem, ArtifactNotFound)
    assert absent["sums"].state == "blocked"


@pytest.mark.parametrize("selection", [{"only": "cubes"}, {"from_": "cubes"}, {"force": ("small", "cubes")}])
def test_a_pinned_node_cannot_be_asked_for(made_store: Path, selection: dict) -> None:
    pinned = Recipe("pinned", "", RECIPE.configs, {"cubes": "squares@latest"})
    with pytest.raises(ConfigError, match="recipe pinned pins cubes to squares@latest"):
        planned(made_store, recipe=pinned, **selection)


def test_planned_ids_are_the_ids_that_running_gives(tmp_path: Path) -> None:
    step = planned(tmp_path)["small"]
    assert run(step.stage, step.config, {}, ArtifactStore(tmp_path), Settings()).artifact.id == step.id


def test_wiring_of_the_wrong_kind_is_refused() -> None:
    wrong = Pipeline(
        "wrong",
        "",
        (Node("a", "count"), Node("b", "total", {"parts": {"a": "a"}}), Node("c", "square", {"numbers": "b"})),
    )
    with pytest.raises(ConfigError, match="input numbers takes documents, but b makes report"):
        wrong.check(load)
