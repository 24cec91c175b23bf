"""The passes: each takes a graph and gives a new one back.

They are installed inside the package, so their import name is `fxslim.passes`:

    >>> from fxslim.passes import Narrow
"""

if __name__ != "fxslim.passes":
    raise ImportError(
        f"this is fxslim.passes, imported as {__name__!r}: a second copy of every pass, whose "
        "classes are not the ones that fxslim uses. Write `import fxslim.passes` instead."
    )

from fxslim.passes.insert_head_masks import InsertHeadMasks
from fxslim.passes.narrow import Narrow
from fxslim.passes.prune import Prune
from fxslim.passes.remove_head_masks import RemoveHeadMasks

__all__ = ["InsertHeadMasks", "Narrow", "Prune", "RemoveHeadMasks"]
