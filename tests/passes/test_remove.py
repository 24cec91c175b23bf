"""Removing all heads: what fed them goes, whatever else read it, and what stays is unchanged."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from tests.models import HEAD_DIM, HEADS, WIDTH, Attention, example, merge, split


class Beside(nn.Module):
    """Convolutions as projections, and something beside the context before the output."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Conv1d(WIDTH, HEADS * HEAD_DIM, 1) for _ in range(3))
        self.other, self.o = nn.Linear(WIDTH, 3), nn.Linear(HEADS * HEAD_DIM + 3, WIDTH)

    def forward(self, x):
        q, k, v = (split(conv(x.mT).mT) for conv in self.qkv)
        context = merge(scaled_dot_product_attention(q, k, v))
        return self.o(torch.cat([context, self.other(x)], -1))


class Flattened(Attention):
    """Sizes for the output projection that are read from the context."""

    def forward(self, x):
        q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
        context = merge(scaled_dot_product_attention(q, k, v))
        batch, length, width = context.shape
        flat = torch.addmm(self.o.bias, context.reshape(batch * length, width), self.o.weight.T)
        return flat.view(batch, length, WIDTH)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("model", [Beside(), Flattened()], ids=["beside", "flattened"])
def test_nothing_is_left_of_an_attention_without_heads(model, dynamic):
    program = fxslim.capture(model, (example(),), dynamic=dynamic)
    (site,) = fxslim.find_attention(program)
    plan = fxslim.PruningPlan({site.name: []}, 1.0)
    slim = fxslim.narrow(program, plan)
    fxslim.verify(slim, fxslim.insert_head_masks(program), plan)
    assert all(parameter.numel() for parameter in slim.parameters())
    assert fxslim.find_attention(slim) == []
