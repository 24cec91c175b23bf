"""Rules as strings: what parses, what does not, and what a call must look like."""

import pytest
import torch

from fxslim.axes import blocks
from fxslim.notation import Pattern
from fxslim.rules import RULES, Row
from tests.law import program_of, sample, says

aten = torch.ops.aten


def test_parsing():
    pattern = Pattern.parse("... q e, ... k! e -> ... q, k")
    assert pattern.operands == (("...", "q", "e"), ("...", "k", "e"))
    assert pattern.results == (("...", "q"), ("k",))
    assert pattern.blocked == {"k"}


def test_a_result_without_dimensions():
    assert Pattern.parse("k, k ->").results == ((),)


@pytest.mark.parametrize("text", ["a b", "a -> b -> c", ""])
def test_one_arrow(text):
    with pytest.raises(ValueError, match=rf"^a rule has one '->': '{text}'$"):
        Pattern.parse(text)


def test_one_ellipsis_an_operand():
    with pytest.raises(ValueError, match=r"^one '...' an operand: '... a ... -> a'$"):
        Pattern.parse("... a ... -> a")


# ------------------------------------------------------- a call that the rule does not describe


def reasons(monkeypatch, rule, target, *args):
    """Why a call is refused whose operator has this rule."""
    monkeypatch.setitem(RULES, target._schema.name.removeprefix("aten::"), Row(Pattern.parse(rule)))
    _, axis_map, node = program_of(sample("", target, *args))
    assert axis_map.unruled == [node]
    (reason,) = {block.why for dim in axis_map.of(node) for block in blocks(dim)}
    return reason


@pytest.mark.parametrize(
    ("rule", "reason"),
    [
        ("m k -> m", "does not fit: 2 operands, the rule has 1"),
        ("m k, n -> m n", "does not fit: a tensor of 2 dimensions where the rule has ('n',)"),
        (
            "... a m k, k n -> m n",
            "does not fit: a tensor of 2 dimensions where the rule has ('...', 'a', 'm', 'k')",
        ),
        ("m k, n k -> m n", "does not fit: dimensions of 3 and 4 positions cannot run together"),
        ("... k, k n -> n", "does not fit: it sums over dimensions that '...' stands for"),
        ("m k, k n -> n m", "does not fit: it gives 4 positions where PyTorch gives 2"),
    ],
)
def test_a_rule_that_does_not_fit(rule, reason, monkeypatch):
    operands = torch.zeros(2, 3), torch.zeros(3, 4)
    assert reasons(monkeypatch, rule, aten.mm.default, *operands) == f"the rule of mm {reason}"


# -------------------------------------------------------------------------------------- what fits


@pytest.mark.parametrize(
    ("rule", "dims"),
    [
        ("m k, k n -> m n", "a b+, b+ c -> a c"),
        ("... k, k n -> ... n", "a b+, b+ c -> a c"),
        ("m k!, k! n -> m n", "a b!, b! c -> a c"),
        ("m k, k n -> m o", "a b+, b+ c+ -> a d!"),
        ("b m k, k n -> m n", "a b+, b+ c -> a c"),
    ],
    ids=["letters", "an ellipsis", "blocked", "a new axis", "an operand with fewer dimensions"],
)
def test_a_rule_that_fits(rule, dims, monkeypatch):
    monkeypatch.setitem(RULES, "mm", Row(Pattern.parse(rule)))
    _, axis_map, node = program_of(
        sample("", aten.mm.default, torch.zeros(2, 3), torch.zeros(3, 4))
    )
    assert says(axis_map, node) == dims
