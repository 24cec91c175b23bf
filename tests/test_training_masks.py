"""Masks where the model is trained: the masked program's, whatever reads the weights."""

import copy
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import fxslim
from fxslim.masks import head_masks
from fxslim.reading import as_they_are
from fxslim.training_masks import HeadMasks, masks_of
from tests.models import (
    HEADS,
    WIDTH,
    Attention,
    Grouped,
    Residual,
    SideBySide,
    example,
    softmax_core,
)
from tests.zoo.handwritten import HANDWRITTEN


def masked(model, inputs):
    """The model with a random mask a head, and its masked program with the same."""
    program = fxslim.capture(model, inputs)
    sites = [site for site in fxslim.find_attention(program) if site.prunable]
    program = fxslim.insert_head_masks(program, sites, trainable=False)
    masks = HeadMasks(model, sites).attach_()
    random = {site.name: torch.rand(site.num_heads) for site in sites}
    values = {site.name: random[min([site.name, *site.coupled])] for site in sites}
    for name, mask in head_masks(program, list(values)).items():
        mask.copy_(values[name])
        masks.mask(name).copy_(values[name])
    return masks, program


def run(model, inputs):
    with torch.no_grad():
        return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


@pytest.mark.parametrize(
    "name",
    [
        "albert",
        "conv-attention",
        "einsum",
        "fused-interleaved",
        "gqa-tiled",
        "joined",
        "mha-cross-batch-first",
        "transformer-encoder-layer",
    ],
)
def test_the_masked_model_is_the_masked_program(name):
    model, inputs = HANDWRITTEN[name]()
    before = run(model, inputs)
    _, program = masked(model, inputs)
    after = run(model, inputs)
    torch.testing.assert_close(after, run(program, inputs))
    assert not torch.allclose(after, before, atol=1e-3)


def test_sites_side_by_side_before_one_projection_have_columns_of_their_own():
    model, x = SideBySide(Grouped(4, 4, 2), Grouped(4, 2, 2)), example()
    masks, program = masked(model, x)
    assert list(masks.sites) == ["attention", "attention@2"]
    torch.testing.assert_close(model(x), program(x))


def layers():
    model = Residual(a=Attention(), b=Attention(core=softmax_core))
    return model, *masked(model, example())


def test_parameters_keep_their_names_and_values():
    model = Residual(a=Attention(), b=Attention())
    before = copy.deepcopy(model.state_dict())
    masked(model, example())
    after = model.state_dict()
    assert {n: v.shape for n, v in after.items() if n not in before} == {
        "head_masks/layers/a": (HEADS,),
        "head_masks/layers/b": (HEADS,),
    }
    assert [name for name, _ in model.named_parameters()] == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    model.load_state_dict(after)


def test_masked_heads_get_no_gradient():
    model, masks, _ = layers()
    masks.mask("layers.a").copy_(torch.tensor([1.0, 0.0, 1.0, 1.0]))
    model(example()).square().sum().backward()
    for linear, dim in [("q", 0), ("k", 0), ("v", 0), ("o", 1)]:
        parameter = model.get_submodule(f"layers.a.{linear}")._parameters["weight"]
        sizes = torch.stack([g.abs().sum() for g in parameter.grad.chunk(HEADS, dim)])
        assert (sizes != 0).tolist() == [True, False, True, True]


def test_the_compiled_model_follows_the_masks_without_compiling_again():
    model, masks, _ = layers()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = example()
    torch.testing.assert_close(compiled(x), model(x))
    masks.mask("layers.b")[1] = 0
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_recomputes_with_the_masks(use_reentrant):
    model, _, _ = layers()
    gradients = []
    for forward in (model, lambda x: checkpoint(model, x, use_reentrant=use_reentrant)):
        x = torch.linspace(-1, 1, 2 * 5 * WIDTH).view(2, 5, WIDTH).requires_grad_()
        model.zero_grad()
        forward(x).square().sum().backward()
        gradients.append([x.grad, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(*gradients)


def test_autocast_reads_the_masks():
    model, masks, program = layers()
    x = example()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(x), program(x), rtol=0.05, atol=0.05)
        masks.mask("layers.a").zero_()
        masks.mask("layers.b").zero_()
        expected = x + model.layers["a"].o.bias + model.layers["b"].o.bias
        torch.testing.assert_close(model(x), expected, rtol=0.02, atol=0.02)


def test_half_precision_stays_half():
    model, _, program = layers()
    x = example().bfloat16()
    assert model.bfloat16()(x).dtype == torch.bfloat16
    torch.testing.assert_close(model(x), program.bfloat16()(x), rtol=0.05, atol=0.05)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.filterwarnings("ignore:.isinstance.treespec")
def test_a_copy_has_masks_of_its_own(copied):
    model, masks, _ = layers()
    x = example()
    other = copied(model)
    expected = model(x)
    torch.testing.assert_close(other(x), expected)
    masks_of(other).mask("layers.a").fill_(3)
    assert not torch.allclose(other(x), expected)
    torch.testing.assert_close(model(x), expected)
    assert not torch.equal(masks.mask("layers.a"), masks_of(other).mask("layers.a"))


def test_tied_weights_are_masked_under_every_name():
    model = Residual(a=Attention(), b=Attention())
    for name in "qkvo":
        getattr(model.layers["b"], name).weight = getattr(model.layers["a"], name).weight
    x = example()
    _, program = masked(model, x)
    torch.testing.assert_close(model(x), program(x))


def test_a_sequential_model_has_no_more_layers():
    model = nn.Sequential(Attention(), nn.Linear(WIDTH, 2))
    _, program = masked(model, example())
    assert len(model) == 2
    x = example()
    torch.testing.assert_close(model(x), program(x))


def test_masks_can_be_taken_away():
    model = Residual(a=Attention())
    x, before = example(), model.state_dict()
    expected = model(x)
    masks, _ = masked(model, x)
    assert not torch.allclose(model(x), expected)
    with as_they_are(model):
        torch.testing.assert_close(model(x), expected)
    assert not torch.allclose(model(x), expected)
    masks.detach_()
    torch.testing.assert_close(model(x), expected)
    assert type(model.layers["a"].o) is nn.Linear
    assert list(model.state_dict()) == list(before)


def test_a_model_is_masked_once():
    model, masks, _ = layers()
    with pytest.raises(ValueError, match=r"^Residual has head masks already: a model is prepared"):
        HeadMasks(model, list(masks.sites.values())).attach_()
