"""The runner: nothing that one entry does stops the others."""

import multiprocessing
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from tests.zoo.__main__ import main
from tests.zoo.check import Result
from tests.zoo.markdown import page
from tests.zoo.reference import Difference
from tests.zoo.runner import Job, _Worker, run
from tests.zoo.tables import report


def test_a_hanging_entry_is_killed():
    (result,) = run([Job("bert", "eager")], timeout=0.01)
    assert (result.name, result.attn, result.status) == ("bert", "eager", "timeout")


def test_a_dead_process_is_a_crash_with_its_exit_code(tmp_path):
    context = multiprocessing.get_context("forkserver")
    worker = _Worker.start(context, Job("bert", "eager"), tmp_path / "log", timeout=60)
    worker.process.kill()
    worker.process.join()
    result = worker.result()
    assert result.status == "crash"
    assert "exit code -9" in result.detail


def test_an_exception_is_a_result_that_says_where():
    (result,) = run([Job("handwritten/nothing", "own")], timeout=60)
    assert result.status == "error"
    assert "KeyError" in result.detail
    assert "entries.py" in result.detail


def test_the_report_fits_and_names_what_failed():
    good = Result("bert", "sdpa", "equal", cores=2, sites=2, prunable=2, effect=0.1)
    results = [
        good,
        replace(good, name="a" * 80, status="wrong", difference=Difference(3.0, 0.25)),
        Result("b", "own", "refused", sites=1, reasons={"x has no rule": 1}, operators={"x": 1}),
        Result("c", "eager", "crash", detail="exit code -11"),
    ]
    printed = StringIO()
    Console(file=printed, width=100).print(report(results))
    text = printed.getvalue()
    assert max(map(len, text.splitlines())) <= 100
    for expected in ("4 checks: ", "x has no rule", "exit code -11", "relative=0.25"):
        assert expected in text


def test_the_page_has_a_row_for_every_entry_and_for_every_difference():
    good = Result("bert", "sdpa", "equal", cores=2, sites=2, prunable=2)
    results = [
        good,
        replace(good, attn="eager"),
        replace(good, name="b"),
        replace(good, name="b", attn="eager", status="refused", prunable=0, reasons={"why": 2}),
        replace(good, name="c", attn="eager", status="skipped"),
    ]
    lines = page(results).splitlines()
    assert "| `bert` | eager, sdpa | 2 | 2 | 2 | equal |" in lines
    assert "| `b` | sdpa | 2 | 2 | 2 | equal |" in lines
    assert "| `b` | eager | 2 | 2 | 0 | refused |" in lines
    assert "| why | 2 |" in lines
    assert not any("`c`" in line for line in lines)


def test_list_prints_the_names_that_match(capsys):
    assert main(["--list", "llama:*"]) == 0
    assert capsys.readouterr().out.split() == ["llama:head_dim", "llama:mha", "llama:mqa"]


def test_a_pattern_without_an_entry_is_refused():
    with pytest.raises(SystemExit, match="no entry matches nothing"):
        main(["nothing"])
