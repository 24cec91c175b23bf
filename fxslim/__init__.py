"""fxslim: find every attention of a PyTorch model and cut out the heads it does not need."""

from fxslim.backend import backend
from fxslim.capture import capture
from fxslim.compile import Report, compile, insert_head_masks, narrow, score
from fxslim.constraints import Constraints
from fxslim.costing import cost
from fxslim.costs import Costs
from fxslim.criteria import CRITERIA, Criterion
from fxslim.errors import (
    CaptureError,
    CheckpointError,
    FxslimError,
    PlanError,
    UnsupportedSite,
    VerificationError,
)
from fxslim.linears import linear_modules
from fxslim.locate import find_attention, find_feed_forward
from fxslim.plan import PruningPlan
from fxslim.planning import plan
from fxslim.refit import Refitted
from fxslim.repair import repair
from fxslim.scores import Scores
from fxslim.show import show
from fxslim.sites import AttentionSite, FeedForwardSite, Projection
from fxslim.verify import verify

__all__ = [
    "CRITERIA",
    "AttentionSite",
    "CaptureError",
    "CheckpointError",
    "Constraints",
    "Costs",
    "Criterion",
    "FeedForwardSite",
    "FxslimError",
    "PlanError",
    "Projection",
    "PruningPlan",
    "Refitted",
    "Report",
    "Scores",
    "UnsupportedSite",
    "VerificationError",
    "backend",
    "capture",
    "compile",
    "cost",
    "find_attention",
    "find_feed_forward",
    "insert_head_masks",
    "linear_modules",
    "narrow",
    "plan",
    "repair",
    "score",
    "show",
    "verify",
]
