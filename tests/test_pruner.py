"""The pruner: scores by their definition, masks by the schedule, state in the state dict."""

import copy
import gc
import itertools

import pytest
import torch
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import fxslim
from fxslim.errors import PlanError
from tests.models import HEADS, WIDTH, Attention, Residual, example, grouped_core

STEPS = 8


def model_of(**layers):
    torch.manual_seed(0)
    return Residual(**(layers or {"a": Attention(), "b": Attention()}))


def prepared(model, optimizer=None, **config):
    config = {"target_sparsity": 0.5, "end_step": STEPS, "sparsity_decay_type": "linear"} | config
    return fxslim.prepare_pruning(model, config, optimizer, example_inputs=example())


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, WIDTH, generator=generator)


def train(model, optimizer, steps):
    """An ordinary loop; yields after each step."""
    for step in steps:
        x = batch(step)
        loss = (model(x) - x.flip(-1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


def masks_of(pruning):
    return {n: m.tolist()[0] for p in pruning.pruners for n, m in p.head_masks.items()}


def zeros(masks):
    return sum(mask.count(0) for mask in masks.values())


# ------------------------------------------------------------------------------------- attributes


def test_the_attributes_that_intel_neural_compressor_has():
    model = model_of()
    pruner = prepared(model).pruners[0]
    assert isinstance(pruner, fxslim.PythonMultiheadAttentionPruner)
    assert list(pruner.mha_compressions) == ["layers.a", "layers.b"]
    assert pruner.mha_compressions["layers.a"].site.num_heads == HEADS
    assert pruner.linear_layers == {
        f"layers.{a}.{name}": getattr(model.layers[a], name) for a in "ab" for name in "qkvo"
    }
    for found in (pruner.head_masks, pruner.mha_scores):
        assert {n: tuple(t.shape) for n, t in found.items()} == {
            "layers.a": (1, HEADS),
            "layers.b": (1, HEADS),
        }


def test_a_mask_that_is_written_to_is_what_the_model_reads():
    model = model_of(a=Attention())
    pruner = prepared(model).pruners[0]
    pruner.head_masks["layers.a"].zero_()
    x = example()
    torch.testing.assert_close(model(x), x + model.layers["a"].o.bias)


# ----------------------------------------------------------------------------------------- scores

REDUCE = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax}


def defined_scores(attention, kind, reduce):
    """The mean over the four layers of what the weights of a head's block give, reduced."""
    total = torch.zeros(HEADS)
    for name, dim in (("q", 0), ("k", 0), ("v", 0), ("o", 1)):
        weight = attention.get_submodule(name)._parameters["weight"]
        values = weight if kind == "magnitude" else weight.grad
        if kind.startswith("snip"):
            values = weight * weight.grad
        total += torch.stack([REDUCE[reduce](v.detach().abs()) for v in values.chunk(HEADS, dim)])
    return total / 4


@pytest.mark.parametrize(
    ("kind", "reduce"),
    [
        *itertools.product(["gradient", "snip", "snip_momentum"], ["mean"]),
        ("snip", "sum"),
        ("snip", "max"),
    ],
)
def test_scores_are_what_their_names_say(kind, reduce):
    model = model_of()
    pruning = prepared(model, criterion_type=kind, criterion_reduce_type=reduce, start_step=2)
    scores = pruning.pruners[0].mha_scores
    expected = dict.fromkeys("ab", torch.zeros(HEADS))
    for step in range(3):
        model.zero_grad()
        model(batch(step)).square().sum().backward()
        new = {name: defined_scores(model.layers[name], kind, reduce) for name in "ab"}
        kept = 0.9 if kind == "snip_momentum" else 0.0
        expected = {name: kept * expected[name] + new[name] for name in "ab"}
        pruning.on_before_optimizer_step()
        for name in "ab":
            torch.testing.assert_close(scores[f"layers.{name}"][0], expected[name])


@pytest.mark.parametrize("scope", ["global", "local"])
def test_the_heads_of_least_magnitude_go(scope):
    model = model_of()
    nn.init.constant_(model.layers["a"].v.weight, 0.5)  # all of a's heads matter more
    pruning = prepared(
        model, start_step=0, end_step=0, criterion_type="magnitude", pruning_scope=scope
    )
    scores = {name: defined_scores(model.layers[name], "magnitude", "mean") for name in "ab"}
    pruning.on_step_begin()
    masks = masks_of(pruning)
    if scope == "global":
        assert masks["layers.a"] == [1] * HEADS or masks["layers.a"].count(0) == 1
        assert zeros(masks) == 4
    else:
        for name in "ab":
            lowest = scores[name].argsort()[:2].tolist()
            assert [h for h, m in enumerate(masks[f"layers.{name}"]) if not m] == sorted(lowest)


def test_frozen_weights_have_no_scores():
    model = model_of()
    model.layers["b"].requires_grad_(False)
    pruning = prepared(model, start_step=1, end_step=1)
    model(example()).sum().backward()
    pruning.on_before_optimizer_step()
    pruning.on_after_optimizer_step()
    with pytest.raises(PlanError, match=r"^no gradient has reached 'layers.b' by step 1, so its"):
        pruning.on_step_begin()


# -------------------------------------------------------------------------------------- schedules


@pytest.mark.parametrize("kind", ["magnitude", "gradient"])
def test_heads_go_by_the_schedule_and_do_not_come_back(kind):
    model = model_of()
    optimizer = sgd(model)
    pruning = prepared(model, optimizer, criterion_type=kind, pruning_frequency=2)
    numbers, before = [zeros(masks_of(pruning))], masks_of(pruning)
    for _ in train(model, optimizer, range(STEPS + 3)):
        masks = masks_of(pruning)
        for name, mask in masks.items():
            assert all(new <= old for new, old in zip(mask, before[name], strict=True))
        numbers.append(zeros(masks))
        before = masks
    assert numbers == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 4]
    assert int(pruning.pruners[0].step) == STEPS + 3


def test_groups_go_together_and_coupled_sites_too():
    shared = Attention()
    model = model_of(a=shared, b=shared, c=Attention(kv_heads=2, core=grouped_core))
    optimizer = sgd(model)
    pruning = prepared(model, optimizer, pruning_scope="local")
    list(train(model, optimizer, range(STEPS)))
    masks = masks_of(pruning)
    assert masks["layers.a"] == masks["layers.b"]
    assert zeros({"a": masks["layers.a"]}) == 2
    assert masks["layers.c"] in ([0, 0, 1, 1], [1, 1, 0, 0])


def test_bounds_hold_for_every_site():
    model = model_of()
    nn.init.constant_(model.layers["a"].v.weight, 5.0)
    bounds = {"min_sparsity_ratio_per_op": 0.25, "max_sparsity_ratio_per_op": 0.75}
    optimizer = sgd(model, lr=0.0)
    pruning = prepared(model, optimizer, criterion_type="magnitude", **bounds)
    for step in train(model, optimizer, range(STEPS)):
        gone = {name: mask.count(0) for name, mask in masks_of(pruning).items()}
        assert sum(gone.values()) == (step + 1) // 2
    assert gone == {"layers.a": 1, "layers.b": 3}


def test_what_the_bounds_leave_out_of_reach_is_said_at_the_end():
    model = model_of()
    bounds = {"target_sparsity": 0.9, "max_sparsity_ratio_per_op": 0.5}
    pruning = prepared(model, criterion_type="magnitude", end_step=0, **bounds)
    with pytest.warns(UserWarning, match=r"sparsity=0.9 is not reached: .* so it is 0.500"):
        pruning.on_step_begin()


def test_configs_apply_to_their_own_sites():
    model = model_of()
    optimizer = sgd(model)
    configs = [
        {"op_names": ["layers.a"], "target_sparsity": 0.25, "end_step": 2},
        {"op_names": ["layers.b"], "target_sparsity": 0.75, "end_step": 4},
    ]
    pruning = fxslim.prepare_pruning(model, configs, optimizer, example_inputs=example())
    list(train(model, optimizer, range(5)))
    assert {n: mask.count(0) for n, mask in masks_of(pruning).items()} == {
        "layers.a": 1,
        "layers.b": 3,
    }


# ------------------------------------------------------------------------------------------ state


def test_a_run_that_is_killed_goes_on_as_if_it_was_not():
    config = {"pruning_frequency": 3, "end_step": 9}
    histories, finals = [], []
    for killed_at in (None, 5):
        model = model_of()
        optimizer = sgd(model)
        pruning = prepared(model, optimizer, **config)
        history = []
        for step in train(model, optimizer, range(12)):
            history.append(masks_of(pruning))
            if step == killed_at:
                saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
                break
        if killed_at is not None:
            torch.manual_seed(1)  # the fresh model has other weights, that would lose other heads
            model = Residual(a=Attention(), b=Attention())
            optimizer = sgd(model)
            pruning = prepared(model, optimizer, **config)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            for _ in train(model, optimizer, range(killed_at + 1, 12)):
                history.append(masks_of(pruning))
        histories.append(history)
        finals.append(model.state_dict())
    assert histories[0] == histories[1]
    assert zeros(histories[0][-1]) == 4
    for name, value in finals[0].items():
        assert torch.equal(value, finals[1][name]), name


def test_moving_the_model_moves_its_pruner():
    model = model_of()
    pruner = prepared(model).pruners[0]
    model.to("meta")
    assert {t.device.type for t in (*pruner.head_masks.values(), pruner.step)} == {"meta"}


# --------------------------------------------------------------------------------------- processes


def _train_half(rank, store, path):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    _train_wrapped(rank, path)
    gc.collect()  # a wrapped model that outlives its process group may hang when it is freed
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def _train_wrapped(rank, path):
    model = model_of()
    wrapped = DistributedDataParallel(model)
    optimizer = sgd(model)
    pruning = prepared(wrapped, optimizer)
    history = []
    for step in range(STEPS):
        x = batch(step)[rank::2]
        (wrapped(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        history.append(masks_of(pruning))
    pruning.pruners[0].on_before_optimizer_step()
    state = copy.deepcopy(model.state_dict())
    for scores in pruning.pruners[0].mha_scores.values():
        scores.mul_(2 * rank)  # 0 and 2 times as much: the average is as it was
    pruning.pruners[0].step.fill_(STEPS)
    pruning.on_step_begin()
    torch.save((history, state, pruning.pruners[0].mha_scores), f"{path}{rank}")


def test_processes_hold_the_masks_of_one_that_has_all_data(tmp_path):
    model = model_of()
    optimizer = sgd(model)
    pruning = prepared(model, optimizer)
    history = [masks_of(pruning) for _ in train(model, optimizer, range(STEPS))]
    multiprocessing.spawn(_train_half, (tmp_path / "store", tmp_path / "state"), nprocs=2)
    first, second = (torch.load(tmp_path / f"state{rank}") for rank in range(2))
    assert first[0] == second[0] == history
    assert zeros(history[-1]) == 4
    for name, value in first[1].items():
        assert torch.equal(value, second[1][name]), name
    for name, scores in first[2].items():
        assert torch.equal(scores, second[2][name])
        torch.testing.assert_close(
            scores[0], first[1][f"head_masks/{name.replace('.', '/')}/scores"]
        )


# -------------------------------------------------------------------------------- masked programs


def test_a_masked_program_is_trained_like_the_model():
    model = model_of()
    program = fxslim.insert_head_masks(
        fxslim.capture(copy.deepcopy(model), example()), trainable=False
    )
    histories = []
    for trained in (model, program):
        optimizer = sgd(trained)
        pruning = prepared(trained, optimizer)
        histories.append([masks_of(pruning) for _ in train(trained, optimizer, range(STEPS))])
    assert histories[0] == histories[1]
    x = example()
    torch.testing.assert_close(model(x), program(x))
    slims = [fxslim.model_slim(trained, x) for trained in (model, program)]
    assert slims[0].meta["fxslim"].plan == slims[1].meta["fxslim"].plan
    torch.testing.assert_close(slims[1](x), program(x))


def test_trainable_masks_would_let_heads_come_back():
    program = fxslim.insert_head_masks(fxslim.capture(model_of(), example()))
    with pytest.raises(ValueError, match=r"^the program's head masks are trainable, and pruned he"):
        prepared(program)
