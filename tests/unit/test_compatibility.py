"""docs/compatibility.md says what the recorded results of tests say, and nothing else."""

import json
import subprocess
import sys

import pytest
from families import FAMILIES
from recorder import merged

from repository import ROOT
from scripts import compatibility
from scripts.compatibility import GPU, NOT_RUN, REFUSED, UNTESTED, YES, Cell, Table, page

RECORD = {
    "a::on_both": ["CPU", "GPU"],
    "a::on_cpu": ["CPU"],
    "a::on_gpu[1]": ["GPU"],
    "a::on_gpu[2]": ["GPU"],
}


@pytest.mark.parametrize(
    ("cell", "text"),
    [
        (Cell(), UNTESTED),
        (Cell(("a::on_both",)), YES),
        (Cell(("a::on_both", "a::on_cpu")), YES),
        (Cell(("a::on_both", "a::on_gpu*")), GPU),
        (Cell(("a::on_gpu[2]",)), GPU),
        (Cell(("a::on_cpu", "a::on_gpu*")), NOT_RUN),
        (Cell(("a::on_cpu", "a::elsewhere")), NOT_RUN),
        (Cell(("a::on_gpu",)), NOT_RUN),
        (Cell(("a::on_both",), needs_gpu=True), GPU),
        (Cell(("a::on_cpu",), needs_gpu=True), NOT_RUN),
        (Cell(("a::on_cpu",), is_refusal=True), REFUSED),
        (Cell(("a::elsewhere",), is_refusal=True), NOT_RUN),
    ],
)
def test_a_cell_says_where_its_tests_passed(cell, text):
    assert cell.text(RECORD) == text


def test_a_table_has_a_row_for_each_set_of_cells():
    table = Table("T", "Words.", "x", ("one", "two"), {"r": (Cell(), Cell(("a::on_cpu",)))})
    assert page(RECORD, [table]).endswith(
        "## T\n\nWords.\n\n| x | one | two |\n|---|---|---|\n| r | - | yes |\n"
    )


def test_results_are_merged_by_place():
    known = {"a": ["CPU"], "b": ["CPU", "GPU"], "c": ["CPU"]}
    text = merged(known, {"a": False, "b": False, "c": True, "d": True}, "CPU")
    assert json.loads(text) == {"b": ["GPU"], "c": ["CPU"], "d": ["CPU"]}
    assert len(text.splitlines()) == 5, "one test a line"
    assert json.loads(merged({}, {"a": True}, "GPU")) == {"a": ["GPU"]}


def test_only_tests_that_pass_are_recorded(tmp_path):
    (tmp_path / "conftest.py").write_text(
        "import recorder\n"
        "def pytest_addoption(parser): recorder.add_option(parser)\n"
        "def pytest_configure(config): recorder.start(config)\n"
    )
    (tmp_path / "test_x.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef bad():\n    yield\n    assert False\n"
        "def test_good(): pass\n"
        "def test_bad(): assert False\n"
        "def test_bad_end(bad): pass\n"
        "def test_skipped(): pytest.skip('no')\n"
    )
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    subprocess.run(
        [*command, "--rootdir", str(tmp_path), "--record", str(record), "test_x.py"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT / "tests"), "PATH": ""},
        capture_output=True,
    )
    assert list(json.loads(record.read_text())) == ["test_x.py::test_good"]


def test_every_family_has_a_row_and_every_row_all_cells():
    families, *others = compatibility.tables()
    assert families.rows.keys() == FAMILIES.keys()
    for table in (families, *others):
        assert all(len(cells) == len(table.columns) for cells in table.rows.values())


def test_the_page_is_up_to_date():
    record = json.loads(compatibility.RECORD.read_text(encoding="utf-8"))
    expected = page(record, compatibility.tables())
    assert compatibility.PAGE.read_text(encoding="utf-8") == expected


@pytest.mark.slow
def test_every_name_is_a_test():
    subprocess.run([sys.executable, "scripts/compatibility.py", "--check"], cwd=ROOT, check=True)
