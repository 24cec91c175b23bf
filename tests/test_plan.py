"""Plans: the lowest scores go, whole units at a time, and never more than was asked."""

import json
import re
from dataclasses import replace

import pytest
import torch

import fxslim
from fxslim.plan import check_plan
from fxslim.sites import AttentionSite


def site(name, heads=4, group=1, coupled=(), reason=""):
    """A site as `find_attention` makes it, without weights."""
    unit = tuple(tuple(range(i, i + group)) for i in range(0, heads, group))
    return AttentionSite(
        name=name,
        kind="mha" if group == 1 else "gqa",
        is_cross=False,
        num_heads=heads,
        num_kv_heads=heads // group,
        head_dim=2,
        query=(),
        key=(),
        value=(),
        output=(),
        unit=() if reason else unit,
        uneven=group > 1 and not reason,
        coupled=coupled,
        prunable=not reason,
        reason=reason,
        cores=("softmax",),
    )


def kept(scores, sites, sparsity=0.5, **options):
    """What a plan keeps, for scores given as lists."""
    scores = {name: torch.tensor(values) for name, values in scores.items()}
    return fxslim.plan(scores, sites, sparsity, **options).kept


A, B = site("a"), site("b")
SCORES = {"a": [1.0, 2.0, 3.0, 4.0], "b": [10.0, 0.0, 20.0, 30.0]}


def test_the_lowest_scores_go_whichever_site_they_are_of():
    assert kept(SCORES, [A, B]) == {"a": [3], "b": [0, 2, 3]}
    assert kept(SCORES, [A, B], 0.25) == {"a": [1, 2, 3], "b": [0, 2, 3]}
    assert kept(SCORES, [A, B], 0) == {"a": [0, 1, 2, 3], "b": [0, 1, 2, 3]}


def test_local_removes_the_same_share_of_every_site():
    wide = site("b", heads=8)
    scores = {"a": SCORES["a"], "b": [float(100 + n) for n in range(8)]}
    assert kept(scores, [A, wide], scope="local") == {"a": [2, 3], "b": [4, 5, 6, 7]}


def test_uniform_leaves_every_site_the_same_number():
    wide = site("b", heads=8)
    scores = {"a": SCORES["a"], "b": [float(100 + n) for n in range(8)]}
    left = kept(scores, [A, wide], scope="uniform")
    assert {name: len(heads) for name, heads in left.items()} == {"a": 3, "b": 3}


@pytest.mark.filterwarnings("ignore:fxslim.plan")
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.24, 0.25, 0.3, 0.5, 0.74, 0.75, 0.99])
@pytest.mark.parametrize("scope", ["global", "local", "uniform"])
def test_never_more_than_asked_and_what_is_reached_is_said(sparsity, scope):
    scores = {name: torch.tensor(values) for name, values in SCORES.items()}
    plan = fxslim.plan(scores, [A, B], sparsity, scope=scope)
    gone = 8 - sum(len(heads) for heads in plan.kept.values())
    assert plan.sparsity == gone / 8 <= sparsity
    assert all(plan.kept.values())


def test_rounding_does_not_lose_a_head():
    ten = site("a", heads=10)  # 0.3 * 10 is a little less than 3 in floating point
    assert len(kept({"a": [float(n) for n in range(10)]}, [ten], 0.3)["a"]) == 7


def test_min_heads_stay_in_every_site():
    scores = {"a": [0.0, 1.0, 2.0, 3.0], "b": [9.0] * 4}
    assert kept(scores, [A, B], 0.5) == {"a": [3], "b": [1, 2, 3]}
    assert kept(scores, [A, B], 0.5, min_heads=2) == {"a": [2, 3], "b": [2, 3]}
    assert kept(scores, [A, B], 0.5, min_heads=0) == {"a": [], "b": [0, 1, 2, 3]}


def test_a_unit_goes_whole_and_is_scored_by_its_mean():
    grouped = site("a", group=2)
    assert kept({"a": [0.0, 9.0, 1.0, 2.0]}, [grouped]) == {"a": [0, 1]}
    with pytest.warns(UserWarning, match="no head was removed: sparsity=0.49 of 4 heads is less"):
        assert kept({"a": [0.0, 9.0, 1.0, 2.0]}, [grouped], 0.49) == {"a": [0, 1, 2, 3]}


def test_coupled_sites_lose_the_same_heads():
    first, second = site("a", coupled=("a@2",)), site("a@2", coupled=("a",))
    scores = {"a": [0.0, 5.0, 1.0, 9.0], "a@2": [9.0, 0.0, 1.0, 9.0]}
    assert kept(scores, [first, second]) == {"a": [0, 3], "a@2": [0, 3]}


def test_refused_sites_are_not_in_the_plan():
    assert kept(SCORES, [A, site("c", reason="it is not")]) == {"a": [2, 3]}


# -------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("scores", "options", "said"),
    [
        (SCORES, {"sparsity": 1.0}, "sparsity must be in [0, 1), not 1.0"),
        (SCORES, {"sparsity": -0.1}, "sparsity must be in [0, 1), not -0.1"),
        (SCORES, {"scope": "all"}, "scope must be one of global, local, uniform, not 'all'"),
        (SCORES, {"min_heads": -1}, "min_heads must be 0 or more, not -1"),
        ({"a": SCORES["a"]}, {}, "no scores for site 'b'"),
        (SCORES | {"b": [1.0, 2.0]}, {}, "scores of 'b' have shape (2,), not (4,)"),
        (SCORES | {"b": [1.0, 2.0, 3.0, float("nan")]}, {}, "scores of 'b' are not finite: "),
        (SCORES | {"b": [1.0, 2.0, 3.0, float("inf")]}, {}, "scores of 'b' are not finite: "),
    ],
)
def test_bad_arguments_are_named(scores, options, said):
    with pytest.raises(ValueError, match=f"^{re.escape(said)}"):
        kept(scores, [A, B], **options)


def test_no_prunable_site_is_an_error_with_the_reasons():
    with pytest.raises(fxslim.PlanError, match=r"^no site is prunable\n  c: it is not$"):
        fxslim.plan({}, [site("c", reason="it is not")])


@pytest.mark.parametrize(
    ("plan", "error", "said"),
    [
        ({"x": [0]}, fxslim.PlanError, "the plan names site 'x'; the sites are: a, g, c, s, s@2"),
        ({"a": [0, 4]}, fxslim.PlanError, "'a' has heads 0 to 3, the plan keeps [0, 4]"),
        ({"a": [0, 0]}, fxslim.PlanError, "'a' has heads 0 to 3, the plan keeps [0, 0]"),
        ({"g": [0, 1, 2]}, fxslim.PlanError, "heads [2, 3] of 'g' go together; the plan keeps "),
        ({"c": [0]}, fxslim.UnsupportedSite, "'c' cannot be pruned: it is not"),
        (
            {"s": [0, 1]},
            fxslim.PlanError,
            "'s' and 's@2' share weights, so they must keep the same heads",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan, error, said):
    sites = [A, replace(site("g", group=2), uneven=False), site("c", reason="it is not")]
    sites += [site("s", coupled=("s@2",)), site("s@2", coupled=("s",))]
    with pytest.raises(error, match=f"^{re.escape(said)}"):
        check_plan(fxslim.PruningPlan(plan, 0.5), sites)


def test_a_plan_may_leave_sites_out_and_keep_refused_ones_whole():
    sites = [A, site("c", reason="it is not")]
    check_plan(fxslim.PruningPlan({}, 0.0), sites)
    check_plan(fxslim.PruningPlan({"c": [0, 1, 2, 3]}, 0.0), sites)


# ------------------------------------------------------------------------------------------- JSON


def test_json_round_trip():
    plan = fxslim.PruningPlan({"a": [0, 2], "b.c@2": []}, 0.75, {"flops": 0.6})
    assert fxslim.PruningPlan.from_json(plan.to_json()) == plan
    data = {"kept": {"a": [0, 2], "b.c@2": []}, "sparsity": 0.75}
    assert json.loads(plan.to_json()) == data | {"reached": {"flops": 0.6}}
    assert fxslim.PruningPlan.from_json(json.dumps(data)) == replace(plan, reached={})


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"kept": {"a": 3}}', '{"kept": {"a": []}}'])
def test_what_is_no_plan_says_what_a_plan_is(text):
    expected = 'expected {"kept": {site: [head, ...]}, "sparsity": number}'
    with pytest.raises(fxslim.PlanError, match=r"^this is no pruning plan \(") as caught:
        fxslim.PruningPlan.from_json(text)
    assert str(caught.value).endswith(expected)


# ----------------------------------------------------------------------------- single query heads

GROUPED = site("g", heads=6, group=3)  # KV heads 0 and 1, with query heads 0 to 2 and 3 to 5


def test_a_round_takes_the_lowest_query_head_of_every_group():
    scores = {"g": [5.0, 1.0, 9.0, 2.0, 8.0, 7.0]}
    assert kept(scores, [GROUPED], 0.4, unit="query") == {"g": [0, 2, 4, 5]}
    assert kept(scores, [GROUPED], 0.7, unit="query") == {"g": [2, 4]}
    assert kept(scores, [GROUPED], 0.5, unit="group") == {"g": [3, 4, 5]}


def test_coupled_sites_lose_query_heads_at_the_same_places():
    a, b = (site(n, heads=6, group=3, coupled=(o,)) for n, o in (("a", "b"), ("b", "a")))
    scores = {"a": [1.0, 2.0, 9.0] * 2, "b": [9.0, 2.0, 9.0] * 2}
    assert kept(scores, [a, b], 0.4, unit="query") == {"a": [0, 2, 3, 5], "b": [0, 2, 3, 5]}


def test_a_site_that_is_not_uneven_loses_whole_groups():
    whole = replace(GROUPED, uneven=False)
    scores = {"g": [5.0, 1.0, 9.0, 2.0, 8.0, 7.0]}
    assert kept(scores, [whole], 0.5, unit="query") == {"g": [3, 4, 5]}


def test_groups_that_stay_must_keep_as_many_heads_each():
    check_plan(fxslim.PruningPlan({"g": [0, 5]}, 0.5), [GROUPED])
    check_plan(fxslim.PruningPlan({"g": [0, 2]}, 0.5), [GROUPED])  # one group goes
    said = (
        "the KV groups of 'g' that stay must keep as many query heads each; "
        "the plan keeps [1, 2] of the groups [[0, 1, 2], [3, 4, 5]]"
    )
    with pytest.raises(fxslim.PlanError, match=re.escape(said)):
        check_plan(fxslim.PruningPlan({"g": [0, 3, 4]}, 0.5), [GROUPED])
