"""Random transformers: the laws of `laws.py` hold for all of them."""

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.properties.laws import Program, located_once, plans
from tests.properties.specs import specs

UNHURRIED = [HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.large_base_example]


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """The tensors are tiny: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check(spec, data):
    with located_once():
        program = Program(spec)
        program.capture_computes_the_model()
        program.every_attention_is_found_and_nothing_else()
        program.coupled_heads_are_refused()
        program.only_shared_weights_couple_sites()
        program.an_empty_plan_changes_nothing()
        program.permuting_a_free_axis_changes_nothing(data)
        if program.prunable:
            program.slim_equals_masked(data.draw(plans(program.prunable), label="plan"))
            first = data.draw(plans(program.prunable, least=1), label="first plan")
            program.two_steps_equal_one(first, data)
        program.no_step_changes_the_program()


@pytest.mark.parametrize("start", range(6))
def test_random_programs(start):
    """300 programs, in parts that run side by side."""

    @seed(start)
    @settings(max_examples=50, database=None, suppress_health_check=UNHURRIED)
    @given(spec=specs(), data=st.data())
    def programs(spec, data):
        check(spec, data)

    programs()


@pytest.mark.fuzz
@settings(max_examples=20_000, suppress_health_check=UNHURRIED)
@given(spec=specs(), data=st.data())
def test_many_random_programs(spec, data):
    check(spec, data)
