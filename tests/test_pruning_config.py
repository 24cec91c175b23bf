"""Pruning configs: plain dicts in, checked; which attentions they name."""

import functools

import pytest

import fxslim
from fxslim.errors import PlanError, UnsupportedSite
from fxslim.pruning_config import PruningConfig, chosen_sites
from tests.models import Attention, Residual, captured, example

LAYERS = "abc"


@functools.cache
def sites():
    model = Residual(**{name: Attention() for name in LAYERS})
    return fxslim.find_attention(fxslim.capture(model, example()))


def names(**config):
    found = chosen_sites(PruningConfig.of(config), sites())
    return "".join(site.name.removeprefix("layers.") for site in found)


def test_absent_keys_have_the_defaults_of_intel_neural_compressor():
    assert PruningConfig.of({}).as_dict() == {
        "pattern": "mha",
        "op_names": [],
        "excluded_op_names": [],
        "target_sparsity": 0.9,
        "start_step": 0,
        "end_step": 0,
        "pruning_frequency": 1,
        "pruning_scope": "global",
        "criterion_type": "snip_momentum",
        "criterion_reduce_type": "mean",
        "sparsity_decay_type": "exp",
        "min_sparsity_ratio_per_op": 0.0,
        "max_sparsity_ratio_per_op": 0.98,
        "rounding": 1,
    }


@pytest.mark.parametrize(
    ("config", "error", "said"),
    [
        ([], TypeError, r"a pruning config must be a dict, not \[\]"),
        (
            {"pruning_type": "snip", "target_sparsity": 0.5},
            ValueError,
            "unknown pruning config keys 'pruning_type'; known: pattern, op_names, excluded_op_na",
        ),
        ({"pruning_scope": "uniform"}, ValueError, "pruning_scope must be one of global, local"),
        ({"criterion_type": "l1"}, ValueError, "criterion_type must be one of gradient, magnit"),
        ({"criterion_reduce_type": "l2"}, ValueError, "criterion_reduce_type must be one of max"),
        ({"sparsity_decay_type": "e"}, ValueError, "sparsity_decay_type must be one of cos, cube"),
        ({"pattern": "4x1"}, ValueError, "pattern must be one of channelx1, mha"),
        ({"target_sparsity": 1.0}, ValueError, r"target_sparsity must be in \[0, 1\), not 1.0"),
        ({"target_sparsity": "half"}, TypeError, "target_sparsity must be a number, not 'half'"),
        ({"start_step": 1.5}, TypeError, "start_step must be a whole number, not 1.5"),
        ({"end_step": True}, TypeError, "end_step must be a whole number, not True"),
        ({"pruning_frequency": 0}, ValueError, r"pruning_frequency must be in \[1, inf\), not 0"),
        ({"start_step": 5, "end_step": 4}, ValueError, r"end_step \(4\) is before start_step"),
        ({"op_names": "query"}, TypeError, "op_names must be a list of names or patterns"),
        ({"op_names": ["("]}, ValueError, r"op_names: '\(' is no regular expression"),
        (
            {"min_sparsity_ratio_per_op": 0.6, "target_sparsity": 0.5},
            ValueError,
            r"min_sparsity_ratio_per_op \(0.6\) is more than target_sparsity \(0.5\)",
        ),
    ],
)
def test_what_makes_no_sense_is_named(config, error, said):
    with pytest.raises(error, match=f"^{said}"):
        PruningConfig.of(config)


def test_gradients_are_not_there_before_the_first_step():
    with pytest.raises(ValueError, match=r"^criterion_type='snip' needs gradients, but the only"):
        PruningConfig.of({"criterion_type": "snip"}).check_schedule()
    PruningConfig.of({"criterion_type": "magnitude"}).check_schedule()
    PruningConfig.of({"criterion_type": "snip", "start_step": 1, "end_step": 1}).check_schedule()


def test_sites_are_named_by_themselves_by_their_layers_or_by_patterns():
    assert names() == "abc"
    assert names(op_names=["layers.b"]) == "b"
    assert names(op_names=["layers.c.q", "layers.a.o"]) == "ac"
    assert names(op_names=["[bc]$"]) == "bc"
    assert names(excluded_op_names=["layers.a"]) == "bc"
    assert names(op_names=[r"\.(a|b)"], excluded_op_names=["a.q"]) == "b"


def test_a_name_is_no_pattern():
    model = Residual(a=Attention(), aa=Attention())
    found = fxslim.find_attention(fxslim.capture(model, example()))
    chosen = chosen_sites(PruningConfig.of({"op_names": ["layers.a"]}), found)
    assert [site.name for site in chosen] == ["layers.a"]


def test_a_name_that_matches_nothing_is_an_error():
    said = r"^'query' names no site and matches none; the sites are: layers.a, layers.b,"
    with pytest.raises(PlanError, match=said):
        names(op_names=["query"])


def test_a_refused_site_that_is_named_is_an_error_with_its_reason():
    found = fxslim.find_attention(captured("one-of-three")[-1])
    refused = next(site for site in found if not site.prunable)
    with pytest.raises(UnsupportedSite, match="cannot be pruned: "):
        chosen_sites(PruningConfig.of({"op_names": [refused.name]}), found)
    assert [s.name for s in chosen_sites(PruningConfig(), found)] == ["layers.1.attention"]


def test_coupled_sites_are_chosen_together():
    found = fxslim.find_attention(captured("albert")[-1])
    with pytest.raises(PlanError, match="must keep the same heads as"):
        chosen_sites(PruningConfig.of({"excluded_op_names": [found[0].name]}), found)
