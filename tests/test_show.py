"""The printed program: what each dimension is made of, a line a node, and the sites."""

import torch
from expecttest import assert_expected_inline
from torch import nn

import fxslim
from fxslim.show import _letters
from tests.models import Attention, Residual, captured, example, printed, softmax_core


def test_an_attention():
    program = fxslim.capture(Attention(bias=False), example(), dynamic=False)
    assert_expected_inline(
        printed(program),
        """\
q_weight [a4*b2!, c6!] = get_attr q.weight
k_weight [a4*b2!, c6!] = get_attr k.weight
v_weight [a4*d2, c6!] = get_attr v.weight
o_weight [e6!, a4*d2] = get_attr o.weight
x [f3!, g5!, c6!] = placeholder x
linear [f3!, g5!, a4*b2!] = linear(x, q_weight)
view [f3!, g5!, a4, b2!] = reshape(linear, [3, 5, 4, 2])
transpose [f3!, a4, g5!, b2!] = transpose(view, 1, 2)
linear_1 [f3!, g5!, a4*b2!] = linear(x, k_weight)
view_1 [f3!, g5!, a4, b2!] = reshape(linear_1, [3, 5, 4, 2])
transpose_1 [f3!, a4, g5!, b2!] = transpose(view_1, 1, 2)
linear_2 [f3!, g5!, a4*d2] = linear(x, v_weight)
view_2 [f3!, g5!, a4, d2] = reshape(linear_2, [3, 5, 4, 2])
transpose_2 [f3!, a4, g5!, d2] = transpose(view_2, 1, 2)
scaled_dot_product_attention [f3!, a4, g5!, d2] = scaled_dot_product_attention(transpose, transpose_1, transpose_2)
transpose_3 [f3!, g5!, a4, d2] = transpose(scaled_dot_product_attention, 1, 2)
view_3 [f3!, g5!, a4*d2] = reshape(transpose_3, [3, 5, 8])
linear_3 [f3!, g5!, e6!] = linear(view_3, o_weight)
# attention: mha, 4 heads, prunable""",  # noqa: E501
    )


def test_a_fused_projection_is_axes_side_by_side():
    lines = printed(captured("nanogpt")[-1]).splitlines()
    (weight,) = (line for line in lines if line.startswith("layers_0_attention_c_attn_weight "))
    assert_expected_inline(
        weight,
        """layers_0_attention_c_attn_weight [(c4*d12! | c4*d12! | c4*e12), b28!] = get_attr layers.0.attention.c_attn.weight""",  # noqa: E501
    )


def test_symbolic_lengths_are_s_and_are_told_apart():
    lines = printed(fxslim.capture(Attention(), example())).splitlines()
    (x,) = (line for line in lines if line.endswith(" = placeholder x"))
    assert_expected_inline(x, """x [fs!, gs!, c6!] = placeholder x""")


def test_a_reason_is_printed_with_its_site():
    class Normed(Attention):
        def __init__(self):
            super().__init__()
            self.o = nn.Sequential(nn.LayerNorm(8), self.o)

    lines = printed(fxslim.capture(Residual(a=Attention(), b=Normed()), example())).splitlines()
    assert_expected_inline(
        "\n".join(lines[-2:]),
        """\
# layers.a: mha, 4 heads, prunable
# layers.b: mha, 4 heads, refused: layer_norm (layer_norm in layers.b.o.0) normalises over all of the head axis""",  # noqa: E501
    )


def test_several_results_are_printed_in_order():
    class Chunked(Attention):
        def forward(self, x):
            a, b = super().forward(x).chunk(2, -1)
            return a * b

    lines = fxslim.show(fxslim.capture(Chunked(bias=False), example())).splitlines()
    (line,) = (line for line in lines if " = split" in line or " = chunk" in line)
    assert_expected_inline(
        line, """split [fs!, gs!, e3!] [fs!, gs!, e3!] = split(linear_3, 3, -1)"""
    )


def test_showing_changes_nothing():
    program = fxslim.capture(Residual(a=Attention(core=softmax_core)), example())
    code, meta = program.code, [dict(node.meta) for node in program.graph.nodes]
    first = fxslim.show(program)
    assert fxslim.show(program) == first
    assert (program.code, [dict(node.meta) for node in program.graph.nodes]) == (code, meta)


def test_letters_go_on_after_z():
    assert [_letters(n) for n in (0, 25, 26, 27, 51, 52, 701, 702)] == [
        "a", "z", "aa", "ab", "az", "ba", "zz", "aaa",
    ]  # fmt: skip


def test_masked_and_slim_programs_print_too():
    program = fxslim.capture(Attention(), example())
    masked = fxslim.insert_head_masks(program)
    slim = fxslim.narrow(program, fxslim.PruningPlan({"attention": [1, 2, 3]}, 0.25))
    assert fxslim.show(masked).endswith("# attention: mha, 4 heads, prunable")
    assert fxslim.show(slim).endswith("# attention: mha, 3 heads, prunable")
    assert torch.equal(slim(example() * 0), slim(example() * 0))
