"""Routing health on loads made by hand, and the gate on runs that collapse and that do not."""

from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.router import Router
from model.transformer import Transformer
from stages.training.checkpoint import save_model
from stages.training.health import ROWS, RoutingCollapsed, RoutingHealth, bias_drift, layer_names, max_violation
from stages.training.job import Optimization
from stages.training.schedules import LearningRate
from stages.training.trainer import train

MODEL = ModelConfig(
    **{"vocab_size": 64, "d_model": 16, "n_layers": 3, "n_heads": 2, "d_ff": 16, "n_dense_layers": 1, "n_mtp": 1},
    **{"n_routed_experts": 4, "n_activated_experts": 1, "moe_d_ff": 8},
)  # three layers with experts: 1, 2 and MTP's
EVEN = torch.full((3, 4), 10.0)


def ignore(done: int, total: int, unit: str, **metrics: float) -> None:
    """A report that nobody reads."""


def health(steps: int = 100, **options) -> RoutingHealth:
    return RoutingHealth(
        MODEL, Optimization(learning_rate=LearningRate(peak=1e-3), **options), steps, torch.device("cpu")
    )


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer(MODEL)


def test_max_violation_is_zero_when_balanced_and_e_minus_one_when_one_expert_takes_all():
    assert max_violation(torch.tensor([[5.0, 5.0], [7.0, 7.0]])).tolist() == [0, 0]
    assert max_violation(torch.tensor([[8.0, 0.0, 0.0, 0.0], [2.0, 2.0, 4.0, 0.0]])).tolist() == [3, 1]


def test_layers_are_named_as_the_model_numbers_them_and_dense_ones_are_left_out():
    assert layer_names(MODEL) == ["layer 1", "layer 2", "MTP 1"]
    assert layer_names(ModelConfig()) == []


def test_bias_drift_is_the_furthest_bias_of_each_layer(model):
    routers = [module for module in model.modules() if isinstance(module, Router)]
    for number, router in enumerate(routers):
        router.bias.zero_()
        router.bias[number] = -0.5 * number
    assert bias_drift(model).tolist() == [0, 0.5, 1]
    for router in routers:
        router.bias.zero_()


def test_a_row_sums_loads_and_tells_the_violation_of_steps_from_that_of_their_sum(model):
    """Two lopsided steps that make up for each other: batch violation 1, global violation 0."""
    found = health(steps=2 * ROWS)
    left, right = torch.tensor([20.0, 20, 0, 0]).expand(3, 4), torch.tensor([0.0, 0, 20, 20]).expand(3, 4)
    for step, loads in enumerate([left, right, left, left, right], start=1):
        found.update(step, loads, model, dropped=12.0)
    first, second, unfinished = found.history(5)["rows"]
    assert (first["step"], unfinished["step"]) == (2, 5)
    assert first["load"] == [[20] * 4] * 3
    assert first["batch_violation"] == [1] * 3
    assert first["global_violation"] == [0] * 3
    assert first["dead"] == [[], [], []]
    assert first["drop_rate"] == pytest.approx(24 / 240)
    assert second["global_violation"] == [1] * 3
    assert second["dead"] == [[2, 3]] * 3
    assert unfinished["load"] == [[0, 0, 20, 20]] * 3


@pytest.mark.parametrize("steps", [ROWS, 7 * ROWS + 5])
def test_the_history_of_a_long_run_is_bounded_and_loses_no_token(model, steps):
    found = health(steps)
    for step in range(1, steps + 1):
        found.update(step, EVEN, model)
    rows = found.history(steps)["rows"]
    assert ROWS // 2 < len(rows) <= ROWS
    assert torch.tensor([row["load"] for row in rows]).sum(0).tolist() == (steps * EVEN).tolist()


@pytest.mark.parametrize("killed", [3, 10, 14, 20])
def test_a_resumed_history_is_the_uninterrupted_one(model, killed):
    loads = torch.rand(25, 3, 4).mul(50).floor()
    whole, first, second = (health(steps=4 * ROWS, health_window=5) for _ in range(3))
    for step in range(25):
        whole.update(step + 1, loads[step], model)
        if step < killed:
            first.update(step + 1, loads[step], model)
    second.load_state_dict(first.state_dict())
    for step in range(killed, 25):
        first.update(step + 1, loads[step] + 1, model)  # what the killed run did after its state changes nothing
        second.update(step + 1, loads[step], model)
    assert second.history(25) == whole.history(25)


def test_experts_without_a_token_in_a_window_stop_the_run_by_name(model):
    loads = EVEN.clone()
    loads[1] = torch.tensor([0.0, 20, 20, 0])
    found = health(health_window=3, max_dead_share=0.4)
    found.update(1, loads, model)
    found.update(2, loads, model)
    with pytest.raises(
        RoutingCollapsed,
        match=r"step 3, layer 2: experts 0, 3 of 4 got no token in 3 steps, beyond max_dead_share=0\.4; raise "
        r"bias_update_speed or balance_alpha, .*set max_dead_share=null",
    ):
        found.update(3, loads, model)


def test_a_token_for_every_expert_within_the_window_is_no_death(model):
    found = health(health_window=4, max_dead_share=0.2, max_violation=None)
    for step in range(1, 9):
        loads = torch.zeros(3, 4)
        loads[:, step % 4] = 40
        found.update(step, loads, model)


def test_one_expert_that_takes_nearly_all_stops_the_run(model):
    loads = EVEN.clone()
    loads[2] = torch.tensor([1.0, 1, 97, 1])  # MaxVio 2.88 of at worst 3
    found = health(health_window=1)
    with pytest.raises(
        RoutingCollapsed,
        match=r"step 1, MTP 1: experts 2 of 4 took 97% of the tokens in 1 steps, beyond max_violation=0\.9",
    ):
        found.update(1, loads, model)
    health(health_window=1, max_violation=0.97).update(1, loads, model)


def test_a_gate_that_is_off_lets_any_load_pass(model):
    loads = torch.tensor([100.0, 0, 0, 0]).expand(3, 4)
    found = health(health_window=1, max_dead_share=None, max_violation=None)
    found.update(1, loads, model)
    assert found.history(1)["rows"][0]["dead"] == [[1, 2, 3]] * 3


def collapsing(make_job, micro_v3, folder, **options):
    """A run whose routers prefer two experts from the start, with nothing to balance them."""
    torch.manual_seed(0)
    model = Transformer(micro_v3)
    for module in model.modules():
        if isinstance(module, Router):
            module.bias[:2] = 5.0
    save_model(folder, model, None)
    options = {"bias_update_speed": 0.0, "balance_alpha": 0.0, "health_window": 4, **options}
    return make_job(micro_v3, folder.name, options=options, initial=str(folder), save_every=2)


def test_a_run_that_routes_everything_to_two_experts_is_stopped(make_job, micro_v3, tmp_path):
    job = collapsing(make_job, micro_v3, tmp_path / "collapsed")
    with pytest.raises(
        RoutingCollapsed, match=r"step 4, layer 1: experts 0, 1 of 4 took 100% of the tokens in 4 steps"
    ):
        train(job, ignore)
    with pytest.raises(RoutingCollapsed, match="step 4"):  # a resumed run comes to the same end
        train(job, ignore)


def test_routers_that_learn_too_fast_without_balance_collapse_and_are_stopped(make_job, micro_v3):
    """No bias, no loss, a hundred times the learning rate: the router's own dynamics."""
    options = {"bias_update_speed": 0.0, "balance_alpha": 0.0, "health_window": 5}
    job = make_job(micro_v3, "wild", options=options, steps=40)
    rate = LearningRate(schedule="constant", peak=1.0)
    with pytest.raises(RoutingCollapsed, match=r"experts .* of 4 (got no token|took)"):
        train(replace(job, optimization=job.optimization.replace(learning_rate=rate)), ignore)


def test_the_collapsed_run_goes_on_where_the_gate_is_off(make_job, micro_v3, tmp_path):
    job = collapsing(make_job, micro_v3, tmp_path / "off", max_violation=None)
    row = train(job, ignore).health["rows"][0]
    assert row["dead"][0] == [2, 3]
    assert row["global_violation"][0] == 1  # its worst: E/K − 1


def test_a_healthy_run_passes_the_gate_and_a_killed_one_has_its_history(make_job, micro_v3):
    settings = {"options": {"health_window": 6, "bias_update_speed": 0.02}, "steps": 18, "save_every": 4}
    whole = train(make_job(micro_v3, "whole", **settings), ignore)
    job = make_job(micro_v3, "killed", **settings)

    def stop(done: int, *args, **metrics) -> None:
        if done == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(job, stop)
    assert train(job, ignore).health == whole.health
    rows = whole.health["rows"]
    assert [row["step"] for row in rows] == list(range(1, 19))
    assert {sum(load) for row in rows for load in row["load"][:1]} == {8 * 32 * micro_v3.n_activated_experts}
    assert max(rows[-1]["global_violation"]) < 0.5


def test_a_dense_model_has_no_routing_to_judge(make_job, micro_llama):
    assert train(make_job(micro_llama, steps=2), ignore).health is None
