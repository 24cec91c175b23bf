"""Narrow: parameters and shape constants follow the axes; nothing else changes."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from fxslim import rules
from fxslim.analysis import analyse
from fxslim.passes import Narrow
from fxslim.rules import Row
from tests.models import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Attention,
    Residual,
    captured,
    example,
    merge,
    printed,
    softmax_core,
    split,
)
from tests.zoo.reference import call_of, compare, without_heads


def keeping(program, **kept):
    """Narrow to these heads; sites are named by the last part of their path."""
    names = {site.name.split(".")[-1]: site.name for site in fxslim.find_attention(program)}
    return fxslim.narrow(program, fxslim.PruningPlan({names[n]: h for n, h in kept.items()}, 0.5))


def assert_is_without(slim, program, model, kept, *inputs):
    """The slim program computes what the model does whose outputs do not read the other heads."""
    call = call_of(inputs)
    reference = without_heads(model, fxslim.find_attention(program), kept)
    assert compare(call.on(slim), call.on(reference)).relative < 1e-5


def calls(program, name):
    """The calls of an operator."""
    return [n for n in program.graph.nodes if getattr(n.target, "__name__", "").startswith(name)]


def test_printed():
    """With two of four heads, what is printed is the same but for the width of the axis."""
    program = fxslim.capture(Attention(bias=False), example(), dynamic=False)
    wide = {
        "a4": "a2",
        "[3, 5, 4, 2]": "[3, 5, 2, 2]",
        "[3, 5, 8]": "[3, 5, 4]",
        "4 heads": "2 heads",
    }
    expected = printed(program)
    for before, after in wide.items():
        assert before in expected
        expected = expected.replace(before, after)
    assert printed(keeping(program, attention=[0, 3])) == expected


def test_parameters_are_index_selected():
    model = Attention()
    slim = keeping(fxslim.capture(model, example()), attention=[0, 3])
    rows = [0, 1, 6, 7]
    for linear in ("q", "k", "v"):
        ours, theirs = slim.get_submodule(linear), model.get_submodule(linear)
        assert torch.equal(ours.weight, theirs.weight[rows])
        assert torch.equal(ours.bias, theirs.bias[rows])
    assert torch.equal(slim.o.weight, model.o.weight[:, rows])


def test_kinds_flags_and_buffers_are_kept():
    class Gated(Attention):
        def __init__(self):
            super().__init__()
            self.register_buffer("gate", torch.rand(HEADS, 1, 1))
            self.register_buffer("scale", torch.rand(HEADS, 1, 1), persistent=False)
            self.q.weight.requires_grad_(False)

        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            return self.o(merge(softmax_core(q * self.scale, k, v) * self.gate))

    model = Gated()
    slim = keeping(fxslim.capture(model, example()), attention=[1, 2])
    assert torch.equal(slim.gate, model.gate[[1, 2]])
    assert torch.equal(slim.scale, model.scale[[1, 2]])
    assert "gate" in slim.state_dict()
    assert "scale" not in slim.state_dict()
    assert isinstance(slim.q.weight, nn.Parameter)
    assert [n for n, p in slim.named_parameters() if not p.requires_grad] == ["q.weight"]


def test_the_input_is_untouched_and_what_did_not_change_is_shared():
    model = Residual(a=Attention(), b=Attention())
    program = fxslim.capture(model, example())
    before = [(node.name, str(node.args), dict(node.meta)) for node in program.graph.nodes]
    shapes = {name: p.shape for name, p in model.named_parameters()}
    slim = keeping(program, a=[0])
    after = [(node.name, str(node.args), dict(node.meta)) for node in program.graph.nodes]
    assert before == after
    assert {name: p.shape for name, p in model.named_parameters()} == shapes
    same = [n for n, p in slim.named_parameters() if p is model.get_parameter(n)]
    assert same == ["layers.a.o.bias", *(n for n in shapes if n.startswith("layers.b"))]


def test_tied_parameters_are_narrowed_once_and_stay_tied():
    model = Residual(a=Attention(), b=Attention())
    model.layers.b.k = model.layers.a.k
    program = fxslim.capture(model, example())
    slim = keeping(program, a=[0, 2], b=[0, 2])
    uses = [n for n in slim.graph.nodes if n.op == "get_attr" and n.target.endswith("k.weight")]
    assert {node.target for node in uses} == {"layers.a.k.weight"}
    assert slim.layers.a.k.weight.shape == (4, WIDTH)
    kept = {"layers.a": [0, 2], "layers.b": [0, 2]}
    assert_is_without(slim, program, model, kept, example(2, 7))


def test_keeping_everything_changes_nothing():
    program = fxslim.capture(Attention(), example())
    result = Narrow(analyse(program), {})(program)
    assert not result.modified
    assert printed(result.graph_module) == printed(program)
    assert result.graph_module is not program


def test_narrowing_again_by_the_same_plan_changes_nothing():
    program = fxslim.capture(Attention(), example())
    once = keeping(program, attention=[0, 3])
    twice = keeping(once, attention=[0, 1])  # heads are numbered anew
    assert printed(twice) == printed(once)
    assert all(
        torch.equal(a, b) for a, b in zip(once.parameters(), twice.parameters(), strict=True)
    )


def test_two_cuts_are_one():
    program, x = fxslim.capture(Attention(), example()), example(2, 7)
    twice = keeping(keeping(program, attention=[0, 1, 3]), attention=[0, 2])
    once = keeping(program, attention=[0, 3])
    assert printed(twice) == printed(once)
    torch.testing.assert_close(twice(x), once(x))


def test_wrong_input_is_named():
    program = fxslim.capture(Attention(), example())
    with pytest.raises(TypeError, match=r"^Narrow takes a torch.fx.GraphModule .*, not Attention$"):
        Narrow(analyse(program), {})(Attention())
    with pytest.raises(ValueError, match=r"^the pass was given the axes of another program: "):
        Narrow(analyse(program), {})(copy.deepcopy(program))


# ------------------------------------------------------------------------ what is selected, not cut


def test_values_that_depend_on_the_position_are_selected_not_made_anew():
    """ALiBi's slopes come from arange(1, 1 + heads): the last heads keep the last slopes."""
    model, inputs, program = captured("alibi")
    kept = {site.name: [1, 3] for site in fxslim.find_attention(program)}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 0.5))
    selected = [node.args[0].target for node in calls(slim, "index_select")]
    assert selected == [torch.ops.aten.arange.start] * 2
    assert_is_without(slim, program, model, kept, *inputs)


def test_a_shared_bias_is_selected_where_it_is_used():
    """T5's table stays whole; each layer picks the heads that it keeps."""
    model, inputs, program = captured("t5-bias")
    kept = {"attentions.0": [1, 3], "attentions.1": [0, 1, 2]}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 0.5))
    table = slim.get_parameter("tables.0.relative_attention_bias.weight")
    assert table is model.tables[0].relative_attention_bias.weight
    assert [node.args[1] for node in calls(slim, "index_select")] == [1, 1]
    assert_is_without(slim, program, model, kept, *inputs)
    assert_is_without(slim, program, model, kept, inputs[0][:2, :5])


class MergedBias(nn.Module):
    """Two attentions over (batch · heads) that add one bias, merged the same way."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention(bias=False) for _ in range(2))
        self.slopes = nn.Parameter(torch.randn(HEADS))

    def forward(self, x):
        batch, length, _ = x.shape
        places = torch.arange(length)
        distance = (places[:, None] - places).abs() * self.slopes[:, None, None]
        bias = distance.expand(batch, HEADS, length, length).reshape(-1, length, length)
        for layer in self.layers:
            q, k, v = (
                split(f(x)).reshape(-1, length, HEAD_DIM) for f in (layer.q, layer.k, layer.v)
            )
            p = torch.baddbmm(bias, q, k.mT).softmax(-1)
            x = x + layer.o(merge((p @ v).view(batch, HEADS, length, HEAD_DIM)))
        return x


@pytest.mark.parametrize("dynamic", [True, False])
def test_a_shared_bias_with_heads_merged_into_the_batch(dynamic):
    model, x = MergedBias(), example()
    program = fxslim.capture(model, x, dynamic=dynamic)
    sites = fxslim.find_attention(program)
    assert [site.prunable for site in sites] == [True, True]
    kept = {sites[0].name: [1, 3], sites[1].name: [0, 1, 2]}
    slim = fxslim.narrow(program, fxslim.PruningPlan(kept, 0.5))
    assert slim.slopes is model.slopes
    assert_is_without(slim, program, model, kept, x)
    if dynamic:
        assert_is_without(slim, program, model, kept, example(2, 7))


def test_a_bias_of_its_own_is_cut_not_selected():
    class Own(Attention):
        def __init__(self):
            super().__init__()
            self.slopes = nn.Parameter(torch.randn(HEADS, 1, 1))

        def forward(self, x):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            return self.o(
                merge(scaled_dot_product_attention(q, k, v, self.slopes * q.mT[..., :1, :]))
            )

    program = fxslim.capture(Own(), example())
    slim = keeping(program, attention=[1, 3])
    assert slim.slopes.shape == (2, 1, 1)
    assert calls(slim, "index_select") == []


# --------------------------------------------------------------------------- a stale shape constant


def expanded_core(q, k, v):
    """Keys and values repeated as transformers does it, every size written out."""
    batch, kv_heads, length, width = k.shape
    sizes = (batch, kv_heads, q.shape[1] // kv_heads, length, width)
    k, v = (x[:, :, None].expand(sizes).reshape(q.shape) for x in (k, v))
    return softmax_core(q, k, v)


class Split(nn.Module):
    """Queries, keys and values of one projection, cut apart by their widths."""

    def __init__(self):
        super().__init__()
        self.qkv, self.o = (
            nn.Linear(WIDTH, 3 * HEADS * HEAD_DIM),
            nn.Linear(HEADS * HEAD_DIM, WIDTH),
        )

    def forward(self, x):
        return self.o(merge(softmax_core(*map(split, self.qkv(x).split([8, 8, 8], -1)))))


@pytest.mark.parametrize(
    ("operator", "model", "heads"),
    [
        ("reshape", Attention(), [0, 1]),
        ("split_with_sizes", Split(), [0, 1]),
        ("expand", Attention(2, expanded_core), [0, 1]),  # one KV head is left: it would broadcast
    ],
)
def test_a_shape_constant_that_is_not_rederived_is_found(operator, model, heads, monkeypatch):
    program = fxslim.capture(model, example(), dynamic=False)
    assert calls(program, operator)
    keeping(program, attention=heads)
    monkeypatch.setitem(rules.RULES, operator, Row(rules.RULES[operator].rule))
    with pytest.raises(fxslim.VerificationError, match=r"\(.*\) does not fit after narrowing: "):
        keeping(program, attention=heads)


def test_a_shape_constant_of_other_dimensions_may_stay(monkeypatch):
    monkeypatch.setitem(rules.RULES, "split_with_sizes", Row(rules.RULES["split_with_sizes"].rule))
    _, _, program = captured("fused-interleaved")  # cuts q, k and v apart within each head
    plan = fxslim.PruningPlan({"layers.0.attention": [0, 1]}, 0.25)
    assert fxslim.narrow(program, plan) is not None


def test_heads_of_a_refused_site_cannot_be_cut():
    _, _, program = captured("talking-heads")
    plan = fxslim.PruningPlan({fxslim.find_attention(program)[0].name: []}, 0.5)
    with pytest.raises(fxslim.UnsupportedSite, match="cannot be pruned: its heads are mixed"):
        fxslim.narrow(program, plan)


def test_lengths_out_of_data_need_not_fit_the_sizes_that_are_made_up_for_them():
    """The image's tokens are what is left without as many as the mask keeps."""

    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
            self.table = nn.Parameter(torch.randn(5, 1, 4))

        def forward(self, image, text, mask):
            text = text[:, mask[0]]
            x = torch.cat([image, text], 1)
            q, k, v = (t.unflatten(-1, (4, 4)) for t in self.qkv(x).chunk(3, -1))
            n = text.shape[1]
            q = torch.cat([q[:, :-n] * self.table, q[:, -n:]], 1)
            context = scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
            return self.out(context.transpose(1, 2).flatten(2))[:, :5]

    mask = torch.tensor([[True, True, True, False]])
    inputs = (torch.randn(1, 5, 16), torch.randn(1, 4, 16), mask)
    program = fxslim.capture(Packed(), inputs, dynamic=False)
    slim = fxslim.compile(program, 0.5)
    report = slim.meta["fxslim"]
    masked = call_of(inputs).on(without_heads(program, report.sites, report.plan.kept))
    assert compare(call_of(inputs).on(slim), masked).relative < 1e-5
