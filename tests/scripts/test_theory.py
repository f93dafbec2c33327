"""docs/background/theory.md has the figures of docs/background/data/theory.json; the command that makes both runs."""

import json
import math
import subprocess
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))

import theory
import theory_page
import theory_tables

PAGE = REPO / "docs" / "background" / "theory.md"
DATA = REPO / "docs" / "background" / "data" / "theory.json"


def test_the_page_has_the_figures_of_the_data():
    assert theory_page.refresh(PAGE.read_text(), json.loads(DATA.read_text())) == PAGE.read_text()


def test_the_data_were_made_with_the_settings_of_the_script():
    content = json.loads(DATA.read_text())
    assert {name: content[name]["settings"] for name in theory.FULL} == {n: s for n, (_, s) in theory.FULL.items()}


def test_every_picture_is_on_the_page_and_in_the_folder():
    for name in theory_page.PICTURES:
        assert f"(images/{name}.png)" in PAGE.read_text()
        assert (PAGE.parent / "images" / f"{name}.png").is_file()


def test_a_table_without_a_place_is_an_error():
    page = PAGE.read_text().replace("<!-- begin linear -->", "")
    with pytest.raises(ValueError, match="0 places"):
        theory_page.refresh(page, json.loads(DATA.read_text()))


def test_intervals_of_shares():
    assert theory_tables.interval(0, 0) == (0, 1)
    low, high = theory_tables.interval(0, 1000)
    assert low == 0 and high == pytest.approx(0.00383, abs=1e-5)
    low, high = theory_tables.interval(50, 100)
    assert (low, high) == pytest.approx((0.4038, 0.5962), abs=1e-4)


def test_rank_correlation():
    assert theory_tables.rank_correlation([1, 2, 3, None], [10, 20, 30, 40]) == pytest.approx(1)
    assert theory_tables.rank_correlation([3, 2, 1], [1, 5, 9]) == pytest.approx(-1)
    assert theory_tables.rank_correlation([1, None, None], [1, 2, 3]) == pytest.approx(math.sqrt(3) / 2)


def test_the_command_makes_data_pictures_and_page(tmp_path):
    command = [sys.executable, str(REPO / "scripts" / "theory.py"), "--quick", "--output", str(tmp_path)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    content = json.loads((tmp_path / "data" / "theory.json").read_text())
    full = json.loads(DATA.read_text())
    for name in theory.FULL:
        assert content[name].keys() == full[name].keys()
        assert content[name]["settings"].keys() == full[name]["settings"].keys()
    assert theory_page.refresh(PAGE.read_text(), content) == (tmp_path / "theory.md").read_text()
    assert {path.stem for path in (tmp_path / "images").iterdir()} == set(theory_page.PICTURES)


def test_quick_results_do_not_replace_the_measured_ones():
    command = [sys.executable, str(REPO / "scripts" / "theory.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 2 and "--output" in done.stderr
