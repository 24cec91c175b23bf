"""Rules that are functions: operators that multiply or normalise."""

from __future__ import annotations

import string

from fxslim.axes import Dim, fresh, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.notation import Pattern, broadcast, joined
from fxslim.refine import regroup

__all__ = [
    "batch_norm",
    "channelwise",
    "convolution",
    "distances",
    "einsum",
    "grid_sampler",
    "group_norm",
    "grouped",
    "instance_norm",
    "matmul",
    "normalised",
    "transposed_convolution",
    "written_over",
]

_MATMUL = {
    (True, True): Pattern.parse("k, k ->"),
    (True, False): Pattern.parse("k, ... k n -> ... n"),
    (False, True): Pattern.parse("... m k, k -> ... m"),
    (False, False): Pattern.parse("... m k, ... k n -> ... m n"),
}


def matmul(call: Call) -> list[Dims]:
    """`torch.matmul`: vectors, matrices, and stacks of them."""
    a, b = (len(call.operand(node)) == 1 for node in call.tensors())
    return _MATMUL[a, b](call)


def distances(call: Call) -> list[Dims]:
    """`torch.cdist`: how far the rows of two matrices are from each other."""
    found = _DISTANCES(call)
    call.reads(call.dims("x1")[-1], "measures distances over all of it")
    return found


_DISTANCES = Pattern.parse("... m k, ... n k -> ... m n")


def einsum(call: Call) -> list[Dims]:
    """The rule is the equation itself."""
    equation = call.arguments["equation"].replace(" ", "")
    left, arrow, right = equation.partition("->")
    terms = [_letters(term) for term in left.split(",")]
    if not arrow:
        alphabet = string.ascii_uppercase + string.ascii_lowercase
        once = [x for x in alphabet if left.count(x) == 1]
        right = ("..." if "..." in left else "") + "".join(once)
    return Pattern(tuple(terms), (_letters(right),), frozenset())(call)


def _letters(term: str) -> tuple[str, ...]:
    head, dots, tail = term.partition("...")
    return (*head, *([dots] if dots else []), *tail)


def grouped(call: Call, dim: Dim, groups: int) -> tuple[Dim, Dim]:
    """A channel dimension as (groups, channels per group)."""
    outer, inner = regroup([dim], [groups, size(dim) // groups], call.why("groups its channels"))
    return outer, inner


def convolution(call: Call) -> list[Dims]:
    """Channels of a group are summed over; positions are mixed unless the kernel is one position.

    input (batch, groups * c, positions...), weight (groups * o, c, kernel...).
    """
    x, weight = call.dims("input"), call.dims("weight")
    channel = len(x) - len(weight) + 1
    groups = call.number("groups")
    g_in, c = grouped(call, x[channel], groups)
    g_out, o = grouped(call, weight[0], groups)
    g = joined(g_in, g_out, call)
    joined(c, weight[1], call)
    call.contracts(call.arguments["input"], channel, c)
    call.contracts(call.arguments["weight"], 1, weight[1])
    return _convolved(call, x, channel, joined((*g, *o), _bias(call), call))


def transposed_convolution(call: Call) -> list[Dims]:
    """As `convolution`, with weight (groups * c, o, kernel...)."""
    x, weight = call.dims("input"), call.dims("weight")
    channel = len(x) - len(weight) + 1
    groups = call.number("groups")
    g_in, c = grouped(call, x[channel], groups)
    g_weight, c_weight = grouped(call, weight[0], groups)
    g = joined(g_in, g_weight, call)
    call.contracts(call.arguments["input"], channel, joined(c, c_weight, call))
    call.contracts(call.arguments["weight"], 0, c_weight)
    return _convolved(call, x, channel, joined((*g, *weight[1]), _bias(call), call))


def _bias(call: Call) -> Dim:
    return call.dims("bias")[0] if call.arguments["bias"] is not None else ()


def _convolved(call: Call, x: Dims, channel: int, out: Dim) -> list[Dims]:
    """The result of a convolution, its positions blocked unless each stands for itself."""
    shape, kernel = call.shapes[0], call.dims("weight")[2:]
    strides = call.arguments["stride"]
    positions: list[Dim] = []
    for i, dim in enumerate(x[channel + 1 :]):
        n = shape[channel + 1 + i]
        if size(kernel[i]) == strides[i % len(strides)] == 1 and n == size(dim):
            positions.append(dim)
            continue
        call.reads(dim, "convolves along it")
        call.reads(kernel[i], "convolves along it")
        positions.append(fresh(n, call.why("convolved")))
    return [(*x[:channel], out, *positions)]


# ------------------------------------------------------------------------------------ normalising


def batch_norm(call: Call) -> list[Dims]:
    """Each channel by itself: input (batch, channels, ...), statistics and affine (channels,)."""
    return _per_channel(call, reads_batch=bool(call.arguments.get("training", False)))


def instance_norm(call: Call) -> list[Dims]:
    """Each channel of each sample by itself, over its positions."""
    dims = call.dims("input")
    for dim in dims[2:]:
        call.reads(dim)
    return _per_channel(call, reads_batch=False)


def _per_channel(call: Call, *, reads_batch: bool) -> list[Dims]:
    nodes = call.tensors()
    dims = call.operand(nodes[0])
    channels = dims[1]
    for node in nodes[1:]:
        channels = joined(channels, call.operand(node)[0], call)
    if reads_batch:
        for dim in (dims[0], *dims[2:]):
            call.reads(dim)
    out = (dims[0], channels, *dims[2:])
    return [out if len(s) == len(out) else _statistics(call, channels, s) for s in call.shapes]


def _statistics(call: Call, channels: Dim, shape: tuple[int, ...]) -> Dims:
    if shape == (size(channels),):
        return (channels,)
    return tuple(fresh(n, call.why("is made by the operator")) for n in shape)


def group_norm(call: Call) -> list[Dims]:
    """(batch, groups * c, positions...): all channels of a group are read together."""
    dims = call.dims("input")
    groups, channels = grouped(call, dims[1], call.number("num_groups"))
    for dim in (channels, *dims[2:]):
        call.reads(dim)
    both = (*groups, *channels)
    for node in call.tensors()[1:]:
        both = joined(both, call.operand(node)[0], call)
    return [(dims[0], both, *dims[2:])]


def normalised(call: Call) -> list[Dims]:
    """The trailing dimensions named by `normalized_shape` are read as a whole."""
    nodes = call.tensors()
    dims = call.operand(nodes[0])
    start = len(dims) - len(call.arguments["normalized_shape"])
    for node in nodes[1:]:
        dims = broadcast(dims, call.operand(node), call)
    for dim in dims[start:]:
        call.reads(dim, "normalises over all of it")
    units: Dims = (*dims[:start], *((),) * (len(dims) - start))
    return [dims, *(units for _ in call.shapes[1:])]


# ------------------------------------------------------------------------------------- the others


def channelwise(call: Call) -> list[Dims]:
    """Input (batch, channels, ...) with one weight a channel, or one for all."""
    dims, weight = call.dims("self"), call.dims("weight")[0]
    position = 1 if len(dims) > 1 else 0
    return [(*dims[:position], joined(dims[position], weight, call), *dims[position + 1 :])]


def written_over(call: Call) -> list[Dims]:
    """`src` written over all of `self`, broadcast."""
    dims = call.dims("self")
    if len(call.dims("src")) > len(dims):
        raise RuleMismatch("the source has more dimensions than what it is written over")
    return [broadcast(dims, call.dims("src"), call)]


_SAMPLE = {
    2: Pattern.parse("b c h! w!, b p q t! -> b c p q"),
    3: Pattern.parse("b c d! h! w!, b o p q t! -> b c o p q"),
}


def grid_sampler(call: Call) -> list[Dims]:
    """Positions of each channel picked by a grid of coordinates."""
    return _SAMPLE[len(call.operand(call.tensors()[0])) - 2](call)
