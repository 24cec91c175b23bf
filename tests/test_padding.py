"""Padding: neither scores nor a repair depend on what padded positions hold."""

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from fxslim.examples import as_inputs
from fxslim.locate import locate
from fxslim.padding import Attended
from tests.models import HEAD_DIM, HEADS, WIDTH, example, merge, split


class Masked(nn.Module):
    """One attention with a mask of the keys, and a projection of each position after it."""

    def __init__(self, core):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in range(3))
        self.o, self.core = nn.Linear(HEADS * HEAD_DIM, WIDTH), core
        self.up, self.down = nn.Linear(WIDTH, 9), nn.Linear(9, WIDTH)

    def forward(self, x, mask):
        q, k, v = (split(linear(x)) for linear in (self.q, self.k, self.v))
        x = x + self.o(merge(self.core(q, k, v, mask)))
        return x + self.down(self.up(x).relu())


class Flattened(Masked):
    """The same with batch and length as one dimension where weights are multiplied."""

    def forward(self, x, mask):
        rows = x.flatten(0, 1)
        q, k, v = (
            split(linear(rows).view(*x.shape[:2], -1)) for linear in (self.q, self.k, self.v)
        )
        context = merge(self.core(q, k, v, mask))
        rows = rows + self.o(context.flatten(0, 1))
        return (rows + self.down(self.up(rows).relu())).view(x.shape)


def selecting(q, k, v, mask):
    return scaled_dot_product_attention(q, k, v, mask[:, None, None, :])


def causal(q, k, v, mask):
    before = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    return scaled_dot_product_attention(q, k, v, mask[:, None, None, :] & before)


def adding(q, k, v, mask):
    added = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)
    return scaled_dot_product_attention(q, k, v, added[:, None, None, :])


def spelt_out(q, k, v, mask):
    scores = (q @ k.mT).masked_fill(~mask[:, None, None, :], -1e9)
    return scores.softmax(-1) @ v


CORES = [selecting, causal, adding, spelt_out]


def batches(noise):
    """Batches whose second half of every other row is padding that holds noise."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(noise)
    for _ in range(6):
        x, mask = example(4, 8), torch.ones(4, 8, dtype=torch.bool)
        mask[::2, 4:] = False
        x[~mask] = 5 * torch.randn(x[~mask].shape, generator=generator)
        yield x, mask


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("model", [Masked, Flattened])
def test_padding_does_not_count(model, core):
    torch.manual_seed(0)
    program = fxslim.capture(model(core).eval(), next(batches(0)))
    slim = fxslim.compile(program, 0.5)
    one, other = (fxslim.repair(slim, program, batches(noise)) for noise in (1, 2))
    assert len(fxslim.Report.of(one).refitted) == 2
    for name, weight in one.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert not torch.equal(one.o.weight, slim.o.weight)


CRITERIA = ["activation", "compensated_fisher", "leave_one_out", "output_fisher"]


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("criterion", CRITERIA)
def test_padding_is_not_scored(criterion, core):
    torch.manual_seed(0)
    program = fxslim.capture(Masked(core).eval(), next(batches(0)))
    masked = fxslim.insert_head_masks(program)
    one, other = (fxslim.score(masked, criterion, [*batches(noise)]) for noise in (1, 2))
    torch.testing.assert_close(one["attention"], other["attention"], rtol=1e-4, atol=1e-6)


def test_outputs_without_positions_count_as_they_are():
    class Pooled(Masked):
        def forward(self, x, mask):
            states = super().forward(x, mask)
            return (states * mask.unsqueeze(-1)).sum(1), states

    program = fxslim.capture(Pooled(selecting).eval(), next(batches(0)))
    told = Attended(locate(program))(as_inputs(next(batches(0))))
    pooled, states = told.outputs(program(*next(batches(0))))
    assert pooled is None
    assert torch.equal(states[..., 0], next(batches(0))[1])


def test_every_position_counts_where_none_is_masked():
    torch.manual_seed(0)
    model = Masked(causal).eval()
    full = [(x, torch.ones_like(mask)) for x, mask in batches(1)]
    program = fxslim.capture(model, full[0])
    slim = fxslim.compile(program, 0.5)
    bare = fxslim.capture(
        Masked(lambda q, k, v, mask: causal(q, k, v, mask | True)).eval(), full[0]
    )
    bare.load_state_dict(program.state_dict())
    repaired = fxslim.repair(slim, program, full)
    again = fxslim.repair(fxslim.compile(bare, 0.5), bare, full)
    for name, weight in repaired.state_dict().items():
        torch.testing.assert_close(weight, again.state_dict()[name])
