"""The output Fisher against the Jacobian itself, and what the others make up for."""

import pytest
import torch
from torch import multiprocessing

import fxslim
from fxslim.fisher import OutputFisher
from fxslim.masks import head_masks
from tests.models import HEADS, Attention, Residual, example, grouped_core
from tests.test_repair import batches, double_a_head


def masked_of(model):
    return fxslim.insert_head_masks(fxslim.capture(model, example()))


def one_number(output):
    """One number a sample, so that random signs square away and the Fisher is exact."""
    return output.flatten(1).tanh().sum(1)


def jacobian(masked, x):
    """(samples, heads): the derivatives by the masks, one sample after another."""
    masks = list(head_masks(masked, [site.name for site in masked.meta["sites"]]).values())
    rows = [torch.autograd.grad(y, masks) for y in (one_number(masked(s[None])) for s in x)]
    return torch.stack([torch.cat(row) for row in rows]).double()


def test_the_matrix_is_the_jacobians_square():
    torch.manual_seed(0)
    data = [example().double(), example(2, 7).double()]
    program = fxslim.capture(Residual(a=Attention(), b=Attention()).double(), data[0])
    masked = fxslim.insert_head_masks(program)
    scores = fxslim.score(masked, OutputFisher(draws=1), data, one_number)
    expected = sum(j.mT @ j for j in (jacobian(masked, x) for x in data)) / len(data)
    torch.testing.assert_close(scores.matrix, expected)
    torch.testing.assert_close(torch.cat(list(scores.values())), expected.diagonal())
    assert list(scores) == ["layers.a", "layers.b"]


def test_all_outputs_count_without_a_loss():
    torch.manual_seed(0)
    masked, x = masked_of(Attention()), example()
    scores = fxslim.score(masked, OutputFisher(draws=400), [x])
    (mask,) = head_masks(masked, ["attention"]).values()
    expected = torch.autograd.functional.jacobian(
        lambda m: torch.func.functional_call(masked, {"head_masks.attention": m}, (x,)), mask
    )
    expected = expected.flatten(0, -2).square().sum(0).double()
    torch.testing.assert_close(scores["attention"], expected, rtol=0.1, atol=0)


def test_heads_that_go_together_share_what_they_cost():
    torch.manual_seed(0)
    masked = masked_of(Attention(kv_heads=2, core=grouped_core))
    scores = fxslim.score(masked, OutputFisher(draws=1), batches(2), one_number)
    for unit in ([0, 1], [2, 3]):
        block = scores.matrix[unit][:, unit]
        torch.testing.assert_close(scores["attention"][unit].sum(), block.sum())


def test_a_head_that_another_doubles_is_nothing_to_lose_after_repair():
    torch.manual_seed(0)
    masked = masked_of(double_a_head(Attention()))
    plain = fxslim.score(masked, "output_fisher", batches())["attention"]
    left = _compensated(masked, dropped=0.0)
    assert (plain > 0.01 * plain.max()).all()
    assert (left[:2] < 1e-3 * plain[:2]).all()
    assert (left[2:] > 1e-2 * plain[2:]).all()


def test_the_less_the_others_are_counted_on_the_more_is_lost():
    torch.manual_seed(0)
    masked = masked_of(double_a_head(Attention()))
    lost = [_compensated(masked, dropped)[:2].sum() for dropped in (0.0, 0.5, 0.9)]
    assert lost == sorted(lost)
    assert lost[1] / lost[2] == pytest.approx((0.5 / 0.9) ** 2, rel=0.1)


def _compensated(masked, dropped):
    criterion = OutputFisher(compensated=True, dropped=dropped)
    return fxslim.score(masked, criterion, batches())["attention"]


def test_a_group_is_not_made_up_for_by_its_own_heads():
    torch.manual_seed(0)
    model = Attention(kv_heads=2, core=grouped_core)
    with torch.no_grad():
        for tensor in (model.q.weight, model.q.bias):
            tensor[2:4] = tensor[:2]
    masked = masked_of(model)
    plain = fxslim.score(masked, "output_fisher", batches())["attention"]
    left = fxslim.score(masked, "compensated_fisher", batches())["attention"]
    assert left[:2].sum() > 1e-2 * plain[:2].sum()


def test_batches_that_come_only_once_are_enough():
    torch.manual_seed(0)
    masked, data = masked_of(Attention()), batches()
    once = fxslim.score(masked, "compensated_fisher", iter(data))
    again = fxslim.score(masked, "compensated_fisher", data)
    assert torch.equal(once["attention"], again["attention"])


def test_an_output_that_no_head_reaches_is_named():
    masked = masked_of(Attention())
    with pytest.raises(ValueError, match=r"^no output of the model depends on its attentions"):
        fxslim.score(masked, "output_fisher", batches(1), lambda y: torch.zeros(()))


def _score_half(rank, store, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    masked, data = masked_of(Attention()), batches()
    criterion = OutputFisher(compensated=True, draws=1)
    scores = fxslim.score(masked, criterion, data[rank::2], one_number)
    torch.save(dict(scores), f"{path}{rank}")
    torch.distributed.destroy_process_group()


def test_processes_that_share_the_data_agree_with_one_that_has_it_all(tmp_path):
    torch.manual_seed(0)
    masked = masked_of(Attention())
    criterion = OutputFisher(compensated=True, draws=1)
    whole = fxslim.score(masked, criterion, batches(), one_number)
    multiprocessing.spawn(_score_half, (tmp_path / "store", tmp_path / "scores"), nprocs=2)
    for rank in range(2):
        scores = torch.load(f"{tmp_path / 'scores'}{rank}")
        torch.testing.assert_close(scores["attention"], whole["attention"])
    assert len(whole["attention"]) == HEADS
