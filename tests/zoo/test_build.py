"""The zoo itself: what it builds, and that its own measuring instruments measure."""

import pytest
import torch
from torch import nn

from tests.zoo import VARIANTS, build, model_types
from tests.zoo.cores import count_cores
from tests.zoo.entries import entry_names, load
from tests.zoo.handwritten import HANDWRITTEN
from tests.zoo.reference import INCOMPARABLE, Difference, call_of, compare, without_heads
from tests.zoo.resizing import resized


def test_the_types_are_distinct_and_every_variant_has_one():
    assert len(model_types()) == len(set(model_types())) == 465
    assert {name.partition(":")[0] for name in VARIANTS} <= set(model_types())
    assert len(entry_names()) == len(set(entry_names()))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_build_is_deterministic_and_honours_the_implementation(attn):
    model, inputs = build("llama", attn)
    again, same_inputs = build("llama", attn)
    assert model.config._attn_implementation == attn
    assert not model.training
    assert all(torch.equal(inputs[name], same_inputs[name]) for name in inputs)
    assert compare(call_of(inputs).on(model), call_of(inputs).on(again)).absolute == 0


def test_tables_and_gates_are_not_left_at_zero():
    model, _ = build("swin")
    zeros = [name for name, p in model.named_parameters() if p.numel() > 1 and not p.any()]
    assert zeros == []


@pytest.mark.parametrize("name", ["no_such_model", "bert:no_such_variant", "handwritten/nothing"])
def test_an_unknown_name_is_a_key_error_that_says_where_to_look(name):
    with pytest.raises(KeyError, match="in this zoo"):
        load(name)


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_a_handwritten_model_runs_and_is_the_same_every_time(name):
    model, inputs = HANDWRITTEN[name]()
    again, _ = HANDWRITTEN[name]()
    call = call_of(inputs)
    assert compare(call.on(model), call.on(again)) == Difference(0, 0)


@pytest.mark.parametrize(
    "name", ["nanogpt", "talking-heads", "experts", "pooled", "memory", "class-scores", "albert"]
)
def test_cores_are_counted_without_the_library(name):
    entry = HANDWRITTEN[name]
    model, inputs = entry()
    exported = torch.export.export(model, inputs).run_decompositions({})
    assert count_cores(exported.module().graph) == entry.attentions


class _Projection:
    weight, dim, index = "output.weight", 1, torch.arange(6).view(3, 2)


class _Site:
    name, size, summed_by = "attention", 3, (_Projection(),)


def test_the_reference_does_not_read_the_removed_heads():
    model = nn.Sequential()
    model.output = nn.Linear(6, 5)
    before = model.output.weight.detach().clone()
    masked = without_heads(model, [_Site()], {"attention": [1]})
    expected = before.clone()
    expected[:, [0, 1, 4, 5]] = 0
    assert torch.equal(masked.output.weight, expected)
    assert torch.equal(model.output.weight, before)


def test_compare_sees_values_shapes_and_infinities():
    one, two = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])
    assert compare([one], [two]) == Difference(2.0, 0.5)
    assert compare([one], [two[:1]]) == INCOMPARABLE
    assert compare([one], []) == INCOMPARABLE
    assert compare([one / 0], [one]) == INCOMPARABLE
    assert compare([one / 0], [one / 0]) == Difference(0, 0)
    assert compare([one * torch.nan], [one]) == INCOMPARABLE


def test_resized_changes_what_is_symbolic():
    class Sum(nn.Module):
        def forward(self, x, y):
            return x + y.sum()

    call = call_of((torch.randn(5, 7, 3), torch.randn(4)))
    dynamic = {0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO}
    exported = torch.export.export(Sum(), call.args, dynamic_shapes=(dynamic, None))
    calls = resized(exported.module(), call)
    shapes = {label: [tuple(x.shape) for x in other.args] for label, other in calls.items()}
    assert shapes == {"batch": [(6, 7, 3), (4,)], "length": [(5, 10, 3), (4,)]}
