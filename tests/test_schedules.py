"""Schedules: when heads go, and how many are gone."""

import math

import pytest

from fxslim.schedules import DECAYS, Schedule


@pytest.mark.parametrize(
    ("decay", "halfway"),
    [
        ("cos", 0.6 * (1 - math.sqrt(0.5))),
        ("cube", 0.6 / 8),
        ("exp", 1 - math.sqrt(0.4)),
        ("linear", 0.3),
    ],
)
def test_the_decays_at_half_the_way(decay, halfway):
    schedule = Schedule(0.6, start=10, end=30, frequency=5, decay=decay)
    assert schedule.sparsity(20) == pytest.approx(halfway)


@pytest.mark.parametrize("decay", sorted(DECAYS))
def test_sparsity_grows_from_nothing_to_the_target_itself(decay):
    schedule = Schedule(0.5, start=2, end=8, decay=decay)
    sparsities = [schedule.sparsity(step) for step in range(12)]
    assert sparsities[:3] == [0, 0, 0]
    assert sparsities[8:] == [0.5] * 4
    assert sparsities == sorted(sparsities)


def test_heads_go_from_start_to_end_at_every_so_many_steps():
    schedule = Schedule(0.5, start=3, end=12, frequency=4)
    assert [step for step in range(20) if schedule.prunes_at(step)] == [3, 7, 11]
    assert schedule.last == 11
    assert schedule.sparsity(11) == 0.5


@pytest.mark.parametrize("schedule", [Schedule(0.5, 4, 4), Schedule(0.5, 4, 6, frequency=10)])
def test_one_pruning_goes_all_the_way(schedule):
    assert [step for step in range(20) if schedule.prunes_at(step)] == [4]
    assert schedule.sparsity(4) == 0.5
