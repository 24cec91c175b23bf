"""Feed-forward blocks: what is one, what is none, and that cut channels are masked channels."""

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F

import fxslim
from fxslim.measure import bind, count_flops, count_parameters
from tests.models import WIDTH, Attention, Residual, captured, example
from tests.zoo.reference import without_heads

CHANNELS = 10


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, CHANNELS), nn.Linear(CHANNELS, WIDTH)

    def forward(self, x):
        return self.down(self.act(self.up(x)))

    act = staticmethod(torch.sigmoid)


class Gated(Mlp):
    """Channels of two projections, multiplied; a sigmoid of 0 is not 0."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, CHANNELS, bias=False)

    def forward(self, x):
        return self.down(self.gate(x).sigmoid() * self.up(x).exp())


class FusedGate(Mlp):
    """Both of them from one weight."""

    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * CHANNELS)

    def forward(self, x):
        gate, up = self.up(x).chunk(2, -1)
        return self.down(F.gelu(gate) * up)


class Depthwise(Mlp):
    """A convolution of each channel by itself in between, as in mix-FFN."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS)

    def forward(self, x):
        return self.down(self.conv(self.up(x).mT).mT.relu())


class Convolutional(nn.Module):
    """Projections that are convolutions of one and of three positions."""

    def __init__(self):
        super().__init__()
        self.up = nn.Conv1d(WIDTH, CHANNELS, 3, padding=1)
        self.down = nn.Conv1d(CHANNELS, WIDTH, 1)

    def forward(self, x):
        return self.down(self.up(x.mT).relu()).mT


def network(block):
    return Residual(attention=Attention(), block=block)


def blocks_of(model, dynamic=True):
    return fxslim.find_feed_forward(fxslim.capture(model, example(), dynamic=dynamic))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", [Mlp, Gated, FusedGate, Depthwise, Convolutional])
def test_cut_channels_are_masked_channels(kind, dynamic):
    model = network(kind())
    (site,) = blocks_of(model, dynamic)
    assert (site.name, site.channels, site.prunable) == ("layers.block.down", CHANNELS, True)
    program = fxslim.capture(model, example(), dynamic=dynamic)
    plan = fxslim.PruningPlan({site.name: [0, 3, 7]}, 0.7)
    slim = fxslim.narrow(program, plan)
    fxslim.verify(slim, fxslim.insert_head_masks(program, [site]), plan)
    assert slim.get_parameter(site.down[0].weight).shape[site.down[0].dim] == 3
    x = example(2, 7) if dynamic else example()
    torch.testing.assert_close(slim(x), without_heads(model, [site], plan.kept)(x))


def test_a_block_may_go_whole():
    model = network(Mlp())
    program = fxslim.capture(model, example())
    slim = fxslim.narrow(program, fxslim.PruningPlan({"layers.block.down": []}, 1.0))
    (site,) = fxslim.find_feed_forward(program)
    assert "layers.block.up.weight" not in dict(slim.named_parameters())
    torch.testing.assert_close(
        slim(x := example()), without_heads(model, [site], {site.name: []})(x)
    )


def test_a_gate_is_one_of_the_projections_that_bring_channels_in():
    (site,) = blocks_of(network(Gated()))
    assert {up.weight for up in site.up} == {"layers.block.gate.weight", "layers.block.up.weight"}
    assert {up.bias for up in site.up} == {None, "layers.block.up.bias"}
    (site,) = blocks_of(network(FusedGate()))
    (up,) = site.up
    assert up.index.tolist() == [[n, CHANNELS + n] for n in range(CHANNELS)]


def test_blocks_of_one_weight_come_in_the_order_of_its_rows():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(WIDTH, 4 * CHANNELS)
            self.down = nn.ModuleList(nn.Linear(CHANNELS, WIDTH) for _ in range(4))

        def forward(self, x):
            channels = self.up(x).sigmoid().chunk(4, -1)
            for down, own in zip(self.down, channels, strict=True):
                x = x + down(own)
            return x

    program = fxslim.capture(Fused(), example())
    for _ in range(5):
        names = [site.name for site in fxslim.find_feed_forward(program)]
        assert names == ["down.0", "down.1", "down.2", "down.3"]


def test_a_layer_that_is_called_twice_is_one_block():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = network(Mlp())

        def forward(self, x):
            return self.layer(self.layer(x))

    (site,) = blocks_of(Twice())
    assert site.name == "layer.layers.block.down"


class Classifier(Mlp):
    """Two layers that lead elsewhere."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(CHANNELS, 3)

    def forward(self, x):
        return F.pad(super().forward(x), (0, WIDTH - 3))


class LowRank(Mlp):
    """Two layers in a row are one of low rank."""

    act = staticmethod(nn.Identity())


@pytest.mark.parametrize("kind", [Classifier, LowRank])
def test_other_layers_in_a_row_are_none(kind):
    assert blocks_of(network(kind())) == []


def test_neither_heads_nor_the_stream_are_channels():
    assert blocks_of(Residual(one=Attention(), other=Attention())) == []


def test_a_norm_over_the_channels_is_a_reason():
    class Normed(Mlp):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(CHANNELS)

        def act(self, x):
            return self.norm(x.relu())

    (site,) = blocks_of(network(Normed()))
    assert not site.prunable
    assert site.reason == (
        "layer_norm (layer_norm in layers.block.norm) normalises over all of the channels"
    )
    program = fxslim.capture(network(Normed()), example())
    with pytest.raises(fxslim.UnsupportedSite, match="normalises over all of the channels"):
        fxslim.narrow(program, fxslim.PruningPlan({site.name: [0]}, 0.9))


def test_experts_are_refused():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(2, WIDTH, CHANNELS))
            self.down = nn.Parameter(torch.randn(2, CHANNELS, WIDTH))

        def forward(self, x):
            x = x.flatten(0, 1).expand(2, -1, -1)
            return ((x @ self.up).relu() @ self.down).sum(0).view(3, 5, WIDTH)

    (site,) = blocks_of(network(Experts()), dynamic=False)
    assert not site.prunable
    assert "experts" in site.reason


@pytest.mark.parametrize(
    "name", ["albert", "experts", "nanogpt", "parallel", "swin", "transformer"]
)
def test_every_block_of_the_hand_written_models_narrows_as_it_is_masked(name):
    _, _, program = captured(name)
    sites = [site for site in fxslim.find_feed_forward(program) if site.prunable]
    plan = fxslim.PruningPlan({s.name: list(range(1, s.channels, 2)) for s in sites}, 0.5)
    slim = fxslim.narrow(program, plan)
    if sites:
        fxslim.verify(slim, fxslim.insert_head_masks(program, sites), plan)


def test_channels_beside_heads_before_one_projection():
    """As in transformers whose attention and feed-forward block are one product each way."""

    class Joined(Attention):
        def __init__(self):
            super().__init__()
            self.up, self.o = nn.Linear(WIDTH, CHANNELS), nn.Linear(8 + CHANNELS, WIDTH)

        def forward(self, x):
            return self.o(torch.cat([self.context(x), F.gelu(self.up(x))], -1))

    model, x = Residual(a=Joined(), b=Joined()), example()
    slim = fxslim.compile(model, 0.5, x, ffn_sparsity=0.5, scope="local")
    assert slim.layers.a.o.weight.shape == (WIDTH, 4 + CHANNELS // 2)
    assert not torch.allclose(slim(x), model(x), atol=1e-3)


def test_compile_prunes_heads_and_channels():
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = transformers.BertForSequenceClassification(config).eval()
    slim = fxslim.compile(model, 0.5, ffn_sparsity=0.5, rounding=16)
    report = fxslim.Report.of(slim)
    assert [site.channels for site in report.feed_forwards] == [64, 64]
    kept = [len(report.plan.kept[site.name]) for site in report.feed_forwards]
    assert sum(kept) == 64
    assert [number % 16 for number in kept] == [0, 0]
    assert report.plan.sparsity == report.plan.reached["channels"] == 0.5
    again = fxslim.compile(model, plan=report.plan)
    inputs = {"input_ids": torch.randint(99, (2, 9)), "attention_mask": torch.ones(2, 9).long()}
    torch.testing.assert_close(again(**inputs).logits, slim(**inputs).logits)


@pytest.mark.parametrize("criterion", ["activation", "compensated_fisher", "output_fisher", "snip"])
def test_criteria_score_channels(criterion):
    model = network(Gated())
    program = fxslim.capture(model, example())
    sites = [*fxslim.find_attention(program), *fxslim.find_feed_forward(program)]
    masked = fxslim.insert_head_masks(program, sites)
    with torch.no_grad():
        model.layers["block"].down.weight[:, 4] = 0.0
    batches = [example(), example()]
    scores = fxslim.score(masked, criterion, batches, loss_fn=lambda y: y.square().mean())
    assert scores["layers.block.down"].shape == (CHANNELS,)
    assert scores["layers.block.down"].argmin() == 4


def test_repair_brings_the_model_nearer_to_the_dense_one():
    torch.manual_seed(1)
    model = network(Gated())
    batches = [example(8, 9) for _ in range(10)]
    dense = model(x := example(8, 9))

    def error(repair):
        slim = fxslim.compile(
            model, 0.25, example(), ffn_sparsity=0.3, calibration=batches, repair=repair
        )
        return (slim(x) - dense).square().mean()

    assert error(repair=True) < 0.5 * error(repair=False)


@pytest.mark.parametrize("target", [{"budget": 0.9}, {"sparsity": 0.5}, {"sparsity": 0.0}])
def test_what_heads_and_channels_reach_is_what_is_left_of_both(target):
    program = fxslim.capture(Residual(attention=Attention(), block=Gated()), example())
    slim = fxslim.compile(program, **target, costs="parameters", ffn_sparsity=0.5)
    reached = fxslim.Report.of(slim).plan.reached
    left = count_parameters(slim) / count_parameters(program)
    assert reached == {"parameters": left, "channels": 0.5}


def test_the_heads_alone_meet_a_budget_beside_a_share_of_the_channels():
    program = fxslim.capture(Residual(attention=Attention(), block=Gated()), example())
    heads, both = (
        fxslim.Report.of(fxslim.compile(program, budget=0.9, costs="parameters", **options)).plan
        for options in ({}, {"ffn_sparsity": 0.5})
    )
    assert both.kept["layers.attention"] == heads.kept["layers.attention"]
    assert both.reached["parameters"] < heads.reached["parameters"] <= 0.9


def test_channels_alone():
    model = Residual(block=Mlp())
    slim = fxslim.compile(model, 0.0, example(), ffn_sparsity=0.5)
    assert slim.get_parameter("layers.block.down.weight").shape == (WIDTH, CHANNELS // 2)
    with pytest.raises(fxslim.UnsupportedSite, match="has no attention"):
        fxslim.compile(model, 0.5, example(), ffn_sparsity=0.5)
    with pytest.raises(fxslim.UnsupportedSite, match="has no feed-forward: no channels between"):
        fxslim.compile(Residual(attention=Attention()), 0.5, example(), ffn_sparsity=0.5)


@pytest.mark.parametrize("resource", ["parameters", "flops"])
def test_one_budget_for_heads_and_channels_is_met(resource):
    model, x = Residual(attention=Attention(), block=Gated(), other=Mlp()), example()
    program = fxslim.capture(model, x)
    sites = [*fxslim.find_attention(program), *fxslim.find_feed_forward(program)]
    scores = fxslim.score(fxslim.insert_head_masks(program, sites), "magnitude")
    costs = fxslim.cost(program, resource, x, feed_forward=True)
    assert costs.sites.keys() == {site.name for site in sites}
    plan = fxslim.plan(scores, sites, budget=0.6, costs=costs)
    slim = fxslim.narrow(program, plan)
    count = {
        "parameters": count_parameters,
        "flops": lambda m: count_flops(bind(m, x)),
    }[resource]
    assert plan.reached[resource] == pytest.approx(count(slim) / count(program))
    assert 0.5 < plan.reached[resource] <= 0.6
    assert any(len(plan.kept[site.name]) < site.size for site in sites[1:])
