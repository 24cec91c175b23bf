"""fxslim: find every attention of a PyTorch model and cut out the heads it does not need."""

from fxslim.backend import backend
from fxslim.capture import capture
from fxslim.compile import compile
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
from fxslim.head_compression import HeadCompression
from fxslim.inc import Pruning, parse_auto_slim_config, prepare_pruning
from fxslim.l0 import L0Gates, insert_l0_gates_
from fxslim.linears import linear_modules
from fxslim.locate import find_attention, find_feed_forward
from fxslim.plan import PruningPlan
from fxslim.planning import plan
from fxslim.pruner import MultiheadAttentionPruner
from fxslim.pruning_config import PruningConfig
from fxslim.refit import Refitted
from fxslim.repair import repair
from fxslim.scores import Scores
from fxslim.show import show
from fxslim.sites import AttentionSite, FeedForwardSite, Projection
from fxslim.slimming import model_slim
from fxslim.steps import Report, insert_head_masks, narrow, score
from fxslim.verify import verify

PythonMultiheadAttentionPruner = MultiheadAttentionPruner
"""Intel Neural Compressor's name."""

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
    "HeadCompression",
    "L0Gates",
    "MultiheadAttentionPruner",
    "PlanError",
    "Projection",
    "Pruning",
    "PruningConfig",
    "PruningPlan",
    "PythonMultiheadAttentionPruner",
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
    "insert_l0_gates_",
    "linear_modules",
    "model_slim",
    "narrow",
    "parse_auto_slim_config",
    "plan",
    "prepare_pruning",
    "repair",
    "score",
    "show",
    "verify",
]
