"""Plans of random sites under random constraints: what must hold of every one of them."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, event, given
from hypothesis import strategies as st

import fxslim
from fxslim import Constraints, Costs, Scores
from fxslim.plan import check_plan
from fxslim.selection import Problem, select
from tests.test_plan import site

pytestmark = pytest.mark.filterwarnings("ignore:fxslim.plan")


@st.composite
def site_lists(draw):
    """Up to four attentions of several widths, some grouped, two of them coupled."""
    sites = []
    for name in "abcd"[: draw(st.integers(1, 4))]:
        group = draw(st.sampled_from([1, 1, 2]))
        sites.append(site(name, heads=group * draw(st.integers(2, 5)), group=group))
    if draw(st.booleans()) and len(sites) > 1:
        first, second = sites[0], replace(sites[0], name=sites[1].name)
        sites[:2] = [replace(first, coupled=(second.name,)), replace(second, coupled=(first.name,))]
    return sites


@st.composite
def scores_of(draw, sites):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    values = {s.name: torch.rand(s.num_heads, generator=generator) for s in sites}
    if draw(st.booleans()):
        return Scores(values)
    heads = sum(s.num_heads for s in sites)
    rank = draw(st.integers(1, heads))
    factors = torch.randn(heads, rank, generator=generator, dtype=torch.float64)
    return Scores(values, factors @ factors.mT)


@st.composite
def costs_of(draw, sites):
    """Rows that rise, and one that does not always."""
    rows = {}
    for s in sites:
        if not s.coupled or s.name < s.coupled[0]:
            steps = draw(st.lists(st.integers(-1, 6), min_size=s.num_heads, max_size=s.num_heads))
            rows[s.name] = [0.0, *itertools.accumulate(map(float, steps))]
    row_ends = sum(row[-1] for row in rows.values())
    return Costs("latency", "group", draw(st.integers(0, 20)) + max(0.0, 1 - row_ends), rows)


@st.composite
def constraints_of(draw, sites):
    names = [s.name for s in sites]
    return Constraints(
        min_share=draw(st.sampled_from([0.0, 0.25, {names[0]: 0.6}])),
        max_share=draw(st.sampled_from([1.0, 1.0, 0.8, {names[-1]: 0.7}])),
        multiple_of=draw(st.sampled_from([1, 1, 2, 3])),
        exclude=draw(st.sampled_from([(), (), (names[0],), ("[ab]",)])),
        keep=draw(st.sampled_from([{}, {"*": [1]}, {names[-1]: [0, 1]}])),
    )


@st.composite
def requests(draw):
    sites = draw(site_lists())
    options = {
        "scope": draw(st.sampled_from(["global", "local", "uniform"])),
        "min_heads": draw(st.integers(0, 3)),
        "constraints": draw(constraints_of(sites)),
    }
    if draw(st.booleans()):
        options |= {"budget": draw(st.floats(0.3, 1)), "costs": draw(costs_of(sites))}
    else:
        options["sparsity"] = draw(st.floats(0, 0.99))
    return draw(scores_of(sites)), sites, options


def planned(scores, sites, options):
    """The plan, unless it is refused with a reason."""
    try:
        return fxslim.plan(scores, sites, **options)
    except fxslim.PlanError as error:
        said = str(error)
        event(said.split(" ")[0])
        assert (
            "cannot be reached" in said
            or "lets" in said
            or "no number of heads" in said
            or ("matches no site" in said and "[ab]" in said)
        )
        return None


@given(requests())
def test_targets_and_constraints_hold(request):
    scores, sites, options = request
    plan = planned(scores, sites, options)
    assume(plan is not None)
    check_plan(plan, sites)
    _holds(plan, sites, options["constraints"], options["min_heads"])
    heads = sum(s.num_heads for s in sites)
    gone = heads - sum(map(len, plan.kept.values()))
    assert plan.sparsity == gone / heads
    if "budget" in options:
        costs = options["costs"]
        assert plan.reached == {"latency": costs.total(plan.kept) / costs.total()}
        assert costs.total(plan.kept) <= options["budget"] * costs.total() * (1 + 1e-6)
    else:
        assert gone <= options["sparsity"] * heads + 1e-6


def _holds(plan, sites, constraints, min_heads):
    for s in sites:
        kept, names = plan.kept[s.name], {s.name, *s.coupled}
        excluded = {n for n in names for p in constraints.exclude if n in p}
        if excluded:
            assert len(kept) == s.num_heads
            continue
        assert len(kept) >= min(min_heads, s.num_heads)
        assert len(kept) % constraints.multiple_of == 0
        for bound, sign in ((constraints.min_share, 1), (constraints.max_share, -1)):
            for pattern, share in bound.items() if isinstance(bound, dict) else [("*", bound)]:
                if pattern in ("*", s.name):
                    assert sign * len(kept) >= sign * share * s.num_heads - 1e-6
        for pattern, held in constraints.keep.items():
            if pattern in ("*", s.name):
                assert set(held) <= set(kept)


@given(site_lists(), st.data())
def test_uniform_sites_keep_as_many_heads_or_all(sites, data):
    scores = data.draw(scores_of(sites))
    sparsity, multiple = data.draw(st.floats(0, 0.99)), data.draw(st.sampled_from([1, 2]))
    options = {"scope": "uniform", "constraints": Constraints(multiple_of=multiple)}
    plan = planned(scores, sites, options | {"sparsity": sparsity})
    if plan is not None:
        counts = {s.name: len(plan.kept[s.name]) for s in sites}
        least = min(counts.values())
        smaller = {s.name for s in sites if counts[s.name] == s.num_heads}
        assert {counts[name] for name in counts.keys() - smaller} <= {max(counts.values())}
        assert least == max(counts.values()) or smaller


@given(requests(), st.randoms(use_true_random=False))
def test_the_order_of_sites_changes_nothing(request, random):
    scores, sites, options = request
    plan = planned(scores, sites, options)
    shuffled = random.sample(sites, len(sites))
    other = planned(scores, shuffled, options)
    assert (plan and plan.kept) == (other and other.kept)
    assert plan == planned(scores, sites, options)


@given(requests())
def test_a_written_plan_and_written_scores_are_the_same(request):
    scores, sites, options = request
    plan = planned(scores, sites, options)
    assume(plan is not None)
    assert fxslim.PruningPlan.from_json(plan.to_json()) == plan
    assert fxslim.plan(Scores.from_json(scores.to_json()), sites, **options) == plan
    assert fxslim.PruningPlan.of(plan.kept, sites, options.get("costs")) == plan


# -------------------------------------------------------------------------------------- selection


@st.composite
def problems(draw):
    """Up to eight units in up to three rows, with interactions, to save some share of the cost."""
    rows, columns = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    size = rows * columns
    factors = torch.randn(size, draw(st.integers(1, size)), generator=generator).double()
    matrix = factors @ factors.mT
    steps = torch.randint(1, 9, (rows, columns), generator=generator).double()
    cost = torch.cat([torch.zeros(rows, 1).double(), steps.cumsum(1)], 1)
    total = cost[:, -1].sum().item()
    least = draw(st.floats(0, 1)) * total
    lower = draw(st.sampled_from([-math.inf, least]))
    loss = matrix.diagonal().reshape(rows, columns).clone()
    pairs = 2 * (matrix - matrix.diagonal().diag())
    allowed = torch.ones_like(cost, dtype=torch.bool)
    units = torch.full((rows,), columns)
    return matrix, Problem(loss, pairs, units, allowed, cost, lower, least)


def loss_of(matrix, removed):
    x = removed.flatten().double()
    return (x @ matrix @ x).item()


def left(problem, removed):
    kept = (~removed).sum(1)
    return sum(row[k].item() for row, k in zip(problem.cost, kept, strict=True))


@given(problems())
def test_interactions_never_make_it_worse(case):
    """Not worse than ignoring them, at the same target; nor than what an exchange would better."""
    matrix, problem = case
    removed = select(problem)
    alone = select(replace(problem, pairs=None))
    if problem.lower == -math.inf:
        assert left(problem, removed) <= problem.upper
        assert loss_of(matrix, removed) <= loss_of(matrix, alone) + 1e-6
    else:
        assert left(problem, removed) >= problem.lower
        assert left(problem, removed) <= left(problem, alone)
        if left(problem, removed) == left(problem, alone):
            assert loss_of(matrix, removed) <= loss_of(matrix, alone) + 1e-6


def test_an_exchange_without_interactions_may_be_the_better_start():
    """Units that undo each other in pairs: the best two are found from where none interact."""
    factors = torch.tensor([[1.26], [-1.59], [2.58], [-2.51]], dtype=torch.float64)
    matrix = factors @ factors.mT
    problem = Problem(
        loss=matrix.diagonal().reshape(2, 2).clone(),
        pairs=2 * (matrix - matrix.diagonal().diag()),
        units=torch.tensor([2, 2]),
        allowed=torch.ones(2, 3, dtype=torch.bool),
        cost=torch.tensor([[0.0, 3.0, 6.0], [0.0, 8.0, 14.0]]),
        lower=-math.inf,
        upper=7.3,
    )
    assert select(problem).tolist() == [[False, False], [True, True]]


def best(matrix, problem):
    """The least loss of any removal that meets the target exactly as asked."""
    found = math.inf
    for bits in itertools.product([False, True], repeat=problem.loss.numel()):
        removed = torch.tensor(bits).view(problem.loss.shape)
        if left(problem, removed) <= problem.upper:
            found = min(found, loss_of(matrix, removed))
    return found


def test_it_is_mostly_the_best_of_all():
    close = []
    for seed in range(60):
        generator = torch.Generator().manual_seed(seed)
        factors = torch.randn(8, 6, generator=generator, dtype=torch.float64)
        matrix = factors @ factors.mT
        loss = matrix.diagonal().reshape(2, 4).clone()
        pairs = 2 * (matrix - matrix.diagonal().diag())
        cost = torch.arange(5.0, dtype=torch.float64).expand(2, 5)
        units = torch.tensor([4, 4])
        problem = Problem(loss, pairs, units, cost >= 0, cost, -math.inf, 4.0)
        found = loss_of(matrix, select(problem))
        close.append(found <= best(matrix, problem) + 1e-9)
    assert sum(close) >= 45
