"""Operator rules as strings, in the grammar of einops.

``linear: "... k, n k, n -> ... n"`` says: the last dimension of the input and of the weight run
together and are summed over (`k` is only on the left: *contracted*); the weight's first dimension,
the bias and the result's last run together; what is before (`...`) passes through, broadcast.
A letter with ``!`` is read as a whole and so *blocked*.  Operands are the tensor arguments in the
order of the operator's schema; absent optional ones are left out from the right, and an operand
with fewer dimensions than letters broadcasts from the left.  A letter that is
only on the right is a new axis.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from fxslim.axes import Block, Dim, block, fresh, size
from fxslim.calls import Call, Dims, RuleMismatch
from fxslim.graph import is_symbolic
from fxslim.refine import join

__all__ = ["Pattern", "joined"]

_REST = "..."


@dataclass(frozen=True)
class Pattern:
    """A parsed rule; calling it with a `Call` joins, blocks and contracts, and returns the dims."""

    operands: tuple[tuple[str, ...], ...]
    results: tuple[tuple[str, ...], ...]
    blocked: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Parse ``"... k, n k -> ... n"``.

        Raises:
            ValueError: there is not exactly one ``->``, or an operand has two ellipses.
        """
        left, arrow, right = text.partition("->")
        if not arrow or "->" in right:
            raise ValueError(f"a rule has one '->': {text!r}")
        sides = [tuple(tuple(term.split()) for term in side.split(",")) for side in (left, right)]
        for term in (*sides[0], *sides[1]):
            if term.count(_REST) > 1:
                raise ValueError(f"one '...' an operand: {text!r}")
        letters = {letter for side in sides for term in side for letter in term}
        blocked = frozenset(letter[:-1] for letter in letters if letter.endswith("!"))
        bare = [tuple(tuple(x.rstrip("!") for x in term) for term in side) for side in sides]
        return cls(bare[0], bare[1], blocked)

    def __str__(self) -> str:
        """The rule as it was written: ``... k, n k, n -> ... n``."""
        left, right = (
            ", ".join(" ".join(self._mark(letter) for letter in term) for term in side)
            for side in (self.operands, self.results)
        )
        return f"{left} -> {right}".rstrip()

    def _mark(self, letter: str) -> str:
        return letter + "!" if letter in self.blocked else letter

    def __call__(self, call: Call) -> list[Dims]:
        """Apply the rule to all tensor arguments of `call`."""
        return self.apply(call, call.tensors())

    def apply(self, call: Call, tensors: list[fx.Node]) -> list[Dims]:
        """Apply the rule to `tensors`, the operands of `call`, in order."""
        if len(tensors) > len(self.operands):
            raise RuleMismatch(f"{len(tensors)} operands, the rule has {len(self.operands)}")
        bound: dict[str, Dim] = {}
        rest: Dims = ()
        for node, letters in zip(tensors, self.operands, strict=False):
            dims = call.operand(node)
            named, others = _align(letters, dims)
            for letter, dim in named:
                bound[letter] = joined(bound.get(letter, ()), dim, call)
            rest = broadcast(rest, others, call)
        if any(rest) and not any(_REST in letters for letters in self.results):
            raise RuleMismatch("it sums over dimensions that '...' stands for")
        for letter in self.blocked & bound.keys():
            block(bound[letter], call.why("reads it as a whole"))
        self._contract(call, tensors)
        return [
            _build(letters, bound, rest, shape, call.why("is made by the operator"))
            for letters, shape in zip(self.results, call.shapes, strict=False)
        ]

    def _contract(self, call: Call, tensors: list[fx.Node]) -> None:
        kept = {letter for letters in self.results for letter in letters} | self.blocked
        for node, letters in zip(tensors, self.operands, strict=False):
            rank = len(call.operand(node))
            for position, letter in enumerate(letters):
                if letter not in kept:
                    shifted = _REST in letters[:position] or rank < len(letters)
                    call.contracts(node, position + (rank - len(letters) if shifted else 0))


def _align(letters: tuple[str, ...], dims: Dims) -> tuple[list[tuple[str, Dim]], Dims]:
    """Which dimension each letter names, and the dims that the ellipsis stands for."""
    if _REST not in letters:
        dims = (*((),) * (len(letters) - len(dims)), *dims)
        if len(dims) != len(letters):
            raise RuleMismatch(f"a tensor of {len(dims)} dimensions where the rule has {letters}")
        return list(zip(letters, dims, strict=True)), ()
    before = letters.index(_REST)
    after = len(letters) - before - 1
    if len(dims) < before + after:
        raise RuleMismatch(f"a tensor of {len(dims)} dimensions where the rule has {letters}")
    end = len(dims) - after
    named = [*zip(letters[:before], dims[:before], strict=True)]
    named += zip(letters[before + 1 :], dims[end:], strict=True)
    return named, dims[before:end]


def _build(
    letters: tuple[str, ...], bound: dict[str, Dim], rest: Dims, shape: tuple[int, ...], why: Block
) -> Dims:
    out: list[Dim] = []
    for letter in letters:
        if letter == _REST:
            out += rest
        elif letter in bound:
            out.append(bound[letter])
        else:
            out.append(fresh(shape[len(out)], why))
    return tuple(out)


def joined(a: Dim, b: Dim, call: Call) -> Dim:
    """`join`, with the call as the reason.

    Lengths that differ at the generic point, but that PyTorch pairs all the same (a guard on the
    input makes them equal), are blocked.

    Raises:
        RuleMismatch: two fixed sizes differ.
    """
    if not a or not b or size(a) == size(b):
        return join(a, b, call.why("pairs two different factorings of it"))
    if not is_symbolic(size(a)) and not is_symbolic(size(b)):
        raise RuleMismatch(f"dimensions of {size(a)} and {size(b)} positions cannot run together")
    for dim in (a, b):
        call.reads(dim, "pairs it with a length that only the input makes equal")
    call.paired.append((a, b))
    return a


def broadcast(a: Dims, b: Dims, call: Call) -> Dims:
    """Join two shapes from the right, as broadcasting does; one may have more dimensions."""
    shared = min(len(a), len(b))
    first, second = len(a) - shared, len(b) - shared
    pairs = zip(a[first:], b[second:], strict=True)
    return (*a[:first], *b[:second], *(joined(x, y, call) for x, y in pairs))
