"""One call, end to end: the slim program is the dense model without the heads that went."""

import copy
import inspect
import io
import re

import pytest
import torch
from torch import nn

import fxslim
from fxslim.masks import mask_name
from tests.models import HEADS, Attention, Residual, captured, example, merge, softmax_core, split
from tests.zoo import build
from tests.zoo.entries import load
from tests.zoo.handwritten import HANDWRITTEN
from tests.zoo.reference import call_of, compare, without_heads
from tests.zoo.resizing import resized


def assert_is_without_heads(slim, model, call, program=None):
    """Slim equals the dense model whose output projections do not read the removed heads.

    With `program` (captured, dynamic) it does so with other batches and lengths, too.
    """
    report = slim.meta["fxslim"]
    reference = without_heads(model, report.sites, report.plan.kept)
    assert compare(call.on(reference), call.on(model)).relative > 1e-4
    calls = {"example": call, **(resized(program, call) if program is not None else {})}
    for label, other in calls.items():
        difference = compare(other.on(slim), other.on(reference))
        assert difference.relative < 1e-5, label
    return list(calls)


# --------------------------------------------------------------------------------- architectures

ARCHITECTURES = {
    "bert": 2,
    "distilbert": 2,
    "vit": 2,
    "opt": 2,
    "gpt2": 2,
    "gpt_neox": 2,
    "falcon": 2,
    "falcon:new_decoder": 2,
    "falcon:alibi": 2,
    "phi3": 2,
    "llama": 2,
    "mistral": 2,
    "qwen2": 2,
    "qwen3": 2,
    "gemma": 2,
    "t5": 6,
    "bart": 6,
    "whisper:conditional": 6,
    "clip": 4,
    "albert": 2,
    "swin": 3,
}
EAGER_ONLY = {"imagegpt": 2, "bloom": 2}
SOME = ("bert", "falcon", "gpt2", "phi3", "swin", "t5")

CASES = [
    *((name, "sdpa", True) for name in ARCHITECTURES),
    *((name, "eager", True) for name in EAGER_ONLY),
    *((name, attn, False) for name in SOME for attn in ("sdpa", "eager")),
]
OTHERS = [
    (name, attn, dynamic)
    for name in (*ARCHITECTURES, *EAGER_ONLY)
    for attn in ("sdpa", "eager")
    for dynamic in (True, False)
    if (name, attn, dynamic) not in CASES and (attn == "eager" or name in ARCHITECTURES)
]


def _check_architecture(name, attn, dynamic):
    model, inputs = build(name, attn)
    program = fxslim.capture(model, inputs, dynamic=dynamic)
    slim = fxslim.compile(program, 0.5)
    sites = slim.meta["fxslim"].sites
    assert len(sites) == (ARCHITECTURES | EAGER_ONLY)[name]
    assert all(site.prunable for site in sites)
    done = assert_is_without_heads(slim, model, call_of(inputs), program if dynamic else None)
    assert dynamic == ("batch" in done)


@pytest.mark.filterwarnings("ignore:fxslim.capture. static sizes:UserWarning")
@pytest.mark.parametrize(("name", "attn", "dynamic"), CASES)
def test_architecture(name, attn, dynamic):
    _check_architecture(name, attn, dynamic)


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore:fxslim.capture. static sizes:UserWarning")
@pytest.mark.parametrize(("name", "attn", "dynamic"), OTHERS)
def test_architecture_otherwise(name, attn, dynamic):
    _check_architecture(name, attn, dynamic)


def test_olmo2_is_refused_with_its_reason():
    model, inputs = build("olmo2", "sdpa")
    said = (
        "Olmo2ForCausalLM has attention, but none of it can be pruned:\n"
        "  model.layers.0.self_attn: mean (mean_1 in model.layers.0.self_attn.k_norm) reads the "
        "head axis as a whole\n"
    )
    with pytest.raises(fxslim.UnsupportedSite, match=f"^{re.escape(said)}"):
        fxslim.compile(model, 0.5, inputs)


class GroupedConvolutions(nn.Module):
    """Projections with a group for each head, which tie the heads to the input's channels."""

    def __init__(self, heads=4):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Conv1d(8, 16, 1, groups=heads) for _ in range(3))
        self.o = nn.Conv1d(16, 8, 1)
        self.heads = heads

    def forward(self, x):
        y = self.norm(x).mT
        q, k, v = (conv(y).unflatten(1, (self.heads, -1)).mT for conv in (self.q, self.k, self.v))
        return x + self.o(softmax_core(q, k, v).mT.flatten(1, 2)).mT


def test_a_grouped_convolution_reads_only_the_channels_of_heads_that_stay():
    model, x = GroupedConvolutions(), torch.randn(3, 5, 8)
    program = fxslim.capture(model, x)
    slim = fxslim.compile(program, plan=fxslim.PruningPlan({"attention": [1, 2]}, 0.5))
    assert_is_without_heads(slim, model, call_of((x,)), program)
    shapes = {name: tuple(p.shape) for name, p in slim.named_parameters()}
    assert shapes["q.weight"] == shapes["v.weight"] == (8, 2, 1)
    assert (shapes["o.weight"], shapes["norm.weight"]) == ((8, 8, 1), (8,))


class GatedByChunks(Attention):
    """Each head's scores are gated by a chunk of the normalised residual stream (WavLM)."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.o, self.gate = nn.Linear(8, 8), nn.Linear(2, 1)

    def forward(self, x):
        y = self.norm(x)
        q, k, v = (split(linear(y)) for linear in (self.q, self.k, self.v))
        scores = (q @ k.mT) * self.gate(split(y)).sigmoid()
        return x + self.o(merge(scores.softmax(-1) @ v))


def test_a_gate_from_chunks_of_the_input_does_not_tie_the_heads_to_its_channels():
    model, x = GatedByChunks(), torch.randn(3, 5, 8)
    program = fxslim.capture(model, x)
    slim = fxslim.compile(program, plan=fxslim.PruningPlan({"attention": [0, 3]}, 0.5))
    assert_is_without_heads(slim, model, call_of((x,)), program)


def test_a_slice_to_the_end_of_heads_merged_with_lengths_is_whole():
    class Merged(Attention):
        def forward(self, x):
            q, k, v = (split(linear(x)).flatten(0, 1)[:] for linear in (self.q, self.k, self.v))
            context = softmax_core(q, k, v).unflatten(0, (-1, HEADS))
            return self.o(merge(context))

    model, x = Merged(), example()
    program = fxslim.capture(model, x)
    assert_is_without_heads(fxslim.compile(program, 0.5), model, call_of((x,)), program)


# ----------------------------------------------------------------------------- single query heads

GROUPED = [
    *(f"handwritten/{n}" for n in ("gqa-broadcast", "gqa-expand", "gqa-native", "gqa-tiled")),
    "handwritten/gqa-repeat-interleave",
    "llama",
    "falcon:new_decoder",
    "phi3",
]


@pytest.mark.parametrize("name", GROUPED)
def test_every_kv_group_may_keep_other_query_heads(name):
    model, inputs = load(name, None if "/" in name else "sdpa")
    program = fxslim.capture(model, inputs)
    sites = fxslim.find_attention(program)
    assert all(site.uneven for site in sites)
    first, second = sites[0].unit[:2]
    plan = fxslim.PruningPlan({sites[0].name: sorted([first[0], second[1]])}, 0.25)
    slim = fxslim.compile(program, plan=plan)
    assert_is_without_heads(slim, model, call_of(inputs), program)
    again = fxslim.compile(slim, 0.5)
    assert again.meta["fxslim"].sites[0].kind == "mha"


def test_unit_query_keeps_every_kv_head():
    model, inputs = build("llama", "sdpa")
    slim = fxslim.compile(model, 0.5, inputs, unit="query")
    for site, kept in slim.meta["fxslim"].plan.kept.items():
        assert [len(set(kept) & set(unit)) for unit in ((0, 1), (2, 3))] == [1, 1], site
    keys = [p.shape for name, p in slim.named_parameters() if "k_proj" in name]
    assert keys == [p.shape for name, p in model.named_parameters() if "k_proj" in name]


REPEATED = ["gqa-expand", "gqa-tiled", "gqa-repeat-interleave", "gqa-native"]


@pytest.mark.parametrize("kept", [[0], [3], [0, 2, 3]])
@pytest.mark.parametrize("name", REPEATED)
def test_any_query_heads_may_go_where_keys_and_values_are_repeated(name, kept):
    model, inputs, program = captured(name)
    (first, *_) = fxslim.find_attention(program, unit="any")
    assert (first.kind, first.num_kv_heads, first.unit) == ("gqa", 2, ((0,), (1,), (2,), (3,)))
    slim = fxslim.compile(program, plan=fxslim.PruningPlan({first.name: kept}, 0.5))
    assert_is_without_heads(slim, model, call_of(inputs), program)
    assert fxslim.find_attention(slim)[0].num_heads == len(kept)


def test_unit_any_follows_the_scores_alone():
    model, inputs, _ = captured("gqa-expand")
    slim = fxslim.compile(model, 0.5, inputs, unit="any", criterion="magnitude", scope="local")
    report = fxslim.Report.of(slim)
    for site, kept in report.plan.kept.items():
        assert sorted(report.scores[site].topk(2).indices.tolist()) == kept


def test_where_query_heads_have_a_dimension_of_their_own_whole_groups_go():
    sites = fxslim.find_attention(captured("gqa-broadcast")[-1], unit="any")
    assert [site.unit for site in sites] == [((0, 1), (2, 3))] * 2


# --------------------------------------------------------------------------------- torch's modules


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(8, 4, 16, dropout=0.0, batch_first=True, **options)


def states(length):
    return torch.randn(3, length, 8)


MODULES = {
    "encoder": (nn.TransformerEncoder(encoder_layer(), 2), (states(5),), 2),
    "encoder layer": (encoder_layer(norm_first=True), (states(5),), 1),
    "decoder layer": (
        nn.TransformerDecoderLayer(8, 4, 16, dropout=0.0, batch_first=True),
        (states(5), states(7)),
        2,
    ),
    "multihead attention": (
        nn.MultiheadAttention(8, 4, batch_first=True),
        {"query": (x := states(5)), "key": x, "value": x, "need_weights": False},
        1,
    ),
}


@pytest.mark.parametrize("mode", ["train", "eval", "eval, fast path off"])
@pytest.mark.parametrize("kind", MODULES)
def test_torchs_own_modules(kind, mode, monkeypatch):
    model, inputs, count = MODULES[kind]
    model = copy.deepcopy(model).train(mode == "train")
    monkeypatch.setattr(torch.backends.mha, "_is_fastpath_enabled", mode == "eval")
    slim = fxslim.compile(model, 0.5, inputs)
    assert len(slim.meta["fxslim"].sites) == count
    assert slim.training == (mode == "train")
    assert_is_without_heads(slim, model, call_of(inputs))


# --------------------------------------------------------------------------------- what comes back


def test_a_transformers_model_keeps_its_interface():
    model, inputs = build("bert")
    slim = fxslim.compile(model, 0.5, inputs)
    ids = torch.arange(21).reshape(3, 7) % 100
    out = slim(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert type(out) is type(model(**inputs))
    assert out.logits.shape == (3, 7, 128)


def test_names_types_flags_and_mode_are_kept():
    model = Residual(a=Attention(), b=Attention(core=softmax_core)).to(torch.bfloat16).eval()
    model.layers.a.requires_grad_(False)
    slim = fxslim.compile(model, 0.5, example().bfloat16())
    ours, theirs = dict(slim.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == torch.bfloat16
        assert parameter.requires_grad == theirs[name].requires_grad
        assert type(parameter) is nn.Parameter
    assert not slim.training
    assert slim(example(2, 7).bfloat16()).dtype == torch.bfloat16


def test_no_masks_and_no_zeros_remain():
    model = Attention()
    slim = fxslim.compile(model, 0.5, example())
    slim.graph.lint()
    assert not any("head_masks" in name for name in slim.state_dict())
    assert all(parameter.all() for parameter in slim.parameters())
    kept = sum(p.numel() for p in slim.parameters())
    assert kept == sum(p.numel() for p in model.parameters()) - (3 * (4 * 6 + 4) + 6 * 4)


class Told(Attention):
    """An attention with more to be told than its states, as a tokenizer gives more than ids."""

    def forward(self, x, scale=None, shift=None):
        y = super().forward(x if scale is None else x * scale)
        return y if shift is None else y + shift


FORMS = {
    "tensors": lambda: example(4, 7),
    "tuples": lambda: (example(4, 7), torch.rand(4, 7, 1)),
    "lists": lambda: [example(4, 7)],
    "dicts": lambda: {"x": example(4, 7), "shift": torch.rand(4, 7, 1)},
}


@pytest.mark.parametrize("form", FORMS)
def test_calibration_batches_say_what_the_model_is_called_with(form):
    batches = [FORMS[form]() for _ in range(3)]
    once = iter(batches) if form == "dicts" else batches  # they may come only once
    slim = fxslim.compile(Told(), 0.5, calibration=once)
    program = fxslim.capture(Told(), batches[0])
    assert inspect.signature(slim.forward) == inspect.signature(program.forward)
    assert fxslim.Report.of(slim).plan.sparsity == 0.5
    assert fxslim.Report.of(slim).refitted


def test_batches_that_the_program_does_not_take_are_refused():
    x, scale = example(), torch.rand(3, 5, 1)
    message = (
        "inputs (x, scale) do not fit a program that was captured with (x): got an unexpected "
        "keyword argument 'scale'; change the inputs, or capture with example_inputs like them"
    )
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        fxslim.compile(Told(), 0.5, {"x": x}, calibration=[{"x": x, "scale": scale}])
    program = fxslim.capture(Told(), (x, scale))
    slim = fxslim.narrow(program, fxslim.PruningPlan({"attention": [0]}, 0.75))
    with pytest.raises(TypeError, match=r"^inputs \(#1\) do not fit .* captured with \(x, scale\)"):
        fxslim.repair(slim, program, [(x,)])


def test_the_model_is_untouched():
    model, x = Residual(a=Attention(), b=Attention()), example()
    before, out = copy.deepcopy(model.state_dict()), model(x)
    fxslim.compile(model, 0.5, x, criterion="taylor", calibration=[x], loss_fn=torch.sum)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert torch.equal(model(x), out)


def test_the_report_says_what_was_done():
    slim = fxslim.compile(Residual(a=Attention(), b=Attention()), 0.5, example())
    report = slim.meta["fxslim"]
    assert report.plan.sparsity == 0.5
    assert [site.name for site in report.sites] == ["layers.a", "layers.b"]
    assert report.plan.kept.keys() == report.scores.keys() == {"layers.a", "layers.b"}
    assert 0 <= report.max_difference < 1e-5
    for site in report.sites:
        kept = report.plan.kept[site.name]
        assert slim.get_parameter(site.query[0].weight).shape[0] == 2 * len(kept)


def test_a_plan_is_followed_exactly():
    model, x = Residual(a=Attention(), b=Attention()), example()
    plan = fxslim.PruningPlan({"layers.a": [3], "layers.b": [0, 1, 2]}, 0.5)
    slim = fxslim.compile(model, example_inputs=x, plan=plan)
    assert slim.meta["fxslim"].plan == plan
    assert slim.meta["fxslim"].scores == {}
    assert torch.equal(slim.layers.a.q.weight, model.layers.a.q.weight[6:])


def test_the_heads_with_the_lowest_scores_go():
    model = Attention()
    with torch.no_grad():
        model.o.weight[:, 2:4] *= 0.01
    assert fxslim.compile(model, 0.25, example()).meta["fxslim"].plan.kept == {
        "attention": [0, 2, 3]
    }


def test_the_steps_alone_make_what_compile_makes():
    model, x = Residual(a=Attention(), b=Attention()), example()
    slim = fxslim.compile(model, 0.5, x)
    program = fxslim.capture(model, x)
    sites = fxslim.find_attention(program)
    masked = fxslim.insert_head_masks(program, sites)
    scores = fxslim.score(masked, "weight_product")
    plan = fxslim.plan(scores, sites, sparsity=0.5)
    other = fxslim.narrow(program, plan)
    assert fxslim.verify(other, masked, plan) < 1e-5
    assert plan == slim.meta["fxslim"].plan
    assert other.code == slim.code
    assert all(map(torch.equal, other.parameters(), slim.parameters()))


def test_slim_is_masked():
    model, x = Residual(a=Attention(), b=Attention(kv_heads=1, core=softmax_core)), example()
    slim = fxslim.compile(model, 0.5, x)
    masked = fxslim.insert_head_masks(fxslim.capture(model, x))
    for name, kept in slim.meta["fxslim"].plan.kept.items():
        with torch.no_grad():
            masked.get_parameter(mask_name(name)).zero_()[kept] = 1
    x = example(2, 9)
    torch.testing.assert_close(slim(x), masked(x))


def test_a_slim_program_can_be_made_slimmer():
    model, x = Residual(a=Attention(), b=Attention()), example(2, 7)
    slim = fxslim.compile(fxslim.compile(model, 0.5, example(), scope="uniform"), 0.5)
    assert [site.num_heads for site in slim.meta["fxslim"].sites] == [2, 2]
    assert slim.meta["fxslim"].plan.sparsity == 0.5
    assert slim(x).shape == x.shape


def test_a_graph_of_a_hand_written_model_is_a_model():
    model, x = Residual(a=Attention(), b=Attention(core=softmax_core)), example(2, 7)
    for graph in (
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (example(),)).module(),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)  # static, as exported
            slim = fxslim.compile(graph, 0.5, example())
        assert_is_without_heads(slim, model, call_of((example(),)))
    assert x.shape == (2, 7, 6)


def test_training_goes_on():
    model = Residual(a=Attention(), b=Attention()).train()
    slim, x = fxslim.compile(model, 0.5, example()), example(2, 7)
    optimizer = torch.optim.SGD(slim.parameters(), 0.1)
    losses = []
    for _ in range(5):
        loss = (slim(x) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    assert all(p.grad is not None for p in slim.parameters())


def test_export_save_and_load():
    slim, x = fxslim.compile(Attention(), 0.5, example()), example(4, 9)
    sizes = ({0: torch.export.Dim.AUTO, 1: torch.export.Dim.AUTO},)
    stream = io.BytesIO()
    torch.export.save(torch.export.export(slim, (example(),), dynamic_shapes=sizes), stream)
    stream.seek(0)
    loaded = torch.export.load(stream).module()
    torch.testing.assert_close(loaded(x), slim(x))


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # Inductor's own imports
def test_inductor():
    slim, x = fxslim.compile(Attention(), 0.5, example()), example(2, 7)
    compiled = torch.compile(slim, fullgraph=True)
    torch.testing.assert_close(compiled(x), slim(x))


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"sparsity": 1.0}, ValueError, "sparsity must be in [0, 1), not 1.0"),
        ({"sparsity": -0.5}, ValueError, "sparsity must be in [0, 1), not -0.5"),
        ({"sparsity": "half"}, TypeError, "sparsity must be a number, not 'half'"),
        ({"sparsity": float("nan")}, ValueError, "sparsity must be in [0, 1), not nan"),
        ({"criterion": "best"}, ValueError, "unknown criterion 'best'; known: activation, "),
        ({"min_heads": -1}, ValueError, "min_heads must be 0 or more, not -1"),
        ({"scope": "all"}, ValueError, "scope must be one of global, local, uniform, not 'all'"),
        (
            {"criterion": "taylor"},
            ValueError,
            "this criterion needs calibration batches: pass calibration=[...]",
        ),
        ({"budget": 0.5}, ValueError, "a budget needs costs: pass costs=fxslim.cost(program, 'fl"),
        (
            {"budget": 0.5, "costs": "memory"},
            ValueError,
            "costs must be one of parameters, flops, latency, not 'memory'",
        ),
        ({"budget": 0.5, "costs": {}}, TypeError, "costs must be fxslim.Costs, not dict"),
        ({"example_inputs": 3}, TypeError, "example_inputs must be a tensor, a tuple "),
    ],
)
def test_bad_arguments_are_refused_before_any_work(options, error, said, monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)  # it is not called
    with pytest.raises(error, match=f"^{re.escape(said)}"):
        fxslim.compile(Attention(), **({"example_inputs": example()} | options))


@pytest.mark.parametrize(
    ("model", "error", "said"),
    [
        ("bert", TypeError, "^model must be a torch.nn.Module, not str$"),
        (nn.Sequential(), ValueError, "^Sequential has no parameters, so there is nothing to"),
    ],
)
def test_what_is_no_model_is_refused_before_any_work(model, error, said, monkeypatch):
    monkeypatch.setattr(torch.export, "export", None)
    with pytest.raises(error, match=said):
        fxslim.compile(model, 0.5)


def test_a_model_without_attention_is_refused():
    model = nn.Sequential(nn.Linear(6, 6), nn.Softmax(-1), nn.Linear(6, 6))
    with pytest.raises(fxslim.UnsupportedSite, match=r"^Sequential has no attention: "):
        fxslim.compile(model, 0.5, example())


def test_a_model_whose_attention_is_all_refused_is_an_error_with_every_reason():
    model, inputs = HANDWRITTEN["talking-heads"]()
    with pytest.raises(fxslim.UnsupportedSite) as caught:
        fxslim.compile(model, 0.5, inputs)
    reason = "its heads are mixed with each other between the query and the scores"
    assert str(caught.value).splitlines() == [
        "Stack has attention, but none of it can be pruned:",
        f"  layers.0.attention: {reason}",
        f"  layers.1.attention: {reason}",
    ]


def test_a_plan_that_names_a_refused_site_is_an_error():
    _, _, program = captured("one-of-three")
    plan = fxslim.PruningPlan({"layers.0.attention": []}, 0.5)
    with pytest.raises(fxslim.UnsupportedSite, match=r"^'layers.0.attention' cannot be"):
        fxslim.compile(program, plan=plan)


@pytest.mark.parametrize("options", [{"sparsity": 0.2}, {"sparsity": 0.5, "min_heads": 4}])
def test_a_model_that_comes_back_whole_is_no_silence(options):
    with pytest.warns(UserWarning, match=r"^fxslim.plan: no head was removed: .* of 4 heads is"):
        slim = fxslim.compile(Attention(), example_inputs=example(), **options)
    assert slim.meta["fxslim"].plan.sparsity == 0


def test_nothing_is_said_where_nothing_was_to_go():
    x, model = example(), Attention()
    torch.testing.assert_close(fxslim.compile(model, 0, x)(x), model(x))
