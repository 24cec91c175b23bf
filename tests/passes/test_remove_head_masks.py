"""RemoveHeadMasks: the program that the masks were inserted into, again."""

import pytest
import torch

import fxslim
from fxslim.passes import RemoveHeadMasks
from tests.models import Attention, captured, example, printed


def test_what_was_inserted_is_gone():
    x = example()
    program = fxslim.capture(Attention(), x)
    masked = fxslim.insert_head_masks(program)
    with torch.no_grad():
        masked.get_parameter("head_masks.attention").zero_()
    code = masked.code
    result = RemoveHeadMasks()(masked)
    assert result.modified
    assert printed(result.graph_module) == printed(program)
    assert not hasattr(result.graph_module, "head_masks")
    torch.testing.assert_close(result.graph_module(x), program(x))
    assert masked.code == code


@pytest.mark.parametrize("name", ["joined", "bmm-merged", "gqa-tiled"])
def test_other_arrangements_compute_what_they_did(name):
    _, inputs, program = captured(name)
    plain = RemoveHeadMasks()(fxslim.insert_head_masks(program)).graph_module
    torch.testing.assert_close(plain(*inputs), program(*inputs))
    assert not any("head_masks" in str(node.target) for node in plain.graph.nodes)


def test_a_program_without_masks_stays_as_it_is():
    program = captured("nanogpt")[-1]
    result = RemoveHeadMasks()(program)
    assert not result.modified
    assert printed(result.graph_module) == printed(program)


def test_anything_but_a_program_is_refused():
    with pytest.raises(TypeError, match=r"^RemoveHeadMasks takes a torch.fx.GraphModule"):
        RemoveHeadMasks()(Attention())
