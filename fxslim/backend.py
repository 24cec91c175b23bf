"""The backend for `torch.compile`: the attentions of each graph, without the heads that go.

>>> torch.compile(model, backend="fxslim", options={"sparsity": 0.5})
>>> torch.compile(model, backend=fxslim.backend(plan=plan))
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from fxslim.compile import check_prunable
from fxslim.criteria import Criterion, chosen
from fxslim.cut import cut_attention
from fxslim.decisions import AtFirstSight, Decisions, Following
from fxslim.dispatch import Dispatch
from fxslim.dynamo import Traced, trace
from fxslim.errors import CaptureError
from fxslim.graph import user_name
from fxslim.locate import locate
from fxslim.partial import captured
from fxslim.placed import Located
from fxslim.plan import PruningPlan, check_plan
from fxslim.planning import check_target
from fxslim.sites import Unit

__all__ = ["Backend", "backend", "dynamo_backend"]

Inner = str | Callable[..., Any]
"""A backend of `torch.compile`, by name or itself."""


class Backend:
    """What `torch.compile` calls with each graph; see `backend`.

    Attributes:
        decide: which heads the attentions of a graph keep.
    """

    def __init__(
        self, decide: Decisions, unit: Unit, inner: Inner, options: Mapping[str, Any]
    ) -> None:
        self.decide = decide
        self._unit: Unit = unit
        self._inner = inner
        self._options = dict(options)

    def __call__(
        self,
        graph_module: fx.GraphModule,
        example_inputs: Sequence[Any],
        *,
        mode: str | None = None,
    ) -> Callable[..., Any]:
        """Compile a graph of Dynamo's; `mode` is handed to the inner backend."""
        given = {**self._options, **({"mode": mode} if mode is not None else {})}
        if not any(isinstance(value, nn.Parameter) for value in example_inputs):
            return self._dense(graph_module, example_inputs, given)
        try:
            traced = trace(graph_module, example_inputs)
        except Exception as error:
            raise CaptureError(
                f"the graph could not be traced to ATen calls; PyTorch said "
                f"({type(error).__name__}): {error}\nTry torch.compiler.disable on what it names"
            ) from error
        located = locate(traced.program, unit=self._unit, feed_forward=True)
        _say_why(located)
        if not any(placed.site.prunable for placed in located.placed):
            check_plan(self.decide(located, traced.tensors(example_inputs)), located.every_site)
            return self._dense(graph_module, example_inputs, given)
        dispatch = Dispatch(traced, located, self.decide, self._compiled(traced, given))
        dispatch.narrowed(example_inputs)
        return dispatch

    def _compiled(
        self, traced: Traced, given: Mapping[str, Any]
    ) -> Callable[[fx.GraphModule], Callable[..., Any]]:
        """Compile a narrow program with the inner backend, for as many sizes as the graph."""

        def compiled(program: fx.GraphModule) -> Callable[..., Any]:
            made: Callable[..., Any] = torch.compile(
                _function_of(program),
                backend=self._inner,
                fullgraph=True,
                dynamic=traced.is_dynamic,
                **given,
            )
            return made

        return compiled

    def _dense(
        self, graph_module: fx.GraphModule, example_inputs: Sequence[Any], given: Mapping[str, Any]
    ) -> Callable[..., Any]:
        """The graph as it is, compiled by the inner backend."""
        mode, options = given.get("mode"), given.get("options")
        made: Callable[..., Any]
        if self._inner == "inductor":
            made = torch._TorchCompileInductorWrapper(mode, options, None)  # type: ignore[no-untyped-call]
        else:
            made = torch._TorchCompileWrapper(self._inner, mode, options, None)  # type: ignore[no-untyped-call]
        compiled: Callable[..., Any] = made(graph_module, example_inputs)
        return compiled


def backend(
    *,
    sparsity: float | None = None,
    plan: PruningPlan | None = None,
    model: nn.Module | None = None,
    inner: Inner = "inductor",
    inner_options: Mapping[str, Any] | None = None,
    mode: str | None = None,
    criterion: str | Criterion = "weight_product",
    unit: Unit = "group",
    min_heads: int = 1,
) -> Backend:
    """A backend for `torch.compile` that removes attention heads from the graphs it is given.

    A graph may be a piece of the model.  When the first of them arrives, the module whose call is
    compiled is captured and planned for as a whole, once for all its pieces.  Where a function is
    compiled, the attentions of each graph are compared with each other only, unless `model` is
    given.

    Args:
        sparsity: the share of the heads that goes, in [0, 1); 0.5 without a plan.
        plan: what stays instead, by the names of the model's sites; followed exactly.
        model: planned for now, and the one whose names a plan uses; where absent, the module that
            was given to `torch.compile`.
        inner: the backend that compiles what is left, by name or itself.
        inner_options: its options; exclude `mode`.
        mode: its mode, such as "reduce-overhead".
        criterion: a name in `fxslim.CRITERIA` or an object with a `score` method; no data is there.
        unit: what goes at a time where query heads share a KV head; see `fxslim.plan`.
        min_heads: heads that stay in every attention.

    Raises:
        ValueError, TypeError: a bad argument, before any work.
        CaptureError: `model` is to be planned for and cannot be captured; make a plan with
            `fxslim.capture` and example inputs.
        UnsupportedSite: it is to be planned for, and no attention of it can be pruned; lists why.
    """
    check_target(sparsity, "local", unit, min_heads)
    chosen(criterion, None)
    if plan is not None and sparsity is not None:
        raise ValueError(f"give a sparsity or a plan, not both ({sparsity} and a plan)")
    if plan is not None and not isinstance(plan, PruningPlan):
        raise TypeError(f"plan must be fxslim.PruningPlan, not {type(plan).__name__}")
    if mode is not None and inner_options is not None:
        raise ValueError("give the inner backend a mode or inner_options, not both")
    share = 0.5 if sparsity is None else sparsity
    by_weights = AtFirstSight(share, criterion, unit, min_heads)
    if model is not None and plan is None:
        check_prunable(by_weights.decide_for(captured(model)), type(model).__name__)
    decide = by_weights if plan is None else Following(plan, model)
    given = {"mode": mode, "options": dict(inner_options) if inner_options else None}
    given = {name: value for name, value in given.items() if value is not None}
    return Backend(decide, unit, inner, given)


def dynamo_backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="fxslim", options=...)`` finds by its entry point.

    Args:
        graph_module: a graph of Dynamo's.
        example_inputs: its inputs.
        mode: the inner backend's.
        options: the arguments of `backend`.

    Raises:
        ValueError: an unknown option.
    """
    made = _made_for(options if options is not None else _NO_OPTIONS)
    return made(graph_module, example_inputs, mode=mode)


_NO_OPTIONS: Mapping[str, Any] = {}
_made: dict[int, tuple[Mapping[str, Any], Backend]] = {}
"""The backend of each dict of options that `torch.compile` holds, for all graphs of a model."""


def _made_for(options: Mapping[str, Any]) -> Backend:
    if id(options) not in _made:
        known = list(inspect.signature(backend).parameters)
        unknown = sorted(options.keys() - set(known))
        if unknown:
            raise ValueError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
        _made[id(options)] = options, backend(**options)
    return _made[id(options)][1]


dynamo_backend.reset = _made.clear  # type: ignore[attr-defined]  # by torch.compiler.reset


def _function_of(program: fx.GraphModule) -> Callable[..., Any]:
    """The program as a function with a code object of its own.

    Dynamo does not compile frames of `torch.fx`, and counts what it compiles by code objects.
    """

    def run(*inputs: Any) -> Any:
        return program.forward(*inputs)

    code = run.__code__.replace()
    return FunctionType(code, run.__globals__, run.__name__, None, run.__closure__)


def _say_why(located: Located) -> None:
    """Warn of attentions that a graph break cuts in two, and where none can be pruned."""
    cut = [user_name(node) for node in cut_attention(located)]
    if cut:
        warnings.warn(
            f"fxslim.backend: {', '.join(cut)} looks like one side of an attention, which keeps "
            "its heads: a graph break may cut it in two; torch._dynamo.explain says where",
            stacklevel=3,
        )
    if located.sites and not any(site.prunable for site in located.sites):
        reasons = "".join(f"\n  {site.name}: {site.reason}" for site in located.sites)
        if "of the graph's" in reasons:
            reasons += "\nA graph break makes inputs and outputs; torch._dynamo.explain says where"
        warnings.warn(
            f"fxslim.backend: a graph has attention, but none of it can be pruned:{reasons}",
            stacklevel=3,
        )
