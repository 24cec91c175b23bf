"""Reports: tables that fit a terminal, and the picture of the head scores."""

import dataclasses
import io
import sys

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import fxslim
from fxslim import report
from fxslim.measure import Totals
from fxslim.report import human, save_heatmap, site_table, totals_table


class Attention(nn.Module):
    """Four query heads of width 4, two KV heads."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (self.q, self.k, self.v))
        context = scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return self.o(context.transpose(1, 2).flatten(-2))


@pytest.fixture(scope="module")
def pruned():
    model = nn.Sequential(Attention(), Attention())
    return model, fxslim.compile(model, 0.5, torch.randn(2, 5, 16))


@pytest.fixture
def sites(pruned):
    return pruned[1].meta["fxslim"].sites


def printed(table):
    console = Console(file=io.StringIO(), width=120)
    console.print(table)
    text = console.file.getvalue()
    assert max(map(len, text.splitlines())) <= 80
    return text


def row(text, name):
    return next(line.rstrip() for line in text.splitlines() if line.split()[:1] == [name])


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (7, "7"), (999, "999"), (1000, "1 K"), (22_713_216, "22.7 M"), (999_900, "1 M")],
)
def test_human_numbers(number, shown):
    assert human(number) == shown


def test_sites_as_they_are(sites):
    columns = row(printed(site_table(sites)), "0").split()
    assert columns == ["0", "gqa", "4", "(2", "kv)", "yes"]


def test_sites_before_and_after(pruned, sites):
    dense, slim = pruned
    done = slim.meta["fxslim"]
    text = printed(site_table(sites, done.plan, done.scores, dense=dense, slim=slim))
    sizes = [sum(p.numel() for p in m.get_submodule("0").parameters()) for m in pruned]
    before, after = (size - 16 for size in sizes)  # the output's bias carries no heads
    assert f"{before} → {after}" in row(text, "0")
    assert f"4 (2 kv) → {len(done.plan.kept['0'])}" in row(text, "0")
    low, high = done.scores["0"].min().item(), done.scores["0"].max().item()
    assert row(text, "0").endswith(f"{low:.2g}…{high:.2g}")


def test_an_attention_that_is_gone_has_no_parameters_left(pruned, sites):
    text = printed(site_table(sites, dense=pruned[0], slim=nn.Module()))
    assert row(text, "0").split()[-3:] == ["→", "0", "yes"]


def test_a_refused_site_says_why_below_the_table(sites):
    reason = "heads are mixed by [line 3]: " + "a reason that is longer than a line " * 3
    refused = [dataclasses.replace(site, prunable=False, reason=reason) for site in sites]
    text = printed(site_table(refused))
    assert row(text, "0").endswith("refused")
    assert f"refused: 0, 1: {reason}".split() == text[text.index("refused: ") :].split()


def test_cross_attention_is_marked(sites):
    crossed = dataclasses.replace(sites[0], name="decoder.layers.11.encoder_attn", is_cross=True)
    text = printed(site_table([crossed]))
    assert "decoder.layers.11.encoder_attn" in text
    assert "cross" in text


def test_a_long_name_is_folded_not_cut(sites):
    name = "model.language_model." + "layers.0." * 10 + "self_attn"
    text = printed(site_table([dataclasses.replace(sites[0], name=name)]))
    assert name in "".join(line.split(" ")[0] for line in text.splitlines())


def test_totals(sites):
    text = printed(totals_table(Totals((2000, 1000), (4_000_000, 3_000_000), (0.002, 0.001))))
    assert [line.split()[-1] for line in text.splitlines() if line.split()][2:] == [
        "0.50",
        "0.75",
        "0.50",
    ]
    assert "2.0 ms" in text


@pytest.mark.parametrize(
    "scores",
    [
        {"a": torch.rand(12), "b": torch.rand(12)},
        {"a": torch.rand(12), "b": torch.rand(9)},  # sites of different width
        {"a": torch.tensor([1e-9, 1.0])},  # shown on a logarithmic scale
        {"a": torch.tensor([-1.0, 0.0, 5.0])},
        {"a": torch.ones(1)},
        {f"layer.{n}": torch.rand(64) for n in range(48)},
    ],
)
def test_heat_map_is_a_png(tmp_path, scores):
    path = save_heatmap(tmp_path / "new" / "heads.png", scores)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_removed_heads_are_crossed_out():
    scores = {"a": torch.rand(3), "b": torch.rand(2), "c": torch.rand(3)}
    plan = fxslim.PruningPlan({"a": [1], "b": []}, 0.5)
    grid = report._grid(scores, 3)
    assert report._removed(grid, list(scores), plan) == [(0, 0), (0, 2), (1, 0), (1, 1)]
    assert report._removed(grid, list(scores), None) == []


def test_heat_map_without_scores(tmp_path):
    with pytest.raises(ValueError, match="no scores to draw"):
        save_heatmap(tmp_path / "heads.png", {})


def test_heat_map_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fxslim\[plot\]'"):
        save_heatmap(tmp_path / "heads.png", {"a": torch.rand(3)})
