"""Render docs/operators.md from the rule table: ``python docs/render.py``."""

from __future__ import annotations

import inspect
from pathlib import Path

from fxslim.notation import Pattern
from fxslim.rules import RULES, Row

HEAD = """# The operators that fxslim knows

Rendered from `fxslim/rules.py` by `python docs/render.py`; a test keeps it current. Operators that
PyTorch tags as pointwise (all operands and results run together) need no row. An operator that is
neither here nor tagged is refused: the sites whose heads it touches say so, by its name.

A letter that is only on the left is summed over; `!` marks what is read as a whole.

| operator | rule | shape constants |
|---|---|---|
"""


def render() -> str:
    """The page as text."""
    return HEAD + "".join(
        f"| `{name}` | {_rule(row)} | {_resize(row)} |\n" for name, row in RULES.items()
    )


def _rule(row: Row) -> str:
    if isinstance(row.rule, Pattern):
        return f"`{row.rule}`"
    doc = inspect.getdoc(row.rule) or _owner_doc(row)
    return " ".join(doc.split("\n\n")[0].split()).replace("|", "\\|")


def _owner_doc(row: Row) -> str:
    """The docstring of the function that made a rule."""
    maker = getattr(row.rule, "__qualname__", "").partition(".")[0]
    return inspect.getdoc(getattr(inspect.getmodule(row.rule), maker)) or ""


def _resize(row: Row) -> str:
    if row.resize is None:
        return "selects from the result" if row.by_position else ""
    return getattr(row.resize, "__qualname__", "").partition(".")[0].replace("_", " ")


if __name__ == "__main__":
    Path(__file__).with_name("operators.md").write_text(render())
