"""Positions: what stays of products and sums of axes."""

import math

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fxslim.axes import Axis, fresh
from fxslim.positions import coordinates, kept_positions, narrowed_size
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
