"""Constraints: what each allows, together, and what is said where nothing is left."""

import re

import pytest
import torch

import fxslim
from fxslim import Constraints
from tests.test_plan import site

A, B = site("encoder.0"), site("decoder.0", heads=6)
SCORES = {"encoder.0": [1.0, 2.0, 3.0, 4.0], "decoder.0": [9.0, 8.0, 7.0, 6.0, 5.0, 0.0]}


def kept(sparsity, sites=(A, B), *, min_heads=1, scope="global", **constraints):
    """What a plan under these constraints keeps."""
    scores = {s.name: torch.tensor(SCORES.get(s.name, [1.0] * s.num_heads)) for s in sites}
    options = {"min_heads": min_heads, "scope": scope, "constraints": Constraints(**constraints)}
    plan = fxslim.plan(scores, sites, sparsity, **options)
    return {name.split(".")[0]: heads for name, heads in plan.kept.items()}


def test_excluded_sites_stay_whole():
    assert kept(0.2, exclude=["enc*"]) == {"encoder": [0, 1, 2, 3], "decoder": [0, 1, 2, 3]}
    assert kept(0.2) == {"encoder": [1, 2, 3], "decoder": [0, 1, 2, 3, 4]}


def test_given_heads_stay():
    assert kept(0.2, keep={"encoder.0": [0]}) == {"encoder": [0, 2, 3], "decoder": [0, 1, 2, 3, 4]}
    assert kept(0.2, keep={"*": [0, 1, 2, 3]})["decoder"] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("share", "left"), [(0.5, (2, 3)), ({"enc*": 0.75}, (3, 2)), ({"*": 0.5, "dec*": 0.8}, (2, 5))]
)
@pytest.mark.filterwarnings("ignore:fxslim.plan")
def test_a_share_stays_at_least(share, left):
    found = kept(0.5 if isinstance(share, dict) and "enc*" in share else 0.9, min_share=share)
    assert (len(found["encoder"]), len(found["decoder"])) == left


def test_a_share_stays_at_most():
    assert kept(0.4, max_share={"dec*": 0.5}) == {"encoder": [1, 2, 3], "decoder": [0, 1, 2]}
    said = (
        "sparsity=0.2 lets 2 of 10 heads go, but the constraints (multiple_of, max_share) make 3 go"
    )
    with pytest.raises(fxslim.PlanError, match=f"^{re.escape(said)}$"):
        kept(0.2, max_share={"dec*": 0.5})


def test_what_stays_is_a_multiple_even_of_sites_that_lose_nothing_else():
    assert kept(0.2, multiple_of=4) == {"encoder": [0, 1, 2, 3], "decoder": [0, 1, 2, 3]}
    assert kept(0.4, multiple_of=2) == {"encoder": [2, 3], "decoder": [0, 1, 2, 3]}


def test_a_multiple_counts_query_heads_of_whole_groups():
    grouped = site("g", heads=8, group=2)
    assert len(kept(0.6, [grouped], multiple_of=4)["g"]) == 4


def test_none_is_a_multiple_only_if_all_heads_may_go():
    assert kept(0.2, min_heads=1, multiple_of=4)["encoder"] == [0, 1, 2, 3]
    assert kept(0.99, [A, B], min_heads=0, multiple_of=4)["encoder"] == []


def test_heads_that_stay_are_the_last_query_heads_to_go():
    grouped = site("g", heads=6, group=3)
    scores = {"g": torch.tensor([1.0, 2.0, 3.0, 1.0, 2.0, 3.0])}
    keep = Constraints(keep={"g": [0, 4]})
    plan = fxslim.plan(scores, [grouped], 0.7, unit="query", constraints=keep)
    assert plan.kept == {"g": [0, 4]}


def test_uniform_takes_a_number_that_all_allow():
    left = kept(0.5, scope="uniform", keep={"dec*": [0, 1, 2]})
    assert {name: len(heads) for name, heads in left.items()} == {"encoder": 3, "decoder": 3}


# -------------------------------------------------------------------------------- what is refused


def test_where_no_number_is_allowed_each_constraint_says_which_it_allows():
    with pytest.raises(fxslim.PlanError) as caught:
        kept(0.5, min_heads=5, multiple_of=4)
    assert str(caught.value).splitlines() == [
        "no number of heads is allowed in 'decoder.0':",
        "  min_heads=5 allows 5, 6 of 6 heads",
        "  multiple_of=4 allows 0, 4 of 6 heads",
    ]


def test_uniform_leaves_excluded_sites_alone():
    left = kept(0.25, scope="uniform", exclude=["dec*"])
    assert {name: len(heads) for name, heads in left.items()} == {"encoder": 2, "decoder": 6}


def test_excluding_a_site_excludes_those_that_share_its_weights():
    a, b = site("s", coupled=("s@2",)), site("s@2", coupled=("s",))
    left = kept(0.3, [A, a, b], scope="uniform", exclude=["s@2"])
    assert {name: len(heads) for name, heads in left.items()} == {"encoder": 1, "s": 4, "s@2": 4}


def test_uniform_may_be_impossible():
    with pytest.raises(fxslim.PlanError, match=r"^no number of heads is allowed in all of decoder"):
        kept(0.5, scope="uniform", min_share={"dec*": 0.9}, max_share={"enc*": 0.5})


@pytest.mark.parametrize(
    "constraints",
    [{"exclude": ["enc"]}, {"keep": {"enc": [0]}}, {"min_share": {"enc": 0.5}}],
)
def test_a_pattern_that_matches_nothing_lists_the_sites(constraints):
    said = "^the pattern 'enc' matches no site; the sites are: encoder.0, decoder.0$"
    with pytest.raises(fxslim.PlanError, match=said):
        kept(0.5, **constraints)


def test_heads_to_keep_must_exist():
    with pytest.raises(fxslim.PlanError, match=r"^'encoder.0' has heads 0 to 3; keep has \[4\]$"):
        kept(0.5, keep={"enc*": [4]})


@pytest.mark.parametrize(
    ("constraints", "error", "said"),
    [
        ({"min_share": 1.5}, ValueError, "min_share must be in [0, 1], not 1.5"),
        ({"max_share": {"*": -1}}, ValueError, "max_share must be in [0, 1], not -1"),
        ({"min_share": "half"}, TypeError, "min_share must be a number, not 'half'"),
        ({"multiple_of": 0}, ValueError, "multiple_of must be in [1, inf], not 0"),
        ({"multiple_of": 2.0}, TypeError, "multiple_of must be a whole number, not 2.0"),
        ({"exclude": "enc*"}, TypeError, "exclude must be a sequence of patterns, not 'enc*'"),
        ({"keep": [0]}, TypeError, "keep must map patterns to heads, not be [0]"),
    ],
)
def test_bad_constraints_are_named(constraints, error, said):
    with pytest.raises(error, match=f"^{re.escape(said)}$"):
        Constraints(**constraints)
