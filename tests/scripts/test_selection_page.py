"""The tables of docs/background/selection.md are those that the scripts make from its JSON files."""

import json
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import search_price
import selection_draws
import selection_landscape_page
import selection_matters
import selection_pays
import selection_quality

PAGE = REPO / "docs" / "background" / "selection.md"
TABLES = {
    "selection_paraphrase": lambda found: selection_quality.table(selection_quality.tested(found)),
    "selection_digits": lambda found: selection_quality.table(selection_quality.tested(found)),
    "selection_draws": selection_draws.table,
    "selection_landscape": selection_landscape_page.text_of,
    "selection_pays": selection_pays.text_of,
    "selection_matters_digits": selection_matters.table,
    "search_price": search_price.table,
    "search_shortened": search_price.shortened_table,
}


@pytest.mark.parametrize("name", TABLES)
def test_the_page_has_the_tables_of_its_data(name):
    found = json.loads((PAGE.parent / "data" / f"{name}.json").read_text())
    between = PAGE.read_text().partition(f"<!-- begin {name} -->")[2].partition(f"<!-- end {name} -->")[0]
    tables = between.partition("\n![")[0].strip()
    assert tables == TABLES[name](found).strip()


def test_every_data_file_has_its_table():
    assert {file.stem for file in (PAGE.parent / "data").glob("*.json")} - {"theory"} == TABLES.keys()


def test_the_script_prints_the_table_of_shortened_searches_from_its_data(monkeypatch, capsys):
    file = PAGE.parent / "data" / "search_shortened.json"
    monkeypatch.setattr(sys, "argv", ["search_price.py", str(file)])
    search_price.main()
    assert capsys.readouterr().out.strip() in PAGE.read_text()
