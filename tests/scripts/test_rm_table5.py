"""The script's table for runs whose measures are known."""

import json
import statistics
import sys

import pytest
from conftest import REPO

sys.path.insert(0, str(REPO / "scripts"))
import rm_table5 as script
from pages import completed


def write(folder, method: str, epochs: int, seed: int, size: str = "R = 0.64 d") -> None:
    place = folder / f"{method}-{size}-{epochs}-{seed}"
    place.mkdir(parents=True)
    metrics = {name: (1 + len(method)) * (seed + 1) / epochs for name in script.MEASURES}
    record = {"status": "completed", "row": f"{method}, {size}", "seed": seed, "metrics": metrics, "config_hash": "x"}
    (place / "run.json").write_text(json.dumps(record | {"settings": {"finetune": {"epochs": epochs}}}))


@pytest.fixture
def folder(tmp_path):
    for seed in range(3):
        write(tmp_path, "LoRA", 10, seed)
        write(tmp_path, "R-LoRA", 10, seed)
        write(tmp_path, "LoRA", 60, seed)
    write(tmp_path, "LoRA", 10, 0, "R = 0.32 d")
    return tmp_path


def test_means_and_differences_by_epochs(folder):
    rows = script.rows_of(completed(folder))
    assert [(row["epochs"], row["method"], len(row["seeds"])) for row in rows] == [
        (10, "LoRA", 3),
        (10, "R-LoRA", 3),
        (60, "LoRA", 3),
    ]
    text = script.table(rows)
    values = [0.7 * (seed + 1) for seed in range(3)]
    assert f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}" in text
    assert text.count("| 10 epochs, R-LoRA | 3 |") == 2 and text.count("| 60 epochs, LoRA | 3 |") == 1
    # R-LoRA less LoRA: 0.2, 0.4 and 0.6, so the mean is 0.4, its error 0.2 / sqrt(3), and t(2) is 4.303
    assert "+0.40 (−0.10 to +0.90)" in text


def test_the_page_gets_the_table_and_the_json_gives_it_again(folder, tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    (tmp_path / "data").mkdir()
    page.write_text("a\n<!-- begin rm_table5 -->\n<!-- end rm_table5 -->\nb\n")
    monkeypatch.setattr(sys, "argv", ["rm_table5.py", str(folder), "--page", str(page)])
    script.main()
    first = capsys.readouterr().out
    assert first.strip() in page.read_text() and page.read_text().endswith("b\n")
    monkeypatch.setattr(sys, "argv", ["rm_table5.py", str(tmp_path / "data" / "rm_table5.json")])
    script.main()
    assert capsys.readouterr().out == first
