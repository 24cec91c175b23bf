"""Intel Neural Compressor's front door: configs found, an ordinary loop hooked."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

import fxslim
from fxslim.errors import PlanError, UnsupportedSite
from tests.models import HEADS, Attention, Residual, example
from tests.zoo import build


def test_configs_name_the_attentions_of_a_model():
    model, inputs = build("bert")
    before = list(model.state_dict())
    configs = fxslim.parse_auto_slim_config(
        model, inputs, mha_sparsity=0.25, start_step=10, end_step=50, pruning_scope="local"
    )
    assert configs == [
        {
            "pattern": "mha",
            "op_names": ["bert.encoder.layer.0.attention", "bert.encoder.layer.1.attention"],
            "excluded_op_names": [],
            "target_sparsity": 0.25,
            "start_step": 10,
            "end_step": 50,
            "pruning_frequency": 1,
            "pruning_scope": "local",
            "criterion_type": "snip_momentum",
            "criterion_reduce_type": "mean",
            "sparsity_decay_type": "exp",
            "min_sparsity_ratio_per_op": 0.0,
            "max_sparsity_ratio_per_op": 0.98,
            "rounding": 1,
        }
    ]
    assert list(model.state_dict()) == before


def test_a_second_config_names_the_feed_forward_blocks():
    model, inputs = build("bert")
    heads, channels = fxslim.parse_auto_slim_config(
        model, inputs, mha_sparsity=0.25, ffn2_sparsity=0.5, end_step=2, rounding=2
    )
    assert (heads["pattern"], channels["pattern"]) == ("mha", "channelx1")
    assert channels["op_names"] == [f"bert.encoder.layer.{n}.output.dense" for n in range(2)]
    assert (channels["target_sparsity"], channels["rounding"]) == (0.5, 2)


@pytest.mark.parametrize("criterion", ["magnitude", "snip_momentum"])
def test_heads_and_channels_go_while_a_model_is_trained(criterion):
    model, inputs = build("bert")
    configs = fxslim.parse_auto_slim_config(
        model,
        inputs,
        mha_sparsity=0.5,
        ffn2_sparsity=0.5,
        start_step=1,
        end_step=3,
        rounding=2,
        criterion_type=criterion,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    pruning = fxslim.prepare_pruning(model, configs, optimizer, example_inputs=inputs)
    for _ in range(4):
        model(**inputs).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    blocks = pruning.pruners[1]
    kept = {name: int(mask.sum()) for name, mask in blocks.head_masks.items()}
    sizes = {name: mask.numel() for name, mask in blocks.head_masks.items()}
    assert sum(kept.values()) == sum(sizes.values()) / 2
    assert all(number % 2 == 0 for number in kept.values())
    slim = fxslim.model_slim(model, inputs)
    report = fxslim.Report.of(slim)
    assert {name: len(report.plan.kept[name]) for name in kept} == kept
    assert (report.plan.sparsity, report.plan.reached) == (0.5, {"channels": 0.5})
    with torch.no_grad():
        torch.testing.assert_close(slim(**inputs).logits, model.eval()(**inputs).logits)


def test_nothing_asked_is_no_config():
    assert fxslim.parse_auto_slim_config(Attention()) == []
    with pytest.raises(ValueError, match=r"^there is no pruning config: pass what parse_auto_sl"):
        fxslim.prepare_pruning(Attention(), [])


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        ({"mha_sparsity": 1.5}, ValueError, "target_sparsity must be in"),
        ({"mha_sparsity": 0.5, "steps": 3}, ValueError, "unknown pruning config keys 'steps'; kno"),
        ({"mha_sparsity": 0.5, "op_names": ["query"]}, PlanError, "'query' names no site"),
        ({"ffn2_sparsity": 0.5}, UnsupportedSite, "Attention has no feed-forward: no channels bet"),
    ],
)
def test_what_cannot_be_configured_is_named(arguments, error, said):
    with pytest.raises(error, match=f"^{said}"):
        fxslim.parse_auto_slim_config(Attention(), example(), **arguments)


def test_a_model_without_attention_is_refused():
    with pytest.raises(UnsupportedSite, match=r"^Linear has no attention"):
        fxslim.parse_auto_slim_config(torch.nn.Linear(3, 3), torch.randn(2, 5, 3), mha_sparsity=0.5)


def test_the_pipeline_of_intel_neural_compressor():
    """Its script, with its names: only the import differs."""
    model, inputs = build("bert")
    model.train()
    configs = fxslim.parse_auto_slim_config(
        model, inputs, mha_sparsity=0.5, start_step=1, end_step=3, criterion_type="snip"
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    fxslim.prepare_pruning(model, configs, optimizer=optimizer, example_inputs=inputs)
    for _ in range(4):
        logits = model(**inputs).logits
        torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), inputs["input_ids"].flatten()
        ).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slim = fxslim.model_slim(model)
    assert isinstance(slim, torch.fx.GraphModule)
    assert sum(map(len, slim.meta["fxslim"].plan.kept.values())) == HEADS
    assert model.training
    assert not slim.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert sum(p.numel() for p in slim.parameters()) < sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(slim(**inputs).logits, model.eval()(**inputs).logits)


def test_two_configs_cannot_name_the_same_attention():
    model = Residual(a=Attention(), b=Attention())
    configs = [{"end_step": 1}, {"end_step": 2, "op_names": ["layers.b"]}]
    with pytest.raises(PlanError, match=r"^two pruning configs name 'layers.b'; exclude it from"):
        fxslim.prepare_pruning(model, configs, example_inputs=example())


def test_a_model_is_prepared_once():
    model = Attention()
    fxslim.prepare_pruning(model, {"end_step": 1}, example_inputs=example())
    with pytest.raises(ValueError, match=r"^Attention has been prepared for pruning already"):
        fxslim.prepare_pruning(model, {"end_step": 1}, example_inputs=example())


def test_the_hooks_can_be_called_by_the_loop():
    model = Attention()
    pruning = fxslim.prepare_pruning(
        model, {"end_step": 2, "target_sparsity": 0.5}, example_inputs=example()
    )
    for _ in range(3):
        pruning.on_step_begin()
        model(example()).sum().backward()
        pruning.on_before_optimizer_step()
        pruning.on_after_optimizer_step()
    assert int(pruning.pruners[0].head_masks["attention"].sum()) == HEADS / 2


@pytest.fixture
def accelerate():
    """Accelerate's settings are the process's: a trainer of another test may have left some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("accelerate")
def test_accelerate_and_gradient_accumulation_count_optimizer_steps():
    model = Residual(a=Attention())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    accelerator = Accelerator(gradient_accumulation_steps=2, cpu=True, mixed_precision="bf16")
    model, optimizer = accelerator.prepare(model, optimizer)
    config = {"end_step": 4, "target_sparsity": 0.5, "sparsity_decay_type": "linear"}
    pruning = fxslim.prepare_pruning(model, config, optimizer, example_inputs=example())
    (pruner,) = pruning.pruners
    for batch in range(8):
        with accelerator.accumulate(model):
            accelerator.backward(model(example()).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        assert int(pruner.step) == (batch + 1) // 2
    assert int(pruner.head_masks["layers.a"].sum()) == HEADS / 2
    x = example()
    slim = fxslim.model_slim(model, x)
    torch.testing.assert_close(slim(x), model(x), rtol=0.05, atol=0.05)
    with torch.no_grad():
        exact = accelerator.unwrap_model(model, keep_fp32_wrapper=False)(x)
        torch.testing.assert_close(slim(x), exact)
