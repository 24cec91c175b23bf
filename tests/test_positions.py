"""Positions: what stays of products and sums of axes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxslim.axes import Axis, fresh
from fxslim.errors import PlanError
from fxslim.positions import (
    Uneven,
    coordinates,
    kept_before,
    kept_positions,
    narrowed_size,
    tells_groups,
)
from fxslim.refine import side_by_side


def test_positions_of_a_product():
    heads, width = fresh(3), fresh(2)
    assert kept_positions((*heads, *width), {heads[0]: [0, 2]}) == [0, 1, 4, 5]
    assert kept_positions((*width, *heads), {heads[0]: [0, 2]}) == [0, 2, 3, 5]


def test_positions_of_a_sum():
    q, k = fresh(3), fresh(2)
    assert kept_positions(side_by_side([q, k]), {k[0]: [1]}) == [0, 1, 2, 4]


def test_coordinates_tell_where_a_position_is():
    q, k, width = fresh(2), fresh(2), fresh(2)
    dim = (*side_by_side([q, k]), *width)
    assert coordinates(dim, k[0]) == [-1, -1, -1, -1, 0, 0, 1, 1]
    assert coordinates(dim, width[0]) == [0, 1, 0, 1, 0, 1, 0, 1]


def test_a_narrowed_length_need_not_be_listed():
    length, heads = Axis(2**40), Axis(8)
    assert narrowed_size((length, heads), {heads: [1, 5]}) == 2**41


@given(st.lists(st.integers(2, 5), min_size=1, max_size=4), st.data())
def test_positions_are_numpys(shape, data):
    dims = [fresh(n) for n in shape]
    keep = {
        d[0]: data.draw(st.lists(st.integers(0, d[0].size - 1), unique=True).map(sorted))
        for d in dims
    }
    numbers = np.arange(math.prod(shape)).reshape(shape)
    flat = tuple(axis for dim in dims for axis in dim)
    assert kept_positions(flat, keep) == numbers[np.ix_(*keep.values())].ravel().tolist()
    assert narrowed_size(flat, keep) == len(kept_positions(flat, keep))


# ------------------------------------------------------------------- other ones for each group


def uneven():
    """Three groups of four, of which two stay with two each, and a width."""
    group, within, width = fresh(3), fresh(4), fresh(2)
    keep = {group[0]: [0, 2], within[0]: Uneven(group[0], {0: [1, 3], 2: [0, 1]})}
    return group, within, width, keep


def test_each_group_keeps_its_own():
    group, within, width, keep = uneven()
    dim = (*group, *within, *width)
    assert kept_positions(dim, keep) == [2, 3, 6, 7, 16, 17, 18, 19]
    assert narrowed_size(dim, keep) == 8


def test_groups_may_be_the_inner_factor():
    group, within, _, keep = uneven()
    assert kept_positions((*within, *group), keep) == [3, 2, 9, 5]  # (1, 0) (0, 2) (3, 0) (1, 2)


def test_each_group_keeps_its_own_inside_a_sum():
    group, within, width, keep = uneven()
    packed = (*group, *side_by_side([within, (), ()]), *width)  # each group: four, and two more
    assert kept_positions(packed, keep)[:8] == [2, 3, 6, 7, 8, 9, 10, 11]
    sum_of_products = side_by_side([(*group, *within), group])
    assert kept_positions(sum_of_products, keep) == [1, 3, 8, 9, 12, 14]


def test_what_all_groups_share_cannot_be_uneven():
    group, within, width, keep = uneven()
    with pytest.raises(PlanError, match="something that all groups share"):
        kept_positions((*within, *width), keep)
    alike = {within[0]: Uneven(group[0], {0: [1, 3], 2: [1, 3]})}
    assert kept_positions((*within, *width), alike) == [2, 3, 6, 7]


def test_which_dimensions_tell_groups():
    group, within, width, _ = uneven()
    tells = {
        True: [
            (*group, *within),
            (*within, *group),
            width,
            side_by_side([(*group, *within), width]),
        ],
        False: [within, (*within, *width), side_by_side([(*group, *width), within])],
    }
    for answer, dims in tells.items():
        assert [tells_groups(dim, within[0], group[0]) for dim in dims] == [answer] * len(dims)


def test_how_many_stay_before_a_bound_needs_no_group():
    _, within, _, keep = uneven()
    packed = side_by_side([within, (), ()])
    assert kept_before(packed, keep, [0, 4, 5, 6]) == [0, 2, 3, 4]
    with pytest.raises(PlanError, match="something that all groups share"):
        kept_before(packed, keep, [1])
