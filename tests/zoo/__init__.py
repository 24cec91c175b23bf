"""A zoo of tiny models: transformers' architectures, hand-written attentions, diffusers' blocks.

Nothing is downloaded. `build` makes a model of an architecture; `python -m tests.zoo` runs the
library over all of them and compares what comes out with the dense model.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported

from tests.zoo.build import build, model_types
from tests.zoo.overrides import VARIANTS

__all__ = ["VARIANTS", "build", "model_types"]
