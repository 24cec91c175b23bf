"""The command line, on model directories that transformers wrote."""

import json
import re
import sys

import pytest
import torch
from typer.testing import CliRunner

import fxslim
from fxslim.cli import app

TINY = {"vocab_size": 99, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 2}
TINY |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def fxslim_command(*arguments):
    environment = {"COLUMNS": "80", "NO_COLOR": "1", "TERM": "dumb"}
    return CliRunner().invoke(app, [str(a) for a in arguments], env=environment)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Two layers, six query heads on three KV heads."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**TINY, num_attention_heads=6, num_key_value_heads=3)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def coupled(tmp_path_factory):
    """A model whose heads are coupled by a norm over all of them."""
    from transformers import Olmo2Config, Olmo2ForCausalLM

    folder = tmp_path_factory.mktemp("olmo2")
    Olmo2ForCausalLM(Olmo2Config(**TINY, num_attention_heads=6)).save_pretrained(folder)
    return folder


def test_inspect_lists_every_site(llama):
    done = fxslim_command("inspect", llama)
    assert done.exit_code == 0, done.output
    assert "model.layers.0.self_attn" in done.stdout
    assert "model.layers.1.self_attn" in done.stdout
    assert "6 (3 kv)" in done.stdout
    assert "2 sites, 2 prunable with 12 heads" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_inspect_says_why_a_site_is_refused(coupled):
    done = fxslim_command("inspect", coupled)
    assert done.exit_code == 0, done.output
    assert "2 sites, 0 prunable with 0 heads" in done.stdout
    assert "refused: model.layers.0.self_attn: " in done.stdout
    assert "self_attn.k_norm" in done.stdout


def test_prune_saves_a_program_and_its_plan(llama, tmp_path):
    done = fxslim_command("prune", llama, "--out", tmp_path, "--sparsity", "0.5")
    assert done.exit_code == 0, done.output
    assert "slim against masked: largest difference" in done.stdout
    plan = fxslim.PruningPlan.from_json((tmp_path / "plan.json").read_text())
    assert sum(map(len, plan.kept.values())) == 6
    exported = torch.export.load(tmp_path / "slim.pt2")
    program = exported.module()
    other = {name: torch.ones(3, 7, dtype=torch.long) for name in exported.example_inputs[1]}
    assert program(**other).logits.shape == (3, 7, 99)
    widths = {len(p) for n, p in program.named_parameters() if n.endswith("q_proj.weight")}
    assert widths == {4 * len(heads) for heads in plan.kept.values()}


def test_prune_meets_a_budget(llama, tmp_path):
    options = ["--budget", "0.95", "--resource", "parameters", "--scope", "uniform"]
    done = fxslim_command("prune", llama, "--out", tmp_path, *options)
    assert done.exit_code == 0, done.output
    plan = fxslim.PruningPlan.from_json((tmp_path / "plan.json").read_text())
    assert 0.5 < plan.reached["parameters"] <= 0.95
    assert len({len(heads) for heads in plan.kept.values()}) == 1


def test_prune_takes_channels_too(llama, tmp_path):
    done = fxslim_command("prune", llama, "--out", tmp_path, "--ffn-sparsity", "0.5")
    assert done.exit_code == 0, done.output
    plan = fxslim.PruningPlan.from_json((tmp_path / "plan.json").read_text())
    assert plan.reached == {"channels": 0.5}
    assert re.search(r"mlp\.down_proj +ffn +\d+ → \d+", done.stdout)


def test_prune_refuses_a_model_without_prunable_heads(coupled, tmp_path):
    done = fxslim_command("prune", coupled, "--out", tmp_path / "out")
    assert_one_message(done, "none of it can be pruned")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sparsity", "1"], "--sparsity must be in [0, 1), not 1.0"),
        (["--sparsity", "-0.1"], "--sparsity must be in [0, 1), not -0.1"),
        (["--budget", "0"], "--budget must be in (0, 1], not 0.0"),
        (["--budget", "0.5", "--sparsity", "0.5"], "give --sparsity or --budget, not both"),
        (["--resource", "joy"], "--resource must be one of parameters, flops, latency, not 'joy'"),
        (["--ffn-sparsity", "1"], "--ffn-sparsity must be in [0, 1), not 1.0"),
        (["--scope", "all"], "--scope must be one of global, local, uniform, not 'all'"),
        (["--criterion", "luck"], "--criterion 'luck' is unknown; known: "),
    ],
)
def test_bad_options_are_refused_before_any_work(tmp_path, options, message):
    done = fxslim_command("prune", tmp_path / "not looked at", "--out", tmp_path, *options)
    assert_one_message(done, message)


def test_a_criterion_that_needs_data(llama, tmp_path):
    done = fxslim_command("prune", llama, "--out", tmp_path, "--criterion", "fisher")
    assert_one_message(done, "needs calibration batches")


def test_the_demo_refuses_a_bad_sparsity(tmp_path):
    done = fxslim_command("demo", "--out", tmp_path, "--sparsity", "2")
    assert_one_message(done, "--sparsity must be in [0, 1), not 2.0")


def test_a_directory_without_a_model(tmp_path):
    done = fxslim_command("inspect", tmp_path)
    assert_one_message(done, f"{tmp_path} is no model directory: it has no config.json")


def test_an_architecture_that_transformers_lacks(tmp_path):
    write_config(tmp_path, model_type="bert", architectures=["HomeMade"])
    done = fxslim_command("inspect", tmp_path)
    assert_one_message(done, "names the architecture 'HomeMade'")


def test_a_directory_without_weights(tmp_path):
    write_config(tmp_path, model_type="bert")
    done = fxslim_command("inspect", tmp_path)
    assert_one_message(done, f"transformers could not load {tmp_path}: OSError: ")


def test_without_transformers(tmp_path, monkeypatch):
    write_config(tmp_path, model_type="bert")
    monkeypatch.setitem(sys.modules, "transformers", None)
    done = fxslim_command("inspect", tmp_path)
    assert_one_message(done, "pip install 'fxslim[transformers]'")


def test_no_command_prints_the_commands():
    done = fxslim_command()
    assert all(command in done.output for command in ("demo", "inspect", "prune"))


def write_config(folder, **config):
    (folder / "config.json").write_text(json.dumps(config))


def assert_one_message(done, message):
    assert done.exit_code == 1, done.output
    assert done.stderr.startswith("error: "), done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.output
