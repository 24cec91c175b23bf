"""Whole attentions with functions of their own: `flex_attention`, from call to slim model."""

import copy
import io

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

import fxslim
from tests.models import HEADS, Attention, example
from tests.zoo.reference import without_heads


def causal(batch, head, query, key):
    return query >= key


def flexible(**functions):
    """`flex_attention` with these functions."""

    def core(q, k, v):
        return flex_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1], **functions)

    return core


def blocked(q, k, v):
    """Causal, by a mask in blocks that is made anew for each length."""
    mask = create_block_mask(causal, None, None, q.shape[2], k.shape[2], device="cpu")
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def with_sink(q, k, v):
    """Rescaled by what is normalised over, as a sink does."""
    out, total = flex_attention(q, k, v, return_lse=True, enable_gqa=q.shape[1] != k.shape[1])
    return out * total.sigmoid().unsqueeze(-1)


CORES = {
    "plain": flexible(),
    "soft cap": flexible(score_mod=lambda score, b, h, m, n: 2 * torch.tanh(score / 2)),
    "distance": flexible(score_mod=lambda score, b, h, m, n: score - (m - n).abs()),
    "sink": with_sink,
    "blocks": blocked,
}


@pytest.mark.parametrize("kv_heads", [HEADS, HEADS // 2])
@pytest.mark.parametrize("core", CORES.values(), ids=CORES)
@torch.no_grad()
def test_flex_attention_is_narrowed(core, kv_heads):
    model, x = Attention(kv_heads, core).eval(), example()
    program = fxslim.capture(model, (x,))
    for unit in ("group",) if kv_heads == HEADS else ("group", "query", "any"):
        slim = fxslim.compile(program, 0.5, unit=unit)
        done = slim.meta["fxslim"]
        assert slim.o.weight.shape[1] == model.o.weight.shape[1] // 2
        masked = without_heads(copy.deepcopy(model), done.sites, done.plan.kept)
        torch.testing.assert_close(slim(x), masked(x))
        if core is not blocked:  # which has lengths rounded to blocks
            other = example(2, 9)
            torch.testing.assert_close(slim(other), masked(other))


def test_heads_whose_number_a_score_depends_on_are_refused():
    slopes = torch.rand(HEADS)
    core = flexible(score_mod=lambda score, b, h, m, n: score - slopes[h] * (m - n))
    (site,) = fxslim.find_attention(fxslim.capture(Attention(core=core).eval(), (example(),)))
    assert site.num_heads == HEADS
    assert site.reason == (
        "flex_attention (flex_attention) scores each position of the head axis by its number"
    )


@torch.no_grad()
def test_the_functions_are_saved_with_the_program():
    x, stream = example(), io.BytesIO()
    slim = fxslim.compile(Attention(core=blocked).eval(), 0.5, (x,))
    torch.save(slim, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=False)(x), slim(x))
