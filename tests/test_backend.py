"""`torch.compile` with fxslim as the backend: what comes out is the model without the heads."""

import copy
import gc
import re
import tomllib
import weakref
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import nn

import fxslim
from fxslim.backend import dynamo_backend
from fxslim.masks import set_masks
from tests.models import Attention, Residual, example, grouped_core, merge, softmax_core
from tests.zoo import build
from tests.zoo.reference import without_heads

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning"),  # Inductor's own imports
]


@pytest.fixture(autouse=True)
def _fresh():
    """Dynamo forgets what it compiled, and finds the backend as after an install."""
    torch.compiler.reset()
    if "fxslim" not in torch._dynamo.list_backends():
        torch._dynamo.register_backend(dynamo_backend, name="fxslim")


class Counting:
    """An inner backend that runs graphs as they are, and keeps them."""

    def __init__(self):
        self.graphs = []

    def __call__(self, graph_module, example_inputs):
        self.graphs.append(graph_module)
        return graph_module.forward

    def weights(self):
        """The shapes of the parameters that the last graph takes."""
        places = self.graphs[-1].graph.find_nodes(op="placeholder")
        values = [node.meta["example_value"] for node in places]
        return [tuple(value.shape) for value in values if isinstance(value, nn.Parameter)]


def two_layers(**options):
    return Residual(a=Attention(**options), b=Attention(core=softmax_core)).eval()


def narrowed(model, plan, x=None):
    return fxslim.narrow(fxslim.capture(model, example() if x is None else x), plan)


def masked_by(model, kept, x=None):
    """The dense model with its heads masked: what everything is compared with."""
    masked = fxslim.insert_head_masks(fxslim.capture(model, example() if x is None else x))
    set_masks(masked, kept)
    return masked


PLAN = fxslim.PruningPlan({"layers.a": [1, 3], "layers.b": [0, 1, 2]}, 3 / 8)


# ------------------------------------------------------------------------------- what it computes


def test_the_entry_point_is_the_backend():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    group = "torch_dynamo_backends"
    value = project["entry-points"][group]["fxslim"]
    assert EntryPoint("fxslim", value, group).load() is dynamo_backend


@torch.no_grad()
def test_by_name_with_options():
    model, inner = two_layers(), Counting()
    slim = torch.compile(model, backend="fxslim", options={"sparsity": 0.5, "inner": inner})
    planned = fxslim.compile(model, 0.5, example())
    for x in (example(), example(2, 7)):
        torch.testing.assert_close(slim(x), planned(x))
        assert not torch.allclose(slim(x), model(x))
    narrow = {tuple(p.shape) for name, p in planned.named_parameters() if "q.weight" in name}
    assert narrow <= set(inner.weights())


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_plan_is_followed_exactly(inner):
    model = two_layers()
    slim = torch.compile(model, backend=fxslim.backend(plan=PLAN, inner=inner), fullgraph=True)
    narrow, masked = narrowed(model, PLAN), masked_by(model, PLAN.kept)
    for x in (example(), example(2, 7)):
        torch.testing.assert_close(slim(x), narrow(x))
        torch.testing.assert_close(slim(x), masked(x))


@torch.no_grad()
@pytest.mark.parametrize("unit", ["query", "any"])
def test_single_query_heads(unit):
    model = Residual(a=Attention(kv_heads=2, core=grouped_core)).eval()
    kept = {"query": [0, 3], "any": [0, 2, 3]}[unit]
    plan = fxslim.PruningPlan({"layers.a": kept}, 0.5)
    slim = torch.compile(model, backend=fxslim.backend(plan=plan, inner="eager"))
    x = example()
    torch.testing.assert_close(slim(x), narrowed(model, plan)(x))


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "attn"),
    [
        ("bert", "sdpa"),
        ("llama", "eager"),
        *(pytest.param(name, "sdpa", marks=pytest.mark.zoo) for name in ("llama", "gpt2", "vit")),
    ],
)
def test_transformers(name, attn):
    model, inputs = build(name, attn)
    program = fxslim.capture(model, inputs)
    sites = fxslim.find_attention(program)
    plan = fxslim.PruningPlan.of({site.name: site.unit[0] for site in sites}, sites)
    backend = fxslim.backend(plan=plan, inner="eager")
    slim = torch.compile(model, backend=backend, fullgraph=True)
    expected = fxslim.narrow(program, plan)(**inputs)
    call = dict(inputs) if name == "vit" else {**inputs, "use_cache": False}
    torch.testing.assert_close(slim(**call)[0], expected[0])
    assert backend.decide.followed == plan.kept.keys()


@torch.no_grad()
def test_a_graph_without_attention_is_compiled_as_it_is():
    model, inner = nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1)), Counting()
    slim = torch.compile(model, backend=fxslim.backend(inner=inner))
    x = example()
    torch.testing.assert_close(slim(x), model(x))
    assert len(inner.graphs) == 1


# ------------------------------------------------------------------------- shapes and recompilation


@torch.no_grad()
@pytest.mark.parametrize("how", ["automatic", "dynamic", "marked"])
def test_other_shapes_compile_once_more_at_most(how):
    model, inner = two_layers(), Counting()
    backend = fxslim.backend(sparsity=0.5, inner=inner)
    slim = torch.compile(model, backend=backend, dynamic=True if how == "dynamic" else None)
    first = example()
    if how == "marked":
        for dim in (0, 1):
            torch._dynamo.mark_dynamic(first, dim)
    slim(first)
    kept = {
        f"layers.{name}": next(iter(backend.decide.remembered[layer.o.weight].values()))
        for name, layer in model.layers.items()
    }
    expected = masked_by(model, kept)
    for x in (first, example(2, 7), example(4, 9)):
        torch.testing.assert_close(slim(x), expected(x))
    assert len(inner.graphs) == (2 if how == "automatic" else 1)


@torch.no_grad()
def test_what_was_decided_stays():
    model, x = two_layers(), example()
    backend = fxslim.backend(sparsity=0.5, inner="eager")
    slim = torch.compile(model, backend=backend)
    slim(x)
    weights = [model.layers.a.o.weight, model.layers.b.o.weight]
    (a,), (b,) = (backend.decide.remembered[weight].values() for weight in weights)
    for layer in model.layers.values():
        for linear in (layer.q, layer.k, layer.v, layer.o):
            nn.init.xavier_normal_(linear.weight)
    expected = masked_by(model, {"layers.a": a, "layers.b": b})
    for again in (example(2, 7), example(4, 9)):
        torch.testing.assert_close(slim(again), expected(again))
    model.train()
    torch.testing.assert_close(slim(x), expected(x))


# ---------------------------------------------------------------------------------- graph breaks


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    def forward(self, x):
        return x + self.attention(x)


class Broken(nn.Module):
    """A graph break before each layer: Dynamo compiles one graph and runs it for all of them."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = layer(x)
        return x


def whole(model):
    """The same layers without graph breaks."""
    same = nn.Sequential()
    same.layers = model.layers
    same.forward = lambda x: nn.Sequential(*model.layers)(x)
    return same


@torch.no_grad()
@pytest.mark.parametrize("inner", ["eager", pytest.param("inductor", marks=pytest.mark.zoo)])
def test_layers_that_share_a_graph_keep_heads_of_their_own(inner):
    model, x = Broken(9 if inner == "eager" else 2).eval(), example()
    backend = fxslim.backend(sparsity=0.5, inner=inner)
    slim = torch.compile(model, backend=backend)
    slim(x)
    weights = [layer.attention.o.weight for layer in model.layers]
    kept = {
        f"layers.{n}.attention": next(iter(backend.decide.remembered[weight].values()))
        for n, weight in enumerate(weights)
    }
    assert len(set(map(tuple, kept.values()))) > 1
    expected = masked_by(whole(model), kept)
    for again in (x, example(2, 7)):
        torch.testing.assert_close(slim(again), expected(again))


@torch.no_grad()
def test_a_plan_of_the_whole_model_reaches_the_pieces():
    model = Broken(3).eval()
    kept = {"layers.0.attention": [0], "layers.1.attention": [1, 2], "layers.2.attention": [1, 2]}
    plan = fxslim.PruningPlan(kept, 7 / 12)
    backend = fxslim.backend(plan=plan, inner="eager")
    slim, expected = torch.compile(model, backend=backend), masked_by(whole(model), kept)
    for x in (example(), example(2, 7)):
        torch.testing.assert_close(slim(x), expected(x))
    assert backend.decide.followed == kept.keys()


def unequal(layers=3):
    """The heads of one layer are the least of all: by itself, each layer would lose as many."""
    model = Broken(layers).eval()
    for parameter in model.layers[1].attention.parameters():
        parameter.mul_(1e-3)
    return model


def compiled(model, how, **options):
    """The model behind the backend, by each of the ways that there are."""
    options |= {"sparsity": 0.25, "criterion": "magnitude"}
    if how == "by name":
        return torch.compile(model, backend="fxslim", options=options | {"inner": "eager"})
    given = model if how == "function of a model" else None
    backend = fxslim.backend(inner="eager", model=given, **options)
    if how == "method":
        model.compile(backend=backend)
        return model
    if how == "forward":
        model.forward = torch.compile(model.forward, backend=backend)
        return model
    return torch.compile(lambda x: model(x), backend=backend)


@torch.no_grad()
@pytest.mark.parametrize("how", ["by name", "function of a model", "method", "forward"])
def test_the_whole_model_is_planned_for_though_its_graph_breaks(how):
    model, x = unequal(), example()
    planned = fxslim.compile(whole(model), 0.25, x, criterion="magnitude")
    assert [len(kept) for kept in planned.meta["fxslim"].plan.kept.values()] == [4, 1, 4]
    slim = compiled(model, how)
    for inputs in (x, example(2, 7), example(4, 9)):
        torch.testing.assert_close(slim(inputs), planned(inputs))


@torch.no_grad()
def test_the_graphs_of_a_function_are_planned_for_one_by_one():
    model, x = unequal(), example()
    by_layer = fxslim.compile(whole(model), 0.25, x, criterion="magnitude", scope="local")
    torch.testing.assert_close(compiled(model, "function")(x), by_layer(x))


@torch.no_grad()
@pytest.mark.zoo
def test_generate_decodes_with_what_is_left():
    """Prompt and steps are different graphs, and cached keys are inputs and outputs of them."""
    model, inputs = build("llama", "sdpa")
    backend = fxslim.backend(sparsity=0.5, inner="eager")
    dense = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend=backend)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(inputs["input_ids"], **greedy)
    sites = fxslim.find_attention(fxslim.capture(dense, inputs))
    remembered = backend.decide.remembered
    outputs = {site.name: model.get_parameter(site.output[0].weight) for site in sites}
    kept = {name: next(iter(remembered[weight].values())) for name, weight in outputs.items()}
    expected = without_heads(dense, sites, kept).generate(inputs["input_ids"], **greedy)
    assert torch.equal(tokens, expected)


@torch.no_grad()
def test_what_was_decided_for_a_model_is_not_decided_again():
    model = unequal()
    decide = fxslim.backend(model=model, sparsity=0.25, inner="eager").decide
    before = copy.deepcopy(list(decide.remembered.values()))
    for parameter in model.layers[0].parameters():
        parameter.data.zero_()
    assert len(decide.decide_for(fxslim.capture(model, example()))) == 3
    assert list(decide.remembered.values()) == before


class Guarded(nn.Module):
    """Layers that are called if the values of the input say so."""

    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return x if x.sum() > 1e6 else self.inner(x)


@torch.no_grad()
def test_a_model_that_is_captured_in_parts_is_planned_for_as_a_whole():
    model, x = Guarded(unequal()), example()
    slim = compiled(model, "by name")
    with pytest.warns(UserWarning, match="Guarded does not export as a whole; captured in parts"):
        slim(x)
    planned = fxslim.compile(whole(model.inner), 0.25, x, criterion="magnitude")
    torch.testing.assert_close(slim(x), planned(x))


class Unexported(Attention):
    """What it does depends on where its input lies."""

    def forward(self, x):
        return super().forward(x) if x.data_ptr() % 4 == 0 else x


@torch.no_grad()
def test_a_model_that_cannot_be_captured_is_planned_for_graph_by_graph():
    model, x = Residual(a=Unexported(), b=Unexported()).eval(), example()
    slim = torch.compile(model, backend=fxslim.backend(sparsity=0.5, inner="eager"))
    with pytest.warns(UserWarning, match="could not be captured: (?s:.*)torch.export"):
        slim(x)
    plain = Residual(a=Attention(), b=Attention()).eval()
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(slim(x), fxslim.compile(plain, 0.5, x, scope="local")(x))


@torch.no_grad()
def test_a_piece_whose_names_a_plan_does_not_have_is_an_error():
    plan = fxslim.PruningPlan({"layers.0.attention": [0], "layers.1.attention": [0]}, 0.75)
    model, backend = Broken(2), fxslim.backend(plan=plan, inner="eager")
    slim = torch.compile(lambda x: model(x), backend=backend)
    said = "the plan does not say what 'attention' keeps; it names: layers.0.attention, "
    with pytest.raises(Exception, match=re.escape(said)):
        slim(example())


class Cut(Attention):
    """A graph break inside the attention."""

    def __init__(self, at, core):
        super().__init__(core=core)
        self.at = at

    def forward(self, x):
        q, k, v = self.heads(x)
        if self.at == "before":
            torch._dynamo.graph_break()
        if self.core is softmax_core:
            scores = q @ k.mT
            if self.at == "scores":
                torch._dynamo.graph_break()
            probabilities = scores.softmax(-1)
            if self.at == "probabilities":
                torch._dynamo.graph_break()
            context = probabilities @ v
        else:
            context = self.core(q, k, v)
        if self.at == "after":
            torch._dynamo.graph_break()
        return self.o(merge(context))


CUTS = [(at, softmax_core) for at in ("before", "scores", "probabilities")]
CUTS += [(at, nn.functional.scaled_dot_product_attention) for at in ("before", "after")]


@torch.no_grad()
@pytest.mark.parametrize(("at", "core"), CUTS)
def test_an_attention_that_is_cut_in_two_stays_whole_and_says_so(at, core):
    model, x = Residual(a=Cut(at, core)).eval(), example()
    slim = torch.compile(model, backend=fxslim.backend(sparsity=0.5, inner="eager"))
    with pytest.warns(UserWarning, match=r"^fxslim.backend: (?s:.*)[aA] graph break "):
        torch.testing.assert_close(slim(x), model(x))


@torch.no_grad()
@pytest.mark.parametrize(("at", "core"), [CUTS[0], CUTS[1], CUTS[-1]])
@pytest.mark.filterwarnings("ignore:fxslim.backend")
def test_a_plan_for_an_attention_that_is_cut_in_two_is_an_error(at, core):
    model = Residual(a=Cut(at, core)).eval()
    plan = fxslim.PruningPlan({"layers.a": [0, 1]}, 0.5)
    slim = torch.compile(model, backend=fxslim.backend(plan=plan, model=model, inner="eager"))
    with pytest.raises(Exception, match=r"'layers.a'.*, which the plan names|cannot be pruned"):
        slim(example())


# ------------------------------------------------------------------------- weights that are written


@torch.no_grad()
def test_weights_are_narrowed_once():
    model, x = two_layers(), example()
    slim = torch.compile(model, backend=fxslim.backend(plan=PLAN, inner=(inner := Counting())))
    slim(x)
    assert inner.weights().count((4, 6)) == 3
    selections = [n for n in inner.graphs[-1].graph.nodes if "index_select" in str(n.target)]
    assert not selections


@pytest.mark.parametrize("how", ["step", "load", "assign", "data", "replaced"])
def test_weights_that_change_are_never_stale(how):
    model, x = two_layers(), example()
    slim = torch.compile(model, backend=fxslim.backend(plan=PLAN, inner="eager"))
    other = copy.deepcopy(model)
    with torch.no_grad():
        slim(x)
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter))
    if how == "step":
        optimizer = torch.optim.Adam(model.parameters(), 0.1)
        slim(x).square().sum().backward()
        optimizer.step()
    elif how in ("load", "assign"):
        model.load_state_dict(other.state_dict(), assign=how == "assign")
    elif how == "data":
        for _ in range(3):  # the last may lie where the first was
            for name, parameter in model.named_parameters():
                parameter.data = other.get_parameter(name).data.clone()
    else:
        model.layers.a.k.weight = other.layers.a.k.weight
    with torch.no_grad():
        torch.testing.assert_close(slim(x), narrowed(model, PLAN)(x))


def test_inference_tensors_have_no_version_and_are_narrowed_in_the_graph():
    with torch.inference_mode():
        model, x = two_layers(), example()
        slim = torch.compile(model, backend=fxslim.backend(plan=PLAN, inner="eager"))
        slim(x)
        model.layers.a.q.weight.add_(1)
        torch.testing.assert_close(slim(x), narrowed(model, PLAN, x)(x))


@torch.no_grad()
def test_weights_of_a_model_that_is_gone_are_freed():
    model, x = Broken(1).eval(), example()
    slim = torch.compile(model, backend=fxslim.backend(sparsity=0.5, inner="eager"))
    slim(x)
    weight = weakref.ref(model.layers[0].attention.q.weight)
    del model, slim
    gc.collect()
    assert weight() is None


# --------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_gradients_reach_the_dense_parameters(inner):
    model, x = two_layers().train(), example()
    masked = masked_by(model, PLAN.kept)
    slim = torch.compile(model, backend=fxslim.backend(plan=PLAN, inner=inner), fullgraph=True)
    names = [name for name, _ in model.named_parameters()]
    out = slim(x)
    torch.testing.assert_close(out, masked(x))
    got = torch.autograd.grad(out.square().sum(), [model.get_parameter(n) for n in names])
    expected = torch.autograd.grad(
        masked(x).square().sum(), [masked.get_parameter(n) for n in names]
    )
    for name, one, other in zip(names, got, expected, strict=True):
        torch.testing.assert_close(one, other, msg=name)
    gradient = dict(zip(names, got, strict=True))["layers.a.q.weight"].reshape(4, 2, 6)
    assert not gradient[[0, 2]].any()
    assert gradient[[1, 3]].all()


class Stops(nn.Module):
    """Gradients that stop, random operators, and buffers that are written to."""

    def __init__(self):
        super().__init__()
        self.attention, self.dropout = Attention(), nn.Dropout(0.5)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count.add_(1)
        with torch.no_grad():
            still = x.mean()
        y = self.attention(x)
        return self.dropout(y) * still + y.detach() * x + self.count


def test_gradients_stop_where_the_model_says_so():
    model, x = Stops().train(), example().requires_grad_()
    dense = copy.deepcopy(model)
    with torch.no_grad():
        dense.attention.o.weight[:, :2] = 0  # head 0 is not read
    plan = fxslim.PruningPlan({"attention": [1, 2, 3]}, 0.25)
    slim = torch.compile(model, backend=fxslim.backend(plan=plan, inner="eager"))
    results = []
    for run, own in ((dense, dense), (slim, model)):
        torch.manual_seed(1)
        out = run(x)
        names = ["q.weight", "k.bias", "v.weight", "o.bias"]
        inputs = [x, *(own.attention.get_parameter(name) for name in names)]
        results.append((out, *torch.autograd.grad(out.sum(), inputs)))
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)
    assert model.count == dense.count == 1


def test_training_goes_on():
    model, x = two_layers().train(), example()
    slim = torch.compile(model, backend=fxslim.backend(sparsity=0.5, inner="aot_eager"))
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    losses = []
    for _ in range(5):
        loss = (slim(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)


# ------------------------------------------------------------------------------- the inner backend


@torch.no_grad()
@pytest.mark.parametrize("how", ["option", pytest.param("torch.compile", marks=pytest.mark.zoo)])
def test_reduce_overhead(how):
    model, x = two_layers(), example()
    if how == "option":
        slim = torch.compile(model, backend=fxslim.backend(plan=PLAN, mode="reduce-overhead"))
    else:
        slim = torch.compile(model, backend=fxslim.backend(plan=PLAN), mode="reduce-overhead")
    expected = narrowed(model, PLAN)
    for _ in range(3):
        torch.testing.assert_close(slim(x), expected(x))


@torch.no_grad()
def test_inner_options_reach_the_inner_backend():
    seen = []

    def inner(graph_module, example_inputs, options):
        seen.append(options)
        return graph_module.forward

    backend = fxslim.backend(sparsity=0.5, inner=inner, inner_options={"depth": 3})
    torch.compile(two_layers(), backend=backend)(example())
    assert seen == [{"depth": 3}]


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be in [0, 1), not 1.0"),
        ({"criterion": "taylor"}, ValueError, "this criterion needs calibration batches"),
        ({"unit": "layer"}, ValueError, "unit must be one of group, query, any, not 'layer'"),
        ({"sparsity": 0.5, "plan": PLAN}, ValueError, "give a sparsity or a plan, not both"),
        ({"plan": {"a": [0]}}, TypeError, "plan must be fxslim.PruningPlan, not dict"),
        ({"model": nn.Linear(1, 1)}, fxslim.UnsupportedSite, "Linear has no attention: "),
        (
            {"mode": "default", "inner_options": {}},
            ValueError,
            "give the inner backend a mode or inner_options, not both",
        ),
    ],
)
def test_bad_options_are_refused(options, error, said):
    with pytest.raises(error, match=f"^{re.escape(said)}"):
        fxslim.backend(**options)


def test_an_unknown_option_is_refused_with_those_that_are_known():
    slim = torch.compile(two_layers(), backend="fxslim", options={"sparsty": 0.5})
    said = "unknown option 'sparsty'; known: sparsity, plan, model, inner, inner_options, mode, "
    with pytest.raises(Exception, match=re.escape(said)):
        slim(example())


def test_a_plan_that_names_no_site_of_the_model_is_an_error():
    plan = fxslim.PruningPlan({"layers.a": [0], "layer.b": [0]}, 0.75)
    slim = torch.compile(two_layers(), backend=fxslim.backend(plan=plan, inner="eager"))
    with pytest.raises(Exception, match=r"the plan does not say what 'layers.b' keeps"):
        slim(example())


class Talking(Attention):
    """Heads that are mixed, so that none can go."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        q, k, v = self.heads(x)
        probabilities = self.mix((q @ k.mT).softmax(-1).movedim(1, -1)).movedim(-1, 1)
        return self.o(merge(probabilities @ v))


@torch.no_grad()
def test_where_nothing_can_be_pruned_the_reasons_are_a_warning():
    model, x = Residual(a=Talking()), example()
    slim = torch.compile(model, backend=fxslim.backend(inner="eager"))
    with pytest.warns(UserWarning, match=r"none of it can be pruned:\n  layers.a: its heads are"):
        torch.testing.assert_close(slim(x), model(x))


def test_a_plan_that_removes_heads_of_a_refused_site_is_an_error():
    plan = fxslim.PruningPlan({"layers.a": [0]}, 0.75)
    slim = torch.compile(Residual(a=Talking()), backend=fxslim.backend(plan=plan, inner="eager"))
    with (
        pytest.warns(UserWarning, match="none of it can be pruned"),
        pytest.raises(Exception, match=r"'layers.a' cannot be pruned: its heads are mixed"),
    ):
        slim(example())
