"""Cost tables: data that adds up, and what `cost` counts is what narrow programs cost."""

import re
from dataclasses import replace

import pytest
import torch

import fxslim
from fxslim import Costs
from fxslim.errors import CheckpointError
from fxslim.measure import bind, count_flops, count_parameters
from tests.models import Attention, Residual, captured, example
from tests.test_plan import site

TABLE = Costs("flops", "group", 10.0, {"a": [0.0, 3.0, 4.0], "b": [0.0, 5.0, 10.0]})


def test_a_total_adds_up_and_what_is_not_named_is_whole():
    assert TABLE.total() == 24.0
    assert TABLE.total({"a": [1], "b": [], "other": [0]}) == 13.0


def test_json_round_trip():
    assert Costs.from_json(TABLE.to_json()) == TABLE


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", TABLE.to_json().replace("flops", "time"), '{"resource": "flops"}']
)
def test_what_are_no_costs_says_what_costs_are(text):
    with pytest.raises(CheckpointError, match=r"^these are no costs \(.*expected \{\"resource"):
        Costs.from_json(text)


# ---------------------------------------------------------------------------------------- budgets

SITES = [site("a", heads=2), site("b", heads=2)]
SCORES = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}


def test_a_budget_is_met_by_the_least_loss_for_what_is_saved():
    plan = fxslim.plan(SCORES, SITES, budget=0.8, costs=TABLE)
    assert plan.kept == {"a": [0, 1], "b": [1]}  # 3 for 5, and a's head would be 1 for 1
    assert plan.reached == {"flops": 19 / 24}
    assert plan.sparsity == 0.25


def test_no_more_goes_than_the_budget_needs():
    costs = replace(TABLE, sites={"a": [0.0, 3.0, 6.0], "b": [0.0, 7.0, 14.0]})
    scores = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    plan = fxslim.plan(scores, SITES, budget=23 / 30, costs=costs)
    assert plan.kept == {"a": [0, 1], "b": [1]}  # a's head is the cheapest, and not needed then


def test_sites_that_are_not_planned_for_stay_whole_and_cost_what_they_cost():
    plan = fxslim.plan(SCORES, SITES[1:], budget=0.85, costs=TABLE)
    assert (plan.kept, plan.reached) == ({"b": [1]}, {"flops": 19 / 24})
    with pytest.raises(fxslim.PlanError, match=r"allow, 0\.792 of the flops remain$"):
        fxslim.plan(SCORES, SITES[1:], budget=0.75, costs=TABLE)


def test_a_number_of_heads_that_costs_no_less_is_skipped():
    costs = replace(TABLE, sites={"a": [0.0, 6.0, 5.0], "b": [0.0, 5.0, 10.0]})
    plan = fxslim.plan(SCORES, SITES, budget=0.7, costs=costs, min_heads=0)
    assert plan.kept == {"a": [], "b": [1]}


def test_with_a_sparsity_the_plan_says_what_it_costs():
    plan = fxslim.plan(SCORES, SITES, 0.25, costs=TABLE)
    assert (plan.kept, plan.reached) == ({"a": [1], "b": [0, 1]}, {"flops": 23 / 24})


@pytest.mark.parametrize(("scope", "left"), [("local", [1, 1]), ("uniform", [1, 1])])
def test_a_budget_in_a_scope(scope, left):
    plan = fxslim.plan(SCORES, SITES, budget=0.9, costs=TABLE, scope=scope)
    assert [len(kept) for kept in plan.kept.values()] == left


def test_a_budget_out_of_reach_says_what_is_in_reach():
    said = (
        "budget=0.7 cannot be reached: with the fewest heads that the scope and the constraints "
        "allow, 0.750 of the flops remain"
    )
    with pytest.raises(fxslim.PlanError, match=f"^{re.escape(said)}$"):
        fxslim.plan(SCORES, SITES, budget=0.7, costs=TABLE)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"budget": 0.5}, ValueError, "a budget needs costs: pass costs="),
        ({"budget": 1.5, "costs": TABLE}, ValueError, "budget must be in (0, 1], not 1.5"),
        ({"budget": "half"}, TypeError, "budget must be a number, not 'half'"),
        (
            {"budget": 0.5, "costs": TABLE, "sparsity": 0.5},
            ValueError,
            "give a sparsity or a budget, not both (0.5 and 0.5)",
        ),
        ({"costs": {}}, TypeError, "costs must be fxslim.Costs, not dict"),
        ({"constraints": {}}, TypeError, "constraints must be fxslim.Constraints, not dict"),
        (
            {"budget": 0.9, "costs": replace(TABLE, unit="query")},
            ValueError,
            "the costs are those of unit='query', the plan has 'group'",
        ),
        (
            {"budget": 0.9, "costs": replace(TABLE, sites={"a": [0.0, 3.0, 4.0]})},
            ValueError,
            "the costs have no row of 3 numbers for 'b'; fxslim.cost makes them",
        ),
    ],
)
def test_bad_targets_are_named(options, error, said):
    with pytest.raises(error, match=f"^{re.escape(said)}"):
        fxslim.plan(SCORES, SITES, **options)


# --------------------------------------------------------------------------------------- counting

EXACT = ["albert", "gqa-native", "t5-bias", "swin", "fused-interleaved", "transformer"]


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("unit", ["group", "query"])
def test_what_is_counted_is_exact(name, unit):
    _, _, program = captured(name)
    sites = fxslim.find_attention(program, unit=unit)
    args, kwargs = program.meta["example_inputs"]
    parameters, flops = (fxslim.cost(program, r, unit=unit) for r in ("parameters", "flops"))
    assert parameters.total() == count_parameters(program)
    scores = {s.name: torch.rand(s.num_heads) for s in sites}
    plan = fxslim.plan(scores, sites, 0.5, unit=unit)
    slim = fxslim.narrow(program, plan)
    assert count_parameters(slim) < count_parameters(program)
    assert parameters.total(plan.kept) == count_parameters(slim)
    assert flops.total(plan.kept) == count_flops(lambda: slim(*args, **kwargs))


def test_an_attention_without_heads_is_exact_too():
    _, _, program = captured("transformer")
    sites = fxslim.find_attention(program)
    parameters = fxslim.cost(program, "parameters")
    plan = fxslim.PruningPlan({sites[0].name: []}, 0.0)
    assert parameters.total(plan.kept) == count_parameters(fxslim.narrow(program, plan))


def test_alike_attentions_share_a_row_and_others_do_not():
    model = Residual(a=Attention(), b=Attention(), c=Attention(bias=False))
    costs = fxslim.cost(fxslim.capture(model, example()), "parameters")
    a, b, c = costs.sites.values()
    assert a == b != c
    assert a[-1] - c[-1] == 24  # three biases of eight


def test_flops_are_those_of_the_inputs_that_are_given():
    program = fxslim.capture(Attention(), example())
    costs = [fxslim.cost(program, "flops", example(batch, 5)) for batch in (2, 4)]
    assert costs[1].total() == 2 * costs[0].total()
    assert costs[1].sites["attention"][2] == 2 * costs[0].sites["attention"][2]


def test_latency_is_measured_between_points(monkeypatch):
    """Pretend that a call takes a second for each head, squared: a table of what was measured."""
    timed = []

    def pretend(calls, **_):
        timed.extend(calls)
        weights = {name: call.func.state_dict() for name, call in calls.items()}
        heads = {n: len(w["q.weight"]) // 2 if "q.weight" in w else 0 for n, w in weights.items()}
        return {name: [10.0 + count**2] * 5 for name, count in heads.items()}

    monkeypatch.setattr("fxslim.costing.interleave", pretend)
    costs = fxslim.cost(fxslim.capture(Attention(), example()), "latency", points=3)
    assert len(timed) == 4  # dense, and with 0, 1 and 2 of 4 heads
    assert costs == Costs("latency", "group", 10.0, {"attention": [0.0, 1.0, 4.0, 10.0, 16.0]})


def test_a_latency_is_a_time():
    program = fxslim.capture(Attention(), example())
    costs = fxslim.cost(program, "latency", seconds=0.2, prepare=lambda model: model)
    assert 0 < costs.total() < 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resource": "memory"}, "resource must be one of parameters, flops, latency, not 'mem"),
        ({"unit": "head"}, "unit must be one of group, query, any, not 'head'"),
        ({"points": 1}, "points must be 2 or more, not 1"),
    ],
)
def test_bad_arguments_are_named(options, said):
    program = fxslim.capture(Attention(), example())
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        fxslim.cost(program, **options)


def test_a_model_without_weights_has_costs_but_no_latency():
    with torch.device("meta"):
        model, x = Attention(), torch.empty(2, 5, 6)
    program = fxslim.capture(model, x)
    assert fxslim.cost(program, "flops").total() > 0
    with pytest.raises(ValueError, match=r"^a model on the meta device has no weights"):
        fxslim.cost(program, "latency")


def test_a_model_that_cannot_be_pruned_says_why():
    _, _, program = captured("talking-heads")
    with pytest.raises(fxslim.UnsupportedSite, match=r"^no attention can be pruned\n  layers.0"):
        fxslim.cost(program, "parameters")


@pytest.mark.parametrize("resource", ["parameters", "flops"])
def test_compile_counts_costs_by_name_on_the_inputs_it_is_given(resource):
    model, x = Residual(a=Attention(), b=Attention()), example(4, 9)
    slim = fxslim.compile(model, budget=0.7, example_inputs=x, costs=resource)
    program = fxslim.capture(model, x)
    costs = fxslim.cost(program, resource, x)
    assert fxslim.compile(program, budget=0.7, costs=costs).code == slim.code
    count = {"parameters": count_parameters, "flops": lambda m: count_flops(bind(m, x))}[resource]
    assert fxslim.Report.of(slim).plan.reached == {resource: count(slim) / count(program)}
    assert count(slim) <= 0.7 * count(program)


@pytest.mark.parametrize("resource", ["parameters", "flops", "latency"])
def test_compile_says_what_a_sparsity_reaches(resource, monkeypatch):
    monkeypatch.setattr("fxslim.costing.interleave", lambda calls, **_: dict.fromkeys(calls, (1,)))
    slim = fxslim.compile(Attention(), 0.5, example(), costs=resource)
    assert list(fxslim.Report.of(slim).plan.reached) == [resource]


def test_a_plan_that_is_followed_costs_nothing_to_count(monkeypatch):
    monkeypatch.setattr("fxslim.costing.count_flops", None)  # it is not called
    plan = fxslim.PruningPlan({"attention": [1, 2]}, 0.5)
    slim = fxslim.compile(Attention(), example_inputs=example(), plan=plan, costs="flops")
    assert fxslim.Report.of(slim).plan == plan


def test_compile_takes_a_budget():
    program = fxslim.capture(Residual(a=Attention(), b=Attention()), example())
    costs = fxslim.cost(program, "parameters")
    slim = fxslim.compile(program, budget=0.7, costs=costs)
    reached = fxslim.Report.of(slim).plan.reached["parameters"]
    assert reached == count_parameters(slim) / count_parameters(program) <= 0.7
