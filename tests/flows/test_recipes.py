"""Recipes fit every pipeline, and what `--set` gets wrong is named before anything runs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from toy import RECIPE, TOY, load

from flows.pipelines import LINE, PIPELINES, Node, Pipeline
from flows.recipes import LINES, REPRODUCTIONS, Recipe, load_recipe, parse_setting
from infra.config import Config
from infra.errors import ConfigError
from stages.training.schedules import batch_sizes


def resolved(*settings: str) -> dict[str, Config]:
    return RECIPE.resolve(TOY, settings, load)


@pytest.mark.parametrize("name", PIPELINES)
def test_every_pipeline_gives_every_stage_the_kinds_that_it_takes(name: str) -> None:
    PIPELINES[name].check()


@pytest.mark.parametrize("name", LINES)
def test_every_recipe_of_the_line_fits_every_pipeline_of_it(name: str) -> None:
    recipe = load_recipe(name)
    pipelines = [pipeline for pipeline in PIPELINES.values() if not pipeline.name.startswith("imported_")]
    assert set(recipe.configs) == {node for pipeline in pipelines for node in pipeline.by_name}
    for pipeline in pipelines:
        assert set(recipe.resolve(pipeline)) == set(pipeline.by_name)


@pytest.mark.parametrize("name", REPRODUCTIONS)
def test_a_reproduction_fits_its_pipeline_and_no_other(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.pipeline is not None
    pipeline = PIPELINES[recipe.pipeline]
    configs: Any = recipe.resolve(pipeline)
    assert set(recipe.configs) == set(pipeline.by_name)
    report = next(node for node in pipeline.nodes if node.stage == "report")
    named = {configs[node].name for node in report.roles.values()}
    assert {side for claim in configs[report.name].claims for side in (claim.left, claim.right)} <= named
    with pytest.raises(ConfigError, match=f"recipe {name} is for the pipeline {recipe.pipeline}, not for line"):
        recipe.resolve(LINE)


@pytest.mark.parametrize("name", LINES)
@pytest.mark.parametrize("branch", ["distill_or_rl", "v3_from_r1"])
def test_a_branchs_report_claims_things_about_its_own_evaluations(name: str, branch: str) -> None:
    pipeline = PIPELINES[branch]
    configs: Any = load_recipe(name).resolve(pipeline)
    report = next(node for node in pipeline.nodes if node.stage == "report")
    named = {configs[node].name for node in report.roles.values()}
    claims = configs[report.name].claims
    assert {side for claim in claims for side in (claim.left, claim.right)} <= named
    assert configs[report.name].rises == ()


@pytest.mark.parametrize("name", LINES)
def test_the_report_claims_things_about_evaluations_that_the_recipe_names(name: str) -> None:
    configs = load_recipe(name).resolve(LINE)
    named = {configs[node].name for node in LINE.node("report").roles.values()}  # type: ignore[attr-defined]
    claims = configs["report"].claims  # type: ignore[attr-defined]
    assert claims
    assert {side for claim in claims for side in (claim.left, claim.right)} <= named
    rises = configs["report"].rises  # type: ignore[attr-defined]
    assert {side for rise in rises for side in (rise.after, rise.before)} <= named


@pytest.mark.parametrize(("name", "tokens"), [("moe_2b", 100e9), ("v2", 8.1e12), ("v3", 14.8e12)])
def test_a_published_model_pretrains_on_the_published_number_of_tokens(name: str, tokens: float) -> None:
    config: Any = load_recipe(name).resolve(LINE)["pretrain"]
    assert config.n_tokens() == pytest.approx(tokens, rel=1e-3)


@pytest.mark.parametrize(("name", "tokens"), [("v2", 225e9), ("v3", 469e9)])
def test_a_published_ramp_covers_the_published_number_of_tokens(name: str, tokens: float) -> None:
    config: Any = load_recipe(name).resolve(LINE)["pretrain"]
    batches = batch_sizes(config.steps, config.batch_size, config.batch_ramp)
    ramp = [batch for batch in batches if batch < config.batch_size]
    assert sum(ramp) * config.sequence_length == pytest.approx(tokens, rel=0.02)


@pytest.mark.parametrize(
    ("name", "alphas", "capacity"),
    [
        ("moe_2b", (0.01, 0.0, 0.0), None),
        ("moe_16b", (0.001, 0.0, 0.0), None),
        ("v2_lite", (0.001, 0.0, 0.0), None),
        ("v2", (0.003, 0.05, 0.02), 1.0),
    ],
)
def test_published_softmax_routers_are_balanced_by_their_papers_losses_alone(
    name: str, alphas: tuple[float, ...], capacity: float | None
) -> None:
    configs: Any = load_recipe(name).resolve(LINE)
    assert configs["pretrain"].model.score_function == "softmax"
    assert configs["pretrain"].model.capacity_factor == capacity
    for node in ("pretrain", "extend_context"):
        assert (configs[node].balance, configs[node].bias_update_speed) == (alphas, 0.0)


@pytest.mark.parametrize("name", ["v1_67b", "moe_2b", "moe_16b", "v2_lite", "v2", "v3"])
def test_published_contexts_can_be_extended_as_the_recipe_says(name: str) -> None:
    configs: Any = load_recipe(name).resolve(LINE)
    base = configs["pretrain"].trained_model(configs["train_tokenizer"].vocab_size)
    longest = configs["extend_context"].models(base)[-1].max_position
    assert longest == configs["extend_context"].phases[-1].sequence_length > base.max_position


def test_a_field_inside_what_is_not_set_says_to_give_it_whole() -> None:
    with pytest.raises(ConfigError, match=r"pretrain\.batch_ramp is not set.*give it whole"):
        load_recipe("v1_67b").resolve(LINE, ["pretrain.batch_ramp.start=4"])
    configs: Any = load_recipe("v1_67b").resolve(LINE, ["pretrain.batch_ramp={start: 4, until: 0.1}"])
    assert configs["pretrain"].batch_ramp.start == 4


def test_a_setting_changes_one_field_of_one_node() -> None:
    configs = resolved("small.shape.width=7", "large.seed=2")
    assert configs["small"].shape.model_dump() == {"width": 7, "height": 2}  # type: ignore[attr-defined]
    assert configs["large"].seed == 2  # type: ignore[attr-defined]
    assert configs["small"].seed == 0  # type: ignore[attr-defined]


def test_settings_may_give_what_a_stage_needs() -> None:
    alone = Pipeline("evaluate", "", (Node("evaluate", "evaluate"),))
    nothing = Recipe("defaults", "", {})
    config: Any = nothing.resolve(alone, ["evaluate.problems.limit=5", "evaluate.name=base"])["evaluate"]
    assert (config.name, config.problems.limit) == ("base", 5)
    with pytest.raises(ConfigError, match=r"recipe defaults, evaluate\.name: Field required"):
        nothing.resolve(alone, ["evaluate.samples=4"])


def test_a_stage_name_reaches_all_its_nodes_where_no_node_has_that_name() -> None:
    configs = resolved("square.power=5")
    assert configs["squares"].power == configs["cubes"].power == 5  # type: ignore[attr-defined]


def test_values_are_yaml() -> None:
    assert parse_setting("a.b=[1, 2.5, x]") == (["a", "b"], [1, 2.5, "x"])
    assert parse_setting("a.b=null") == (["a", "b"], None)
    assert parse_setting("a.b=x=y") == (["a", "b"], "x=y")
    assert resolved("small.seconds=1e-3")["small"].seconds == 0.001  # type: ignore[attr-defined]


def test_derived_fields_are_derived_anew() -> None:
    tiny = load_recipe("tiny")
    config = tiny.resolve(LINE, ["student_base_llama.model.d_model=64"])["student_base_llama"]
    assert config.model.head_dim == 16  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("smal.seed=1", "no node or stage 'smal'; did you mean 'small'"),
        ("small.sed=1", "no field 'sed'; did you mean 'seed'"),
        ("small.shape.widht=1", "no field 'widht'; did you mean 'width'"),
        ("small.seed.deep=1", "is a plain value"),
        ("small.seed=many", "small.seed: Input should be a valid integer"),
        ("small.order=sideways", "small.order: Input should be 'up' or 'down'"),
        ("small.shape.width=0", "small.shape.width: Input should be greater than or equal to 1"),
        ("small=3", "node.field=value"),
        ("small.seed", "node.field=value"),
        ("small.seed=[1", "not YAML"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_to_write(setting: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolved(setting)
    assert message in str(caught.value)


@pytest.mark.parametrize("field", ["generate_problems.families", "ingest_math.source.families"])
def test_an_unknown_family_of_problems_is_refused_before_anything_runs(field: str) -> None:
    with pytest.raises(ConfigError, match=r"families\.1: Input should be 'chain_sum', .* \(got 'chainsum'\)"):
        load_recipe("tiny").resolve(LINE, [f"{field}=[sort, chainsum]"])


def test_an_impossible_combination_is_refused() -> None:
    with pytest.raises(ConfigError, match="must divide n_routed_experts"):
        load_recipe("tiny").resolve(LINE, ["pretrain.model.n_groups=3"])


def test_an_unknown_recipe_or_pipeline_names_the_nearest() -> None:
    from flows.pipelines import pipeline

    with pytest.raises(ConfigError, match="did you mean 'tiny'"):
        load_recipe("tinny")
    with pytest.raises(ConfigError, match="did you mean 'r1_zero'"):
        pipeline("r1zero")


def test_listing_and_planning_start_without_torch_or_prefect() -> None:
    code = "import sys, flows.cli, flows.planning; print([m for m in ('torch', 'prefect', 'ray') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
