"""Ridge regression: against a solver that sees all rows at once."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fxslim.least_squares import Moments, fit


def moments(x, y, chunk=7):
    """Streamed in chunks."""
    made = Moments(x.shape[1], y.shape[1])
    for start in range(0, len(x), chunk):
        made.add(x[start : start + chunk], y[start : start + chunk])
    return made


def data(seed, rows=60, features=4, outputs=3, noise=0.0):
    torch.manual_seed(seed)
    x, weight, bias = (torch.randn(*s) for s in [(rows, features), (features, outputs), (outputs,)])
    return x, x @ weight + bias + noise * torch.randn(rows, outputs), weight, bias


def test_what_is_linear_is_recovered():
    x, y, weight, bias = data(0)
    start = torch.zeros_like(weight), torch.zeros_like(bias)
    found = fit(moments(x[:40], y[:40]), moments(x[40:], y[40:]), *start, intercept=True)
    torch.testing.assert_close(found.weight.float(), weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(found.bias.float(), bias, atol=1e-4, rtol=0)
    assert found.after < 1e-8 < found.before


def test_without_an_intercept_the_bias_stays():
    x, y, weight, bias = data(1)
    found = fit(moments(x[:40], y[:40]), moments(x[40:], y[40:]), 0 * weight, bias, intercept=False)
    torch.testing.assert_close(found.weight.float(), weight, atol=1e-4, rtol=0)
    assert torch.equal(found.bias.float(), bias)


def test_the_solution_is_that_of_all_rows_with_the_ridge_as_more_rows():
    x, y, weight, bias = data(2, noise=1.0)
    start = 0.5 * weight
    found = fit(moments(x[:50], y[:50]), moments(x[50:], y[50:]), start, bias, intercept=False)
    assert math.isfinite(found.strength)
    root = (found.strength * x.double().square().sum(0).mean()).sqrt() * torch.eye(4).double()
    rows = torch.cat([x.double(), root])
    targets = torch.cat([(y - bias).double(), root @ start.double()])
    torch.testing.assert_close(found.weight, torch.linalg.lstsq(rows, targets).solution)


def test_what_was_there_stays_where_nothing_does_better_on_other_rows():
    x, y, weight, bias = data(3)
    torch.manual_seed(0)
    noise = torch.randn(5, 3)
    found = fit(moments(x[:5], noise), moments(x[5:], y[5:]), weight, bias, intercept=True)
    assert found.strength == math.inf
    assert torch.equal(found.weight.float(), weight)
    assert found.after == found.before


@given(st.integers(0, 10_000), st.floats(0, 3), st.booleans())
def test_held_out_rows_are_never_fitted_worse_than_before(seed, noise, intercept):
    x, y, weight, bias = data(seed, noise=noise)
    start = weight + torch.randn_like(weight), bias + 1
    train, judge = moments(x[:30], y[:30]), moments(x[30:], y[30:])
    found = fit(train, judge, *start, intercept=intercept)
    assert found.after <= found.before
    predicted = x[30:].double() @ start[0].double() + start[1].double()
    error = (y[30:].double() - predicted).square().sum(1).mean()
    assert found.before == pytest.approx(float(error), rel=1e-6)
