"""InsertHeadMasks: ones change nothing, and a zero is a head that the output does not read."""

import copy

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import fxslim
from fxslim.locate import locate
from fxslim.masks import mask_name
from fxslim.passes import InsertHeadMasks
from tests.models import (
    Attention,
    Grouped,
    Residual,
    SideBySide,
    captured,
    example,
    printed,
    softmax_core,
)
from tests.zoo.reference import call_of, compare, without_heads


def set_mask(masked, site, kept):
    """Keep these heads of a site only."""
    mask = masked.get_parameter(mask_name(site.name))
    with torch.no_grad():
        mask.zero_()[kept] = 1


def test_printed():
    program = fxslim.capture(Attention(bias=False), example(), dynamic=False)
    before, after = printed(program), printed(fxslim.insert_head_masks(program))
    assert_expected_inline(
        "\n".join(before.splitlines()[-4:]),
        """\
transpose_3 [f3!, g5!, a4, d2] = transpose(scaled_dot_product_attention, 1, 2)
view_3 [f3!, g5!, a4*d2] = reshape(transpose_3, [3, 5, 8])
linear_3 [f3!, g5!, e6!] = linear(view_3, o_weight)
# attention: mha, 4 heads, prunable""",
    )
    assert_expected_inline(
        "\n".join(after.splitlines()[-7:]),
        """\
transpose_3 [g3!, h5!, b4, e2] = transpose(scaled_dot_product_attention, 1, 2)
view_3 [g3!, h5!, b4*e2] = reshape(transpose_3, [3, 5, 8])
head_masks_attention_index0 [1, 1, b4*e2] = get_attr head_masks.attention/index0
index_tensor [1, 1, b4*e2] = index(head_masks_attention, [head_masks_attention_index0])
mul_tensor [g3!, h5!, b4*e2] = mul(view_3, index_tensor)
linear_3 [g3!, h5!, f6!] = linear(mul_tensor, o_weight)
# attention: mha, 4 heads, prunable""",
    )


@pytest.mark.parametrize(
    "name",
    [
        "bmm-merged",
        "conv-attention",
        "einsum",
        "fused-interleaved",
        "gqa-broadcast",
        "gqa-tiled",
        "joined",
        "mqa-broadcast",
        "swin",
        "t5-bias",
        "transformer-decoder-layer",
    ],
)
def test_a_mask_of_ones_changes_nothing_and_zeros_are_columns_of_zeros(name):
    model, inputs, program = captured(name)
    call, masked = call_of(inputs), fxslim.insert_head_masks(program)
    sites = masked.meta["sites"]
    assert compare(call.on(masked), call.on(model)).relative < 1e-5
    for site in sites:
        set_mask(masked, site, [0, 3])
    kept = {site.name: [0, 3] for site in sites}
    expected = call.on(without_heads(model, sites, kept))
    assert compare(call.on(masked), expected).relative < 1e-5
    assert compare(expected, call.on(model)).relative > 1e-3


def test_a_mask_of_zeros_silences_the_whole_attention():
    model, x = Residual(a=Attention(bias=False)), example()
    masked = fxslim.insert_head_masks(fxslim.capture(model, x))
    set_mask(masked, masked.meta["sites"][0], [])
    assert torch.equal(masked(x), x)


def test_a_mask_of_one_half_is_half_a_head():
    model, x = Attention(), example()
    masked = fxslim.insert_head_masks(fxslim.capture(model, x))
    halved = copy.deepcopy(model)
    with torch.no_grad():
        masked.get_parameter("head_masks.attention")[2] = 0.5
        halved.o.weight[:, 4:6] *= 0.5
    torch.testing.assert_close(masked(x), halved(x))
    assert not torch.allclose(masked(x), model(x))


def test_masks_are_named_after_their_sites_and_only_prunable_ones_have_one():
    masked = fxslim.insert_head_masks(captured("one-of-three")[-1])
    names = [n for n, _ in masked.named_parameters() if n.startswith("head_masks")]
    assert names == ["head_masks.layers/1/attention"]
    assert [site.name for site in masked.meta["sites"]] == ["layers.1.attention"]


def test_each_call_of_a_shared_layer_has_a_mask():
    masked = fxslim.insert_head_masks(captured("albert")[-1])
    names = [n for n, _ in masked.head_masks.named_parameters()]
    assert names == [f"layers/0/layer/attention{number}" for number in ("", "@2", "@3")]


def test_contexts_side_by_side_before_one_projection_have_a_mask_each():
    model = SideBySide(Grouped(4, 4, 2), Grouped(4, 2, 2))
    program = fxslim.capture(model, example())
    masked, sites = fxslim.insert_head_masks(program), fxslim.find_attention(program)
    kept = {"attention": [1, 3], "attention@2": [0, 1]}
    for site in sites:
        set_mask(masked, site, kept[site.name])
    call = call_of((example(2, 7),))
    expected = call.on(without_heads(model, sites, kept))
    assert compare(call.on(masked), expected).relative < 1e-6
    assert compare(call.on(fxslim.compile(model, 0.5, example())), call.on(model)).relative > 0.01


def test_masks_are_trainable_parameters_or_buffers():
    program = fxslim.capture(Attention(), example())
    mask = fxslim.insert_head_masks(program).get_parameter("head_masks.attention")
    assert (mask.requires_grad, mask.tolist()) == (True, [1, 1, 1, 1])
    fixed = fxslim.insert_head_masks(program, trainable=False)
    assert "head_masks.attention" in dict(fixed.named_buffers())
    assert not any(name.startswith("head_masks") for name, _ in fixed.named_parameters())
    ours = set(fixed.state_dict()) - set(program.state_dict())
    assert ours == {"head_masks.attention"}


def test_a_mask_has_the_contexts_type_and_device():
    model = Attention().to(torch.bfloat16)
    masked = fxslim.insert_head_masks(fxslim.capture(model, example().bfloat16()))
    assert masked.get_parameter("head_masks.attention").dtype == torch.bfloat16
    with torch.device("meta"):
        model, x = Attention(), example()
    masked = fxslim.insert_head_masks(fxslim.capture(model, x))
    assert masked.get_parameter("head_masks.attention").is_meta


def test_masks_work_at_other_sizes_and_get_gradients():
    model = Residual(a=Attention(core=softmax_core))
    masked = fxslim.insert_head_masks(fxslim.capture(model, example()))
    masked(example(2, 9)).sum().backward()
    assert masked.get_parameter("head_masks.layers/a").grad.abs().min() > 0


def test_sites_can_be_chosen():
    program = fxslim.capture(Residual(a=Attention(), b=Attention()), example())
    sites = fxslim.find_attention(program)
    masked = fxslim.insert_head_masks(program, sites[1:])
    assert [name for name, _ in masked.head_masks.named_parameters()] == ["layers/b"]
    other = fxslim.find_attention(fxslim.capture(Attention(), example()))
    with pytest.raises(fxslim.UnsupportedSite, match="the program has no prunable site attention"):
        fxslim.insert_head_masks(program, other)


def test_the_program_that_came_in_is_untouched():
    model = Attention()
    program = fxslim.capture(model, example())
    code, names = program.code, [name for name, _ in program.named_parameters()]
    masked = fxslim.insert_head_masks(program)
    assert (program.code, [name for name, _ in program.named_parameters()]) == (code, names)
    assert "sites" not in program.meta
    assert all(masked.get_parameter(name) is model.get_parameter(name) for name in names)


def test_a_program_without_prunable_sites_is_not_modified():
    located = locate(captured("talking-heads")[-1])
    assert not InsertHeadMasks(located)(located.axis_map.program).modified


def test_masking_twice_is_refused():
    masked = fxslim.insert_head_masks(fxslim.capture(Attention(), example()))
    with pytest.raises(ValueError, match=r"^the program has head masks already; "):
        fxslim.insert_head_masks(masked)


def test_wrong_input_is_named():
    located = locate(fxslim.capture(Attention(), example()))
    said = r"^InsertHeadMasks takes a torch.fx.GraphModule \(see fxslim.capture\), not Linear$"
    with pytest.raises(TypeError, match=said):
        InsertHeadMasks(located)(nn.Linear(2, 2))
    other = fxslim.capture(Attention(), example())
    with pytest.raises(ValueError, match=r"^the pass was given the axes of another program: "):
        InsertHeadMasks(located)(other)


@pytest.mark.parametrize(
    ("program", "error", "said"),
    [
        (nn.ReLU(), TypeError, "^a program is what fxslim.capture returns, not ReLU$"),
        (
            torch.fx.symbolic_trace(nn.Sequential(nn.ReLU())),
            ValueError,
            "^the graph of .* is no captured program: input_1 has no shape; fxslim.capture",
        ),
    ],
)
def test_what_was_not_captured_is_refused(program, error, said):
    for function in (fxslim.find_attention, fxslim.insert_head_masks, fxslim.show):
        with pytest.raises(error, match=said):
            function(program)
