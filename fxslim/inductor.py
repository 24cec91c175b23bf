"""A pass for Inductor: a plan, carried out on the graphs that Inductor compiles.

>>> from fxslim.inductor import PrunePass
>>> options = {"pre_grad_custom_pass": PrunePass(plan)}
>>> torch.compile(model, options=options)
"""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.fake_tensor import unset_fake_temporarily

from fxslim.decisions import Following, narrowed_by
from fxslim.dynamo import trace
from fxslim.graph import attribute
from fxslim.lifting import lifted, without_data
from fxslim.locate import locate
from fxslim.plan import PruningPlan

__all__ = ["PrunePass"]


class PrunePass(CustomGraphPass):
    """Removes heads before autograd is traced: ``pre_grad_custom_pass`` is the hook it is for.

    There, attention and linear layers are still whole.  Weights are inputs of the graph and are
    narrowed in it, so gradients reach the dense ones; ``freezing=True`` narrows them beforehand.

    Args:
        plan: names the sites of the model; followed exactly.
    """

    def __init__(self, plan: PruningPlan) -> None:
        self.plan = plan

    def __call__(self, graph: fx.Graph) -> None:
        """Narrow `graph` in place.

        Raises:
            PlanError: the plan does not say what an attention of the graph keeps.
            UnsupportedSite: it removes heads of one that cannot be pruned.
        """
        with unset_fake_temporarily():
            self._narrow(graph)

    def _narrow(self, graph: fx.Graph) -> None:
        module = graph.owning_module
        assert module is not None
        places = graph.find_nodes(op="placeholder")
        traced = trace(module, [_example(place) for place in places])
        program = traced.program
        weights = {name: without_data(attribute(program, name)) for name in traced.weights}
        located = locate(program, feed_forward=True)
        decide = Following(self.plan, program)  # not the model: these are no weights of its own
        slim, narrow = narrowed_by(decide, located, weights)
        if narrow:
            _replace(graph, lifted(slim, traced.weights, narrow, inside=True))

    def uuid(self) -> str:
        """What Inductor's caches tell two passes apart by: the plan and the version."""
        text = f"fxslim {version('fxslim')} {self.plan.to_json()}"
        return hashlib.sha256(text.encode()).hexdigest()


def _example(place: fx.Node) -> Any:
    """The (fake) value that an input of Dynamo's graph was traced with."""
    return place.meta["example_value"]


def _replace(graph: fx.Graph, program: fx.GraphModule) -> None:
    """Put the calls of `program` in place of those of `graph`, which takes the same inputs."""
    places = graph.find_nodes(op="placeholder")
    for node in reversed(graph.nodes):
        if node not in places:
            graph.erase_node(node)
    values = dict(zip(program.graph.find_nodes(op="placeholder"), places, strict=True))
    for node in program.graph.find_nodes(op="get_attr"):
        if not hasattr(graph.owning_module, str(node.target)):
            values[node] = _constant(graph, attribute(program, str(node.target)))
    graph.output(graph.graph_copy(program.graph, values))


def _constant(graph: fx.Graph, value: torch.Tensor) -> fx.Node:
    """A call that makes a small tensor: Dynamo's graphs may have no attributes of others."""
    kind: dict[str, Any] = {"dtype": value.dtype, "device": value.device}
    return graph.call_function(torch.tensor, (value.tolist(),), kind)
