"""Shape constants that are symbolic: the samples of the rules cover those that are numbers."""

import pytest
import torch
from torch import nn

from fxslim import capture
from fxslim.analysis import analyse
from fxslim.axes import leaves
from fxslim.passes.narrow import Narrow

HEADS, WIDTH = 4, 3


class Heads(nn.Module):
    """A projection to heads, something in between, and the projection back."""

    def __init__(self, between, wide=1):
        super().__init__()
        self.first = nn.Linear(5, HEADS * WIDTH)
        self.slopes = nn.Parameter(torch.randn(HEADS, 1, 1))
        self.last = nn.Linear(wide * HEADS * WIDTH, 2)
        self.between = between

    def forward(self, x):
        return self.last(self.between(self.first(x), self.slopes))


def merged_with_the_batch(y, slopes):
    b, s, _ = y.shape
    heads = y.view(b, s, HEADS, WIDTH).transpose(1, 2).reshape(b * HEADS, s, WIDTH)
    return heads.view(b, HEADS, s, WIDTH).transpose(1, 2).reshape(b, s, HEADS * WIDTH)


def inferred_sizes(y, slopes):
    b, s, _ = y.shape
    return y.view(b, -1, HEADS, WIDTH).flatten(2).reshape(-1, s, HEADS * WIDTH)


def expanded_over_the_batch(y, slopes):
    b, s, _ = y.shape
    scaled = y.view(b, s, HEADS, WIDTH) * slopes.expand(b, HEADS, 1, 1).transpose(1, 2)
    return scaled.reshape(b, s, HEADS * WIDTH)


def repeated_over_the_batch(y, slopes):
    b, s, _ = y.shape
    heads = y.view(b, s, HEADS, WIDTH).transpose(1, 2).reshape(b * HEADS, s, WIDTH)
    scaled = heads * slopes.repeat(b, 1, 1)
    return scaled.unflatten(0, (b, HEADS)).transpose(1, 2).reshape(b, s, HEADS * WIDTH)


def zeros_of_a_symbolic_size(y, slopes):
    b, s, _ = y.shape
    added = y + y.new_ones(b, s, HEADS * WIDTH) * torch.zeros(b, 1, HEADS * WIDTH)
    return added.unflatten(-1, (HEADS, WIDTH)).flatten(-2)


def repeated_heads(y, slopes):
    b, s, _ = y.shape
    heads = y.view(b, s, HEADS, 1, WIDTH).expand(b, s, HEADS, 2, WIDTH)
    return heads.reshape(b, s, HEADS * 2 * WIDTH)


def tiled_heads(y, slopes):
    return y.unflatten(-1, (HEADS, WIDTH)).repeat(1, 1, 2, 1).flatten(-2)


def sliced_length(y, slopes):
    return y[:, 1:-1].unflatten(-1, (HEADS, WIDTH)).flatten(-2)


def split_at_a_symbol(y, slopes):
    b, s, _ = y.shape
    heads = y.view(b, s, HEADS, WIDTH).transpose(1, 2).reshape(b * HEADS, s, WIDTH)
    (whole,) = heads.split(b * HEADS)
    (listed,) = whole.split([b * HEADS])
    (one,) = listed.chunk(1)
    return one.view(b, HEADS, s, WIDTH).transpose(1, 2).reshape(b, s, HEADS * WIDTH)


def sliced_to_the_end(y, slopes):
    b, s, _ = y.shape
    heads = y.view(b, s, HEADS, WIDTH).transpose(1, 2).reshape(b * HEADS, s, WIDTH)
    whole = heads[: b * HEADS]
    return whole.view(b, HEADS, s, WIDTH).transpose(1, 2).reshape(b, s, HEADS * WIDTH)


def side_by_side_in_the_batch(y, slopes):
    heads = torch.cat(y.split(WIDTH, -1))
    return torch.cat(heads.split(y.shape[0]), -1)


def chunks_of_the_batch(y, slopes):
    return torch.cat(torch.cat(y.chunk(HEADS, -1)).chunk(HEADS), -1)


def lists_of_the_batch(y, slopes):
    return torch.cat(torch.cat(y.chunk(HEADS, -1)).split([y.shape[0]] * HEADS), -1)


def sizes_of_the_batch(y, slopes):
    heads, sizes = torch.cat(y.chunk(HEADS, -1)), [y.shape[0]] * HEADS
    return torch.cat(torch.ops.aten.split.sizes(heads, sizes), -1)


def one_by_one(y, slopes):
    return torch.cat(y.unflatten(-1, (HEADS, WIDTH)).unbind(2), -1)


def strided_width(y, slopes):
    heads = y.unflatten(-1, (HEADS, WIDTH))
    return torch.cat([heads[..., ::WIDTH], heads[..., 1:]], -1).flatten(-2)


BETWEEN = [
    merged_with_the_batch,
    inferred_sizes,
    expanded_over_the_batch,
    repeated_over_the_batch,
    zeros_of_a_symbolic_size,
    repeated_heads,
    tiled_heads,
    sliced_length,
    split_at_a_symbol,
    sliced_to_the_end,
    side_by_side_in_the_batch,
    chunks_of_the_batch,
    lists_of_the_batch,
    sizes_of_the_batch,
    one_by_one,
    strided_width,
]
KEPT = [0, 2]


def narrow(program, count, kept):
    """The program with these of its heads, be they positions of an axis or units."""
    axis_map = analyse(program)
    weight = next(n for n in program.graph.nodes if n.target == "first.weight")
    found = list(leaves(axis_map.of(weight)[0]))
    heads = [leaf for leaf in found if leaf.size == 1] or [found[0]]
    assert sum(leaf.size for leaf in heads) == count
    assert all(leaf.block is None for leaf in heads)
    if len(heads) == 1:
        keep = {heads[0]: kept}
    else:
        keep = {leaf: [] for n, leaf in enumerate(heads) if n not in kept}
    return Narrow(axis_map, keep)(program).graph_module


@pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)
def test_narrowing_is_masking_at_every_batch_size_and_again(between):
    wide = 2 if between in (repeated_heads, tiled_heads) else 1
    model = Heads(between, wide).double()
    program = capture(model, (torch.randn(2, 7, 5, dtype=torch.double),))
    once = narrow(program, HEADS, KEPT)
    for slim, kept in (once, KEPT), (narrow(once, len(KEPT), [1]), KEPT[1:]):
        assert slim.first.weight.shape == (len(kept) * WIDTH, 5)
        mask = torch.zeros(HEADS, WIDTH, dtype=torch.double)
        mask[kept] = 1
        with torch.no_grad():
            model.last.weight.copy_(model.last.weight * masked_columns(between, mask))
            for batch, length in [(2, 7), (3, 5), (1, 4)]:
                x = torch.randn(batch, length, 5, dtype=torch.double)
                torch.testing.assert_close(slim(x), model(x))


def masked_columns(between, mask):
    """The mask of the heads as the last projection sees them."""
    if between is repeated_heads:
        return mask.repeat_interleave(2, 0).flatten()
    return mask.flatten().repeat(2 if between is tiled_heads else 1)
