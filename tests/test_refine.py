"""Refinement: splitting, joining and cutting keep every position where it is."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.distributed.tensor._ops._view_ops import Flatten, InputDim, Split, view_groups

from fxslim.axes import SYMBOLIC, Axis, Block, block, blocks, fresh, leaves, resolve, size
from fxslim.positions import kept_positions
from fxslim.refine import beginning_with_unit, cut, join, regroup, side_by_side

WHY = Block("the test says so", "here")


def sizes(dim):
    """The sizes of the factors of `dim`."""
    return [axis.size for axis in resolve(dim)]


def free(*dims):
    """The leaves of `dims` that are not blocked, each once."""
    found = dict.fromkeys(leaf for dim in dims for leaf in leaves(dim))
    return [leaf for leaf in found if not leaf.block]


# --------------------------------------------------------------------------------------- regroup


def test_a_view_splits_an_axis_everywhere():
    hidden = fresh(12)
    batch, heads, width = regroup([fresh(2), hidden], [2, 3, 4], WHY)
    assert sizes(hidden) == [3, 4]
    assert resolve(hidden) == (*heads, *width)
    assert not blocks(hidden) + blocks(batch)


def test_a_view_joins_axes_into_a_product():
    a, b = fresh(2), fresh(3)
    (both,) = regroup([a, b], [6], WHY)
    assert resolve(both) == (*a, *b)


def test_regrouping_back_is_the_identity():
    dims = [fresh(2), fresh(12), fresh(5)]
    there = regroup(dims, [4, 3, 10], WHY)
    back = regroup(there, [2, 12, 5], WHY)
    assert [resolve(dim) for dim in back] == [resolve(dim) for dim in dims]
    assert not any(blocks(dim) for dim in back)


def test_factors_without_a_common_refinement_are_blocked_alone():
    a, b, c = fresh(7), fresh(4), fresh(6)
    out = regroup([a, b, c], [7, 6, 4], WHY)
    assert out[0] == a
    assert blocks(a) == []
    assert blocks(b) == blocks(c) == blocks(out[1]) == [WHY]


def test_an_axis_that_comes_twice_is_split_at_both_places():
    a = fresh(4)
    for dims, target in [([a, a], [2, 4, 2]), ([a, a], [8, 2])]:
        out = regroup(dims, target, WHY)
        assert [size(dim) for dim in out] == target
        (outer, inner) = resolve(a)
        assert [axis for dim in out for axis in resolve(dim)] == [outer, inner, outer, inner]


def test_units_come_and_go():
    a = fresh(4)
    assert regroup([a, (), ()], [1, 4, 1], WHY) == [(), a, ()]


def test_a_view_of_nothing_relates_nothing():
    assert [blocks(dim) for dim in regroup([fresh(0), fresh(3)], [3, 0], WHY)] == [[WHY], [WHY]]


def test_what_a_view_of_another_width_leaves_over_is_blocked():
    a = fresh(6)
    (half,) = regroup([a], [3], WHY)
    assert sizes(a) == [3, 2]
    assert [leaf.size for leaf in free(a)] == [3] == sizes(half)


def test_what_lies_around_a_length_that_only_the_input_fits_is_not_affected():
    heads, width, length = fresh(4), fresh(16), Axis(SYMBOLIC + 7)
    blocks_of_it = [SYMBOLIC + 9, SYMBOLIC + 11]  # at run time their product is the length
    dims = regroup([heads, (length,), width], [4, *blocks_of_it, 16], WHY)
    assert resolve(dims[0]) == heads
    assert resolve(dims[3]) == width
    assert not blocks(heads) + blocks(width)
    assert blocks((length,)) == [WHY]
    assert blocks(dims[1]) == blocks(dims[2]) == [WHY]


def test_a_view_that_fits_only_divisible_lengths_is_not_believed():
    """(length, 4) read as (4, length), as a head split without its transpose does."""
    length, heads, width = Axis(2**61 - 1), fresh(4), fresh(8)
    regroup([(length,), (*heads, *width)], [4, 2**61 - 1, 8], WHY)
    assert blocks(heads) == [WHY]
    assert not blocks(width)


@pytest.mark.parametrize("axis", [fresh(4), side_by_side([(), ()])], ids=["axis", "sum"])
def test_a_unit_before_an_axis_is_not_joined_with_the_axis_alone(axis):
    """It would begin with one unit more, and so on."""
    unit, rest = beginning_with_unit(axis)
    join((*unit, *rest), rest, WHY)
    assert blocks(unit) == [WHY]


def test_parts_of_a_sum_read_as_a_product_run_together():
    q, k = fresh(12), fresh(6)
    number, rows, width = regroup([side_by_side([q, k])], [3, 2, 3], WHY)
    assert sizes(q) == [2, 2, 3]
    assert sizes(k) == [1, 2, 3], "one position by itself, which can go"
    assert resolve(q)[1:] == resolve(k)[1:] == (*rows, *width)
    assert list(leaves(number)) == [resolve(q)[0], resolve(k)[0]] == free(number)


def test_parts_that_are_not_whole_rows_are_cut_and_their_number_stays():
    q, k = fresh(4), fresh(8)
    number, rows = regroup([side_by_side([q, k])], [2, 6], WHY)
    assert blocks(number)[0].why == "indexed position by position"
    assert [size(q), size(k), size(rows)] == [4, 8, 6]
    assert sizes(q) == [4]
    assert [leaf.size for leaf in leaves(k)] == [2, 4, 2]


SHAPES = st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4)


@given(SHAPES, st.randoms())
def test_dtensor_groups_the_same_dimensions(shape, rng):
    factors = [p for n in shape for p in {4: (2, 2), 6: (2, 3)}.get(n, (n,))]
    target = [1]
    for factor in factors:
        if rng.random() < 0.5:
            target[-1] *= factor
        else:
            target.append(factor)
    dims = [fresh(n) for n in shape]
    out = regroup(dims, target, WHY)
    assert [size(dim) for dim in out] == target
    for dim, group in zip(out, view_groups(tuple(shape), tuple(target)), strict=True):
        if isinstance(group, InputDim):
            assert resolve(dim) == resolve(dims[group.input_dim])
        elif isinstance(group, Flatten) and all(isinstance(g, InputDim) for g in group.input_dims):
            inputs = [dims[g.input_dim] for g in group.input_dims]
            assert resolve(dim) == tuple(axis for d in inputs for axis in resolve(d))
        elif isinstance(group, Split) and isinstance(group.input_dim, InputDim):
            split = regroup([dims[group.input_dim.input_dim]], group.group_shape, WHY)
            assert resolve(dim) == resolve(split[group.split_id])
        elif dim:  # finer than what DTensor says: parts of what it regroups
            related = {leaf for d in dims for leaf in leaves(d)}
            assert blocks(dim) or set(leaves(dim)) <= related


def units_of(total):
    """A sum of two units, joined with `total`, and what they begin: (1, 4) and (1, 4)."""
    parts = fresh(4), fresh(4)
    number, _ = regroup([side_by_side(parts)], [2, 4], WHY)
    assert sizes(parts[0]) == sizes(parts[1]) == [1, 4]
    join(number, total, WHY)
    return number, *parts


def test_a_unit_stays_with_what_it_is_joined_with():
    rows = fresh(2)
    number, a, b = units_of(rows)
    assert list(leaves(rows)) == list(leaves(number)) == [resolve(a)[0], resolve(b)[0]]
    other = fresh(4)
    join(a, other, WHY)
    assert resolve(other) == resolve(a)
    assert kept_positions(other, {resolve(a)[0]: []}) == []
    assert kept_positions(rows, {resolve(a)[0]: []}) == [1]


def test_a_unit_that_is_cut_out_alone_is_blocked():
    number, *_ = units_of(fresh(2))
    assert cut(number, [1], WHY) == [(), ()]
    assert blocks(number) == [WHY, WHY]


def test_a_unit_beside_a_position_without_an_axis_is_blocked():
    _, a, b = units_of(side_by_side([(), ()]))
    assert blocks(resolve(a)[:1]) == blocks(resolve(b)[:1]) == [WHY]


def test_a_dimension_with_a_unit_is_cut_behind_it():
    _, a, _ = units_of(fresh(2))
    assert [sizes(piece) for piece in cut(a, [2], WHY)] == [[1, 2], [1, 2]]
    assert not blocks(a)


# ------------------------------------------------------------------------------------------- cut


def test_a_cut_makes_parts():
    qkv = fresh(12)
    q, k, v = cut(qkv, [4, 6], WHY)
    assert [sizes(q), sizes(k), sizes(v)] == [[4], [2], [6]]
    assert list(leaves(qkv)) == [*q, *k, *v]


def test_a_cut_of_a_product_cuts_its_outer_factor():
    outer, inner = fresh(4), fresh(3)
    left, right = cut((*outer, *inner), [9], WHY)
    assert sizes(left) == [3, 3]
    assert sizes(right) == [3]
    assert not blocks((*outer, *inner))


def test_a_cut_through_an_inner_factor_blocks():
    dim = (*fresh(4), *fresh(3))
    pieces = cut(dim, [5], WHY)
    assert [sizes(piece) for piece in pieces] == [[5], [7]]
    assert blocks(dim) == [WHY, WHY]
    assert all(blocks(piece) for piece in pieces)


def test_a_piece_may_span_parts():
    a, b, c = fresh(2), fresh(3), fresh(4)
    left, right = cut(side_by_side([a, b, c]), [5], WHY)
    assert list(leaves(left)) == [*a, *b]
    assert right == c


def test_parts_of_a_blocked_axis_are_blocked():
    dim = fresh(6, WHY)
    assert [blocks(piece) for piece in cut(dim, [2], Block("another"))] == [[WHY], [WHY]]


def test_one_part_is_no_sum():
    a = fresh(4)
    assert side_by_side([fresh(0), a]) == a


# ------------------------------------------------------------------------------------------ join


def test_joined_axes_are_one():
    a, b = fresh(4), fresh(4)
    assert join(a, b, WHY) == resolve(a) == resolve(b)


def test_equal_sizes_are_not_one():
    a, b = fresh(4), fresh(4)
    assert resolve(a) != resolve(b)


def test_a_unit_broadcasts():
    a = fresh(4)
    assert join((), a, WHY) == join(a, (), WHY) == a


def test_joined_axes_share_their_reason():
    a, b = fresh(4, WHY), fresh(4)
    join(a, b, Block("another"))
    assert blocks(b) == [WHY]


def test_joining_splits_to_the_common_factors():
    a, b = (*fresh(4), *fresh(6)), (*fresh(2), *fresh(12))
    join(a, b, WHY)
    assert sizes(a) == sizes(b) == [2, 2, 6]
    assert resolve(a) == resolve(b)
    assert not blocks(a)


def test_joining_without_common_factors_blocks_both():
    a, b = (*fresh(4), *fresh(6)), (*fresh(6), *fresh(4))
    join(a, b, WHY)
    assert blocks(a) == blocks(b) == [WHY, WHY]


def test_joining_sums_cuts_both():
    a, b = side_by_side([fresh(2), fresh(4)]), side_by_side([fresh(3), fresh(3)])
    join(a, b, WHY)
    assert [leaf.size for leaf in leaves(a)] == [leaf.size for leaf in leaves(b)] == [2, 3]
    assert list(leaves(a)) == list(leaves(b))


def test_joining_other_sizes_is_an_error():
    with pytest.raises(ValueError, match="cannot join dimensions of 4 and 6 positions"):
        join(fresh(4), fresh(6), WHY)


# ------------------------------------------------------------------------- laws of any refinement


def flat(dims, keep):
    """The positions of the row-major product of `dims` that stay."""
    return kept_positions(tuple(axis for dim in dims for axis in dim), keep)


def laid_out(pieces, keep):
    """The positions that stay of `pieces` one after the other."""
    starts = np.cumsum([0, *map(size, pieces)]).tolist()
    return [
        s + p for s, piece in zip(starts, pieces, strict=False) for p in kept_positions(piece, keep)
    ]


def drawn_view(data, dims):
    """`dims` and a regrouping of them."""
    total, target = math.prod(map(size, dims)), []
    while total > 1 and len(target) < 4:
        target.append(
            data.draw(st.sampled_from([n for n in range(1, total + 1) if total % n == 0]))
        )
        total //= target[-1]
    return regroup(dims, [*target, total], WHY)


@given(st.data())
def test_refining_moves_no_position(data):
    """Whatever is split, cut, joined and blocked later, each step stays true for any keep set."""
    pool = [fresh(data.draw(st.sampled_from([2, 3, 4, 6, 8, 12]))) for _ in range(3)]
    facts = []
    for _ in range(data.draw(st.integers(1, 8))):
        dim = data.draw(st.sampled_from(pool))
        kind = data.draw(st.sampled_from(["view", "cut", "join", "sum", "block"]))
        if kind == "view":
            dims = [dim, data.draw(st.sampled_from(pool))]
            new = drawn_view(data, dims)
            facts.append((flat, dims, flat, new))
        elif kind == "cut" and size(dim) > 1:
            bounds = data.draw(st.sets(st.integers(1, size(dim) - 1), max_size=3))
            new = cut(dim, sorted(bounds), WHY)
            facts.append((flat, [dim], laid_out, new))
        elif kind == "join":
            other = data.draw(st.sampled_from([d for d in pool if size(d) == size(dim)]))
            new = [join(dim, other, WHY)]
            facts += [(flat, [dim], flat, [other]), (flat, [dim], flat, new)]
        elif kind == "sum":
            parts = [dim, data.draw(st.sampled_from(pool))]
            new = [side_by_side(parts)]
            facts.append((laid_out, parts, flat, new))
        else:
            block(dim, WHY)
            new = []
        pool += [d for d in new if 1 < size(d) <= 48]
    keep = {
        leaf: data.draw(st.lists(st.integers(0, leaf.size - 1), unique=True).map(sorted))
        for leaf in free(*pool)
    }
    for one, before, other, after in facts:
        assert one(before, keep) == other(after, keep)
