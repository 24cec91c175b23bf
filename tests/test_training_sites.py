"""Training sites: what can be masked on the model itself, and why the rest cannot."""

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fxslim
from fxslim.errors import UnsupportedSite
from fxslim.training_sites import bare, evaluating, training_sites
from tests.models import Attention, Residual, example
from tests.zoo.handwritten import HANDWRITTEN


class BesideTheAttribute(Attention):
    """Reads the output projection's weight from the dict that holds it."""

    def forward(self, x):
        weight = self.o._parameters["weight"]
        return nn.functional.linear(self.context(x), weight, self.o.bias)


class WeightNorm(Attention):
    """Divides the output projection's weight by its norm: no plain factor of the context."""

    def forward(self, x):
        weight = self.o.weight / self.o.weight.norm(dim=0).detach().max()
        return nn.functional.linear(self.context(x), weight, self.o.bias)


def test_what_the_program_can_mask_the_model_can():
    model, inputs = HANDWRITTEN["one-of-three"]()
    found = fxslim.find_attention(fxslim.capture(model, inputs))
    assert [s.prunable for s in training_sites(model, inputs)] == [s.prunable for s in found]


@pytest.mark.parametrize("refused", [BesideTheAttribute, WeightNorm])
def test_a_weight_that_is_not_read_as_a_factor_is_refused(refused):
    model = Residual(a=Attention(), b=refused())
    before = list(model.state_dict())
    a, b = training_sites(model, example())
    assert a.prunable
    assert not b.prunable
    if refused is BesideTheAttribute:
        assert b.reason.startswith("masks on the model and on its program differ on the example in")
        assert "does not read the weight 'layers.b.o.weight' as an attribute" in b.reason
    assert list(model.state_dict()) == before
    assert type(model.layers["a"].o) is nn.Linear


def test_heads_without_any_effect_cannot_be_checked():
    model = Residual(a=Attention(), b=Attention())
    nn.init.zeros_(model.layers["b"].o.weight)
    a, b = training_sites(model, example())
    assert a.prunable
    assert b.reason == "its heads have no effect on the example outputs, so masks cannot be checked"


def test_no_site_at_all_is_an_error_with_the_reasons():
    with pytest.raises(UnsupportedSite, match=r"BesideTheAttribute has attention, but none of it"):
        training_sites(BesideTheAttribute(), example())


def test_the_mode_of_each_module_comes_back():
    model = Residual(a=Attention(), b=Attention())
    model.layers["a"].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    training_sites(model, example())
    assert [module.training for module in model.modules()] == modes


def test_the_bare_model_is_inside_of_compiled_ones():
    model = Attention()
    assert bare(torch.compile(model, backend="eager")) is model
    assert bare(model) is model


@pytest.fixture
def mesh(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield init_device_mesh("cpu", (1,))
    distributed.destroy_process_group()


SHARDED = r"^'layers.a.q.weight' of .*Residual is sharded over processes: .* fxslim.compile before"


def test_a_sharded_model_is_refused(mesh):
    model = fully_shard(Residual(a=Attention()), mesh=mesh)
    with pytest.raises(UnsupportedSite, match=SHARDED):
        fxslim.parse_auto_slim_config(model, example(), mha_sparsity=0.5)
    with pytest.raises(UnsupportedSite, match=SHARDED):
        fxslim.prepare_pruning(model, [{"end_step": 1}], example_inputs=example())
    with pytest.raises(UnsupportedSite, match=SHARDED):
        fxslim.model_slim(model, example())


def test_a_model_that_is_sharded_later_is_refused_at_the_first_step(mesh):
    model = Residual(a=Attention())
    pruning = fxslim.prepare_pruning(model, {"end_step": 1}, example_inputs=example())
    fully_shard(model, mesh=mesh)
    with pytest.raises(UnsupportedSite, match="is sharded over processes"):
        pruning.on_before_optimizer_step()
