"""Slimming: heads that are masked, gated or zeroed go, and nothing else changes."""

import copy

import pytest
import torch
from torch import nn

import fxslim
from tests.models import HEAD_DIM, HEADS, Attention, Residual, example, grouped_core
from tests.test_partial import Branching, Tower
from tests.zoo.handwritten import HANDWRITTEN


def zero_heads(linear, *heads):
    """As another tool would: the columns of the output projection."""
    with torch.no_grad():
        for head in heads:
            linear.weight[:, head * HEAD_DIM : (head + 1) * HEAD_DIM] = 0


def kept(slim):
    return slim.meta["fxslim"].plan.kept


def assert_computes_the_same(slim, model, x):
    with torch.no_grad():
        torch.testing.assert_close(slim(x), model(x))


def test_heads_that_another_tool_zeroed_go():
    model = Residual(a=Attention(), b=Attention())
    zero_heads(model.layers["a"].o, 0, 2)
    zero_heads(model.layers["b"].o, 3)
    before, x = copy.deepcopy(model.state_dict()), example()
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"layers.a": [1, 3], "layers.b": [0, 1, 2]}
    assert_computes_the_same(slim, model, x)
    assert slim.get_parameter("layers.a.q.weight").shape[0] == 2 * HEAD_DIM
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_head_that_is_zero_in_part_stays():
    model = Attention()
    zero_heads(model.o, 1)
    with torch.no_grad():
        model.o.weight[0, 2 * HEAD_DIM] = 1e-20
        model.o.weight[:, 3 * HEAD_DIM] = 0
    x = example()
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"attention": [0, 2, 3]}
    assert_computes_the_same(slim, model, x)


class Gated(Attention):
    """Each head's context is gated by what a layer makes of all heads' contexts."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)

    def forward(self, x):
        context = self.context(x)
        return self.o(context * self.gate(context).sigmoid())


def test_a_head_that_gates_of_others_read_stays():
    model, x = Gated(), example()
    output = fxslim.find_attention(fxslim.capture(model, x))[0].output
    assert [(p.weight, p.dim) for p in output] == [("gate.weight", 1), ("o.weight", 1)]
    zero_heads(model.o, 1, 2)
    zero_heads(model.gate, 2)
    with torch.no_grad():
        model.gate.weight[HEAD_DIM : 2 * HEAD_DIM] = 0
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"attention": [0, 1, 3]}
    assert slim.get_parameter("gate.weight").shape == (3 * HEAD_DIM, 3 * HEAD_DIM)
    assert_computes_the_same(slim, model, x)


def test_an_attention_that_is_all_zero_goes():
    model = Residual(a=Attention(), b=Attention())
    zero_heads(model.layers["a"].o, *range(HEADS))
    x = example()
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"layers.a": [], "layers.b": [0, 1, 2, 3]}
    assert_computes_the_same(slim, model, x)


def test_groups_go_if_all_of_them_is_zero():
    model = Residual(a=Attention(kv_heads=2, core=grouped_core))
    zero_heads(model.layers["a"].o, 2, 3)
    x = example()
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"layers.a": [0, 1]}
    assert slim.get_parameter("layers.a.k.weight").shape[0] == HEAD_DIM
    assert_computes_the_same(slim, model, x)


@pytest.mark.parametrize(("gone", "key_heads"), [([0], 2), ([0, 1], 1), ([0, 2, 3], 1)])
def test_where_keys_are_repeated_single_heads_go_or_groups_with_their_keys(gone, key_heads):
    model, (x,) = HANDWRITTEN["gqa-repeat-interleave"]()
    (site, *_) = fxslim.find_attention(fxslim.capture(model, (x,)))
    (output,), (key,) = site.output, site.key
    with torch.no_grad():
        model.get_parameter(output.weight)[:, output.index[gone].flatten()] = 0
    slim = fxslim.model_slim(model, (x,))
    assert kept(slim)[site.name] == [head for head in range(4) if head not in gone]
    assert len(slim.get_parameter(key.weight)) == key_heads * site.head_dim
    assert_computes_the_same(slim, model, x)


def test_layers_that_share_weights_lose_the_same_heads():
    shared = Attention()
    model = Residual(a=shared, b=shared)
    zero_heads(shared.o, 1)
    x = example()
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"layers.a": [0, 2, 3], "layers.b": [0, 2, 3]}
    assert_computes_the_same(slim, model, x)


def test_nothing_to_remove_is_said():
    model, x = Attention(), example()
    with pytest.warns(UserWarning, match=r"^fxslim.model_slim: no head of Attention is masked or"):
        slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"attention": [0, 1, 2, 3]}
    assert_computes_the_same(slim, model, x)


class Dropout(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.dropout = Attention(), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.attention(x))


def test_a_model_in_training_mode_becomes_a_program_in_eval_mode():
    model, x = Dropout().train(), example()
    zero_heads(model.attention.o, 0)
    slim = fxslim.model_slim(model, x)
    assert model.training
    assert model.dropout.training
    assert not slim.training
    assert_computes_the_same(slim, model.eval(), x)


def test_masks_and_zeros_go_together():
    model, x = Attention(), example()
    zero_heads(model.o, 0)
    pruning = fxslim.prepare_pruning(model, {"end_step": 1}, example_inputs=x)
    mask = pruning.pruners[0].head_masks["attention"]
    mask[0, 3] = 0
    mask[0, 2] = 0.5  # edited by hand: not removed, but taken into account
    slim = fxslim.model_slim(model, x)
    assert kept(slim) == {"attention": [1, 2]}
    assert_computes_the_same(slim, model, x)
    assert_computes_the_same(fxslim.model_slim(torch.compile(model, backend="eager"), x), model, x)


def test_a_program_that_comes_in_stays_as_it_is():
    x = example()
    masked = fxslim.insert_head_masks(fxslim.capture(Attention(), x))
    with torch.no_grad():
        masked.get_parameter("head_masks.attention")[1] = 0
    code, expected = masked.code, masked(x)
    slim = fxslim.model_slim(masked, x)
    assert kept(slim) == {"attention": [0, 2, 3]}
    assert masked.code == code
    torch.testing.assert_close(masked(x), expected)
    assert_computes_the_same(slim, masked, x)


@pytest.mark.filterwarnings("ignore:fxslim. .* does not export as a whole:UserWarning")
def test_a_model_that_exports_in_parts_is_trained_and_slimmed():
    model, x = Branching(Tower()), example()
    names = list(model.state_dict())
    pruning = fxslim.prepare_pruning(
        model, {"criterion_type": "magnitude", "target_sparsity": 0.5}, example_inputs=x
    )
    pruning.on_step_begin()
    slim = fxslim.model_slim(model)
    assert isinstance(slim, Branching)
    assert sum(map(len, kept(slim).values())) == HEADS
    assert list(slim.state_dict()) == names
    with torch.no_grad():
        torch.testing.assert_close(slim(x)["y"], model(x)["y"])
    assert any("head_masks" in name for name in model.state_dict())
