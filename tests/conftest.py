"""What every test runs under: no network, one thread a worker, a fixed seed, no deadlines."""

import gc
import os

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers share the cores

# Exporting a model can take seconds, so no example has a deadline.
settings.register_profile("fxslim", settings.default, deadline=None)
settings.register_profile("fuzz", settings.default, deadline=None, max_examples=2000)
settings.load_profile("fxslim")


def pytest_collection_finish():
    """What imports made is never garbage, and torch's is much: do not look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    """Give torch the same seed in every test, whatever ran before it."""
    torch.manual_seed(0)
