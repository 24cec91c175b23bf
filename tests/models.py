"""Small models that several tests use, written to be read; `tests/zoo/handwritten` has more."""

import functools

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from tests.zoo.handwritten import HANDWRITTEN

WIDTH, HEADS, HEAD_DIM = 6, 4, 2


class Attention(nn.Module):
    """One attention of four linear layers: the smallest model with heads to cut."""

    def __init__(self, kv_heads=HEADS, core=scaled_dot_product_attention, bias=True):
        super().__init__()
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, bias)
        self.k = nn.Linear(WIDTH, kv_heads * HEAD_DIM, bias)
        self.v = nn.Linear(WIDTH, kv_heads * HEAD_DIM, bias)
        self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH, bias)
        self.core = core

    def heads(self, x):
        return (split(linear(x)) for linear in (self.q, self.k, self.v))

    def context(self, x):
        return merge(self.core(*self.heads(x)))

    def forward(self, x):
        return self.o(self.context(x))


def split(x):
    """(batch, length, heads · head dim) to (batch, heads, length, head dim)."""
    return x.unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2)


def merge(x):
    """(batch, heads, length, head dim) to (batch, length, heads · head dim)."""
    return x.transpose(1, 2).flatten(2)


def softmax_core(q, k, v):
    """Attention in three operators."""
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


def grouped_core(q, k, v):
    """Keys and values repeated for the query heads that share them."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    return scaled_dot_product_attention(q, k, v)


class Grouped(nn.Module):
    """An attention of any number of heads, KV heads and channels a head."""

    def __init__(self, heads, kv_heads, head_dim, core=grouped_core):
        super().__init__()
        self.head_dim, self.core = head_dim, core
        self.q = nn.Linear(WIDTH, heads * head_dim, bias=False)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * head_dim, bias=False) for _ in range(2))
        self.o = nn.Linear(heads * head_dim, WIDTH, bias=False)

    def context(self, x, queries):
        projected = (queries, self.k(x), self.v(x))
        q, k, v = (y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for y in projected)
        return self.core(q, k, v).transpose(1, 2).flatten(2)

    def forward(self, x):
        return self.o(self.context(x, self.q(x)))


class SideBySide(nn.Module):
    """Two attentions before one output projection."""

    def __init__(self, one, other):
        super().__init__()
        self.one, self.other = one, other
        self.out = nn.Linear(one.o.in_features + other.o.in_features, WIDTH)

    def forward(self, x):
        one, other = (layer.context(x, q) for layer, q in self.queries(x))
        return self.out(self.combined(one, other))

    def combined(self, one, other):
        return torch.cat([one, other], -1)

    def queries(self, x):
        yield self.one, self.one.q(x)
        yield self.other, self.other.q(x)


class Residual(nn.Module):
    """Named attentions one after the other, each added to what came in."""

    def __init__(self, **layers):
        super().__init__()
        self.layers = nn.ModuleDict(layers)

    def forward(self, x):
        for layer in self.layers.values():
            x = x + layer(x)
        return x


def example(batch=3, length=5):
    """Hidden states (batch, length, width)."""
    return torch.randn(batch, length, WIDTH)


@functools.cache
def captured(name):
    """A hand-written model of the zoo, its inputs and its program; none of them is changed."""
    model, inputs = HANDWRITTEN[name]()
    return model, inputs, fxslim.capture(model, inputs)


def printed(program):
    """What `fxslim.show` prints, without what only asserts of inputs."""
    dropped = set()
    for node in reversed(program.graph.nodes):
        is_read = node.op == "call_function" and getattr(node.target, "__name__", "") in _READ
        if node.target is torch._assert or (is_read and set(node.users) <= dropped):
            dropped.add(node)
    names = {node.name for node in dropped}
    lines = [x for x in fxslim.show(program).splitlines() if x.split(" ")[0] not in names]
    return "\n".join(lines).replace("·", "*")  # expecttest writes plain ASCII


_READ = {"contains", "eq", "getattr", "is_", "le", "sym_size.int"}
