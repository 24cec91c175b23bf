"""The table is right: one law, on the real operator with random operands, checks every row."""

import pytest
import torch

from fxslim import pieces, resize, views
from fxslim.axes import fresh, size
from fxslim.errors import VerificationError
from fxslim.notation import Pattern
from fxslim.rules import RULES, Row
from tests.law import check_law, program_of, sample, says
from tests.rule_samples import SAMPLES, aten, x

pytestmark = [
    # Deprecated spellings are in the table because programs have them.
    pytest.mark.filterwarnings("ignore:Using torch.cross without specifying the dim:UserWarning"),
    pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.meshgrid. in an upcoming release:UserWarning"),
]

NAMES = [f"{number}-{sample}" for number, sample in enumerate(SAMPLES)]


@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_row(sample):
    program, axis_map, node = program_of(sample)
    assert says(axis_map, node) == sample.says
    assert axis_map.unruled == []
    check_law(program, axis_map)


@pytest.mark.fuzz
@pytest.mark.parametrize("sample", SAMPLES, ids=NAMES)
def test_row_for_many_keep_sets(sample):
    program, axis_map, _ = program_of(sample)
    for seed in range(1, 20):
        check_law(program, axis_map, seed)


def test_every_row_has_a_sample():
    sampled = {str(s).partition(".")[0] for s in SAMPLES}
    assert sorted(RULES.keys() - sampled) == []


def test_rows_are_in_the_order_of_the_alphabet():
    assert list(RULES) == sorted(RULES)


def test_every_row_names_an_operator():
    assert [name for name in RULES if not hasattr(aten, name)] == ["flex_attention"]
    assert hasattr(torch.ops.higher_order, "flex_attention")


# ------------------------------------------------------------------------- planted wrong rows fail

MATRICES = x(4, 4), x(4, 4)


def interleaved(call):
    """Each dimension's copies as the inner factor; `repeat` makes them the outer one."""
    dims = call.dims("self")
    return [
        tuple((*dim, *fresh(n // size(dim))) for dim, n in zip(dims, call.shapes[0], strict=True))
    ]


WRONG = {
    "softmax is elementwise": (views.elementwise, aten._softmax.default, x(2, 5), 1, False),
    "cumsum is elementwise": (views.elementwise, aten.cumsum.default, x(2, 5), 1),
    "flip is elementwise": (views.elementwise, aten.flip.default, x(2, 5), [1]),
    "sort is elementwise": (views.elementwise, aten.sort.default, x(2, 5)),
    "tril is elementwise": (views.elementwise, aten.tril.default, x(4, 4)),
    "layer_norm normalises nothing": (
        "... d, d -> ... d",
        aten.layer_norm.default,
        x(2, 5),
        [5],
        x(5),
    ),
    "mean is a sum": (views.sum_over, aten.mean.dim, x(2, 5), [1]),
    "max is a sum": (views.sum_over, aten.amax.default, x(2, 5), [1]),
    "a norm is a sum": (views.sum_over, aten.linalg_vector_norm.default, x(2, 5), 2, [1]),
    "mm is transposed after": ("m k, k n -> n m", aten.mm.default, *MATRICES),
    "mm is transposed before": ("m k, n k -> m n", aten.mm.default, *MATRICES),
    "addmm's bias is along its rows": ("m, m k, k n -> m n", aten.addmm.default, x(4), *MATRICES),
    "embedding's rows are free": (
        "v d, i -> i d",
        aten.embedding.default,
        x(2, 5),
        torch.arange(2),
    ),
    "cdist sums": ("m d, n d -> m n", aten.cdist.default, *MATRICES),
    "repeat interleaves": (interleaved, aten.repeat.default, x(3), [2]),
    "arange counts anew": (views.create, aten.arange.default, 5),
    "expand has no sizes": (views.expand, aten.expand.default, x(4, 1), [4, 3]),
    "view has no sizes": (views.view, aten.view.default, x(12), [3, 4]),
    "split has no widths": (pieces.split, aten.split_with_sizes.default, x(6, 2), [2, 4]),
    "slice has no bounds": (pieces.sliced, aten.slice.Tensor, x(6), 0, 2, 6),
    "select has no position": (pieces.select, aten.select.int, x(6, 2), 0, 3),
    "pad is a copy": (views.elementwise, aten.pad.default, x(2, 5), [1, -1]),
}
RESIZE = {"repeat interleaves": resize.repeats}


def wrong_row(name):
    rule = WRONG[name][0]
    return Row(Pattern.parse(rule) if isinstance(rule, str) else rule, RESIZE.get(name))


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_row_breaks_the_law(name, monkeypatch):
    _, target, *args = WRONG[name]
    operator = target._schema.name.removeprefix("aten::")
    monkeypatch.setitem(RULES, operator, wrong_row(name))
    program, axis_map, _ = program_of(sample("", target, *args))
    assert axis_map.unruled == []
    with pytest.raises((AssertionError, RuntimeError, IndexError, ValueError, VerificationError)):
        check_law(program, axis_map)


def test_a_row_that_blocks_everything_is_noticed(monkeypatch):
    monkeypatch.setitem(RULES, "mm", Row(views.read_everything))
    _, axis_map, node = program_of(sample("", aten.mm.default, *MATRICES))
    assert says(axis_map, node) == "a! b!, c! d! -> e! f!"
