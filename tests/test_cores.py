"""Cores: the near misses that random programs found, each reduced to the smallest model."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from tests.models import (
    HEAD_DIM,
    HEADS,
    WIDTH,
    Attention,
    Residual,
    captured,
    example,
    grouped_core,
    merge,
    softmax_core,
    split,
)
from tests.zoo.reference import call_of, compare, without_heads


def sites_of(model, dynamic=True):
    return fxslim.find_attention(fxslim.capture(model, (example(),), dynamic=dynamic))


class Softmaxes(nn.Module):
    """A softmax between two linear layers that is no attention."""

    def __init__(self, combine):
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.combine = combine

    def forward(self, x):
        return self.combine(self.a(x), self.b(x))


def similarity(a, b):
    """Scores that nothing is summed with."""
    return b * (a @ b.mT).softmax(-1).diagonal(dim1=1, dim2=2).unsqueeze(-1)


def linear_attention(a, b):
    """Keys and queries normalised apart from each other."""
    return b.softmax(-1) @ (a.softmax(1).mT @ b)


def pooling(a, b):
    """The length summed away by each channel of its own."""
    return (a.softmax(1).mT @ b).mean(1, keepdim=True)


@pytest.mark.parametrize("combine", [similarity, linear_attention, pooling])
def test_attention_before_and_after_a_softmax_is_none_of_its_own(combine):
    model = Residual(a=Attention(), b=Softmaxes(combine), c=Attention(core=softmax_core))
    assert [site.name for site in sites_of(model)] == ["layers.a", "layers.c"]


class HeadsOfTheOutput(nn.Module):
    """An output projection with a head dimension of its own, before a softmax over the length."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, HEAD_DIM, WIDTH))
        self.pool = Softmaxes(pooling)

    def forward(self, x):
        context = softmax_core(*(split(linear(x)) for linear in (self.q, self.k, self.v)))
        x = x + torch.einsum("bhsd,hdw->bsw", context, self.o)
        return x + self.pool(x)


def test_two_dimensions_summed_at_once_are_no_scores():
    (site,) = sites_of(HeadsOfTheOutput())
    assert (site.num_heads, site.prunable) == (HEADS, True)


class Latents(nn.Module):
    """Three learned queries with one head."""

    def __init__(self):
        super().__init__()
        self.latents = nn.Parameter(torch.randn(3, WIDTH))
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        q = self.q(self.latents).unsqueeze(0)
        return self.o(scaled_dot_product_attention(q, self.k(x), self.v(x)))


def test_learned_queries_are_no_heads():
    (site,) = sites_of(Latents())
    assert (site.num_heads, site.reason[:22]) == (1, "there is one head only")


class Crossed(nn.Module):
    """A query head lies beside one KV head in the weight, and attends to another."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 2 * 4 * HEAD_DIM)
        self.o = nn.Linear(4 * HEAD_DIM, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (2, 4 * HEAD_DIM)).split([4, 2, 2], -1)
        q = q.unflatten(-1, (2, HEAD_DIM)).flatten(2, 3).transpose(1, 2)
        k, v = (x.transpose(1, 2).repeat(1, 2, 1, 1) for x in (k, v))
        return self.o(merge(scaled_dot_product_attention(q, k, v)))


def test_heads_paired_with_each_other_are_refused():
    (site,) = sites_of(Crossed())
    assert site.reason == "its heads are mixed with each other between the query and the scores"


class Unprojected(nn.Module):
    """Layers that add the contexts to what they are made from, as they are."""

    def __init__(self, layers):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed, self.out = nn.Linear(WIDTH, width), nn.Linear(width, WIDTH)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = x + merge(softmax_core(*map(split, layer(self.norm(x)).chunk(3, -1))))
        return self.out(x)


@pytest.mark.parametrize("layers", [1, 2])
def test_an_attention_without_an_output_projection_is_refused(layers):
    reason = (
        "its heads are channels of what it is made from: no output projection comes before its "
        "context is added to that"
    )
    assert [site.reason for site in sites_of(Unprojected(layers))] == [reason] * layers


class GatedMask(nn.Module):
    """As in WavLM: what each head's share of the stream says weighs the positions for it."""

    def __init__(self, norm):
        super().__init__()
        width = HEADS * HEAD_DIM
        self.embed, self.qkv = nn.Linear(WIDTH, width), nn.Linear(width, 3 * width)
        self.gate, self.o = nn.Linear(HEAD_DIM, 1), nn.Linear(width, width)
        self.norm, self.out = norm(width), nn.Linear(width, WIDTH)

    def forward(self, x):
        x = self.norm(self.embed(x))
        mask = self.gate(split(x)).sigmoid() * torch.arange(x.shape[1])
        context = scaled_dot_product_attention(*map(split, self.qkv(x).chunk(3, -1)), mask)
        return self.out(x + self.o(merge(context)))


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.Identity])
def test_a_mask_of_the_streams_own_channels_is_not_added_to_the_context(norm):
    slim = fxslim.compile(GatedMask(norm), 0.5, example_inputs=example())
    (site,) = slim.meta["fxslim"].sites
    assert (site.prunable, site.reason) == (True, "")
    assert slim.get_parameter("embed.weight").shape == (HEADS * HEAD_DIM, WIDTH)


class AddedToQueries(Attention):
    """Queries that what they are made from is added to."""

    def __init__(self):
        super().__init__()
        self.embed, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.q = nn.Sequential(nn.LayerNorm(HEADS * HEAD_DIM), nn.Linear(*2 * [HEADS * HEAD_DIM]))

    def heads(self, x):
        embedded = self.embed(x)
        return map(split, (self.q(embedded) + embedded, self.k(x), self.v(x)))


def test_what_is_added_to_queries_is_not_added_to_a_context():
    (site,) = sites_of(AddedToQueries())
    assert site.reason.startswith("layer_norm (layer_norm in q.0) normalises over all of the head")


class Routed(nn.Module):
    """Gates that depend on all heads' gates; the layer is called twice."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.gate, self.o = nn.Linear(WIDTH, HEADS), nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x):
        for _ in range(2):
            q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
            gates = self.gate(x).softmax(-1).mT.unsqueeze(-1)
            x = self.o(merge(scaled_dot_product_attention(q, k, v) * gates))
        return x


def test_gates_of_a_layer_that_is_called_twice_are_selected_at_both_uses():
    model, inputs = Routed(), (example(),)
    program = fxslim.capture(model, inputs)
    sites = fxslim.find_attention(program)
    assert [(site.prunable, site.reason) for site in sites] == [(True, "")] * 2
    plan = fxslim.PruningPlan({site.name: [1, 3] for site in sites}, 0.5)
    slim = fxslim.narrow(program, plan)
    fxslim.verify(slim, fxslim.insert_head_masks(program), plan)


class Alibi(Attention):
    def forward(self, x):
        q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
        slopes = 2.0 ** -torch.arange(1, 1 + HEADS)
        line = torch.arange(x.shape[1])
        bias = -slopes[:, None, None] * (line[:, None] - line).abs()
        return self.o(merge(scaled_dot_product_attention(q, k, v, bias)))


def test_heads_selected_from_slopes_can_be_narrowed_again():
    model, inputs = Alibi(), (example(),)
    program = fxslim.capture(model, inputs)
    once = fxslim.narrow(program, fxslim.PruningPlan({"attention": [0, 2, 3]}, 0.25))
    twice = fxslim.narrow(once, fxslim.PruningPlan({"attention": [0, 2]}, 0.5))
    direct = fxslim.narrow(program, fxslim.PruningPlan({"attention": [0, 3]}, 0.5))
    call = call_of(inputs)
    assert compare(call.on(twice), call.on(direct)).relative < 1e-6


class Fused(nn.Module):
    """Two KV heads for four query heads, all in one weight."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 8 * HEAD_DIM)
        self.o = nn.Linear(4 * HEAD_DIM, WIDTH)

    def forward(self, x):
        q, k, v = (split(y) for y in self.qkv(x).split([8, 4, 4], -1))
        return self.o(merge(grouped_core(q, k, v)))


def test_the_keys_of_a_fused_weight_are_told_from_its_queries():
    (site,) = sites_of(Fused())
    assert (site.kind, site.num_kv_heads) == ("gqa", 2)
    assert site.query[0].index.tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert site.key[0].index.tolist() == [[8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize("core", [softmax_core, scaled_dot_product_attention])
def test_keys_of_length_one_are_an_attention(core):
    program = fxslim.capture(Attention(core=core), example(length=1), dynamic=False)
    (found,) = fxslim.find_attention(program)
    assert (found.prunable, found.num_heads, found.kind) == (True, HEADS, "mha")


def test_a_shared_linear_attention_is_no_attention():
    """Its weights map the channels to themselves, so that channels look like projected heads."""

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)

        def forward(self, x):
            for _ in range(2):
                y = self.norm(x)
                context = self.a(y).softmax(1).mT @ self.b(y)
                x = x + self.b(y).softmax(-1) @ context
            return x

    program = fxslim.capture(Linear(), torch.randn(1, 2, 2), dynamic=False)
    assert fxslim.find_attention(program) == []


def test_a_linear_attention_behind_an_attention_is_no_attention():
    """It is normalised over the sequence, which the scores far before it have, too."""

    class Behind(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

        def forward(self, x):
            scores = (self.a(x) @ self.b(x).mT).softmax(-1)
            x = x * scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)
            context = self.c(x).softmax(1).mT @ self.b(x)
            x = x + self.a(x).softmax(-1) @ context
            context = self.c(x).softmax(1).mT @ self.b(x)
            return x + self.a(x).softmax(-1) @ context

    for dynamic in (False, True):
        program = fxslim.capture(Behind(), example(), dynamic=dynamic)
        assert fxslim.find_attention(program) == []


def test_a_batch_that_learned_queries_are_expanded_to_is_no_head_axis():
    """Else everything that has the batch looks like a projection of heads, as this shared key."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(6, 2 * 2 + 2 + 2), nn.Linear(4, 6)
            self.latents, self.pool = nn.Parameter(torch.randn(3, 5)), nn.Linear(5, 6)

        def forward(self, x):
            q, k, v = self.qkv(x).split([4, 2, 2], -1)
            k, v = (split(y).repeat_interleave(2, 1) for y in (k, v))
            x = self.o(merge(scaled_dot_product_attention(split(q), k, v)))
            queries = self.pool(self.latents.expand(x.shape[0], -1, -1))
            return scaled_dot_product_attention(queries, x, x)

    attention, *_ = fxslim.find_attention(fxslim.capture(Pooled(), example(), dynamic=False))
    assert (attention.kind, attention.num_heads, attention.num_kv_heads) == ("mqa", 2, 1)


def test_single_heads_side_by_side_are_one_attention():
    """Nothing is left of a head that goes, neither its scores nor what only they needed."""
    _, _, program = captured("head-modules")
    site, _ = fxslim.find_attention(program)
    assert (site.kind, site.num_heads, site.num_kv_heads) == ("mha", 4, 4)
    assert [p.row_of.tolist() for p in site.value] == [
        [0, -1, -1, -1],
        [-1, 0, -1, -1],
        [-1, -1, 0, -1],
        [-1, -1, -1, 0],
    ]
    slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: [0, 2]}, 0.25))
    heads = "layers.0.attention.heads."
    left = {n.removeprefix(heads)[0] for n, _ in slim.named_parameters() if n.startswith(heads)}
    assert left == {"0", "2"}


def along_the_batch(q, k, v):
    """Heads cut from the width, side by side along the batch (Set Transformer)."""
    context = softmax_core(*(torch.cat(x.split(HEAD_DIM, -1)) for x in (q, k, v)))
    return torch.cat(context.split(q.shape[0]), -1)


def cut_after_a_view(q, k, v):
    """Nobody else's heads are of these sizes, and they come from a view and a flattening."""
    return along_the_batch(*(split(x).transpose(1, 2).flatten(2) for x in (q, k, v)))


def picked(q, k, v):
    """Heads that are picked one by one, and put side by side again."""
    context = softmax_core(split(q), split(k), split(v))
    return torch.cat([context[:, n] for n in range(HEADS)], -1)


def unbound(q, k, v):
    """Stacked, and unbound again."""
    context = softmax_core(*(torch.stack(x.chunk(HEADS, -1)) for x in (q, k, v)))
    return torch.cat(context.unbind(), -1)


def split_alone(q, k, v):
    """Every head of a dimension of one."""
    context = softmax_core(split(q), split(k), split(v))
    return torch.cat(context.split(1, 1), -1).squeeze(1)


def changed_alone(q, k, v):
    """What is done to a head alone may come between."""
    context = softmax_core(split(q), split(k), split(v))
    return torch.stack([head * (n + 1) for n, head in enumerate(context.unbind(1))], 2).flatten(2)


@pytest.mark.parametrize(
    "attend", [along_the_batch, cut_after_a_view, picked, unbound, split_alone, changed_alone]
)
@pytest.mark.parametrize("dynamic", [True, False])
def test_pieces_that_are_put_together_again_are_heads(attend, dynamic):
    class Pieces(Attention):
        def forward(self, x):
            return self.o(attend(self.q(x), self.k(x), self.v(x)))

    model = Pieces()
    program = fxslim.capture(model, example(1), dynamic=dynamic)
    (site,) = fxslim.find_attention(program)
    assert (site.kind, site.num_heads, site.prunable) == ("mha", HEADS, True)
    x = example(3, 7) if dynamic else example(1)
    for kept in [1, 2], [3], []:
        slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: kept}, 0.5))
        assert all(
            p.shape[0] == len(kept) * HEAD_DIM for n, p in slim.named_parameters() if n[0] in "qkv"
        )
        dense = without_heads(model, [site], {site.name: kept})
        torch.testing.assert_close(slim(x), dense(x))


def test_every_head_may_have_a_norm_of_its_own():
    """A list of them, as StableLM has it; they go with their heads."""

    class Normed(Attention):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList(nn.LayerNorm(HEAD_DIM) for _ in range(HEADS))

        def heads(self, x):
            q, k, v = super().heads(x)
            pieces = zip(self.norms, q.split(1, 1), strict=True)
            return torch.cat([norm(piece) for norm, piece in pieces], 1), k, v

    model = Normed()
    program = fxslim.capture(model, example())
    (site,) = fxslim.find_attention(program)
    assert (site.num_heads, site.prunable) == (HEADS, True)
    slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: [0, 3]}, 0.5))
    assert {n.split(".")[1] for n, _ in slim.named_parameters() if n[0] == "n"} == {"0", "3"}
    x = example(2, 7)
    torch.testing.assert_close(slim(x), without_heads(model, [site], {site.name: [0, 3]})(x))


@pytest.mark.parametrize("calls", [1, 2])
def test_layers_of_every_head_may_be_stacked(calls):
    """A head takes its layers along, however often they are called."""

    class Stacked(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (
                nn.ModuleList(nn.Linear(WIDTH, HEAD_DIM) for _ in range(HEADS)) for _ in range(3)
            )
            self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH)

        def forward(self, x):
            for _ in range(calls):
                q, k, v = (
                    torch.stack([layer(x) for layer in m], 1) for m in (self.q, self.k, self.v)
                )
                x = x + self.o(merge(softmax_core(q, k, v)))
            return x

    program = fxslim.capture(Stacked(), example())
    sites = fxslim.find_attention(program)
    assert [(site.prunable, site.num_heads) for site in sites] == [(True, HEADS)] * calls
    slim = fxslim.narrow(program, fxslim.PruningPlan({site.name: [1] for site in sites}, 0.5))
    assert {n.split(".")[1] for n, _ in slim.named_parameters() if n[0] in "qkv"} == {"1"}
    assert fxslim.compile(program, 0.5).meta["fxslim"].max_difference < 1e-6


def test_what_is_alike_in_all_that_is_stacked_is_no_unit():
    """Rotated pairs, of two positions that are a sum without an axis."""

    class Rotated(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.o = nn.Linear(WIDTH, 3 * 8), nn.Linear(8, WIDTH)

        def forward(self, x):
            table = torch.cat([torch.ones(1, 1, 1), torch.zeros(1, 1, 1)], 1)
            q, k, v = self.qkv(x).chunk(3, -1)
            a, b = (k * table).unflatten(-1, (-1, 2)).unbind(-1)
            k = torch.stack([-b, a], -1).flatten(2) + k * table
            return self.o(merge(softmax_core(*(split(y) for y in (q, k, v)))))

    x = torch.randn(3, 2, WIDTH)
    (site,) = fxslim.find_attention(fxslim.capture(Rotated(), x, dynamic=False))
    assert site.num_heads == 4
    assert site.prunable


@pytest.mark.parametrize("step", [1, 2])
def test_a_mask_as_long_as_the_data_says_is_paired_with_the_scores(step):
    """Padding up to the longest length: only the input makes it as long as the keys."""

    class Padded(Attention):
        def forward(self, x, lengths):
            longest = torch.ops.aten.item(lengths.max())
            padding = torch.ones(longest, longest, dtype=torch.bool).triu(1)[lengths - 1]
            x, padding = x[:, ::step], padding[:, ::step]
            q, k, v = self.heads(x)
            scores = (q @ k.transpose(-1, -2)).masked_fill(padding[:, None, None], -1e9)
            return self.o(merge(scores.softmax(-1) @ v))

    inputs = (torch.randn(2, 40, WIDTH), torch.tensor([40, 33]))
    program = fxslim.capture(Padded(), inputs)
    (site,) = fxslim.find_attention(program)
    assert (site.prunable, site.num_heads) == (True, HEADS)
    assert fxslim.compile(program, 0.5).meta["fxslim"].max_difference < 1e-6


def test_a_single_head_is_refused():
    class One(nn.Module):
        """Its context lies beside something else."""

        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(WIDTH, 4) for _ in range(3))
            self.o = nn.Linear(4 + WIDTH, WIDTH)

        def forward(self, x):
            return self.o(torch.cat([softmax_core(self.q(x), self.k(x), self.v(x)), x], -1))

    (site,) = fxslim.find_attention(fxslim.capture(One(), example()))
    assert not site.prunable
    assert site.reason == "there is one head only, so there is no head axis to cut"


def over_its_sum(scores, v):
    """A softmax that keeps away from zero."""
    weights = scores.exp()
    return weights / (weights.sum(-1, keepdim=True) + 1e-6) @ v


def with_none_of_the_keys(scores, v):
    """A softmax with a zero among the scores ("off by one")."""
    largest = scores.amax(-1, keepdim=True)
    weights = (scores - largest).exp()
    total = weights.sum(-1, keepdim=True) + (-largest).exp()
    return weights / total.expand_as(weights) @ v


def masked(scores, v):
    """The masked weights have a sum of their own."""
    weights = scores.exp() * torch.ones(scores.shape[-2:]).tril()
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) @ v


def divided_afterwards(scores, v):
    """The context is divided in place of the weights."""
    weights = scores.exp()
    return weights @ v / weights.sum(-1, keepdim=True)


@pytest.mark.parametrize(
    "attend", [over_its_sum, with_none_of_the_keys, masked, divided_afterwards]
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_weights_may_be_divided_by_their_own_sum(attend, dynamic):
    model = Residual(a=Attention(core=lambda q, k, v: attend(q @ k.mT, v)))
    program = fxslim.capture(model, example(), dynamic=dynamic)
    (found,) = fxslim.find_attention(program)
    assert (found.prunable, found.num_heads, found.head_dim) == (True, HEADS, HEAD_DIM)
    assert fxslim.compile(program, 0.5).meta["fxslim"].max_difference < 1e-6


def test_probabilities_that_are_divided_by_their_sum_are_no_second_attention():
    """Masked after the softmax, they are normalised again (AllenNLP's masked softmax)."""

    def core(q, k, v):
        p = (q @ k.mT).softmax(-1) * torch.ones(q.shape[-2], k.shape[-2]).tril()
        return p / (p.sum(-1, keepdim=True) + 1e-13) @ v

    (found,) = sites_of(Residual(a=Attention(core=core)))
    assert (found.prunable, found.cores) == (True, ("softmax",))


def test_a_kernel_that_is_divided_by_what_queries_make_of_all_keys_is_no_attention():
    """Linear attention: the weights are never there, neither is their sum."""

    class Linear(Attention):
        def context(self, x):
            q, k, v = (y.exp() for y in self.heads(x))
            return merge(q @ (k.mT @ v) / (q @ k.sum(2, keepdim=True).mT))

    assert sites_of(Linear()) == []


def test_each_head_may_be_routed_to_output_projections_of_its_own():
    """SwitchHead's: one sum over heads, of context, weight and router."""

    class Experts(Attention):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(HEADS, 3, HEAD_DIM, WIDTH))
            self.router = nn.Linear(WIDTH, 3 * HEADS)

        def forward(self, x):
            context = self.core(*self.heads(x))
            gates = self.router(x).sigmoid().unflatten(-1, (HEADS, 3))
            return torch.einsum("bhtd,hedw,bthe->btw", context, self.experts, gates)

    program = fxslim.capture(Experts(), example())
    (found,) = fxslim.find_attention(program)
    assert [projection.weight for projection in found.output] == ["experts"]
    slim = fxslim.compile(program, 0.5)
    assert slim.meta["fxslim"].max_difference < 1e-6
    assert slim.get_parameter("router.weight").shape == (3 * HEADS // 2, WIDTH)


def test_scores_may_be_distances():
    class Distances(Attention):
        def context(self, x):
            q, k, v = self.heads(x)
            return merge((-torch.cdist(q, k).square()).softmax(-1) @ v)

    program = fxslim.capture(Distances(), example())
    (found,) = fxslim.find_attention(program)
    assert (found.prunable, found.num_heads, found.head_dim) == (True, HEADS, HEAD_DIM)
    assert fxslim.compile(program, 0.5).meta["fxslim"].max_difference < 1e-6


@pytest.mark.parametrize("dynamic", [False, True])
def test_channels_that_are_attended_to_are_no_heads(dynamic):
    """Cross-covariance attention: the scores are of channels with channels, summed over length."""

    class Covariance(Attention):
        def context(self, x):
            q, k, v = (y.mT for y in self.heads(x))
            return merge(((q @ k.mT).softmax(-1) @ v).mT)

    (site,) = sites_of(Covariance(), dynamic=dynamic)
    assert (site.kind, site.num_heads, site.head_dim) == ("mha", HEADS, HEAD_DIM)
