"""The whole zoo, each entry in a process of its own (``pytest -m zoo``; minutes to an hour)."""

import pytest

from tests.zoo.diffusers_models import DIFFUSERS
from tests.zoo.entries import entry_names
from tests.zoo.expected import NOT_PRUNABLE
from tests.zoo.handwritten import HANDWRITTEN
from tests.zoo.runner import Job, jobs_of, run

pytestmark = pytest.mark.zoo

_ARCHITECTURES = [name for name in entry_names() if "/" not in name]
_EXPECTED = {f"handwritten/{name}": entry for name, entry in HANDWRITTEN.items()}
_EXPECTED |= {f"diffusers/{name}": entry for name, entry in DIFFUSERS.items()}


def _check(job):
    (result,) = run([job])
    if result.status == "skipped":
        pytest.skip(result.detail.splitlines()[0])
    return result


@pytest.mark.parametrize("job", jobs_of(_ARCHITECTURES), ids=lambda job: f"{job.name}-{job.attn}")
def test_the_slim_model_is_the_dense_one_without_the_removed_heads(job):
    result = _check(job)
    if result.status == "capture":
        pytest.skip(f"torch.export cannot capture it: {result.detail.splitlines()[0]}")
    assert result.status == ("refused" if job.name in NOT_PRUNABLE else "equal"), result


@pytest.mark.parametrize("name", _EXPECTED)
def test_what_is_known_of_an_entry_is_found(name):
    entry, result = _EXPECTED[name], _check(Job(name, "own"))
    assert result.status == ("equal" if entry.prunable else "refused"), result
    assert (result.sites, result.prunable) == (entry.attentions, entry.prunable), result
