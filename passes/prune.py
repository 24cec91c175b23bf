"""Prune: a plan, carried out on any captured graph."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from fxslim.keeping import keep_of, located_for
from fxslim.passes.base import GraphPass
from fxslim.passes.narrow import Narrow
from fxslim.plan import PruningPlan, check_plan

__all__ = ["Prune"]


@dataclass(frozen=True)
class Prune(GraphPass):
    """Locate the attentions, and narrow them to the heads that a plan keeps.

    Before: a captured program.  After: the program without the other heads; see `Narrow`.  Where
    `InsertHeadMasks` and `Narrow` need to be told of the one program that they run on, this pass
    finds its places itself.

    Attributes:
        plan: which heads each site keeps; sites that it does not name stay whole.
    """

    plan: PruningPlan

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        """Return the narrow program.

        Raises:
            PlanError: the plan does not fit the program's sites.
            UnsupportedSite: it removes heads of a site that is not prunable.
        """
        (located,) = located_for(graph_module, self.plan).values()
        check_plan(self.plan, located.every_site)
        return Narrow(located.axis_map, keep_of(located, self.plan))(graph_module)
