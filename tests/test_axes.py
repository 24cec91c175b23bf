"""Axes: a dimension is what it is made of, not a size."""

from fxslim.axes import fresh, resolve, size


def test_one_position_is_no_axis():
    assert fresh(1) == ()
    assert size(fresh(1)) == 1


def test_no_positions_are_an_axis():
    assert [axis.size for axis in resolve(fresh(0))] == [0]
