"""L0 gates: the distribution of Louizos et al. 2018, and what becomes of it."""

import math

import pytest
import torch

import fxslim
from tests.models import HEADS, Attention, Residual, example, grouped_core


def gated(model, **arguments):
    return fxslim.insert_l0_gates_(model, example(), **arguments)


def set_logits(gates, site, values):
    with torch.no_grad():
        gates.state(site).copy_(torch.tensor(values))


def test_the_gates_are_hard_concrete():
    model = Attention()
    gates = gated(model, temperature=0.5, open_probability=0.7)
    (logits,) = gates.parameters()
    assert torch.allclose(
        logits.sigmoid(), (torch.tensor(0.7).logit() + 0.5 * math.log(1 / 11)).sigmoid()
    )
    set_logits(gates, "attention", [-1.0, 0.0, 0.5, 1.0])
    noise = torch.tensor([0.2, 0.4, 0.6, 0.8])
    gates.state("attention", "noise").copy_(noise)
    stretched = 1.2 * ((noise.log() - (1 - noise).log() + logits) / 0.5).sigmoid() - 0.1
    torch.testing.assert_close(gates.mask("attention"), stretched.clamp(0, 1))
    model.eval()
    torch.testing.assert_close(gates.mask("attention"), 1.2 * logits.sigmoid() - 0.1)


def test_the_penalty_is_the_expected_number_of_open_heads():
    model = Residual(a=Attention(), b=Attention(kv_heads=2, core=grouped_core))
    gates = gated(model, open_probability=0.6)
    assert gates.penalty().item() == pytest.approx(0.6 * 2 * HEADS)
    set_logits(gates, "layers.a", [-2.0, -0.5, 0.0, 1.0])
    expected = gates.penalty().item()
    drawn = []
    for _ in range(4000):
        gates.draw(model, ())
        drawn.append(sum((gates.mask(site) > 0).sum().item() for site in gates.sites))
    assert sum(drawn) / len(drawn) == pytest.approx(expected, abs=0.1)


def test_dense_at_first():
    model, x = Attention().eval(), example()
    expected = model(x)
    gated(model)
    torch.testing.assert_close(model(x), expected)


def test_noise_is_drawn_at_each_forward_in_training_only():
    model, x = Attention(), example()
    gated(model, open_probability=0.5)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))


def test_gates_of_a_group_and_of_coupled_sites_are_one():
    shared = Attention(kv_heads=2, core=grouped_core)
    model = Residual(a=shared, b=shared)
    gates = gated(model, open_probability=0.5)
    (parameter,) = gates.parameters()
    assert parameter.shape == (2,)
    model(example())
    a, b = (gates.mask(site) for site in ("layers.a", "layers.b"))
    assert torch.equal(a, b)
    assert a[0] == a[1] != a[2] == a[3]


def test_gates_that_the_task_does_not_need_close():
    model = Residual(a=Attention(), b=Attention())
    with torch.no_grad():
        model.layers["a"].o.weight[:, :4] *= 0.01  # heads 0 and 1 hardly matter
    model.requires_grad_(False)
    teacher = Residual(a=Attention(), b=Attention())
    teacher.load_state_dict(model.state_dict())
    gates = gated(model)
    optimizer = torch.optim.Adam(gates.parameters(), lr=0.25)
    for _ in range(60):
        x = example(8)
        loss = (model(x) - teacher(x)).square().mean() + 3e-4 * gates.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    plan = gates.plan()
    assert not {0, 1} & set(plan.kept["layers.a"])
    assert len(plan.kept["layers.b"]) > 1
    x = example()
    slim = fxslim.model_slim(model, x)
    assert slim.meta["fxslim"].plan.kept == plan.kept
    model.eval()
    torch.testing.assert_close(slim(x), model(x))
    assert (model(x) - teacher(x)).abs().max() < 0.5


def test_gates_are_saved_and_loaded():
    model, x = Attention(), example()
    gates = gated(model)
    set_logits(gates, "attention", [-3.0, 3.0, 0.1, 0.2])
    other = Attention()
    assert gated(other).plan() != gates.plan()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other.eval()(x), model.eval()(x))
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if "head_masks" in name] == ["head_masks/attention"]


def test_the_gated_model_compiles_whole():
    model, x = Attention().eval(), example()
    gates = gated(model)
    set_logits(gates, "attention", [-3.0, 3.0, 0.1, 0.2])
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    model.train()
    compiled(x).sum().backward()
    assert gates.parameters()[0].grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"open_probability": 1.0}, r"open_probability must be in \(0, 1\), not 1.0"),
        ({"temperature": 0}, "temperature must be above 0, not 0"),
    ],
)
def test_numbers_out_of_range_are_named(arguments, said):
    with pytest.raises(ValueError, match=f"^{said}"):
        gated(Attention(), **arguments)
