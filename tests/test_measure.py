"""Measures: what is counted, and the order in which calls are timed."""

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from fxslim.measure import bind, count_flops, count_parameters, interleave, totals


def test_a_tied_parameter_counts_once():
    first, second = nn.Linear(3, 4), nn.Linear(3, 4)
    second.weight = first.weight
    assert count_parameters(nn.Sequential(first, second)) == 3 * 4 + 4 + 4


def test_flops_are_two_for_each_multiply_add():
    assert count_flops(bind(nn.Linear(3, 4), torch.zeros(2, 3))) == 2 * 2 * 3 * 4


def test_flops_of_fused_attention_are_counted():
    q = torch.zeros(2, 4, 16, 8)
    two_products = 2 * (2 * 2 * 4 * 16 * 16 * 8)
    assert count_flops(lambda: scaled_dot_product_attention(q, q, q)) == two_products


def test_inputs_are_positional_or_by_keyword():
    x = torch.randn(2, 3)
    linear = nn.Linear(3, 4)
    assert torch.equal(bind(linear, (x,))(), bind(linear, {"input": x})())


def test_every_other_round_runs_backwards():
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = interleave(calls, repeats=4, warmup=1)
    assert "".join(order) == "ba" + "ab" + "ba" + "ab" + "ba"
    assert {name: len(taken) for name, taken in seconds.items()} == {"a": 4, "b": 4}


def test_a_spent_budget_ends_after_five_rounds():
    assert len(interleave({"a": int}, budget=0)["a"]) == 5


def test_totals_pair_dense_with_slim():
    wide, narrow = nn.Linear(64, 64, bias=False), nn.Linear(64, 32, bias=False)
    cost = totals(wide, narrow, torch.zeros(2, 64), budget=0)
    assert cost.parameters == (4096, 2048)
    assert cost.flops == (4 * 4096, 4 * 2048)
    assert all(seconds > 0 for seconds in cost.seconds)
