"""The feed-forward blocks of the whole zoo: half of the channels, against the dense model's."""

import pytest

import fxslim
from tests.zoo.entries import entry_names, load
from tests.zoo.reference import TOLERANCE, call_of, compare, dense_of, without_heads

pytestmark = pytest.mark.zoo


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", entry_names())
def test_cut_channels_are_channels_that_nothing_reads(name):
    try:
        model, inputs = load(name)
        program = fxslim.capture(model, inputs)
    except (ModuleNotFoundError, fxslim.CaptureError) as error:
        pytest.skip(str(error).splitlines()[0])
    sites = [site for site in fxslim.find_feed_forward(program) if site.prunable]
    if not sites:
        pytest.skip("it has no feed-forward block to prune")
    plan = fxslim.PruningPlan({s.name: list(range(1, s.channels, 2)) for s in sites}, 0.5)
    slim = fxslim.narrow(program, plan)
    fxslim.verify(slim, fxslim.insert_head_masks(program, sites), plan)
    call = call_of(inputs)
    reference = without_heads(dense_of(program, model, call), sites, plan.kept)
    assert compare(call.on(slim), call.on(reference)).relative < TOLERANCE
