"""Agreement of selections beside chance, against all possible selections."""

import csv
import json
from itertools import combinations, product

import numpy as np
import pytest
from made_runs import LAYERS, made_run

from diffora.report import page
from diffora.report.agreement import stability
from diffora.report.runs import gather

THERE = np.array([[True, True, True, True], [True, True, False, False], [False, True, True, True]])


def subsets(places, size):
    return [frozenset(chosen) for chosen in combinations(places, size)]


def all_selections(mask, present, by_layer):
    """Every selection of the same sizes as ``mask``, as sets of places."""
    places = [[(i, j) for j in range(present.shape[1]) if present[i, j]] for i in range(len(present))]
    if not by_layer:
        return subsets([place for layer in places for place in layer], int(mask.sum()))
    of_layers = [subsets(layer, int(row.sum())) for layer, row in zip(places, mask, strict=True)]
    return [frozenset().union(*parts) for parts in product(*of_layers)]


def jaccard(a, b):
    return len(a & b) / len(a | b) if a | b else 1.0


def mask_of(*rows):
    return np.array([[bool(int(flag)) for flag in row] for row in rows])


PAIRS = {
    "equal sizes": (mask_of("1100", "1000", "0110"), mask_of("0110", "0100", "0101")),
    "other sizes": (mask_of("1110", "0000", "0110"), mask_of("1000", "0100", "0000")),
    "an empty one": (mask_of("0000", "0000", "0000"), mask_of("1000", "0000", "0001")),
    "all and some": (THERE, mask_of("1000", "0100", "0100")),
    "two empty ones": (mask_of("0000", "0000", "0000"),) * 2,
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("by_layer", [True, False])
def test_chance_is_the_mean_over_all_pairs_of_selections_of_these_sizes(name, by_layer):
    first, second = PAIRS[name]
    ones, others = (all_selections(mask, THERE, by_layer) for mask in (first, second))
    expected = np.mean([jaccard(a, b) for a in ones for b in others])
    found = stability(np.array([first, second]), by_layer, THERE, draws=400)
    assert found.chance == pytest.approx(expected, rel=1e-12)
    places = [frozenset(zip(*np.nonzero(mask), strict=True)) for mask in (first, second)]
    assert found.jaccard == pytest.approx(jaccard(*places))


def test_p_is_the_share_of_pairs_that_agree_as_well():
    first, second = PAIRS["equal sizes"]
    ones = all_selections(first, THERE, True)
    found = stability(np.array([first, second]), True, THERE, draws=20_000)
    alike = [jaccard(a, b) >= found.jaccard - 1e-9 for a in ones for b in ones]
    assert found.p == pytest.approx(np.mean(alike), abs=0.015)


def test_of_several_selections_the_mean_over_pairs_is_compared():
    masks = np.array(
        [mask_of("1100", "1000", "0110"), mask_of("1000", "0100", "0101"), mask_of("1111", "0000", "0001")]
    )
    pairs = [stability(masks[[i, j]], False, THERE) for i, j in combinations(range(3), 2)]
    found = stability(masks, False, THERE, draws=4000)
    assert found.chance == pytest.approx(np.mean([pair.chance for pair in pairs]))
    assert found.jaccard == pytest.approx(np.mean([pair.jaccard for pair in pairs]))
    assert found.low <= found.chance <= found.high


def test_random_selections_do_not_agree_more_often_than_p_says():
    rng = np.random.default_rng(0)

    def p():
        masks = rng.random((3, 4, 6)).argsort(-1).argsort(-1) < 3
        return stability(masks, True, draws=200).p

    assert np.mean([p() <= 0.05 for _ in range(200)]) <= 0.1
    same = np.repeat(mask_of("110000", "101000", "011000")[None], 4, 0)
    assert stability(same, True).p < 0.01 and stability(same, True).jaccard == 1.0
    assert stability(same, True, draws=50).p == pytest.approx(1 / 51)  # the selections themselves count as one


# --- on the page ---


def ensembles(folder, sure, seeds=3, **content):
    for seed in range(seeds):
        run = made_run(folder / f"{seed}", "diffora", seed)
        found = json.loads((run / "selection.json").read_text()) | {"gamma_bar": None, "ensemble": 5}
        (run / "selection.json").write_text(json.dumps(found | {"confidence": sure} | content))
    return folder


def test_the_page_shows_agreement_of_every_selector_and_what_ensembles_decided(tmp_path):
    ensembles(tmp_path / "runs", [[0.99, 0.5, 0.2, 0.01]] * LAYERS)
    for seed in range(4):
        made_run(tmp_path / "runs" / f"random{seed}", "random", seed)
    files = page.write(gather([tmp_path / "runs"]), tmp_path / "out", [tmp_path])
    html = files[0].read_text()
    assert html.count("6 of 12 modules decided by an ensemble of 5") == 3
    assert "agreement of the seeds" in html or "select the same modules, beside chance" in html
    (table,) = (file for file in files if file.name.endswith("-agreement.csv"))
    lines = list(csv.DictReader(table.read_text().splitlines()))
    assert [(line["selector"], line["selections"]) for line in lines] == [("search", "3"), ("random", "4")]
    chance = {line["by chance"] for line in lines}
    assert chance == {f"{expected_jaccard(2, 4, LAYERS):.2f}"}  # 2 of 4 in each layer
    assert table.name.replace("-agreement.csv", ".md") in {file.name for file in files}


def test_layers_that_a_time_budget_leaves_out_do_not_count(tmp_path):
    """With the lower layers, chance would be lower, and modules that no seed can select would be decided."""
    sure = [[0.0] * 4, [0.0] * 4, [0.99, 0.5, 0.2, 0.01]]
    assert len(sure) == LAYERS
    for seed in range(3):
        run = made_run(tmp_path / "runs" / f"{seed}", "diffora", seed, settings={"method": {"scope": "global"}})
        found = json.loads((run / "selection.json").read_text()) | {"gamma_bar": None, "ensemble": 5, "k": None}
        chosen = {"selected": [[], [], found["types"][seed : seed + 2]], "lowest_layer": 2, "confidence": sure}
        (run / "selection.json").write_text(json.dumps(found | chosen))
    files = page.write(gather([tmp_path / "runs"]), tmp_path / "out", [tmp_path])
    assert files[0].read_text().count("2 of 4 modules decided by an ensemble of 5") == 3
    (table,) = (file for file in files if file.name.endswith("-agreement.csv"))
    (line,) = csv.DictReader(table.read_text().splitlines())
    assert line["by chance"] == f"{expected_jaccard(2, 4, 1):.2f}"


def expected_jaccard(k, n, layers):
    masks = all_selections(np.repeat([[True] * k + [False] * (n - k)], layers, 0), np.ones((layers, n), bool), True)
    return np.mean([jaccard(masks[0], other) for other in masks])


@pytest.mark.parametrize("sure", [[["x"] * 4] * LAYERS, [[0.5] * 3] * LAYERS, [[2.0] * 4] * LAYERS, "high", 3])
def test_a_confidence_that_cannot_be_is_not_shown(tmp_path, sure):
    ensembles(tmp_path / "runs", sure)
    html = page.write(gather([tmp_path / "runs"]), tmp_path / "out", [tmp_path])[0].read_text()
    assert "modules decided" not in html
    ensembles(tmp_path / "more", [[0.5] * 4] * LAYERS, ensemble=None)
    page.write(gather([tmp_path / "more"]), tmp_path / "out", [tmp_path])
